"""Block lists: which key blocks each block of queries visits, as arrays.

Static lists are NumPy arrays, known at trace time; lists that depend on data are JAX arrays with a
capacity fixed at trace time. Causality, segment ids, the ragged end and dropout are masks of a call
on top of its lists.
"""

import dataclasses
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
            {1, K, N}; rows = ceil(T / block_size). Entries from counts on may be any column.
        counts: int32 [b, n, rows], how many entries of a row are valid.
        bands: (left, right) per band, in tokens, None for no limit: a query at position p sees a
            key at s only if -right <= p - s <= left. The first is (None, None), the whole block.
        band_index: int32 [b, n, rows, capacity], the band of each entry; None: the first.
        block_size: tokens of a block.

    Example:
        >>> lists = from_mask(np.tri(4, dtype=bool), 64)
        >>> lists.columns[0, 0].tolist(), lists.counts[0, 0].tolist()
        ([[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]], [1, 2, 3, 4])
    """

    columns: Any
    counts: Any
    bands: tuple[tuple[int | None, int | None], ...] = dataclasses.field(
        default=(WHOLE,), metadata={"static": True}
    )
    band_index: Any = None
    block_size: int = dataclasses.field(default=128, metadata={"static": True})

    @property
    def capacity(self) -> int:
        """The most entries that a row can have."""
        return self.columns.shape[-1]

    @property
    def is_static(self) -> bool:
        """Are the lists known at trace time?"""
        return all(isinstance(x, np.ndarray) for x in jax.tree.leaves(self))

    @property
    def valid(self) -> Any:
        """bool [b, n, rows, capacity]: which entries count."""
        return _along_last(self.capacity, 4) < self.counts[..., None]

    def blocks(self, length: int) -> int:
        """How many blocks as many tokens fill."""
        _check_block_size(self.block_size)
        return -(-length // self.block_size)


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
    mask = mask.reshape(*[1] * (4 - mask.ndim), *shape)
    counts = mask.sum(-1, dtype=np.int32)
    capacity = max(1, int(counts.max(initial=0)))
    # A stable sort of "not kept" puts the kept columns first, in ascending order.
    columns = np.argsort(~mask, axis=-1, kind="stable")[..., :capacity]
    last = np.take_along_axis(columns, np.maximum(counts, 1)[..., None] - 1, -1)
    valid = np.arange(capacity) < counts[..., None]
    columns = np.where(valid, columns, np.where(counts[..., None] > 0, last, 0))
    if band_index is not None:
        band_index = _known_array("band_index", band_index)
        if band_index.shape != shape or band_index.dtype.kind not in "iu":
            raise refuse("band_index", f"ints of the mask's shape {shape}", band_index)
        band_index = band_index.reshape(mask.shape)
        band_index = np.take_along_axis(band_index, columns, -1).astype(np.int32)
    lists = BlockLists(columns.astype(np.int32), counts, tuple(bands), band_index, block_size)
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
    columns, valid = np.asarray(lists.columns), np.asarray(lists.valid)
    kept = (valid & (columns < limit[:, None])).sum()
    return float(kept / max(1, limit.sum() * columns.shape[0] * columns.shape[1]))


def partial_blocks(
    lists: BlockLists,
    T: int,
    S: int,
    is_causal: bool = False,
    q_start: int = 0,
    k_start: int = 0,
) -> np.ndarray:
    """bool [b, n, rows, capacity]: the valid entries of static lists that a call masks in part.

    A block is masked in part if its band or causality hides a pair of tokens in it.

    Example:
        >>> lists = from_mask(np.tri(4, dtype=bool), 64)
        >>> int(partial_blocks(lists, 256, 256, is_causal=True).sum())
        4
    """
    size, column = lists.block_size, np.asarray(lists.columns)
    row = np.arange(column.shape[2])[:, None]
    first, last = q_start + row * size, q_start + np.minimum((row + 1) * size, T) - 1
    nearest = first - (k_start + np.minimum((column + 1) * size, S) - 1)
    furthest = last - (k_start + column * size)
    left, right = (
        np.array([np.inf if band[i] is None else band[i] for band in lists.bands]) for i in (0, 1)
    )
    if is_causal:
        right = np.minimum(right, 0)
    band = 0 if lists.band_index is None else np.asarray(lists.band_index)
    return np.asarray(lists.valid) & ((furthest > left[band]) | (-nearest > right[band]))


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
    shape = np.shape(lists.columns)
    x: Any
    for name, x, wanted in (
        ("blocks.columns", lists.columns, (*shape[:2], rows, *shape[3:])),
        ("blocks.counts", lists.counts, shape[:3]),
        ("blocks.band_index", lists.band_index, shape),
    ):
        if x is None and name == "blocks.band_index":
            continue
        if (
            len(shape) != 4
            or getattr(x, "shape", None) != wanted
            or getattr(x, "dtype", None) != jnp.int32
        ):
            form = "[b, n, rows]" if name == "blocks.counts" else "[b, n, rows, capacity]"
            raise refuse(name, f"int32 {form} with {rows} rows, all of one shape", x)
    for axis, sizes in ((0, batch), (1, heads)):
        if sizes is not None and shape[axis] not in sizes:
            wanted = f"axis {axis} of size {' or '.join(map(str, sorted(set(sizes))))}"
            raise refuse("blocks.columns", wanted, lists.columns)
    if all(map(_is_known, jax.tree.leaves(lists))):
        _check_contents(jax.tree.map(np.asarray, lists), columns)


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
    counts, valid = np.asarray(lists.counts), np.asarray(lists.valid)
    if counts.min(initial=0) < 0 or counts.max(initial=0) > lists.capacity:
        raise refuse("blocks.counts", f"counts from 0 to the capacity {lists.capacity}", counts)
    entries = np.where(valid, lists.columns, 0)
    if entries.min(initial=0) < 0 or entries.max(initial=0) >= columns:
        wanted = f"columns from 0 to {columns - 1}"
        raise refuse("blocks.columns", wanted, int(entries.flat[np.abs(entries).argmax()]))
    if not ((np.diff(entries, axis=-1) > 0) | ~valid[..., 1:]).all():
        raise refuse("blocks.columns", "each row in ascending order, no column twice", entries)
    if lists.band_index is not None:
        index = np.where(valid, np.asarray(lists.band_index), 0)
        if index.min(initial=0) < 0 or index.max(initial=0) >= len(lists.bands):
            wanted = f"band numbers from 0 to {len(lists.bands) - 1}"
            raise refuse("blocks.band_index", wanted, lists.band_index)


def window(lists: BlockLists, row: int, rows: int, column: int, columns: int) -> BlockLists:
    """The lists of rows `row`, `row` + 1, ... for keys that begin with block `column`.

    Example:
        >>> window(from_mask(np.tri(4, dtype=bool), 64), 1, 3, 1, 2).counts[0, 0].tolist()
        [1, 2, 2]
    """
    xp: Any = np if lists.is_static else jnp
    lists = jax.tree.map(lambda x: x[:, :, row : row + rows], lists)
    inside = lists.valid & (lists.columns >= column) & (lists.columns < column + columns)
    if lists.is_static and bool((inside == lists.valid).all()):
        moved = np.maximum(lists.columns - np.int32(column), 0)
        return dataclasses.replace(lists, columns=moved)
    # Columns ascend, so those inside follow each other: move them to the front.
    before = (lists.valid & (lists.columns < column)).sum(-1, keepdims=True)
    slot = xp.minimum(_along_last(lists.capacity, 4) + before, lists.capacity - 1)
    moved = xp.clip(xp.take_along_axis(lists.columns, slot, -1) - column, 0, columns - 1)
    band = lists.band_index
    return dataclasses.replace(
        lists,
        columns=moved.astype(np.int32),
        counts=inside.sum(-1).astype(np.int32),
        band_index=None if band is None else xp.take_along_axis(band, slot, -1),
    )


class Transposed(NamedTuple):
    """Lists of query blocks for each key block, one after the other.

    Key block j is visited by rows[..., starts[..., j] : starts[..., j + 1]], in ascending order.
    """

    rows: Any  # int32 [b, n, size]; anything in range from starts[..., -1] on
    starts: Any  # int32 [b, n, columns + 1]
    band_index: Any  # int32 [b, n, size] or None


def transpose(lists: BlockLists, columns: int) -> Transposed:
    """The query blocks that visit each of `columns` key blocks, in O(kept blocks).

    Static lists give NumPy arrays of the size that they need, traced ones arrays of size
    rows * capacity. Work and memory never depend on rows * columns.

    Example:
        >>> flat = transpose(from_mask(np.tri(3, dtype=bool), 64), 3)
        >>> flat.rows[0, 0].tolist(), flat.starts[0, 0].tolist()
        ([0, 1, 2, 1, 2, 2], [0, 3, 5, 6])
    """
    xp: Any = np if lists.is_static else jnp
    b, n, _, capacity = lists.columns.shape
    valid = xp.broadcast_to(lists.valid, lists.columns.shape)
    # Entries that do not count go behind the last column.
    column = xp.where(valid, lists.columns, columns).reshape(b, n, -1)
    order = xp.argsort(column, axis=-1, stable=True)
    column = xp.take_along_axis(column, order, -1)
    row = (order // capacity).astype(np.int32)
    find = np.vectorize if lists.is_static else jnp.vectorize
    search = find(lambda x: xp.searchsorted(x, xp.arange(columns + 1)), signature="(m)->(k)")
    starts = search(column).astype(np.int32)
    band = lists.band_index
    if band is not None:
        band = xp.take_along_axis(band.reshape(b, n, -1), order, -1)
    if lists.is_static:
        size = max(1, int(starts[..., -1].max(initial=0)))
        row, band = row[..., :size], None if band is None else band[..., :size]
    return Transposed(row, starts, band)


def token_mask(lists: BlockLists, T: int, S: int, q_start: int = 0, k_start: int = 0) -> Any:
    """bool [b, n, T, S]: the pairs of tokens that the lists and their bands leave; dense.

    Example:
        >>> token_mask(from_mask(np.eye(2, dtype=bool), 2), 3, 4)[0, 0].astype(int).tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]]
    """
    size, columns = lists.block_size, -(-S // lists.block_size)
    # Which band each block has, 0 for none: one-hot of the columns, without a scatter.
    band = 0 if lists.band_index is None else lists.band_index
    number = jnp.where(lists.valid, 1 + band, 0)
    hot = jnp.asarray(lists.columns)[..., None] == _along_last(columns, 5)
    number = jnp.where(hot, number[..., None], 0).max(-2)
    number = jnp.repeat(jnp.repeat(number, size, -2), size, -1)[..., :T, :S]
    distance = (q_start + np.arange(T))[:, None] - (k_start + np.arange(S))
    mask = jnp.zeros(number.shape, bool)
    for i, (left, right) in enumerate(lists.bands):
        near = np.ones(distance.shape, bool)
        near &= True if left is None else distance <= left
        near &= True if right is None else distance >= -right
        mask |= (number == i + 1) & near[None, None]
    return mask


def _along_last(size: int, ndim: int) -> np.ndarray:
    """0, 1, ... along the last of `ndim` axes."""
    return np.arange(size, dtype=np.int32).reshape(*[1] * (ndim - 1), size)
