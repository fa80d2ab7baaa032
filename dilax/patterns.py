"""The block patterns: local windows, dilated, global and hierarchical ones.

They combine with | and &, and with what `dilax.pattern` has besides, which is exported here too.
"""

import dataclasses
from typing import Any

import numpy as np

from dilax import block_entries
from dilax._types import refuse
from dilax.block_entries import UNLIMITED, Entries, Grid, budget, first_by, nearest, ranges, whole
from dilax.checks import check_index, check_ratio, plain
from dilax.pattern import Causal as Causal
from dilax.pattern import Intersection as Intersection
from dilax.pattern import Pattern as Pattern
from dilax.pattern import PerHead as PerHead
from dilax.pattern import Union as Union


def _make_plain(pattern: Any) -> None:
    """Replace what NumPy has in the fields, first of all."""
    for f in dataclasses.fields(pattern):
        object.__setattr__(pattern, f.name, plain(f.name, getattr(pattern, f.name)))


def _check_sizes(pattern: Any, *sizes: str) -> bool:
    """Does the pattern go by its ratio? Refuses a ratio and sizes together, and neither."""
    check_size("block_size", pattern.block_size)
    ratio = pattern.sparsity_ratio
    given = [name for name in sizes if getattr(pattern, name) is not None]
    if ratio is None:
        if not given:
            raise refuse("sparsity_ratio", f"a ratio, or {' or '.join(sizes)}", None)
        return False
    check_ratio(ratio)
    if given:
        raise refuse(given[0], "None with a sparsity_ratio", getattr(pattern, given[0]))
    return True


def check_size(name: str, x: Any, least: int = 1) -> None:
    """Refuse x unless it is an int from `least` on and small enough to count with."""
    if check_index(name, x) < least:
        raise refuse(name, "a positive int", x)
    if x >= UNLIMITED:
        raise refuse(name, f"an int below {UNLIMITED}", x)


def _check_pair(name: str, x: Any) -> None:
    """Refuse x unless it is None, a positive int, or a pair of ints or None."""
    if not isinstance(x, tuple):
        return None if x is None else check_size(name, x)
    if len(x) != 2:
        raise refuse(name, "an int or a pair of ints", x)
    for i in x:
        if i is not None:
            check_size(name, i, least=0)


@dataclasses.dataclass(frozen=True, repr=False)
class LocalWindow(Pattern):
    """The blocks nearest to each block of queries.

    Args, one of the first three:
        sparsity_ratio: the share of admissible blocks kept; near an end the window moves inwards,
            so that each row keeps its count.
        window_size: in tokens, exact to the token, cut at the ends: an int is the whole width (the
            last window_size tokens if causal, else window_size // 2 on each side), a pair the
            tokens to the left and to the right, None for no limit.
        window_blocks: the width in whole blocks, cut at the ends.
        block_size: tokens of a block.

    Source: Longformer (arXiv:2004.05150), section 3.1.

    Example:
        >>> LocalWindow(window_blocks=3, block_size=64).lists(256).rows()[0][0]
        [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    """

    sparsity_ratio: float | None = None
    window_size: int | tuple[int | None, int | None] | None = None
    window_blocks: int | None = None
    block_size: int = 128

    def __post_init__(self):
        _make_plain(self)
        _check_pair("window_size", self.window_size)
        _check_sizes(self, "window_size", "window_blocks")
        if self.window_blocks is not None:
            if self.window_size is not None:
                raise refuse("window_blocks", "None with a window_size", self.window_blocks)
            check_size("window_blocks", self.window_blocks)

    def entries(self, grid: Grid, group: int = 0, groups: int = 1) -> Entries:
        """The blocks of a grid that the window touches."""
        if self.sparsity_ratio is not None:
            return nearest(grid, budget(grid, self.sparsity_ratio))
        if self.window_blocks is not None:
            before = self.window_blocks - 1 if grid.is_causal else self.window_blocks // 2
            first = grid.diagonal - before
            return ranges(grid, first, first + self.window_blocks)
        return _band(grid, *self.limits(grid.is_causal))

    def limits(self, is_causal: bool) -> tuple[int | None, int | None]:
        """The tokens to the left and to the right that a window_size means."""
        if not isinstance(self.window_size, int):
            return self.window_size or (None, None)
        if is_causal:
            return self.window_size - 1, None  # nothing lies to the right
        return self.window_size // 2, self.window_size // 2


