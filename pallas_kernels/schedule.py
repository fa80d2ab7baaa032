"""Where a tile of rows looks, and in which order tiles are worked on.

Positions p of one residue class modulo a rate r form the *dilated rows* g = (p - offset) / r; a
segment of w positions holds w / r of them. A tile is `block` consecutive rows of the array viewed
as `[rows, stride]`, with stride a multiple of every rate of the launch: all rows of a tile are
congruent, so a branch sees the whole tile or none of it. The "home" side of a tile is held in
registers; for each branch it visits a range of dilated rows of the other, "away" side.
"""

import dataclasses
import functools
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.compat import COLUMN, ROW, plgpu

UNBOUNDED = 1 << 30
# Copies to swizzled shared memory start at a multiple of this many rows.
ROW_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True)
class Launch:
    """The static description of one kernel launch over one group of branches.

    rates, lengths: per branch, the dilation rate and the dilated rows of one segment.
    offsets: per branch, per query head, the residue that the head keeps, or -1 (head absent).
    numbers: per branch, its number in the whole call (for dropout).
    phases: per branch (first position, width) of its segments, where the rate does not divide the
        segment length: the branch then has every so many segments only, those whose rows have the
        same residue, and its length is in rows from one of them to the next. Else None.
    stride: a multiple of all rates; home rows are stepped by it.
    home, away: number of positions on either side.
    home_start, away_start: absolute position of the first one, or None (traced).
    transposed: home rows are keys (gradients of keys and values), not queries.
    """

    rates: tuple[int, ...]
    lengths: tuple[int, ...]
    offsets: tuple[tuple[int, ...], ...]
    numbers: tuple[int, ...]
    phases: tuple[tuple[int, int] | None, ...]
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
    def gaps(self) -> bool:
        """Whether rows lie between the segments of some branch."""
        return any(self.phases)

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
    """Away tiles visited by `[head, residue, tile]`, all branches together.

    Starts that are known only at run time count as 0: the result then only balances work.
    """
    known = dataclasses.replace(
        launch, home_start=launch.home_start or 0, away_start=launch.away_start or 0
    )
    return of_heads(launch, geometry(known, None)[..., 1].astype(np.int64))


def of_heads(launch: Launch, counts: np.ndarray) -> np.ndarray:
    """Sums `[branch, residue, tile]` over the branches of each `[head, residue, tile]`."""
    bits = participation(launch)[None] >> np.arange(len(launch.rates))[:, None, None] & 1
    return np.einsum("bnr,brt->nrt", bits, counts)


