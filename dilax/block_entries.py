"""The kept blocks of a pattern as sorted lists of entries, and how these become `BlockLists`.

All of it is NumPy on the host, in time and memory of the order of the kept blocks.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dilax.block_lists import BlockLists, admissible, packed

UNLIMITED = 2**40


@dataclasses.dataclass(frozen=True)
class Grid:
    """The blocks of one call: rows of queries, columns of keys, and what causality leaves.

    Example:
        >>> grid = Grid(300, 300, 128, is_causal=True)
        >>> grid.rows, grid.columns, grid.limit.tolist(), grid.diagonal.tolist()
        (3, 3, [1, 2, 3], [0, 1, 2])
    """

    T: int
    S: int
    block_size: int
    is_causal: bool = False
    q_start: int = 0
    k_start: int = 0

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return -(-self.T // self.block_size)

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return -(-self.S // self.block_size)

    @property
    def limit(self) -> np.ndarray:
        """int [rows]: how many key blocks are admissible; they are the first ones."""
        place = (self.q_start, self.k_start)
        return admissible(self.T, self.S, self.block_size, self.is_causal, *place)

    @property
    def diagonal(self) -> np.ndarray:
        """int [rows]: the key block at the position of a row's last query, or the nearest one."""
        last = self.queries(np.arange(self.rows))[1]
        return np.clip((last - self.k_start) // self.block_size, 0, self.columns - 1)

    def queries(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last query position of a row."""
        first, end = row * self.block_size, np.minimum((row + 1) * self.block_size, self.T)
        return self.q_start + first, self.q_start + end - 1

    def keys(self, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last key position of a column."""
        first, end = column * self.block_size, np.minimum((column + 1) * self.block_size, self.S)
        return self.k_start + first, self.k_start + end - 1


class Entries(NamedTuple):
    """Kept blocks, sorted by row and then column, none twice, all of them admissible.

    left and right are the band in tokens, UNLIMITED where there is none. Neither is negative: each
    band holds distance 0, so the union of two has no gap and their intersection is not empty.
    """

    row: np.ndarray
    column: np.ndarray
    left: np.ndarray
    right: np.ndarray


def whole(row: Any, column: Any) -> Entries:
    """Entries without a band; the rows and columns must be sorted.

    Example:
        >>> whole([0, 1], [0, 1]).left.tolist() == [UNLIMITED] * 2
        True
    """
    row, column = np.asarray(row, np.int64), np.asarray(column, np.int64)
    return Entries(row, column, *(np.full(row.shape, UNLIMITED) for _ in range(2)))


def ranges(grid: Grid, first: np.ndarray, end: np.ndarray) -> Entries:
    """Whole blocks first[i] .. end[i] - 1 of every row i, as far as they are admissible.

    Example:
        >>> ranges(Grid(256, 256, 64, True), np.zeros(4, int), np.full(4, 2)).column.tolist()
        [0, 0, 1, 0, 1, 0, 1]
    """
    first, end = np.maximum(first, 0), np.minimum(end, grid.limit)
    counts = np.maximum(end - first, 0)
    row = np.repeat(np.arange(grid.rows), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return whole(row, np.repeat(first, counts) + within)


def nearest(grid: Grid, counts: np.ndarray) -> Entries:
    """The counts[i] admissible blocks of row i that are nearest to its diagonal; left before right.

    Example:
        >>> nearest(Grid(256, 256, 64), np.full(4, 2)).column.tolist()
        [0, 1, 0, 1, 1, 2, 2, 3]
    """
    counts = np.minimum(counts, grid.limit)
    first = np.clip(grid.diagonal - counts // 2, 0, np.maximum(grid.limit - counts, 0))
    return ranges(grid, first, first + counts)


def budget(grid: Grid, ratio: float) -> np.ndarray:
    """int [rows]: the blocks that a row keeps, clip(round(ratio * a), 1, a) of a admissible ones.

    Halves are rounded up.

    Example:
        >>> budget(Grid(640, 640, 64, is_causal=True), 0.3).tolist()
        [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    """
    return np.minimum(np.maximum(np.floor(ratio * grid.limit + 0.5).astype(int), 1), grid.limit)


def first_by(
    counts: np.ndarray, candidates: Entries, priority: Callable[[int, np.ndarray], np.ndarray]
) -> Entries:
    """The counts[i] candidates of row i that have the lowest priority(i, columns).

    Example:
        >>> all_blocks = ranges(Grid(192, 192, 64), np.zeros(3, int), np.full(3, 3))
        >>> first_by(np.full(3, 1), all_blocks, lambda i, c: -c).column.tolist()
        [2, 2, 2]
    """
    kept = []
    for i, (count, columns) in enumerate(zip(counts, by_row(candidates, len(counts)), strict=True)):
        order = np.argsort(priority(i, columns), kind="stable")
        kept.append(np.sort(columns[order[:count]]))
    return from_rows(kept)


def by_row(entries: Entries, rows: int) -> list[np.ndarray]:
    """The columns of each row.

    Example:
        >>> [x.tolist() for x in by_row(whole([0, 0, 2], [1, 4, 3]), 3)]
        [[1, 4], [], [3]]
    """
    return np.split(entries.column, np.searchsorted(entries.row, np.arange(1, rows)))


def from_rows(columns: Sequence[np.ndarray]) -> Entries:
    """Whole blocks from the sorted columns of each row.

    Example:
        >>> from_rows([np.array([1, 4]), np.array([0])]).row.tolist()
        [0, 0, 1]
    """
    row = np.repeat(np.arange(len(columns)), [len(x) for x in columns])
    return whole(row, np.concatenate(columns))


def union(grid: Grid, parts: Sequence[Entries]) -> Entries:
    """All blocks that any part keeps; a block's bands are joined."""
    row, column, left, right = (np.concatenate(x) for x in zip(*parts, strict=True))
    place = row * grid.columns + column
    order = np.argsort(place, kind="stable")
    place, row, column, left, right = (x[order] for x in (place, row, column, left, right))
    first = np.flatnonzero(np.diff(place, prepend=-1))
    if not len(first):
        return Entries(row, column, left, right)
    return Entries(
        row[first],
        column[first],
        np.maximum.reduceat(left, first),
        np.maximum.reduceat(right, first),
    )


def intersection(grid: Grid, parts: Sequence[Entries]) -> Entries:
    """The blocks that all parts keep; a block's bands are cut."""
    result = parts[0]
    for part in parts[1:]:
        places = [x.row * grid.columns + x.column for x in (result, part)]
        _, a, b = np.intersect1d(*places, assume_unique=True, return_indices=True)
        left = np.minimum(result.left[a], part.left[b])
        right = np.minimum(result.right[a], part.right[b])
        result = Entries(result.row[a], result.column[a], left, right)
    return result


def without_whole_bands(grid: Grid, entries: Entries) -> Entries:
    """The same entries, with no band where it masks no pair of the block."""
    (q_first, q_last), (k_first, k_last) = grid.queries(entries.row), grid.keys(entries.column)
    left = np.where(q_last - k_first <= entries.left, UNLIMITED, entries.left)
    ahead = 0 if grid.is_causal else k_last - q_first  # causality masks the rest anyway
    right = np.where(ahead <= entries.right, UNLIMITED, entries.right)
    return Entries(entries.row, entries.column, left, right)


def as_lists(grid: Grid, heads: Sequence[Entries]) -> BlockLists:
    """The BlockLists of the entries of each list of heads.

    Example:
        >>> as_lists(Grid(128, 128, 64), [whole([0, 1], [0, 1])]).rows()
        [[[[0], [1]]]]
    """
    heads = [without_whole_bands(grid, entries) for entries in heads]
    counts = np.stack([np.bincount(x.row, minlength=grid.rows) for x in heads])
    limits = np.concatenate([np.stack([x.left, x.right], 1) for x in heads])
    free = np.full((1, 2), UNLIMITED)
    bands, numbers = np.unique(np.concatenate([-free, -limits]), axis=0, return_inverse=True)
    numbers = numbers.reshape(-1)[1:] if len(bands) > 1 else None
    limited: Any = tuple(tuple(None if -x == UNLIMITED else int(-x) for x in row) for row in bands)
    columns = np.concatenate([x.column for x in heads])
    return packed(columns, counts[None], limited, numbers, grid.block_size)
