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

from sharding.heads import Branch, Slots, slots_of
from sharding.mesh import chunk_length, chunk_starts, chunks_of
from sharding.rows import UNBOUNDED, Ranks

METHODS = ("local", "ring", "all_to_all", "all_gather", "hybrid")
TILE = 128  # rows that a kernel works on at once, even if fewer exist


@dataclasses.dataclass(frozen=True)
class Link:
    """What a message and a product cost. Defaults: NVLink as measured by ppermute, one H100.

    bandwidth: bytes per second that a device receives. latency: seconds per message.
    flops: products and sums per second of the attention.
    memory: bytes that gathered keys and values may take.
    """

    bandwidth: float = 340e9
    latency: float = 15e-6
    flops: float = 550e12
    memory: float = 2**30


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of one device's call; heads are those on one device of the heads' axis."""

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    stats_itemsize: int = 4
    ids: bool = False


@dataclasses.dataclass(frozen=True)
class Call:
    """One use of the local attention: rows of a query chunk against rows of a key chunk.

    starts: ranks of the first query and key, or None: known only on the device.
    """

    query: int
    key: int
    q_rows: tuple[int, int]
    k_rows: tuple[int, int]
    starts: tuple[int, int] | None
    segment: int
    causal: bool


@dataclasses.dataclass(frozen=True)
class Hop:
    """Keys and values from the device `shift` places before in the group, and what to do with them.

    pairs: (source, destination) on the sequence axis. rows: per key chunk, the range that is sent.
    """

    shift: int
    pairs: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int] | None, ...]
    calls: tuple[Call, ...]


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

    @property
    def in_place(self) -> bool:
        """Whether the local attention can take the branch on the arrays as they are."""
        return self.method == "local" and not self.hops


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The branches' plans, and what they share."""

    length: int
    devices: int
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
    link: Link = Link(),
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
    return Plan(length, devices, layout, is_causal, sizes, link, starts, tuple(plans))


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
    need = _need(first, end, ranks.length, shared.causal)
    if not (need & ~np.eye(shared.devices, dtype=bool)).any():
        return _local(shared, number, branch, ranks, slots, first, end)
    group = _group_size(need)
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


def _need(first: np.ndarray, end: np.ndarray, length: int, causal: bool) -> np.ndarray:
    """bool [P, P]: whether a device's queries (rows) see keys of another (columns)."""
    need = np.zeros((len(first), len(first)), bool)
    for i in range(first.shape[1]):
        for j in range(first.shape[1]):
            need |= _sees(
                first[:, i, None],
                end[:, i, None],
                first[None, :, j],
                end[None, :, j],
                length,
                causal,
            )
    return need


def _sees(q: Any, q_end: Any, k: Any, k_end: Any, length: int, causal: bool) -> np.ndarray:
    """Whether ranks [q, q_end) see any of [k, k_end)."""
    same = np.minimum(q_end - 1, k_end - 1) // length >= np.maximum(q, k) // length
    return same & (k < q_end) if causal else same