def rows_of(branches: Any, extent: int) -> list[int]:
    """Dilated rows of a segment of each branch (w, r, ...) over `extent` positions.

    Example:
        >>> rows_of(((2048, 1), (1 << 20, 4)), 8192)
        [2048, 2048]
    """
    return [max(1, min(w, extent) // r) for w, r, *_ in branches]


@dataclasses.dataclass(frozen=True)
class Visit:
    """What one branch contributes to one tile: traced int32 scalars.

    first: first away row. steps: away tiles to visit. home_shift, home_step: the dilated row of
    home row m is `m * home_step + home_shift`. away_shift: dilated row of away row 0.
    away_residue: residue of the away rows in the away array viewed as `[rows, rate]`. limit: away
    rows that exist. origin: position of dilated row 0. rate, length: of the branch; where there are
    gaps length is a pair, the rows from one segment to the next and those in a segment.
    """

    first: Any
    steps: Any
    home_shift: Any
    away_shift: Any
    away_residue: Any
    limit: Any
    origin: Any
    rate: Any
    length: Any
    home_step: Any


def pick(values: tuple[int, ...], index: Any) -> Any:
    """`values[index]` for a static tuple and an index that may be traced."""
    if isinstance(index, int) or len(set(values)) == 1:
        return values[0 if len(set(values)) == 1 else index]
    result: Any = jnp.int32(values[-1])
    for i in range(len(values) - 2, -1, -1):
        result = jnp.where(index == i, values[i], result)
    return result


def row_bounds(launch: Launch, length: Any, rows: Any) -> tuple[Any, Any]:
    """The dilated away rows [low, high) that dilated home rows see (scalar or vector).

    length: as in `Visit`. A row between two segments sees nothing: [UNBOUNDED, 0).
    """
    period, count = length if isinstance(length, tuple) else (length, length)
    start = low = lax.div(rows, jnp.int32(period)) * period
    high = low + count
    if launch.causal and launch.transposed:
        low = jnp.maximum(low, rows)
    elif launch.causal:
        high = jnp.minimum(high, rows + 1)
    if isinstance(length, tuple):
        inside = rows - start < count
        low, high = jnp.where(inside, low, UNBOUNDED), jnp.where(inside, high, 0)
    return low, high


# The first seven of `Visit`, the tile's residue in the home array, the rows of a segment.
FIELDS = 9
LOCAL, COUNT = 7, 8


def _fields(
    launch: Launch, branch: int, residue: Any, row: Any, starts: Any, ops: Any
) -> tuple[Any, ...]:
    """The fields of one branch for tiles at `row` of class `residue`; all values are >= 0.

    ops: namespace with div, rem, maximum and minimum for numpy, jax or kernel scalars.
    """
    rate, length = launch.rates[branch], launch.lengths[branch]
    home_start, away_start = starts
    local = ops.rem(residue + ops.rem(-home_start, launch.stride) + launch.stride, launch.stride)
    offset = ops.rem(residue, rate)
    count, skipped = length, 0
    if launch.phases[branch]:
        count, skipped = _segment(launch, branch, offset, ops)
    # The rows before the first segment count as those between others: no number gets negative.
    shift = length - skipped if launch.phases[branch] else 0
    home_shift = ops.div(home_start + local - offset, rate) + shift
    away_residue = ops.rem(offset + ops.rem(-away_start, rate) + rate, rate)
    away_shift = ops.div(away_start + away_residue - offset, rate) + shift
    limit = ops.div(ops.maximum(launch.away - away_residue + rate - 1, 0), rate)
    last = ops.minimum(row + launch.block_home, launch.home_rows) - 1
    step = launch.stride // rate
    low, high = row * step + home_shift, last * step + home_shift
    seen_low, seen_high = ops.div(low, length) * length, ops.div(high, length) * length + count
    if launch.phases[branch]:  # from a gap on: the next segment
        past = ops.minimum(ops.div(low - seen_low, ops.maximum(count, 1)), 1)
        seen_low = seen_low + past * length
    if launch.causal and launch.transposed:
        seen_low = ops.maximum(seen_low, low)
    elif launch.causal:
        seen_high = ops.minimum(seen_high, high + 1)
    first = ops.div(ops.maximum(seen_low - away_shift, 0), ROW_ALIGNMENT) * ROW_ALIGNMENT
    rows = ops.maximum(ops.minimum(seen_high - away_shift, limit) - first, 0)
    visited = ops.div(rows + (launch.block_away - 1), launch.block_away)
    origin = offset - shift * rate
    return first, visited, home_shift, away_shift, away_residue, limit, origin, local, count


def _segment(launch: Launch, branch: int, offset: Any, ops: Any) -> tuple[Any, Any]:
    """(rows of a segment, rows before the first one) of a residue of a branch with a phase."""
    rate, phase = launch.rates[branch], launch.phases[branch]
    begin, width = phase or (0, 0)
    inner = ops.rem(offset + (rate - begin % rate), rate)  # the residue inside the segment
    return ops.div(rate - 1 + width - inner, rate), ops.div(begin + inner - offset, rate)


def phases(w: int, rate: int, end: int | None) -> list[tuple[int, int] | None]:
    """The phases of a branch over positions up to `end`, None if that is not known.

    Example:
        >>> phases(8, 2, 64), phases(5, 2, 64), phases(5, 2, 5)
        ([None], [(0, 5), (5, 5)], [None])
    """
    if w % rate == 0 or (end is not None and w >= end):
        return [None]
    count = rate // math.gcd(w, rate)
    if end is not None:
        count = min(count, -(-end // w))
    return [(i * w, w) for i in range(count)]


# Truncating division, the same on the host and in a kernel (where // would also test for signs).
_HOST = types.SimpleNamespace(
    div=lambda a, b: np.asarray(a) // b,
    rem=lambda a, b: np.fmod(a, b),
    maximum=np.maximum,
    minimum=np.minimum,
)
_TRACED = types.SimpleNamespace(
    div=lambda a, b: lax.div(*_int32(a, b)),
    rem=lambda a, b: lax.rem(*_int32(a, b)),
    maximum=jnp.maximum,
    minimum=jnp.minimum,
)


def _int32(a: Any, b: Any) -> tuple[jax.Array, jax.Array]:
    a, b = jnp.asarray(a, jnp.int32), jnp.asarray(b, jnp.int32)
    return a, jnp.broadcast_to(b, a.shape) if a.ndim else b


def knows_starts(launch: Launch) -> bool:
    """Whether both start positions are static."""
    return launch.home_start is not None and launch.away_start is not None


def computes_visits(launch: Launch) -> bool:
    """Whether a kernel computes where a tile looks, and does not read it.

    With one branch all divisors are constants: quicker than a read from memory. (Not for a single
    tile: there everything would be constant, and a loop known to be empty breaks the lowering.)
    """
    return len(launch.rates) == 1 and knows_starts(launch) and launch.tiles > 1


def kernel_table(launch: Launch, starts: Any) -> Any:
    """The `geometry` that a kernel gets: of one entry where it does not read it."""
    if computes_visits(launch):
        return np.zeros((1, 1, 1, FIELDS), np.int32)
    return geometry(launch, starts)


def geometry(launch: Launch, starts: Any) -> Any:
    """Where each branch looks from each tile: int32 `[branch, residue, tile, FIELDS]`.

    Computed before the launch, because divisions by a rate that is not a constant would cost a tile
    more than a whole step. starts: traced int32 `[2]` (queries, keys), used only where the launch
    does not know its start.
    """
    static = knows_starts(launch)
    shape = (launch.stride, launch.tiles)
    residue = np.broadcast_to(np.arange(launch.stride, dtype=np.int32)[:, None], shape)
    row = np.arange(launch.tiles, dtype=np.int32)[None] * launch.block_home
    row = np.broadcast_to(row, shape)
    where = (launch.home_start, launch.away_start)
    if not static:
        where = tuple(starts[i] for i in ((1, 0) if launch.transposed else (0, 1)))
        where = tuple(jnp.broadcast_to(x, shape) for x in where)
        residue, row = jnp.asarray(residue), jnp.asarray(row)
    xp: Any = np if static else jnp
    ops = _HOST if static else _TRACED
    branches = []
    for branch in range(len(launch.rates)):
        fields = _fields(launch, branch, residue, row, where, ops)
        branches.append(xp.stack([xp.broadcast_to(x, shape) for x in fields], axis=-1))
    return xp.stack(branches).astype(np.int32)


def home_end(launch: Launch, local: Any) -> Any:
    """How many home rows exist of residue `local` of the home array.

    Those past them, up to the end of a tile, are zeros: as keys, whose logits of 0 may be far above
    all that count in a query's lse. Their probabilities would then be infinite.
    """
    return (launch.home - local + launch.stride - 1) // launch.stride


@functools.lru_cache(maxsize=256)
def hides(launch: Launch) -> bool:
    """Whether a visit may hold a pair that does not see each other, and so needs masks."""
    if launch.causal or launch.gaps or not knows_starts(launch):
        return True
    return bool(masked_steps(launch).any())


def masked_steps(launch: Launch) -> np.ndarray:
    """Of the away tiles of `[branch, residue, tile]`, those that some home row does not see whole.

    For static starts, without causality and gaps.
    """
    found = []
    for branch, fields in enumerate(geometry(launch, None).astype(np.int64)):
        first, steps, home_shift, away_shift, _, limit = np.moveaxis(fields, -1, 0)[:6]
        step, length = launch.stride // launch.rates[branch], launch.lengths[branch]
        row = np.arange(launch.tiles) * launch.block_home
        # What all rows see: from where the last one's segment begins to where the first one's ends.
        last = (row + launch.block_home - 1) * step + home_shift
        low = last // length * length - away_shift - first
        high = (row * step + home_shift) // length * length + length - away_shift
        high = np.minimum(high, limit) - first
        if launch.transposed:
            # Keys past the end see nothing, see `home_end`.
            there = row + launch.block_home <= home_end(launch, fields[..., LOCAL])
            high = np.where(there, high, 0)
        whole = high // launch.block_away - -(-np.maximum(low, 0) // launch.block_away)
        found.append(steps - np.clip(whole, 0, steps))
    return np.stack(found)


def visit(launch: Launch, table: Any, branch: Any, mask: Any, residue: Any, tile: Any) -> Visit:
    """Reads the visit of `branch` by a tile; a branch whose bit in `mask` is unset has 0 steps.

    mask None says that the branch is there.
    """
    wanted = (*range(LOCAL), *((COUNT,) if launch.gaps else ()))
    present = True
    if mask is not None:
        present = lax.rem(lax.shift_right_logical(mask, jnp.int32(branch)), jnp.int32(2)) == 1
    if computes_visits(launch):
        where = (jnp.int32(launch.home_start), jnp.int32(launch.away_start))
        row = tile * launch.block_home
        fields = list(_fields(launch, 0, residue, row, where, _TRACED))
        fields = [fields[i] for i in wanted]
        fields[1] = jnp.where(present, fields[1], 0)
    else:

        def read() -> tuple[Any, ...]:
            return tuple(table[branch, residue, tile, i] for i in wanted)

        nothing = (jnp.int32(0),) * len(wanted)
        fields = read() if mask is None else lax.cond(present, read, lambda: nothing)
    length = pick(launch.lengths, branch)
    return Visit(
        *fields[:LOCAL],
        rate=pick(launch.rates, branch),
        length=(length, fields[-1]) if launch.gaps else length,
        home_step=pick(tuple(launch.stride // r for r in launch.rates), branch),
    )


def place(launch: Launch, table: Any, code: Any, heads: int) -> tuple[Any, ...]:
    """(batch, head, residue, tile, residue in the home array) of a tile code."""
    batch, tile, head, residue = decode(launch, heads, code)
    if not knows_starts(launch):
        local = table[0, residue, tile, LOCAL]
    else:
        shifted = residue + (-launch.home_start) % launch.stride
        local = lax.rem(shifted, jnp.int32(launch.stride))
    return batch, head, residue, tile, local


def entry(items: Any, cta: Any, t: Any, count: Any) -> tuple[Any, Any, Any]:
    """(code, branch mask, away tiles) of item t of a block; the last one again past the end."""
    at = jnp.minimum(t + 1, count)
    return items[cta, at, 0], items[cta, at, 1], items[cta, at, 2]


def known_steps(
    launch: Launch, table: Any, current: Any, mask: Any, residue: Any, tile: Any
) -> Any:
    """Away tiles of a home tile, all branches: from its entry, or summed if starts are traced."""
    if knows_starts(launch):
        return current[2]
    counts = (visit(launch, table, i, mask, residue, tile).steps for i in range(len(launch.rates)))
    return sum(counts, jnp.int32(0))


def first_branch(launch: Launch, table: Any, mask: Any, residue: Any, tile: Any) -> Any:
    """The first branch that looks at anything from a tile; the last one if none does."""
    result: Any = len(launch.rates) - 1
    for branch in range(len(launch.rates) - 2, -1, -1):
        looks = visit(launch, table, branch, mask, residue, tile).steps > 0
        result = jnp.where(looks, jnp.int32(branch), result)
    return result


def decode(launch: Launch, heads: int, code: Any) -> tuple[Any, Any, Any, Any]:
    """(batch, tile, head, residue) of a tile code."""
    rest, residue = lax.div(code, jnp.int32(launch.stride)), lax.rem(code, jnp.int32(launch.stride))
    rest, head = lax.div(rest, jnp.int32(heads)), lax.rem(rest, jnp.int32(heads))
    batch, tile = lax.div(rest, jnp.int32(launch.tiles)), lax.rem(rest, jnp.int32(launch.tiles))
    return batch, tile, head, residue


def common_stride(rates: tuple[int, ...]) -> int:
    """The least common multiple of some rates."""
    return math.lcm(*rates)


def visible(
    launch: Launch,
    length: Any,
    rows: jax.Array,
    columns: jax.Array,
    limit: Any,
    end: Any = UNBOUNDED,
) -> Any:
    """Which pairs of dilated home rows `[h]` below `end` and away rows `[h, a]` below `limit` see
    each other.
    """
    low, high = row_bounds(launch, length, rows)
    high = jnp.minimum(high, limit)
    if end is not UNBOUNDED:
        high = jnp.where(rows < end, high, 0)
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
    home = ((home + row) * v.home_step + v.home_shift) * v.rate + v.origin
    away = (away + (start + v.away_shift)) * v.rate + v.origin
    who = (batch, head, pick(launch.numbers, branch))
    return kept_at(keep, rate, seed, who, (home, away), launch.transposed)


def kept_at(
    keep: Any,
    rate: float,
    seed: tuple[Any, Any],
    who: tuple[Any, Any, Any],
    positions: tuple[jax.Array, jax.Array],
    transposed: bool,
) -> jax.Array:
    """Which pairs (home, away) of these positions dropout keeps, home ones of keys if transposed.

    who: (batch, query head, number of the branch).
    """
    (batch, head, number), (home, away) = who, positions
    if transposed:
        first = keep.column_bits(seed, home, number)
        second = keep.row_bits(seed, batch, head, away)
    else:
        first = keep.row_bits(seed, batch, head, home)
        second = keep.column_bits(seed, away, number)
    shape = (home.shape[0], away.shape[0])
    # The bits of a pair depend on the sum of the two only, so the order does not matter.
    return keep.keep(_Spread(first, shape, 0), _Spread(second, shape, 1), rate)