def _band(grid: Grid, left: int | None, right: int | None) -> Entries:
    """The blocks with a pair of tokens in the band."""
    first, last = grid.queries(np.arange(grid.rows))
    size, none = grid.block_size, np.zeros(grid.rows, int)
    low = none if left is None else (first - left - grid.k_start) // size
    high = none + grid.columns if right is None else (last + right - grid.k_start) // size + 1
    row, column, *limits = ranges(grid, low, high)
    for limit, tokens in zip(limits, (left, right), strict=True):
        if tokens is not None:
            limit[:] = tokens
    return Entries(row, column, *limits)


@dataclasses.dataclass(frozen=True, repr=False)
class DilatedSparse(Pattern):
    """Blocks at distances that are multiples of a rate, the rates taken in turn, nearest first.

    What the rates do not reach follows, nearest first, so a ratio of 1 keeps everything. One rate
    per head: `per_head` of patterns with one rate each.

    Args:
        sparsity_ratio: the share of admissible blocks kept.
        window_size: instead: each row keeps as many blocks as window_size tokens fill.
        dilation_rates: in blocks.
        block_size: tokens of a block.

    Source: Sparse Transformer (arXiv:1904.10509), section 4; Longformer (arXiv:2004.05150).

    Example:
        >>> pattern = DilatedSparse(0.5, dilation_rates=(1, 4), block_size=64)
        >>> pattern.lists(512, is_causal=True).rows()[0][0][7]
        [3, 5, 6, 7]
    """

    sparsity_ratio: float | None = None
    window_size: int | None = None
    dilation_rates: tuple[int, ...] = (1, 2, 4)
    block_size: int = 128

    def __post_init__(self):
        _make_plain(self)
        if self.window_size is not None:
            check_size("window_size", self.window_size)
        _check_sizes(self, "window_size")
        if not isinstance(self.dilation_rates, tuple) or not self.dilation_rates:
            raise refuse("dilation_rates", "a sequence of positive ints", self.dilation_rates)
        for rate in self.dilation_rates:
            check_size("dilation_rates", rate)

    def entries(self, grid: Grid, group: int = 0, groups: int = 1) -> Entries:
        """The first blocks of every row, as many as it keeps."""
        if self.sparsity_ratio is not None:
            counts = budget(grid, self.sparsity_ratio)
        else:
            counts = np.minimum(-(-(self.window_size or 1) // self.block_size), grid.limit)
        diagonal, rates = grid.diagonal, self.dilation_rates
        # So far away at most lies what the turns reach until a row has its count.
        far = np.minimum(counts * min(max(rates), grid.columns), grid.columns)
        candidates = ranges(grid, diagonal - far, diagonal + far + 1)

        def priority(row: int, column: np.ndarray) -> np.ndarray:
            distance = np.abs(column - diagonal[row])
            turn = np.full(distance.shape, UNREACHED) + distance
            for i, rate in enumerate(rates):
                reached = distance % rate == 0
                turn = np.where(reached, np.minimum(turn, distance // rate * len(rates) + i), turn)
            return np.where(distance == 0, -1, turn * 2 + (column > diagonal[row]))

        return first_by(counts, candidates, priority)


UNREACHED = 2**40  # later than every turn of a rate, and more than every column


@dataclasses.dataclass(frozen=True, repr=False)
class GlobalLocal(Pattern):
    """Blocks that every row sees, a local window, and optionally random blocks.

    Args:
        sparsity_ratio: the share of admissible blocks kept, by every row: a quarter of them, at
            least one, are the first blocks, then random_blocks, the rest the nearest.
        global_tokens: instead: rounded up to whole blocks, seen by every row; if not causal, the
            rows at their positions see everything. An int counts from the start; a pair from the
            start and the end.
        window_size, window_blocks: instead: the window, as in `LocalWindow`.
        random_blocks: more blocks per row, drawn anew for each row from those not kept otherwise.
        seed: of the random blocks; the same seed gives the same blocks everywhere.
        block_size: tokens of a block.

    Source: Longformer (arXiv:2004.05150), BigBird (arXiv:2007.14062).

    Example:
        >>> pattern = GlobalLocal(global_tokens=1, window_blocks=1, block_size=64)
        >>> pattern.lists(256).rows()[0][0]
        [[0, 1, 2, 3], [0, 1], [0, 2], [0, 3]]
    """

    sparsity_ratio: float | None = None
    global_tokens: int | tuple[int, int] | None = None
    window_size: int | tuple[int | None, int | None] | None = None
    window_blocks: int | None = None
    random_blocks: int = 0
    seed: int = 0
    block_size: int = 128

    def __post_init__(self):
        _make_plain(self)
        tokens = self.global_tokens
        _check_pair("global_tokens", tokens)
        if isinstance(tokens, tuple) and (None in tokens or not any(tokens)):
            raise refuse("global_tokens", "a positive int or a pair of ints", tokens)
        _check_pair("window_size", self.window_size)
        for name in ("random_blocks", "seed"):
            check_index(name, getattr(self, name))
        if self.seed and not self.random_blocks:
            raise refuse("seed", "0 without random_blocks", self.seed)
        if not _check_sizes(self, "global_tokens", "window_size", "window_blocks"):
            if tokens is None:
                raise refuse("global_tokens", "a positive int with a window", None)
            self._window()

    def _window(self) -> LocalWindow:
        return LocalWindow(None, self.window_size, self.window_blocks, self.block_size)

    def entries(self, grid: Grid, group: int = 0, groups: int = 1) -> Entries:
        """The global, local and random blocks of a grid."""
        if self.sparsity_ratio is not None:
            return self._by_ratio(grid, budget(grid, self.sparsity_ratio))
        tokens: Any = self.global_tokens
        tokens = (tokens, 0) if isinstance(tokens, int) else tokens
        first, last = (-(-x // self.block_size) for x in tokens)
        zero = np.zeros(grid.rows, int)
        parts = [
            self._window().entries(grid),
            ranges(grid, zero, zero + first),
            ranges(grid, zero + grid.columns - last, zero + grid.columns),
        ]
        if not grid.is_causal:
            dense = self._global_rows(grid, first, last)
            parts.append(ranges(grid, zero, np.where(dense, grid.columns, 0)))
        kept = block_entries.union(grid, parts)
        if not self.random_blocks:
            return kept
        return block_entries.union(grid, [kept, self._random(grid, kept)])

    def _global_rows(self, grid: Grid, first: int, last: int) -> np.ndarray:
        """bool [rows]: which hold a query at the position of a global key."""
        begin, end = grid.queries(np.arange(grid.rows))
        split = max(grid.columns - last, 0) * grid.block_size
        found = np.zeros(grid.rows, bool)
        for low, high in ((0, min(first * grid.block_size, grid.S)), (split, grid.S)):
            found |= (begin < grid.k_start + high) & (end >= grid.k_start + low) & (low < high)
        return found

    def _random(self, grid: Grid, kept: Entries) -> Entries:
        """Some of the admissible blocks that are not kept."""
        chosen, before = [], grid.q_start // grid.block_size  # a row is its position's
        for i, column in enumerate(block_entries.by_row(kept, grid.rows)):
            free = grid.limit[i] - len(column)
            number = min(self.random_blocks, free)
            draw = np.random.default_rng((self.seed, before + i)).choice
            rank = np.sort(draw(free, number, replace=False)) if number else np.zeros(0, int)
            # The free block of a rank lies behind as many kept ones as have fewer free before.
            behind = np.searchsorted(column - np.arange(len(column)), rank, side="right")
            chosen.append(rank + behind)
        return block_entries.from_rows(chosen)

    def _by_ratio(self, grid: Grid, counts: np.ndarray) -> Entries:
        diagonal, zero = grid.diagonal, np.zeros(grid.rows, int)
        first = np.maximum(1, (counts + 2) // 4)
        always = [ranges(grid, zero, first), ranges(grid, diagonal, diagonal + 1)]
        near = ranges(grid, diagonal - counts, diagonal + counts + 1)
        parts, drawn = [*always, near], [zero[:0]] * grid.rows
        if self.random_blocks:
            parts.append(self._random(grid, block_entries.union(grid, always)))
            drawn = block_entries.by_row(parts[-1], grid.rows)

        def priority(row: int, column: np.ndarray) -> np.ndarray:
            distance = np.abs(column - diagonal[row])
            turn = 2 * distance + (column > diagonal[row]) + 2 * grid.columns
            turn = np.where(column < first[row], column, turn)
            turn = np.where(np.isin(column, drawn[row]), grid.columns, turn)
            return np.where(distance == 0, -1, turn)

        return first_by(counts, block_entries.union(grid, parts), priority)


@dataclasses.dataclass(frozen=True, repr=False)
class Hierarchical(Pattern):
    """All blocks nearby, and of the bands further out, each twice as far, every 2nd, 4th, ... one.

    Block j is kept at distance d from the diagonal if d < near_blocks * 2^v, where 2^v is the
    largest power of two that divides j: nearby all, then the even ones, and so on.

    Args:
        sparsity_ratio: the share of admissible blocks kept: near_blocks grows until it is reached.
        near_blocks: how far, in blocks, everything is kept.
        levels: how many bands there are beyond the near one; None for as many as fit.
        block_size: tokens of a block.

    Source: the halving bands of Radial Attention (arXiv:2506.19852) and LogSparse
    (arXiv:1907.00235).

    Example:
        >>> pattern = Hierarchical(near_blocks=2, block_size=64)
        >>> pattern.lists(1024, is_causal=True).rows()[0][0][15]
        [0, 8, 12, 14, 15]
    """

    sparsity_ratio: float | None = None
    near_blocks: int | None = None
    levels: int | None = None
    block_size: int = 128

    def __post_init__(self):
        _make_plain(self)
        if self.near_blocks is not None:
            check_size("near_blocks", self.near_blocks)
        if self.levels is not None:
            check_index("levels", self.levels)
        _check_sizes(self, "near_blocks")

    def entries(self, grid: Grid, group: int = 0, groups: int = 1) -> Entries:
        """The blocks of a grid, nearest bands first."""
        if self.near_blocks is not None:
            return self._within(grid, np.full(grid.rows, self.near_blocks))
        counts, diagonal = budget(grid, self.sparsity_ratio or 1.0), grid.diagonal
        power = self._power(np.arange(grid.columns))

        def priority(row: int, column: np.ndarray) -> np.ndarray:
            distance = np.abs(column - diagonal[row])
            return distance // power[column] * grid.columns + distance

        # With near_blocks = n a row keeps n blocks or more.
        return first_by(counts, self._within(grid, counts), priority)

    def _power(self, column: np.ndarray) -> np.ndarray:
        """The largest power of two, of those with a band, that divides a column."""
        power = np.where(column > 0, column & -column, UNREACHED)
        return power if self.levels is None else np.minimum(power, 2 ** min(self.levels, 40))

    def _within(self, grid: Grid, near: np.ndarray) -> Entries:
        """What each row keeps with near_blocks of its own."""
        diagonal, near, parts = grid.diagonal, np.minimum(near, grid.columns), []
        bands = grid.columns.bit_length()
        for band in range(bands if self.levels is None else min(bands, self.levels + 1)):
            step = 2**band  # of which all multiples nearer than this are kept
            first = -((near * step - 1 - diagonal) // step)
            end = np.minimum((diagonal + near * step - 1) // step + 1, -(-grid.limit // step))
            row, multiple, *_ = ranges(grid, first, end)
            parts.append(whole(row, multiple * step))
        zero = np.flatnonzero((self._power(np.zeros(1, int)) * near > diagonal) & (grid.limit > 0))
        return block_entries.union(grid, [*parts, whole(zero, 0 * zero)])
