"""Where a tile of rows looks.

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
    series: the strides of the launches that run one program, one after the other, each of one
        branch; () if it has a program of its own. In the kernel of a series its rates, lengths,
        numbers and stride are int32 scalars, see `visits.running`.
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
    series: tuple[int, ...] = ()

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
        return self.tiles_of(self.stride)

    @property
    def heads(self) -> int:
        """Query heads."""
        return len(self.offsets[0])

    @property
    def views(self) -> tuple[int, ...]:
        """The rates by which rows of arrays are taken, in the order of a view's number."""
        return self.series or tuple(sorted(set(self.rates)))

    @property
    def home_view(self) -> int:
        """By what home arrays are viewed as `[rows, stride]` in operands."""
        return max(self.series, default=self.stride)

    @property
    def away_views(self) -> tuple[int, ...]:
        """By what away arrays are viewed in operands: for all of a series by the same."""
        return (max(self.series),) if self.series else self.views

    def away_view(self, branch: int) -> int:
        """The one of `away_views` that a branch's rows are taken from."""
        return 0 if self.series else self.views.index(self.rates[branch])

    @property
    def numbering(self) -> tuple[int, int]:
        """(tiles, residues) by which tile codes are made: constants of a program."""
        strides = self.series or (self.stride,)
        return max(self.tiles_of(stride) for stride in strides), max(strides)

    @property
    def ragged(self) -> bool:
        """Whether some tile does not end with the rows that exist."""
        return any(self.home % (n * self.block_home) for n in self.series or (self.stride,))

    def tiles_of(self, stride: int) -> int:
        """Tiles of one residue class of a stride."""
        return -(-self.home // (stride * self.block_home))


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


# The first seven of `Visit`, the tile's residue in the home array, the rows of a segment.
FIELDS = 9
LOCAL, COUNT = 7, 8


def fields_of(
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
TRACED = types.SimpleNamespace(
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

    With one branch all divisors are constants: quicker than a read from memory. (Not in a series,
    nor for a single tile: there everything would be constant, and a loop known to be empty breaks
    the lowering.)
    """
    single = len(launch.rates) == 1 and not launch.series
    return single and knows_starts(launch) and launch.tiles > 1


def kernel_table(launch: Launch, starts: Any) -> Any:
    """The `geometry` that a kernel gets, `[branch, tile * stride + residue, FIELDS]`.

    Of one entry where the kernel does not read it; for all of a series of one shape.
    """
    if computes_visits(launch):
        return np.zeros((1, 1, FIELDS), np.int32)
    table = geometry(launch, starts).swapaxes(1, 2).reshape(len(launch.rates), -1, FIELDS)
    rows = max((n * launch.tiles_of(n) for n in launch.series), default=table.shape[1])
    xp: Any = np if isinstance(table, np.ndarray) else jnp
    return xp.pad(table, ((0, 0), (0, rows - table.shape[1]), (0, 0)))


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
    ops = _HOST if static else TRACED
    branches = []
    for branch in range(len(launch.rates)):
        fields = fields_of(launch, branch, residue, row, where, ops)
        branches.append(xp.stack([xp.broadcast_to(x, shape) for x in fields], axis=-1))
    return xp.stack(branches).astype(np.int32)


def home_end(launch: Launch, local: Any) -> Any:
    """How many home rows exist of residue `local` of the home array.

    Those past them, up to the end of a tile, are zeros: as keys, whose logits of 0 may be far above
    all that count in a query's lse. Their probabilities would then be infinite.
    """
    ops = _HOST if isinstance(local, np.ndarray) else TRACED
    return ops.div(launch.home - local + launch.stride - 1, launch.stride)


def hides(launch: Launch) -> bool:
    """Whether a visit may hold a pair that does not see each other, and so needs masks."""
    if launch.causal or launch.gaps or not knows_starts(launch):
        return True
    return _hides_some(launch)


@functools.lru_cache(maxsize=256)
def _hides_some(launch: Launch) -> bool:
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


# What tells the launches of a series apart: int32 words. The number of the view; the rate; rows of
# a segment; the branch's number; whether results are added to what is there.
VIEW, RATE, LENGTH, NUMBER, CONTINUES = range(5)


def words(launch: Launch, continues: bool) -> np.ndarray:
    """The words of a launch; without a series nobody uses them."""
    if not launch.series:
        return np.zeros(1, np.int32)
    view, rate = launch.series.index(launch.stride), launch.stride
    return np.array([view, rate, launch.lengths[0], launch.numbers[0], continues], np.int32)


def in_series(launches: list[Launch], items: int, interpret: bool) -> list[Launch]:
    """The launches, where those that can run one program know their series.

    They have one branch each, causality, so that they need masks, and no gaps; the rows of a tile
    lie in two segments at most. items: tile codes for each tile of a residue class and
    residue, which must fit 32 bits. The interpreter has one view of an array, so that it runs a
    program for each.
    """

    def can(launch: Launch) -> bool:
        one = len(launch.rates) == 1 and launch.lengths[0] >= launch.block_home
        return one and launch.causal and not launch.gaps

    strides = tuple(sorted({launch.stride for launch in launches if can(launch)}))
    if sum(map(can, launches)) < 2:
        return launches
    found = [
        dataclasses.replace(x, series=(x.stride,) if interpret else strides) if can(x) else x
        for x in launches
    ]
    fits = all(math.prod(x.numbering) * items < 1 << 31 for x in found)
    return found if fits else launches


def program(launch: Launch) -> Launch:
    """What is static about the launches of a series; a launch without one."""
    if not launch.series:
        return launch
    return dataclasses.replace(
        launch,
        rates=(0,),
        lengths=(0,),
        offsets=((0,) * launch.heads,),
        numbers=(0,),
        stride=launch.home_view,
    )


def common_stride(rates: tuple[int, ...]) -> int:
    """The least common multiple of some rates."""
    return math.lcm(*rates)
