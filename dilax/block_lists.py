"""Block lists: which key blocks each block of queries visits, as arrays.

Static lists are NumPy arrays, known at trace time, of the size of what they keep; lists that depend
on data are JAX arrays with a capacity fixed at trace time. Causality, segment ids, the ragged end
and dropout are masks of a call on top of its lists.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dilax._types import refuse

WHOLE = (None, None)  # the band that masks nothing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockLists:
    """The key blocks that each block of queries visits.

    Blocks count from the first row of an array, not from position 0: row i of a list belongs to
    queries i * block_size, i * block_size + 1, ...

    Args:
        columns: int32 [b, n, rows, capacity], key blocks in ascending order, b in {1, B} and n in
            {1, K, N}; rows = ceil(T / block_size). Entries from counts on may be any column. With
            starts: int32 [b, n, size], where no row takes more room than it needs.
        counts: int32 [b, n, rows], how many entries of a row are valid.
        bands: (left, right) per band, in tokens, None for no limit: a query at position p sees a
            key at s only if -right <= p - s <= left. The first is (None, None), the whole block.
        band_index: int32 like columns, the band of each entry; None: the first.
        block_size: tokens of a block.
        starts: int32 [b, n, rows], where in columns[b, n] a row's entries begin; one row after the
            other.
        longest: with starts, a limit of the counts that is known when tracing; None: there is none.

    Example:
        >>> lists = from_mask(np.tri(3, dtype=bool), 64)
        >>> lists.columns.tolist(), lists.starts.tolist(), lists.counts.tolist()
        ([[[0, 0, 1, 0, 1, 2]]], [[[0, 1, 3]]], [[[1, 2, 3]]])
    """

    columns: Any
    counts: Any
    bands: tuple[tuple[int | None, int | None], ...] = dataclasses.field(
        default=(WHOLE,), metadata={"static": True}
    )
    band_index: Any = None
    block_size: int = dataclasses.field(default=128, metadata={"static": True})
    starts: Any = None
    longest: int | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def capacity(self) -> int:
        """The most entries that a row can have."""
        if self.starts is not None and self.longest is not None:
            return self.longest
        return self.columns.shape[-1]

    @property
    def is_static(self) -> bool:
        """Are the lists known at trace time?"""
        return all(isinstance(x, np.ndarray) for x in jax.tree.leaves(self))

    @property
    def valid(self) -> Any:
        """bool like columns: which entries count."""
        if self.starts is None:
            slot = np.arange(self.capacity, dtype=np.int32).reshape(1, 1, 1, -1)
            return slot < self.counts[..., None]
        return self.flat().owners()[1].reshape(self.columns.shape)

    @property
    def begins(self) -> Any:
        """int32 [rows] or [b, n, rows]: starts, also where all rows take as much room."""
        if self.starts is not None:
            return self.starts
        return np.arange(self.counts.shape[2], dtype=np.int32) * np.int32(self.capacity)

    def flat(self) -> "Flat":
        """The same lists with all entries in one row."""
        shape, band = self.counts.shape, self.band_index
        size = math.prod(self.columns.shape[2:])
        before = np.arange(math.prod(shape[:2]), dtype=np.int32).reshape(*shape[:2], 1)
        return Flat(
            self.columns.reshape(-1),
            None if band is None else band.reshape(-1),
            self.begins + before * np.int32(size),
            self.counts,
        )

    def kept(self) -> "Kept":
        """The valid entries of static lists."""
        flat = jax.tree.map(np.asarray, self).flat()
        line, valid = flat.owners()
        place = np.flatnonzero(valid)
        band = None if flat.band_index is None else flat.band_index[place]
        batch, head, row = np.unravel_index(line[place], flat.counts.shape)
        return Kept(batch, head, row, flat.columns[place], band)

    def rows(self) -> list[list[list[list[int]]]]:
        """The columns of each row of static lists, [b][n][rows]."""
        found, counts = self.kept().column, np.asarray(self.counts)
        rows = iter(np.split(found, np.cumsum(counts.reshape(-1))[:-1]))
        return [[[next(rows).tolist() for _ in row] for row in head] for head in counts]

    def blocks(self, length: int) -> int:
        """How many blocks as many tokens fill."""
        _check_block_size(self.block_size)
        return -(-length // self.block_size)


class Kept(NamedTuple):
    """The valid entries of static lists, list after list and row after row: [size] each."""

    batch: np.ndarray
    head: np.ndarray
    row: np.ndarray
    column: np.ndarray
    band: np.ndarray | None


class Flat(NamedTuple):
    """Lists with all entries in one row.

    columns, band_index: [size]. starts, counts: [b, n, rows].
    """

    columns: Any
    band_index: Any
    starts: Any
    counts: Any

    def owners(self) -> tuple[Any, Any]:
        """The row, of those of all lists, that each entry lies in, and does it count?"""
        xp: Any = np if isinstance(self.starts, np.ndarray) else jnp
        place, starts = xp.arange(self.columns.size, dtype=np.int32), self.starts.reshape(-1)
        line = xp.maximum(xp.searchsorted(starts, place, side="right") - 1, 0)
        within = place - starts[line]
        return line, (within >= 0) & (within < self.counts.reshape(-1)[line])


def packed(
    columns: np.ndarray,
    counts: np.ndarray,
    bands: tuple[tuple[int | None, int | None], ...] = (WHOLE,),
    band_index: np.ndarray | None = None,
    block_size: int = 128,
) -> BlockLists:
    """Static lists of rows one after the other: columns [size], counts [b, n, rows].

    Example:
        >>> packed(np.array([4, 2, 5]), np.array([[[1, 2]]])).rows()
        [[[[4], [2, 5]]]]
    """
    starts = np.cumsum(counts, -1) - counts
    sizes = counts.sum(-1)
    # As much room for each as the fullest needs; nothing can be taken from an empty array.
    there = np.arange(max(1, sizes.max(initial=0))) < sizes[..., None]

    def spread(x: np.ndarray) -> np.ndarray:
        result = np.zeros(there.shape, np.int32)
        result[there] = x
        return result

    band_index = None if band_index is None else spread(band_index)
    counts, starts = counts.astype(np.int32), starts.astype(np.int32)
    return BlockLists(spread(columns), counts, tuple(bands), band_index, block_size, starts)


def from_mask(
    mask: Any,
    block_size: int,
    bands: tuple[tuple[int | None, int | None], ...] = (WHOLE,),
    band_index: Any = None,
) -> BlockLists:
    """Static lists of a boolean mask over blocks, [rows, columns] with up to two axes before.

    band_index, of the mask's shape, says which of `bands` masks each block.

    Raises:
        ValueError: the mask has another number of axes, is not boolean or not known when tracing,
            or a band is wrong.

    Example:
        >>> from_mask(np.eye(3, dtype=bool), 64).counts.tolist()
        [[[1, 1, 1]]]
    """
    mask = _known_array("mask", mask)
    if mask.dtype != bool or not 2 <= mask.ndim <= 4:
        raise refuse("mask", "a boolean array [b, n, rows, columns], b and n optional", mask)
    shape = mask.shape
    if band_index is not None:
        band_index = _known_array("band_index", band_index)
        if band_index.shape != shape or band_index.dtype.kind not in "iu":
            raise refuse("band_index", f"ints of the mask's shape {shape}", band_index)
        band_index = band_index[mask]
    counts = mask.reshape(*[1] * (4 - mask.ndim), *shape).sum(-1)
    lists = packed(np.nonzero(mask)[-1], counts, bands, band_index, block_size)
    check_lists(lists, shape[-2], shape[-1])
    return lists


def _known_array(name: str, x: Any) -> np.ndarray:
    if isinstance(x, Tracer):
        raise refuse(name, "an array that is known when the call is traced", x)
    return np.asarray(x)


def admissible(
    T: int, S: int, block_size: int, is_causal: bool, q_start: int = 0, k_start: int = 0
) -> np.ndarray:
    """int [rows]: how many key blocks causality leaves a row; they are always the first ones.

    Example:
        >>> admissible(300, 300, 128, True).tolist(), admissible(300, 200, 128, False).tolist()
        ([1, 2, 3], [2, 2, 2])
    """
    rows, columns = -(-T // block_size), -(-S // block_size)
    if not is_causal:
        return np.full(rows, columns)
    last_query = q_start + np.minimum((np.arange(rows) + 1) * block_size, T) - 1
    return np.clip((last_query - k_start) // block_size + 1, 0, columns)


def density(
    lists: BlockLists,
    T: int,
    S: int,
    is_causal: bool = False,
    q_start: int = 0,
    k_start: int = 0,
) -> float:
    """The share of admissible blocks that static lists keep; partly masked blocks count whole.

    Example:
        >>> density(from_mask(np.tri(4, dtype=bool), 64), 256, 256, is_causal=True)
        1.0
    """
    limit = admissible(T, S, lists.block_size, is_causal, q_start, k_start)
    kept = lists.kept()
    number = (kept.column < limit[kept.row]).sum()
    return float(number / max(1, limit.sum() * math.prod(lists.counts.shape[:2])))


def partial_blocks(
    lists: BlockLists,
    T: int,
    S: int,
    is_causal: bool = False,
    q_start: int = 0,
    k_start: int = 0,
) -> np.ndarray:
    """bool [size]: which of the entries that static lists keep a call masks in part.

    A block is masked in part if its band or causality hides a pair of tokens in it.

    Example:
        >>> lists = from_mask(np.tri(4, dtype=bool), 64)
        >>> int(partial_blocks(lists, 256, 256, is_causal=True).sum())
        4
    """
    size, kept = lists.block_size, lists.kept()
    row, column = kept.row, kept.column
    first, last = q_start + row * size, q_start + np.minimum((row + 1) * size, T) - 1
    nearest = first - (k_start + np.minimum((column + 1) * size, S) - 1)
    furthest = last - (k_start + column * size)
    left, right = (
        np.array([np.inf if band[i] is None else band[i] for band in lists.bands]) for i in (0, 1)
    )
    if is_causal:
        right = np.minimum(right, 0)
    band = 0 if kept.band is None else kept.band
    return (furthest > left[band]) | (-nearest > right[band])


def check_lists(
    lists: BlockLists,
    rows: int,
    columns: int,
    batch: tuple[int, ...] | None = None,
    heads: tuple[int, ...] | None = None,
) -> None:
    """Refuse lists that do not fit `rows` x `columns` blocks; contents unless they are traced.

    batch and heads: the sizes that the first two axes may have, None for any.

    Raises:
        ValueError: a shape, a dtype, a count, a column or a band is wrong, or a row is not sorted.

    Example:
        >>> check_lists(from_mask(np.eye(3, dtype=bool), 64), 3, 3)
    """
    _check_bands(lists)
    _check_shapes(lists, rows)
    for axis, sizes in ((0, batch), (1, heads)):
        if sizes is not None and lists.counts.shape[axis] not in sizes:
            wanted = f"axis {axis} of size {' or '.join(map(str, sorted(set(sizes))))}"
            raise refuse("blocks.counts", wanted, lists.counts)
    if all(map(_is_known, jax.tree.leaves(lists))):
        _check_contents(jax.tree.map(np.asarray, lists), columns)


def _check_shapes(lists: BlockLists, rows: int) -> None:
    flat = lists.starts is not None
    if lists.longest is not None and not (flat and isinstance(lists.longest, int)):
        raise refuse("blocks.longest", "an int, with starts, or None", lists.longest)
    shape = np.shape(lists.columns)
    outer = (*(np.shape(lists.counts) if flat else shape)[:2], rows)
    of_rows = "[b, n, rows]", outer
    of_entries = ("[b, n, rows, capacity]", (*outer, *shape[3:4]))
    if flat:
        of_entries = ("[b, n, size]", (*outer[:2], *shape[2:3]))
    for name, form, wanted in (
        ("columns", *of_entries),
        ("counts", *of_rows),
        ("starts", *of_rows),
        ("band_index", *of_entries),
    ):
        x = getattr(lists, name)
        if x is None and name in ("starts", "band_index"):
            continue
        good = len(wanted) == form.count(",") + 1 and getattr(x, "shape", None) == wanted
        if not good or getattr(x, "dtype", None) != jnp.int32:
            raise refuse(f"blocks.{name}", f"int32 {form} with {rows} rows, all of one shape", x)


def _is_known(x: Any) -> bool:
    """Can this process read the array now?"""
    if isinstance(x, np.ndarray):
        return True
    return isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.is_fully_addressable


def _check_block_size(size: Any) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise refuse("blocks.block_size", "a positive int", size)


def _check_bands(lists: BlockLists) -> None:
    _check_block_size(lists.block_size)
    if not lists.bands or tuple(lists.bands[0]) != WHOLE:
        raise refuse("blocks.bands", "(None, None), the whole block, first", lists.bands)
    for band in lists.bands:
        good = isinstance(band, tuple) and len(band) == 2
        if not good or not all(x is None or isinstance(x, int) for x in band):
            raise refuse("blocks.bands", "pairs (left, right) of ints or None", band)


def _check_contents(lists: BlockLists, columns: int) -> None:
    counts, most = lists.counts, lists.capacity
    if counts.min(initial=0) < 0 or counts.max(initial=0) > most:
        raise refuse("blocks.counts", f"counts from 0 to the capacity {most}", counts)
    if lists.starts is not None:
        size, outside = lists.columns.shape[-1], ((0, 0), (0, 0))
        begin = np.pad(lists.starts, (*outside, (0, 1)), constant_values=size)
        if (begin < np.pad(lists.starts + counts, (*outside, (1, 0)))).any():
            wanted = f"rows one after the other, of counts entries each, in {size}"
            raise refuse("blocks.starts", wanted, lists.starts)
    kept = lists.kept()
    if kept.column.min(initial=0) < 0 or kept.column.max(initial=0) >= columns:
        wanted = f"columns from 0 to {columns - 1}"
        raise refuse("blocks.columns", wanted, int(kept.column[np.abs(kept.column).argmax()]))
    same = np.all([np.diff(x) == 0 for x in (kept.batch, kept.head, kept.row)], axis=0)
    if (same & (np.diff(kept.column) <= 0)).any():
        raise refuse("blocks.columns", "each row in ascending order, no column twice", kept.column)
    if kept.band is not None:
        if kept.band.min(initial=0) < 0 or kept.band.max(initial=0) >= len(lists.bands):
            wanted = f"band numbers from 0 to {len(lists.bands) - 1}"
            raise refuse("blocks.band_index", wanted, lists.band_index)


def window(lists: BlockLists, row: int, rows: int, column: int, columns: int) -> BlockLists:
    """The lists of rows `row`, `row` + 1, ... for keys that begin with block `column`.

    Example:
        >>> window(from_mask(np.tri(4, dtype=bool), 64), 1, 3, 1, 2).counts[0, 0].tolist()
        [1, 2, 2]
    """
    xp: Any = np if lists.is_static else jnp
    if lists.starts is None:
        shape, band = lists.counts.shape, lists.band_index
        lists = dataclasses.replace(
            lists,
            columns=lists.columns.reshape(*shape[:2], -1),
            band_index=None if band is None else band.reshape(*shape[:2], -1),
            starts=xp.broadcast_to(lists.begins, shape),
            longest=lists.capacity,
        )
    starts, counts = (x[:, :, row : row + rows] for x in (lists.starts, lists.counts))

    def number(what: Any) -> Any:
        """Of how many entries of each row it is true."""
        before = xp.pad(xp.cumsum(what, -1, dtype=np.int32), ((0, 0), (0, 0), (1, 0)))
        end, begin = (xp.take_along_axis(before, x, -1) for x in (starts + counts, starts))
        return end - begin

    # Columns ascend, so those inside follow each other.
    return dataclasses.replace(
        lists,
        columns=xp.clip(lists.columns - np.int32(column), 0, columns - 1),
        counts=number((lists.columns >= column) & (lists.columns < column + columns)),
        starts=starts + number(lists.columns < column),
    )


def token_mask(lists: BlockLists, T: int, S: int, q_start: int = 0, k_start: int = 0) -> Any:
    """bool [b, n, T, S]: the pairs of tokens that the lists and their bands leave; dense.

    Example:
        >>> token_mask(from_mask(np.eye(2, dtype=bool), 2), 3, 4)[0, 0].astype(int).tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    """
    flat, size, columns = lists.flat(), lists.block_size, -(-S // lists.block_size)
    # Which band each block has, 0 for none.
    band = 0 if flat.band_index is None else flat.band_index
    line, valid = flat.owners()
    number = jnp.zeros((lists.counts.size, columns), jnp.int32)
    number = number.at[line, flat.columns].max(jnp.where(valid, 1 + band, 0))
    number = number.reshape(*lists.counts.shape, columns)
    number = jnp.repeat(jnp.repeat(number, size, -2), size, -1)[..., :T, :S]
    distance = (q_start + np.arange(T))[:, None] - (k_start + np.arange(S))
    mask = jnp.zeros(number.shape, bool)
    for i, (left, right) in enumerate(lists.bands):
        near = np.ones(distance.shape, bool)
        near &= True if left is None else distance <= left
        near &= True if right is None else distance >= -right
        mask |= (number == i + 1) & near[None, None]
    return mask
