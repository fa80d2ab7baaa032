"""Which tiles a multiprocessor works on, and in which order, for block lists.

Rows that are much longer than others would stall a whole call, so they are split into parts of
equal length whose results are merged; how a row is split depends on the lists alone, so that
every order of visits gives the same bits.
"""

import dataclasses
import heapq
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.block_lists import BLOCK_BITS, TILE_ROWS, Lists
from pallas_kernels.marks import Kinds

UNBOUNDED = 1 << 30
ORDERS = ("row", "longest_first", "hilbert")
# Keys and values of the heads that are worked on together should share the L2 cache.
CHUNK_BYTES = 24 << 20
# Shorter rows are not worth splitting; traced ones, which need room for parts, even less.
SHORTEST_SPLIT, SHORTEST_TRACED_SPLIT = 32, 256
# Starting and ending a tile costs about as much as one or two steps.
OVERHEAD = 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static description of one kernel launch.

    tiles, heads: home tiles of 128 rows, and heads of the home side. away: rows of a step.
    steps_per_entry, width: steps that one entry takes, and entries that one step takes; one of them
    is 1. home_rows, away_rows: true lengths. bands: (left, right) in tokens, causality included.
    lanes: lists that a tile follows, 1 or one for each warpgroup. transposed: home rows are keys.
    list_batch, list_heads: how many arrays of entries there are. parts: of split rows. numbers: of
    the branch (for dropout).
    """

    batch: int
    heads: int
    tiles: int
    away: int
    steps_per_entry: int
    home_rows: int
    away_rows: int
    bands: tuple[tuple[int, int], ...]
    lanes: int
    transposed: bool
    width: int = 1
    list_batch: int = 1
    list_heads: int = 1
    parts: int = 0
    numbers: tuple[int, ...] = (0,)

    @property
    def block(self) -> int:
        """Away rows of an entry."""
        return self.away * self.steps_per_entry // self.width

    @property
    def together(self) -> int:
        """Entries that lie together: of all lanes, or of a step."""
        return self.lanes * self.width

    @property
    def banded(self) -> bool:
        """Whether some band masks anything."""
        return any(side < UNBOUNDED for band in self.bands for side in band)

    @property
    def masks(self) -> bool:
        """Whether any entry may have to be masked by its place.

        Queries past the end need no mask: their gradients are 0.
        """
        ragged = not self.transposed and self.away_rows % self.block != 0
        return self.banded or self.lanes > 1 or ragged

    @property
    def ragged_keys(self) -> bool:
        """Whether a tile of keys goes past their end, which matters where they give to queries.

        What lies there are zeros, whose logits of 0 may be far above all that count in a query's
        lse; their probabilities would then be infinite.
        """
        return self.transposed and self.home_rows % TILE_ROWS != 0


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options of a kernel beside its `block_schedule.Plan`.

    overlap, lazy: of the forward kernel, see `online_softmax.Warpgroup`.
    """

    scale: float
    stages: int
    overlap: bool
    lazy: bool
    group: int
    marks: Kinds
    rate: float
    interpret: bool


class Work(NamedTuple):
    """What a launch does.

    items: int32 `[ctas, 1 + items, 4]`, entry 0 holds the count, the others (code of the tile,
    first entry, steps, number of the part or -1). rows: int32 `[R]`, codes of the split rows (or
    one past the last code), owners: int32 `[parts]`, to which of them a part belongs (or R).
    """

    items: Any
    rows: Any
    owners: Any


def bands(blocks: Any, causal: bool) -> tuple[tuple[int, int], ...]:
    """The bands of a call as numbers, joined with causality."""

    def side(x: int | None) -> int:
        return UNBOUNDED if x is None else min(int(x), UNBOUNDED)

    return tuple(
        (side(left), min(side(right), 0) if causal else side(right)) for left, right in blocks.bands
    )


