"""Who sends what to whom: one plan for every branch, made before anything is computed.

A branch whose segments lie inside the devices' chunks is *local*. Any other is computed in ranks
(see `sharding.rows`) by one of

- "ring": the kept keys and values travel, straight from their owner to whoever sees them;
- "all_to_all": every device gets all rows of the group for a part of the heads, and sends the
  result back; "hybrid" does so among `spread` neighbours and rings between those;
- "all_gather": the group's keys and values in one message.

Bytes are those that one device receives in the forward pass, per call; the backward pass moves keys
and values again, and their gradients in float32. Times are expected ones, from `Link`.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from sharding.cost import NVLINK, Cost, Link, Sizes, compute_of, pairs_before
from sharding.heads import Branch, Slots, slots_of
from sharding.hops import Hop, View, gathered_calls, group_size, need_of
from sharding.mesh import chunk_length, chunk_starts, chunks_of
from sharding.rows import Ranks

METHODS = ("local", "ring", "all_to_all", "all_gather", "hybrid")


@dataclasses.dataclass(frozen=True, eq=False)
class BranchPlan:
    """How one branch is computed. Arrays: starts of virtual chunks, in ranks, int64 [V, C]."""

    number: int
    branch: Branch
    method: str
    spread: int
    group: int
    ranks: Ranks
    rows: int
    starts: np.ndarray
    slots: Slots
    hops: tuple[Hop, ...]
    bytes: int
    messages: int
    balance: float
    compute: float
    exposed: float
    ids: bool

    @property
    def masked(self) -> bool:
        """Whether ids go along with keys: of the call, or to mask phantom rows and absent heads."""
        return self.ids or not self.ranks.exact or bool((self.slots.offsets < 0).any())

    def direct(self, num_heads: int) -> bool:
        """Whether the kept rows are all rows of all heads, where they lie: ranks are positions."""
        slots = self.slots
        return (
            slots.uniform
            and slots.queries.size == num_heads
            and self.ranks.rate == 1
            and self.spread == 1
            and bool((slots.offsets == 0).all())
        )

    @property
    def in_place(self) -> bool:
        """Whether the local attention can take the branch on the arrays as they are."""
        return self.method == "local" and not self.hops


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The branches' plans, and what they share; head_parts: devices along the heads."""

    length: int
    devices: int
    head_parts: int
    layout: str
    causal: bool
    sizes: Sizes
    link: Link
    token_starts: np.ndarray
    branches: tuple[BranchPlan, ...]

    @property
    def bytes(self) -> int:
        """Bytes that one device receives in a forward pass."""
        return sum(branch.bytes for branch in self.branches)

    @property
    def messages(self) -> int:
        """Messages that one device receives in a forward pass."""
        return sum(branch.messages for branch in self.branches)

    @property
    def seconds(self) -> float:
        """Expected seconds of a forward pass: local branches hide what others expose."""
        local = sum(b.compute for b in self.branches if b.method == "local")
        exposed = sum(b.exposed for b in self.branches)
        return sum(b.compute for b in self.branches) + max(0.0, exposed - local)

    @property
    def balance(self) -> float:
        """Work of the busiest device over the mean."""
        total = sum(b.compute for b in self.branches)
        return total / sum(b.compute / b.balance for b in self.branches) if total else 1.0


