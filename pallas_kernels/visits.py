"""Inside a kernel: where a tile looks, and which pairs of a visit see each other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import schedule
from pallas_kernels.compat import COLUMN, ROW, TILE, plgpu
from pallas_kernels.schedule import Launch


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

    def home_row(self, row: Any) -> Any:
        """The dilated row of a home row."""
        return row * self.home_step + self.home_shift


def pick(values: tuple[int, ...], index: Any) -> Any:
    """`values[index]` for a static tuple and an index that may be traced."""
    if len(values) == 1:
        return values[0]
    if isinstance(index, int) or len(set(values)) == 1:
        return values[0 if len(set(values)) == 1 else index]
    result: Any = jnp.int32(values[-1])
    for i in range(len(values) - 2, -1, -1):
        result = jnp.where(index == i, values[i], result)
    return result


def running(launch: Launch, words: Any, continues: bool) -> tuple[Launch, Any]:
    """The launch that runs, of the series of a program, and whether it continues results.

    words: see `schedule.words`. continues: whether a launch without a series does.
    """
    if not launch.series:
        return launch, continues
    rate, length, number = (words[i] for i in (schedule.RATE, schedule.LENGTH, schedule.NUMBER))
    one = dataclasses.replace(
        launch, rates=(rate,), lengths=(length,), numbers=(number,), stride=rate
    )
    return one, words[schedule.CONTINUES] != 0


def row_bounds(launch: Launch, length: Any, rows: Any, start: Any = None) -> tuple[Any, Any]:
    """The dilated away rows [low, high) that dilated home rows see (scalar or vector).

    length: as in `Visit`. start: where their segments begin, if that is known. A row between two
    segments sees nothing: [schedule.UNBOUNDED, 0).
    """
    period, count = length if isinstance(length, tuple) else (length, length)
    if start is None:
        start = lax.div(rows, jnp.int32(period)) * period
    low, high = start, start + count
    if launch.causal and launch.transposed:
        low = jnp.maximum(low, rows)
    elif launch.causal:
        high = jnp.minimum(high, rows + 1)
    if isinstance(length, tuple):
        inside = rows - start < count
        low, high = jnp.where(inside, low, schedule.UNBOUNDED), jnp.where(inside, high, 0)
    return low, high


def visit(launch: Launch, table: Any, branch: Any, mask: Any, residue: Any, tile: Any) -> Visit:
    """Reads the visit of `branch` by a tile; a branch whose bit in `mask` is unset has 0 steps.

    mask None says that the branch is there.
    """
    wanted = (*range(schedule.LOCAL), *((schedule.COUNT,) if launch.gaps else ()))
    present = True
    if mask is not None:
        present = lax.rem(lax.shift_right_logical(mask, jnp.int32(branch)), jnp.int32(2)) == 1
    if schedule.computes_visits(launch):
        where = (jnp.int32(launch.home_start), jnp.int32(launch.away_start))
        row = tile * launch.block_home
        fields = list(schedule.fields_of(launch, 0, residue, row, where, schedule.TRACED))
        fields = [fields[i] for i in wanted]
        fields[1] = jnp.where(present, fields[1], 0)
    else:

        def read() -> tuple[Any, ...]:
            return tuple(table[branch, tile * launch.stride + residue, i] for i in wanted)

        nothing = (jnp.int32(0),) * len(wanted)
        fields = read() if mask is None else lax.cond(present, read, lambda: nothing)
    names = ("first", "steps", "home_shift", "away_shift", "away_residue", "limit", "origin")
    found = dict(zip(names, fields[: schedule.LOCAL], strict=True))
    return running_visit(launch, branch, fields[-1] if launch.gaps else None, **found)


def segment_start(launch: Launch, v: Visit, row: Any, rows: Any) -> Any:
    """Where the segments of dilated rows begin, from home row `row` on; for `row_bounds`.

    Divisions by what is known at run time only are long: in a series one, for rows that lie in two
    segments at most.
    """
    if not launch.series:
        return None
    begin = lax.div(v.home_row(row), v.length) * v.length
    return jnp.where(rows - begin < v.length, begin, begin + v.length)


def running_visit(launch: Launch, branch: Any, count: Any, **fields: Any) -> Visit:
    """A visit of a branch; what is not among the fields is None.

    count: rows of a segment, where there are gaps.
    """
    length = pick(launch.lengths, branch)
    steps = () if launch.series else tuple(launch.stride // r for r in launch.rates)
    return Visit(
        **dict.fromkeys(("first", "steps", "away_residue")) | fields,
        rate=pick(launch.rates, branch),
        length=(length, count) if launch.gaps else length,
        home_step=1 if launch.series else pick(steps, branch),
    )


def unmasked(launch: Launch, v: Visit, tile: Any, first: int, count: int, end: Any = None) -> Any:
    """The first and last start of an away tile that some home rows of a tile see whole.

    first, count: which, of the tile that begins with row `tile`. end: home rows that exist, or None
    where all do.
    """
    _, high = bounds_of(launch, v, tile, first)
    low, _ = bounds_of(launch, v, tile, first + count - 1)
    if end is not None:
        low = jnp.where(tile + first + count > end, schedule.UNBOUNDED, low)
    return low - v.away_shift, jnp.minimum(high - v.away_shift, v.limit) - launch.block_away


def bounds_of(launch: Launch, v: Visit, tile: Any, i: int) -> tuple[Any, Any]:
    """`row_bounds` of row i of the tile that begins with home row `tile`."""
    row = v.home_row(tile + i)
    return row_bounds(launch, v.length, row, segment_start(launch, v, tile, row))


def before(v: Visit, rows: int) -> Any:
    """Where the away rows of a visit begin in an array of `rows` ordered by residue."""
    return v.away_residue * schedule.TRACED.div(rows, v.rate)


def place(launch: Launch, table: Any, code: Any, heads: int) -> tuple[Any, ...]:
    """(batch, head, residue, tile, residue in the home array) of a tile code."""
    batch, tile, head, residue = decode(launch, heads, code)
    if launch.home_start == 0:
        local = residue
    elif launch.series or not schedule.knows_starts(launch):
        local = table[0, tile * launch.stride + residue, schedule.LOCAL]
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
    if schedule.knows_starts(launch):
        return current[2]
    counts = (visit(launch, table, i, mask, residue, tile).steps for i in range(len(launch.rates)))
    return sum(counts, jnp.int32(0))


def decode(launch: Launch, heads: int, code: Any) -> tuple[Any, Any, Any, Any]:
    """(batch, tile, head, residue) of a tile code."""
    tiles, residues = launch.numbering
    rest, residue = lax.div(code, jnp.int32(residues)), lax.rem(code, jnp.int32(residues))
    rest, head = lax.div(rest, jnp.int32(heads)), lax.rem(rest, jnp.int32(heads))
    batch, tile = lax.div(rest, jnp.int32(tiles)), lax.rem(rest, jnp.int32(tiles))
    return batch, tile, head, residue


def visible(
    launch: Launch,
    length: Any,
    rows: jax.Array,
    columns: jax.Array,
    limit: Any,
    end: Any = schedule.UNBOUNDED,
    start: Any = None,
) -> Any:
    """Which pairs of dilated home rows `[h]` below `end` and away rows `[h, a]` below `limit` see
    each other; start: as in `row_bounds`.
    """
    low, high = row_bounds(launch, length, rows, start)
    high = jnp.minimum(high, limit)
    if end is not schedule.UNBOUNDED:
        high = jnp.where(rows < end, high, 0)
    low, high = (lax.broadcast_in_dim(x, columns.shape, [0]) for x in (low, high))
    return (columns >= low) & (columns < high)


def seen_pairs(
    launch: Launch,
    v: Visit,
    row: Any,
    start: Any,
    shape: tuple[int, int],
    end: Any = None,
) -> jax.Array:
    """Which (home, away) pairs of a tile see each other; home rows from `end` on see nothing."""
    columns = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE) + (start + v.away_shift)
    iota = plgpu.broadcasted_iota(jnp.int32, (shape[0],), 0, layout=ROW)
    last = schedule.UNBOUNDED if end is None else v.home_row(end)
    rows = v.home_row(iota + row)
    start = segment_start(launch, v, row, rows)
    return visible(launch, v.length, rows, columns, v.limit + v.away_shift, last, start)


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
    positions: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """Which pairs of a tile dropout keeps, bool of `shape` (home, away).

    keep: object with row_bits, column_bits and keep. place: (batch, query head, branch, first home
    row, first away row). positions: of home and away, None: those of the rows.
    """
    batch, head, branch, row, start = place
    if positions is None:
        home = plgpu.broadcasted_iota(jnp.int32, (shape[0],), 0, layout=ROW)
        away = plgpu.broadcasted_iota(jnp.int32, (shape[1],), 0, layout=COLUMN)
        home = ((home + row) * v.home_step + v.home_shift) * v.rate + v.origin
        away = (away + (start + v.away_shift)) * v.rate + v.origin
    else:
        home, away = positions
    number = pick(launch.numbers, branch)
    if launch.transposed:
        first = keep.column_bits(seed, home, number)
        second = keep.row_bits(seed, batch, head, away)
    else:
        first = keep.row_bits(seed, batch, head, home)
        second = keep.column_bits(seed, away, number)
    # The bits of a pair depend on the sum of the two only, so the order does not matter.
    return keep.keep(_Spread(first, shape, 0), _Spread(second, shape, 1), rate)