def _spread(x: Any, plan: Plan) -> Any:
    """`[b, n, tiles]` of lists as a flat `[batch * heads * tiles]`."""
    xp = np if isinstance(x, np.ndarray) else jnp
    x = xp.repeat(x, plan.heads // x.shape[1], axis=1)
    return xp.broadcast_to(x, (plan.batch, *x.shape[1:])).reshape(-1)


def work(plan: Plan, lists: Lists, *, ctas: int, head_bytes: int, group: int, order: str) -> Work:
    """Splits long rows and assigns every tile or part of one to a block of the persistent grid.

    head_bytes: bytes of both away arrays of one head. group: home heads that share them.
    """
    static = isinstance(lists.counts, np.ndarray)
    xp: Any = np if static else jnp
    count, begin = _spread(lists.counts, plan), _spread(lists.begin, plan)
    codes = count.shape[0]
    least = -(-(SHORTEST_SPLIT if static else SHORTEST_TRACED_SPLIT) // plan.steps_per_entry)
    parts = xp.ones_like(count)
    slots, split = codes, 0
    if lists.longest > least:
        share = count.sum() // ctas + 1
        limit = xp.maximum(least, share // 4 if static else share)
        parts = xp.maximum(1, -(-count // limit)).astype(xp.int32)
        split = int((parts > 1).sum()) if static else ctas
        slots = int(parts.sum()) if static else codes + 2 * ctas
    ends = xp.cumsum(parts, dtype=xp.int32)
    code = xp.searchsorted(ends, xp.arange(slots, dtype=xp.int32), side="right").astype(xp.int32)
    valid = code < codes
    code = xp.minimum(code, codes - 1)
    part, whole = xp.arange(slots, dtype=xp.int32) - (ends - parts)[code], parts[code]
    size = -(-count[code] // whole)
    first = xp.minimum(part * size, count[code])
    entries = xp.where(valid, xp.minimum(size, count[code] - first), 0)
    many = valid & (whole > 1)
    number = xp.where(many, xp.cumsum(many) - 1, -1)
    table = xp.stack(
        [code, begin[code] + first, entries * plan.steps_per_entry, number], -1
    ).astype(xp.int32)
    chunk = code // plan.tiles // max(1, group * (CHUNK_BYTES // max(1, head_bytes)))
    key = _key(plan, lists, code, table[:, 1], entries, order)
    if order == "row":
        chunk = xp.zeros_like(code)
    # Parts of long rows first of all, empty places last.
    visits = xp.lexsort((key, xp.where(valid, xp.where(many, -1, chunk), codes)))
    if static:
        table = table[visits]
        items = _host_items(_small_last(table, ctas) if order == "longest_first" else table, ctas)
    else:
        items = _items(table, visits, valid, ctas)
    rows, owners = _merges(parts, code, many, number, split)
    return Work(items, rows, owners)


def _merges(parts: Any, code: Any, many: Any, number: Any, split: int) -> tuple[Any, Any]:
    """The codes of split rows, and the row of every part."""
    xp = np if isinstance(parts, np.ndarray) else jnp
    if not split:
        return np.zeros(0, np.int32), np.zeros(0, np.int32)
    codes = parts.shape[0]
    is_split = parts > 1
    rank = xp.cumsum(is_split) - 1
    if xp is np:
        return np.flatnonzero(is_split).astype(np.int32), rank[code[many]].astype(np.int32)
    rows = jnp.nonzero(is_split, size=split, fill_value=codes)[0].astype(jnp.int32)
    owners = jnp.full((2 * split + 1,), split, jnp.int32)
    place = jnp.where(many, number, 2 * split)
    owners = owners.at[place].set(jnp.where(many, rank[code], split).astype(jnp.int32))
    return rows, owners[:-1]


def _key(plan: Plan, lists: Lists, code: Any, begin: Any, entries: Any, order: str) -> Any:
    """What items of a chunk are sorted by."""
    xp: Any = np if isinstance(code, np.ndarray) else jnp
    if order == "row":
        return code
    if order == "longest_first":
        return -entries
    tile, head = code % plan.tiles, code // plan.tiles
    flat = xp.broadcast_to(lists.entries, (plan.batch, *lists.entries.shape[1:]))
    b, n = head // plan.heads, head % plan.heads // (plan.heads // lists.entries.shape[1])
    middle = xp.minimum((begin + entries // 2) * plan.together, flat.shape[-1] - 1)
    return _hilbert(xp, tile, flat[b, n, middle] & ((1 << BLOCK_BITS) - 1))


def _hilbert(xp: Any, x: Any, y: Any, bits: int = 15) -> Any:
    """The distance along Hilbert's curve of points in a square of side 2^bits."""
    distance = xp.zeros_like(x)
    for level in range(bits - 1, -1, -1):
        side = 1 << level
        right, upper = (x & side) > 0, (y & side) > 0
        distance = distance + xp.where(right, xp.where(upper, 2, 3), xp.where(upper, 1, 0)) * (
            1 << (2 * level)
        )
        turned = xp.where(right, side - 1 - (x & (side - 1)), x & (side - 1))
        other = xp.where(right, side - 1 - (y & (side - 1)), y & (side - 1))
        x, y = xp.where(upper, x & (side - 1), other), xp.where(upper, y & (side - 1), turned)
    return distance


def _small_last(table: np.ndarray, ctas: int) -> np.ndarray:
    """The end of the list only fills gaps: the smallest items of all chunks, longest first.

    No more than it needs: what they read has left the cache by then.
    """
    steps = table[:, 2]
    ascending, tail = np.argsort(steps, kind="stable"), ctas * int(steps.max(initial=0)) // 2
    small = ascending[: np.searchsorted(np.cumsum(steps[ascending]), tail)]
    if not len(small) or steps[small[-1]] == steps.max():
        return table
    rest = np.ones(len(steps), bool)
    rest[small] = False
    return np.concatenate([table[rest], table[small[::-1]]])


def _host_items(table: np.ndarray, ctas: int) -> np.ndarray:
    """Each item goes to the block with the least work so far."""
    lists: list[list[list[int]]] = [[] for _ in range(ctas)]
    load = [(0, cta) for cta in range(ctas)]
    for item in table.tolist():
        total, cta = load[0]
        heapq.heapreplace(load, (total + item[2] + OVERHEAD, cta))
        lists[cta].append(item)
    result = np.zeros((ctas, 1 + max(1, *map(len, lists)), 4), np.int32)
    for cta, items in enumerate(lists):
        result[cta, 0, 0] = len(items)
        if items:
            result[cta, 1 : 1 + len(items)] = items
    return result


def _items(table: Any, visits: Any, valid: Any, ctas: int) -> Any:
    """Deals items out in turns, every second turn backwards."""
    turns = -(-table.shape[0] // ctas)
    turn, cta = np.meshgrid(np.arange(turns), np.arange(ctas), indexing="ij")
    place = turn * ctas + np.where(turn % 2, ctas - 1 - cta, cta)
    count = valid.sum()
    dealt = jnp.asarray(place) < count
    items = table[visits[np.minimum(place, table.shape[0] - 1)]]
    items = jnp.where(dealt[..., None], items, 0).swapaxes(0, 1)
    head = jnp.zeros((ctas, 1, 4), jnp.int32).at[:, 0, 0].set(dealt.sum(0).astype(jnp.int32))
    return jnp.concatenate([head, items], axis=1).astype(jnp.int32)


class Item(NamedTuple):
    """One tile or part of one: int32 scalars."""

    code: Any
    begin: Any
    steps: Any
    part: Any


def item(items: Any, cta: Any, t: Any, count: Any) -> Item:
    """Item t of a block; the last one again past the end."""
    at = jnp.minimum(t + 1, count)
    return Item(*(items[cta, at, i] for i in range(4)))


def place(plan: Plan, code: Any) -> tuple[Any, Any, Any]:
    """(batch, home head, tile) of a code."""
    rest, tile = lax.div(code, jnp.int32(plan.tiles)), lax.rem(code, jnp.int32(plan.tiles))
    return lax.div(rest, jnp.int32(plan.heads)), lax.rem(rest, jnp.int32(plan.heads)), tile


def list_place(plan: Plan, batch: Any, head: Any) -> tuple[Any, Any]:
    """Which list a home head of an example follows."""
    first = batch if plan.list_batch > 1 else 0
    if plan.list_heads == 1:
        return first, 0
    return first, lax.div(head, jnp.int32(plan.heads // plan.list_heads))


def entry_of(plan: Plan, j: Any) -> tuple[Any, Any]:
    """(entry, row of the first away row in its block) of step j of an item."""
    if plan.steps_per_entry == 1:
        return j, 0
    per = jnp.int32(plan.steps_per_entry)
    return lax.div(j, per), lax.rem(j, per) * plan.away


def load_entries(plan: Plan, entries: Any, where: tuple[Any, Any], at: Any) -> tuple[Any, ...]:
    """The packed entries at a place of a list, one for each lane, or of a step."""
    return tuple(load_entry(plan, entries, where, at, i) for i in range(plan.together))


def load_entry(plan: Plan, entries: Any, where: tuple[Any, Any], at: Any, lane: Any) -> Any:
    """One of the packed entries that lie together (any number where there is one)."""
    return entries[(*where, at if plan.together == 1 else at * plan.together + lane)]


def ring(plan: Plan, stages: int, *columns: int) -> tuple[int, ...]:
    """The shape of away tiles in shared memory."""
    shape = (stages, plan.away, *columns)
    return shape if plan.lanes == 1 else (plan.lanes, *shape)


def of_lane(plan: Plan, ring: Any, lane: Any) -> Any:
    """The away tiles of one lane (any number where there is one list); None of None."""
    return ring if plan.lanes == 1 or ring is None else ring.at[lane]


def limits(plan: Plan, band: Any, shift: Any) -> tuple[Any, Any]:
    """Home row h sees away rows h + low to h + high; shift: position of home 0 less away 0."""

    def pick(side: int) -> Any:
        values = tuple(pair[side] for pair in plan.bands)
        result: Any = jnp.int32(values[-1])
        for i in range(len(values) - 2, -1, -1):
            result = jnp.where(band == i, values[i], result)
        return result

    left, right = pick(0), pick(1)
    if plan.transposed:
        left, right = right, left
    return shift - left, shift + right


def unmasked(plan: Plan, band: Any, first: Any, shift: Any) -> tuple[Any, Any]:
    """The first and last start of an away tile that all home rows of the tile at `first` see."""
    if not (plan.masks or plan.ragged_keys):
        return jnp.int32(-UNBOUNDED), jnp.int32(UNBOUNDED)
    low, high = limits(plan, band, shift)
    end = jnp.minimum(high + first, plan.away_rows - 1)
    begin = low + first + TILE_ROWS - 1
    if plan.ragged_keys:
        begin = jnp.where(first + TILE_ROWS > plan.home_rows, UNBOUNDED, begin)
    return begin, end + 1 - plan.away


def hidden(plan: Plan, band: Any, first: Any, shift: Any) -> tuple[Any, Any]:
    """The last start of an away tile of which the second half of the home rows of the tile at
    `first` sees nothing, and the first of which the first half sees nothing.
    """
    if not plan.masks:
        return jnp.int32(-UNBOUNDED), jnp.int32(UNBOUNDED)
    low, high = limits(plan, band, shift)
    second = first + TILE_ROWS // 2
    return low + second - plan.away, high + second


def tiles_of(rows: int) -> int:
    """Tiles that cover some rows."""
    return -(-rows // TILE_ROWS)