@functools.lru_cache(maxsize=256)
def make_plan(
    branches: tuple[Branch, ...],
    *,
    length: int,
    devices: int,
    sizes: Sizes,
    layout: str = "contiguous",
    is_causal: bool = False,
    head_parts: int = 1,
    method: str | tuple[str | None, ...] | None = None,
    link: Link = NVLINK,
) -> Plan:
    """A plan for branches over a sequence of `length` positions on `devices` devices.

    branches: over all query heads, sizes.num_heads * head_parts. method: one of `METHODS` for every
    branch that is not local, or one per branch; None chooses the least expected time.

    Raises:
        ValueError: the length does not divide, or a method cannot compute its branch; the message
            says why and which methods can.

    Example:
        >>> sizes = Sizes(1, 4, 4, 64, 2)
        >>> branches = ((8, 1, 0, (0,) * 4), (32, 2, 0, (0, 1) * 2))
        >>> plan = make_plan(branches, length=64, devices=4, sizes=sizes, method="ring")
        >>> [(branch.method, branch.bytes) for branch in plan.branches]
        [('local', 0), ('ring', 8192)]
    """
    if devices == 1:
        layout = "contiguous"
    chunk_length(length, devices, layout)
    wanted = (method,) * len(branches) if method is None or isinstance(method, str) else method
    if len(wanted) != len(branches):
        raise ValueError(f"method: wanted one for each of {len(branches)} branches, got {wanted!r}")
    starts = chunk_starts(length, devices, layout)
    shared = _Shared(length, devices, layout, is_causal, head_parts, sizes, link, starts)
    plans = [
        _branch_plan(shared, i, b, m) for i, (b, m) in enumerate(zip(branches, wanted, strict=True))
    ]
    return Plan(length, devices, head_parts, layout, is_causal, sizes, link, starts, tuple(plans))


@dataclasses.dataclass(frozen=True, eq=False)
class _Shared:
    length: int
    devices: int
    layout: str
    causal: bool
    head_parts: int
    sizes: Sizes
    link: Link
    starts: np.ndarray

    @property
    def chunk(self) -> int:
        return self.length // self.devices // chunks_of(self.layout)

    def compute(self, ranks: Ranks, slots: Slots, first, end, spread: int) -> tuple[float, float]:
        """Expected seconds of the busiest device, and its work over the mean."""
        total = ranks.floor(self.length - 1) + 1
        before = (pairs_before(x, ranks, total, self.causal) for x in (first, end))
        work = -np.subtract(*before).sum(1)
        return compute_of(work, end - first, slots, spread, self.sizes, self.link)


def _branch_plan(shared: _Shared, number: int, branch: Branch, wanted: str | None) -> BranchPlan:
    if wanted is not None and wanted not in METHODS:
        raise ValueError(f"method: wanted None or one of {', '.join(METHODS)}, got {wanted!r}")
    w, r = min(branch[0], shared.length), branch[1]
    ranks = Ranks(w, r, shared.chunk)
    slots = slots_of(
        branch,
        shared.sizes.num_heads * shared.head_parts,
        shared.sizes.num_kv_heads,
        shared.head_parts,
    )
    first = ranks.floor(shared.starts)
    end = ranks.floor(shared.starts + shared.chunk - 1) + 1
    need = need_of(first, end, ranks.length, shared.causal)
    if not (need & ~np.eye(shared.devices, dtype=bool)).any():
        return _local(shared, number, branch, ranks, slots, first, end)
    group = group_size(need)
    candidates, reasons = {}, {}
    for name, spread in _spreads(shared, ranks, slots, group, reasons):
        plan = _moving(shared, number, branch, name, spread, group, ranks, slots)
        candidates.setdefault(name, []).append(plan)
    if wanted not in (None, "local"):
        if wanted not in candidates:
            why = reasons.get(wanted, f"the group of {group} devices cannot be cut for it")
            raise ValueError(
                f"method: wanted one of {', '.join(candidates)} for segments of {w} at rate {r} on"
                f" {shared.devices} devices, got {wanted!r}: {why}"
            )
        candidates = {wanted: candidates[wanted]}
    if wanted == "local":
        raise ValueError(
            f"method: wanted one of {', '.join(candidates)}, got 'local': segments of {w} reach"
            f" beyond the {shared.chunk} tokens of a chunk"
        )
    every = [plan for plans in candidates.values() for plan in plans]
    fits = [p for p in every if p.method != "all_gather" or p.bytes <= shared.link.memory]
    return min(fits or every, key=lambda plan: (plan.compute + plan.exposed, plan.bytes))