def _group_size(need: np.ndarray) -> int:
    """The smallest g such that devices see only those of their own g neighbours."""
    P = len(need)
    where = np.nonzero(need)
    return next(g for g in range(1, P + 1) if P % g == 0 and (where[0] // g == where[1] // g).all())


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
        hops = (_hop(shared, ranks, first, end, len(first), 0, rows),)
    compute, balance = _compute(shared, ranks, slots, first, end, 1)
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
    compute, balance = _compute(shared, ranks, slots, first, end, spread)
    masked = shared.sizes.ids or not ranks.exact or bool((slots.offsets < 0).any())
    cost = _Cost(shared.sizes, slots, masked)
    moved, messages, exposed = 0, 0, 0.0
    if name == "all_gather":
        hops = (Hop(0, (), (None,) * C, _gathered_calls(shared, ranks, first, end, group)),)
        moved, messages = (group - 1) * C * rows * cost.keys(1), C * cost.key_messages
        exposed = moved / link.bandwidth + messages * link.latency
    else:
        found = (
            _hop(shared, ranks, first, end, group // spread, shift, count, spread)
            for shift in range(group // spread)
        )
        hops = tuple(hop for hop in found if hop)
        for hop in hops[1:]:
            sent = [b - a for a, b in filter(None, hop.rows)]
            moved += sum(sent) * cost.keys(spread)
            messages += len(sent) * cost.key_messages
            arrives = sum(sent) * cost.keys(spread) / link.bandwidth + link.latency
            # A hop travels while the one before is computed.
            exposed += max(0.0, arrives - compute / len(hops))
        exposed += link.latency if len(hops) > 1 else 0.0
    if spread > 1:
        dealt = cost.dealt(spread) * C * rows
        moved, messages = moved + dealt, messages + C * (cost.key_messages + 3 + masked)
        exposed += dealt / link.bandwidth + 2 * link.latency
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


@dataclasses.dataclass(frozen=True)
class _Cost:
    """Bytes that one rank of one chunk costs on the wire."""

    sizes: Sizes
    slots: Slots
    masked: bool

    @property
    def key_messages(self) -> int:
        return 2 + self.masked

    def _ids(self) -> int:
        return 4 * self.sizes.batch * len(self.slots.queries) * self.masked

    def keys(self, spread: int) -> int:
        """Keys and values, dealt out among `spread` devices."""
        one = self.slots.rows * self.sizes.batch * 2 * self.sizes.head_dim * self.sizes.itemsize
        return one // spread + self._ids() // (1 if self.slots.uniform else spread)

    def dealt(self, spread: int) -> int:
        """All-to-all of queries, keys and values, and of out and lse back."""
        queries = self.slots.queries.size * self.sizes.batch
        there = 2 * self.sizes.head_dim * self.sizes.itemsize
        there = queries * (there + self.sizes.stats_itemsize) + self.keys(1) - self._ids()
        ids = 2 * self._ids() * (spread if self.slots.uniform else 1)
        return (there + ids) * (spread - 1) // spread


def _hop(shared, ranks, first, end, group: int, shift: int, count: int, spread: int = 1):
    """One hop of the (virtual) ring, None if nobody sees what it would bring."""
    V, C = first.shape
    dst = np.arange(V)
    src = dst // group * group + (dst % group - shift) % group
    args = ranks.length, shared.causal
    calls, rows = [], [None] * C
    needed = np.zeros(V, bool)
    for j in range(C):
        for i in range(C):
            q, q_end, k, k_end = first[dst, i], end[dst, i], first[src, j], end[src, j]
            sees = _sees(q, q_end, k, k_end, *args)
            if not sees.any():
                continue
            needed |= sees
            call = _call(i, j, (q, q_end, k, k_end), sees, ranks.length, shared.causal, count)
            calls.append(call)
            old = rows[j] or call.k_rows
            rows[j] = (min(old[0], call.k_rows[0]), max(old[1], call.k_rows[1]))
    if not calls:
        return None
    pairs = [
        (s * spread + i, d * spread + i)
        for s, d in zip(src[needed].tolist(), dst[needed].tolist(), strict=True)
        for i in range(spread)
    ]
    return Hop(shift, tuple(pairs) if shift else (), tuple(rows), tuple(calls))


def _call(i, j, bounds, sees, length: int, causal: bool, count: int) -> Call:
    """The call for one pair of chunks, restricted to the rows that some device needs."""
    q, q_end, k, k_end = bounds
    low = np.maximum(q // length, k // length)
    high = np.minimum((q_end - 1) // length, (k_end - 1) // length)
    one = ((q // length == (q_end - 1) // length) & (k // length == (k_end - 1) // length))[sees]
    k_rows = _range(low * length - k, (high + 1) * length - k, sees, count)
    q_rows = _range(low * length - q, (high + 1) * length - q, sees, count)
    excluded = sees | (causal & (k >= q_end))  # by causality alone, or not at all
    segment = UNBOUNDED if one.all() and excluded.all() else length
    behind, phase = q - k, q % length
    starts = None
    if sees.all():
        whole = not causal or (k_end - 1 <= q).all()
        if segment == UNBOUNDED and whole:
            return Call(i, j, q_rows, k_rows, (0, 0), segment, False)
        if (behind == behind[0]).all() and (segment == UNBOUNDED or (phase == phase[0]).all()):
            base = min(q[0], k[0]) // length * length
            starts = (int(q[0] - base), int(k[0] - base))
    return Call(i, j, q_rows, k_rows, starts, segment, causal)


def _range(low: np.ndarray, high: np.ndarray, sees: np.ndarray, count: int) -> tuple[int, int]:
    a, b = np.clip(low[sees], 0, count).min(), np.clip(high[sees], 0, count).max()
    return int(a), int(b)


def _gathered_calls(shared, ranks, first, end, group: int) -> tuple[Call, ...]:
    """Every query chunk against every chunk number of the whole group."""
    C, rows = first.shape[1], ranks.count(shared.starts)
    k_first = np.repeat(first.reshape(-1, group, C).min(1), group, 0)
    calls = []
    for j in range(C):
        for i in range(C):
            k, k_end = k_first[:, j], k_first[:, j] + group * rows
            sees = _sees(first[:, i], end[:, i], k, k_end, ranks.length, shared.causal)
            if sees.any():
                segment = UNBOUNDED
                if (k // ranks.length != (k_end - 1) // ranks.length).any():
                    segment = ranks.length
                if (first[:, i] // ranks.length != (end[:, i] - 1) // ranks.length).any():
                    segment = ranks.length
                if not sees.all():
                    segment = ranks.length
                static = (0, 0) if segment == UNBOUNDED and not shared.causal else None
                ranges = (0, rows), (0, group * rows)
                calls.append(Call(i, j, *ranges, static, segment, shared.causal))
    return tuple(calls)


def _compute(shared, ranks, slots, first, end, spread: int) -> tuple[float, float]:
    """Expected seconds of the busiest device, and its work over the mean."""
    total = ranks.floor(shared.length - 1) + 1
    work = (
        _pairs(end, ranks.length, total, shared.causal)
        - _pairs(first, ranks.length, total, shared.causal)
    ).sum(1)
    sizes, rows = shared.sizes, np.maximum(end - first, 1)
    filled = (np.maximum(rows, TILE) / rows).mean()
    heads = slots.queries.size / spread * sizes.batch
    seconds = 4.0 * work.max() * heads * sizes.head_dim * filled / shared.link.flops
    return float(seconds), float(work.max() / max(work.mean(), 1e-9))


def _pairs(x: np.ndarray, length: int, total: int, causal: bool) -> np.ndarray:
    """Visible pairs of all queries before rank x."""
    x = x.astype(float)
    whole, rest = np.floor(x / length), x % length
    if causal:
        return whole * length * (length + 1) / 2 + rest * (rest + 1) / 2
    last = total - whole * length
    return whole * length * length + rest * np.minimum(length, last)
