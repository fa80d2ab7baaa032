"""Where a tile of rows looks, and in which order tiles are worked on.

Positions p of one residue class modulo a rate r form the *dilated rows* g = (p - offset) / r; a
segment of w positions holds w / r of them. A tile is `block` consecutive rows of the array viewed
as `[rows, stride]`, with stride a multiple of every rate of the launch: all rows of a tile are
congruent, so a branch sees the whole tile or none of it. The "home" side of a tile is held in
registers; for each branch it visits a range of dilated rows of the other, "away" side.
"""

import dataclasses
import heapq
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.compat import COLUMN, ROW, plgpu

UNBOUNDED = 1 << 30
# Keys and values that tiles in flight together should share in the L2 cache.
CHUNK_BYTES = 12 << 20
# Copies to swizzled shared memory start at a multiple of this many rows.
ROW_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Launch:
    """The static description of one kernel launch over one group of branches.

    rates, lengths: per branch, the dilation rate and the dilated rows of one segment.
    offsets: per branch, per query head, the residue that the head keeps, or -1 (head absent).
    numbers: per branch, its number in the whole call (for dropout).
    stride: a multiple of all rates; home rows are stepped by it.
    home, away: number of positions on either side.
    home_start, away_start: absolute position of the first one, or None (traced, passed at run time).
    transposed: home rows are keys (gradients of keys and values), not queries.
    """

    rates: tuple[int, ...]
    lengths: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...]
    stride: int
    home: int
    away: int
    home_start: int | None
    away_start: int | None
    causal: bool
    transposed: bool
    block_home: int
    block_away: int

    @property
    def home_rows(self) -> int:
        """Rows of the home view."""
        return -(-self.home // self.stride)

    @property
    def tiles(self) -> int:
        """Tiles of one residue class."""
        return -(-self.home_rows // self.block_home)

    @property
    def heads(self) -> int:
        """Query heads."""
        return len(self.offsets[0])


def participation(launch: Launch) -> np.ndarray:
    """Bit b of `[head, residue]` says whether branch b keeps that residue (mod stride) for it."""
    residues = np.arange(launch.stride)
    mask = np.zeros((launch.heads, launch.stride), np.int64)
    for bit, (rate, offsets) in enumerate(zip(launch.rates, launch.offsets, strict=True)):
        mask |= (np.asarray(offsets)[:, None] == residues[None] % rate).astype(np.int64) << bit
    return mask


def steps(launch: Launch) -> np.ndarray:
    """Away tiles visited by `[head, residue, tile]`, all branches together."""
    mask = participation(launch)
    home_start, away_start = launch.home_start or 0, launch.away_start or 0
    residue = np.arange(launch.stride)[:, None]
    first_row = np.arange(launch.tiles)[None] * launch.block_home
    last_row = np.minimum(first_row + launch.block_home, launch.home_rows) - 1
    local = (residue - home_start) % launch.stride
    total = np.zeros((launch.heads, launch.stride, launch.tiles), np.int64)
    for bit, (rate, length) in enumerate(zip(launch.rates, launch.lengths, strict=True)):
        offset = residue % rate
        first, last = (
            (home_start + row * launch.stride + local - offset) // rate
            for row in (first_row, last_row)
        )
        low, high = first // length * length, (last // length + 1) * length
        if launch.causal and launch.transposed:
            low = np.maximum(low, first)
        elif launch.causal:
            high = np.minimum(high, last + 1)
        away_local = (offset - away_start) % rate
        shift = (away_start + away_local - offset) // rate
        count = np.maximum(0, -(-(launch.away - away_local) // rate))
        low = np.maximum(low - shift, 0) // ROW_ALIGNMENT * ROW_ALIGNMENT
        high = np.minimum(high - shift, count)
        visited = -(-np.maximum(high - low, 0) // launch.block_away)
        total += np.where((mask >> bit & 1)[:, :, None] == 1, visited[None], 0)
    return total


def _chunks(launch: Launch, kv_head: np.ndarray, tile: np.ndarray, row_bytes: int) -> np.ndarray:
    """Numbers the chunks of tiles that share CHUNK_BYTES of keys and values."""
    budget = max(1, CHUNK_BYTES // row_bytes)
    shortest = min(
        launch.home, *(n * r for n, r in zip(launch.lengths, launch.rates, strict=True))
    )
    span = max(budget // shortest, 1) * shortest
    if span >= launch.home:
        return kv_head // max(1, budget // launch.home)
    position = tile * (launch.block_home * launch.stride)
    return kv_head * -(-launch.home // span) + position // span


def work_lists(
    launch: Launch, *, batch: int, ctas: int, row_bytes: int, group: int, skip_empty: bool
) -> np.ndarray:
    """Assigns every tile to a block of the persistent grid, longest first.

    Tiles are taken head by head in chunks whose keys and values fit the L2 cache, longest first
    within a chunk, and each goes to the block with the least work so far.

    row_bytes: bytes of one position of one kv head, both away arrays together.
    group: query heads for each kv head (items of `transposed` launches are per kv head).
    Returns int32 `[ctas, 1 + items, 2]`: entry 0 holds the count; the others (tile code, branch
    mask), code = ((batch * tiles + tile) * heads + head) * stride + residue.
    """
    away_tiles, mask = steps(launch), participation(launch)
    heads = launch.heads
    if launch.transposed:
        heads = launch.heads // group
        away_tiles = away_tiles.reshape(heads, group, *away_tiles.shape[1:]).sum(1)
        mask = np.bitwise_or.reduce(mask.reshape(heads, group, -1), axis=1)
    head, residue, tile = np.meshgrid(
        *(np.arange(n) for n in away_tiles.shape), indexing="ij", sparse=False
    )
    keep = np.ones(away_tiles.shape, bool)
    if skip_empty:
        keep &= (mask != 0)[:, :, None]
    head, residue, tile, cost = (x[keep] for x in (head, residue, tile, away_tiles))
    kv_head = head // (1 if launch.transposed else group)
    chunk = _chunks(launch, kv_head, tile, row_bytes)
    example = np.repeat(np.arange(batch), len(cost))
    head, residue, tile, cost, chunk = (np.tile(x, batch) for x in (head, residue, tile, cost, chunk))
    order = np.lexsort((residue, tile, head, -cost, chunk, example))
    # The end of the list only fills gaps: the smallest tiles of all chunks, longest first.
    ascending = np.sort(cost)
    tail = max(ctas * 2 * int(cost.max(initial=0)), int(cost.sum()) // 8)
    largest = int(np.searchsorted(np.cumsum(ascending), tail))
    fill = cost[order] <= (ascending[min(largest, len(cost) - 1)] if len(cost) else 0)
    last = order[fill]
    order = np.concatenate([order[~fill], last[np.argsort(-cost[last], kind="stable")]])
    code = ((example * launch.tiles + tile) * heads + head) * launch.stride + residue
    work = zip(
        code[order].tolist(),
        mask[head, residue][order].tolist(),
        # Loading the home tile and writing the result cost about as much as one more visit.
        (cost[order] + 1).tolist(),
        strict=True,
    )
    lists: list[list[tuple[int, int]]] = [[] for _ in range(ctas)]
    load = [(0, cta) for cta in range(ctas)]
    for item, bits, weight in work:
        total, cta = load[0]
        heapq.heapreplace(load, (total + weight, cta))
        lists[cta].append((item, bits))
    table = np.zeros((ctas, 1 + max(map(len, lists)), 2), np.int32)
    for cta, items in enumerate(lists):
        table[cta, 0, 0] = len(items)
        if items:
            table[cta, 1 : 1 + len(items)] = items
    return table


@dataclasses.dataclass(frozen=True)
class Visit:
    """What one branch contributes to one tile: traced int32 scalars.

    offset, rate, length: of the branch. home_shift, home_step: dilated row of home row m is
    `m * home_step + home_shift`. away_shift: dilated row of away row 0. away_residue: the residue
    of the away rows in the away array viewed as `[rows, rate]`. first: first away row. limit:
    number of away rows that exist. steps: away tiles to visit.
    """

    offset: Any
    rate: Any
    length: Any
    home_shift: Any
    home_step: Any
    away_shift: Any
    away_residue: Any
    first: Any
    limit: Any
    steps: Any


def pick(values: tuple[int, ...], index: Any) -> Any:
    """`values[index]` for a static tuple and an index that may be traced."""
    if isinstance(index, int) or len(set(values)) == 1:
        return values[0 if len(set(values)) == 1 else index]
    result: Any = jnp.int32(values[-1])
    for i in range(len(values) - 2, -1, -1):
        result = jnp.where(index == i, values[i], result)
    return result


def row_bounds(launch: Launch, length: Any, rows: Any) -> tuple[Any, Any]:
    """The dilated away rows [low, high) that dilated home rows see (scalar or vector)."""
    low = lax.div(rows, lax.convert_element_type(jnp.int32(length), jnp.int32)) * length
    high = low + length
    if launch.causal and launch.transposed:
        low = jnp.maximum(low, rows)
    elif launch.causal:
        high = jnp.minimum(high, rows + 1)
    return low, high


def visit(
    launch: Launch, branch: Any, mask: Any, residue: Any, row: Any, starts: tuple[Any, Any]
) -> Visit:
    """Resolves the visit of `branch` by the home tile that starts at `row` of class `residue`.

    mask: branch bits of the item; a branch whose bit is unset gets 0 steps.
    starts: absolute (home, away) start positions.
    """
    rate, length = pick(launch.rates, branch), pick(launch.lengths, branch)
    home_start, away_start = starts
    offset = lax.rem(residue, jnp.int32(rate))
    step = pick(tuple(launch.stride // r for r in launch.rates), branch)
    local = modulo(residue - home_start, launch.stride)
    home_shift = lax.div(home_start + local - offset, jnp.int32(rate))
    away_residue = modulo(offset - away_start, rate)
    away_shift = lax.div(away_start + away_residue - offset, jnp.int32(rate))
    limit = lax.div(jnp.maximum(launch.away - away_residue + rate - 1, 0), jnp.int32(rate))
    last = jnp.minimum(row + launch.block_home, launch.home_rows) - 1
    low, _ = row_bounds(launch, length, row * step + home_shift)
    _, high = row_bounds(launch, length, last * step + home_shift)
    first = lax.div(jnp.maximum(low - away_shift, 0), jnp.int32(ROW_ALIGNMENT)) * ROW_ALIGNMENT
    count = jnp.maximum(jnp.minimum(high - away_shift, limit) - first, 0)
    steps = lax.div(count + (launch.block_away - 1), jnp.int32(launch.block_away))
    present = lax.rem(lax.shift_right_logical(mask, jnp.int32(branch)), jnp.int32(2))
    return Visit(
        offset, rate, length, home_shift, step, away_shift, away_residue, first, limit,
        steps * present,
    )


def modulo(value: Any, modulus: Any) -> Any:
    """The non-negative remainder, also of a negative value."""
    if isinstance(modulus, int) and modulus == 1:
        return jnp.int32(0)
    modulus = jnp.int32(modulus)
    remainder = lax.rem(jnp.int32(value), modulus)
    return jnp.where(remainder < 0, remainder + modulus, remainder)


def decode(launch: Launch, heads: int, code: Any) -> tuple[Any, Any, Any, Any]:
    """(batch, tile, head, residue) of a tile code."""
    rest, residue = lax.div(code, jnp.int32(launch.stride)), lax.rem(code, jnp.int32(launch.stride))
    rest, head = lax.div(rest, jnp.int32(heads)), lax.rem(rest, jnp.int32(heads))
    batch, tile = lax.div(rest, jnp.int32(launch.tiles)), lax.rem(rest, jnp.int32(launch.tiles))
    return batch, tile, head, residue


def common_stride(rates: tuple[int, ...]) -> int:
    """The least common multiple of some rates."""
    return math.lcm(*rates)


def visible(launch: Launch, length: Any, rows: jax.Array, columns: jax.Array, limit: Any) -> Any:
    """Which pairs of dilated home rows `[h]` and away rows `[h, a]` see each other."""
    low, high = row_bounds(launch, length, rows)
    high = jnp.minimum(high, limit)
    low, high = (lax.broadcast_in_dim(x, columns.shape, [0]) for x in (low, high))
    return (columns >= low) & (columns < high)


class _Spread:
    """A vector that answers `x[..., :, None]` and `x[..., None, :]` with the whole tile.

    Registers have no tiles with an axis of length 1; a mask function that adds a column to a row
    gets two tiles instead.
    """

    def __init__(self, vector: jax.Array, shape: tuple[int, int], axis: int):
        self.tile = lax.broadcast_in_dim(vector, shape, [axis])

    def __getitem__(self, index: Any) -> jax.Array:
        return self.tile


def kept(
    launch: Launch,
    keep: Any,
    rate: float,
    seed: tuple[Any, Any],
    v: Visit,
    place: tuple[Any, Any, Any, Any, Any],
    shape: tuple[int, int],
) -> jax.Array:
    """Which pairs of a tile dropout keeps, bool of `shape` (home, away).

    keep: object with row_bits, column_bits and keep. place: (batch, query head, branch, first home
    row, first away row).
    """
    batch, head, branch, row, start = place
    home = plgpu.broadcasted_iota(jnp.int32, (shape[0],), 0, layout=ROW)
    away = plgpu.broadcasted_iota(jnp.int32, (shape[1],), 0, layout=COLUMN)
    home = ((home + row) * v.home_step + v.home_shift) * v.rate + v.offset
    away = (away + (start + v.away_shift)) * v.rate + v.offset
    number = pick(launch.numbers, branch)
    if launch.transposed:
        first = keep.column_bits(seed, home, number)
        second = keep.row_bits(seed, batch, head, away)
    else:
        first = keep.row_bits(seed, batch, head, home)
        second = keep.column_bits(seed, away, number)
    # The bits of a pair depend on the sum of the two only, so the order does not matter.
    return keep.keep(_Spread(first, shape, 0), _Spread(second, shape, 1), rate)