def _spreads(shared: _Shared, ranks: Ranks, slots: Slots, group: int, reasons: dict):
    """The methods that can compute a branch, each with the devices of its all-to-all."""
    yield "ring", 1
    tiled = ranks.exact and _contiguous(shared, group)
    if not tiled:
        why = f"chunks of {shared.chunk} tokens and segments of {ranks.segment} are not aligned"
        reasons.update(dict.fromkeys(("all_to_all", "all_gather", "hybrid"), why))
        return
    yield "all_gather", 1
    for spread in range(2, group + 1):
        if group % spread == 0 and slots.divides(spread):
            yield ("all_to_all" if spread == group else "hybrid"), spread
    what = f"{slots.rows} kv heads (with their residues) are not a multiple of"
    reasons["all_to_all"] = f"{what} the group of {group} devices"
    reasons["hybrid"] = f"{what} any part of the group of {group} devices"


def _contiguous(shared: _Shared, group: int) -> bool:
    """Whether each chunk number of a group is one run of positions."""
    C = shared.starts.shape[1]
    runs = np.sort(shared.starts.reshape(-1, group, C), 1)
    return bool((np.diff(runs, axis=1) == shared.chunk).all())


def _local(shared, number, branch, ranks, slots, first, end) -> BranchPlan:
    rows: int = ranks.count(shared.starts)
    hops: Any = ()
    # Kernels want segments that the rate divides, or one segment; in ranks they take any.
    aligned = ranks.segment >= shared.length or (
        ranks.segment % ranks.rate == 0 and shared.chunk % ranks.segment == 0
    )
    if not (aligned and slots.static and _one_run(slots)):
        view = View(first, end, ranks.length, shared.causal, len(first), rows)
        hops = tuple(view.hops(0))
    compute, balance = shared.compute(ranks, slots, first, end, 1)
    return BranchPlan(
        number,
        branch,
        "local",
        1,
        1,
        ranks,
        rows,
        first,
        slots,
        hops,
        0,
        0,
        balance,
        compute,
        0.0,
        shared.sizes.ids,
    )


def _one_run(slots: Slots) -> bool:
    """Whether the heads that take part follow each other, as the primitive's branches want."""
    heads = np.sort(slots.queries.reshape(-1))
    return len(heads) > 0 and len(heads) == heads[-1] - heads[0] + 1 and slots.offsets.min() >= 0


def _moving(shared, number, branch, name, spread, group, ranks, slots) -> BranchPlan:
    """The plan of a branch that moves rows by one method."""
    link, C, rows = shared.link, shared.starts.shape[1], ranks.count(shared.starts)
    tokens = shared.starts.reshape(-1, spread, C).min(1)
    first = ranks.floor(tokens)
    count = rows * spread
    end = first + count if ranks.exact else ranks.floor(tokens + shared.chunk - 1) + 1
    compute, balance = shared.compute(ranks, slots, first, end, spread)
    masked = shared.sizes.ids or not ranks.exact or bool((slots.offsets < 0).any())
    cost = Cost(shared.sizes, slots, masked)
    moved, messages, exposed = 0, 0, 0.0
    view = View(first, end, ranks.length, shared.causal, group // spread, count, spread)
    if name == "all_gather":
        hops = (Hop(0, (), (None,) * C, gathered_calls(view)),)
        moved, messages = (group - 1) * C * rows * cost.keys(1), C * cost.key_messages
        exposed = moved / (group - 1) * link.gather(group) + messages * link.latency
    else:
        hops = tuple(hop for shift in range(group // spread) for hop in view.hops(shift))
        for hop in hops[1:]:
            sent = [b - a for a, b in filter(None, hop.rows)]
            moved += sum(sent) * cost.keys(spread)
            messages += len(sent) * cost.key_messages
            arrives = sum(sent) * cost.keys(spread) / link.slowest(hop.pairs) + link.latency
            # A hop travels while the one before is computed.
            exposed += max(0.0, arrives - compute / len(hops))
        exposed += link.latency if len(hops) > 1 else 0.0
    if spread > 1:
        dealt = cost.dealt(spread) * C * rows
        moved, messages = moved + dealt, messages + C * (cost.key_messages + 3 + cost.marks)
        exposed += dealt / (spread - 1) * link.gather(spread) + 2 * link.latency
    return BranchPlan(
        number,
        branch,
        name,
        spread,
        group,
        ranks,
        rows,
        first,
        slots,
        hops,
        moved,
        messages,
        balance,
        compute,
        exposed,
        shared.sizes.ids,
    )
