"""Block lists as the kernels read them: flat entries, and where each tile of 128 rows begins.

Lists come as an object with `columns`, `counts`, `bands`, `band_index` and `block_size` (see
`dilax.block_lists`). A tile of 128 rows is two warpgroups of 64, which follow one list; with blocks
of 64 each has its own, side by side. Entries name blocks of the other side ("away"). Everything
here works alike on NumPy arrays, when the lists are known at trace time, and on traced ones; sorts
keep it at O(entries log entries) in time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

TILE_ROWS = 128
# Bits of an entry: block, query head in its group, band, and whether it is none at all.
BLOCK_BITS, MEMBER_BITS, BAND_BITS = 18, 6, 5
MEMBER_SHIFT = BLOCK_BITS
BAND_SHIFT = MEMBER_SHIFT + MEMBER_BITS
EMPTY_SHIFT = BAND_SHIFT + BAND_BITS
EMPTY = 1 << EMPTY_SHIFT


class Lists(NamedTuple):
    """entries int32 `[b, n, E]`; begin and counts int32 `[b, n, tiles]` say what a tile has.

    With blocks of 64 entries are pairs, `[b, n, 2 E]`. longest: no tile has more entries.
    """

    entries: Any
    begin: Any
    counts: Any
    longest: int


class Entry(NamedTuple):
    """A decoded entry: int32 scalars."""

    block: Any
    member: Any
    band: Any
    empty: Any


def decode(entry: Any) -> Entry:
    """The fields of a packed entry."""

    def field(shift: int, bits: int) -> Any:
        return lax.shift_right_logical(entry, jnp.int32(shift)) & ((1 << bits) - 1)

    return Entry(
        field(0, BLOCK_BITS),
        field(MEMBER_SHIFT, MEMBER_BITS),
        field(BAND_SHIFT, BAND_BITS),
        field(EMPTY_SHIFT, 1),
    )


def is_static(blocks: Any) -> bool:
    """Whether lists are NumPy arrays, known at trace time."""
    return all(isinstance(x, np.ndarray) for x in (blocks.columns, blocks.counts))


def _module(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


def _packed(blocks: Any) -> tuple[Any, Any]:
    """Entries with their bands, and which of them are valid: `[b, n, rows, capacity]`."""
    xp = _module(blocks.columns)
    entries = xp.asarray(blocks.columns).astype(xp.int32)
    if blocks.band_index is not None:
        entries = entries | (xp.asarray(blocks.band_index).astype(xp.int32) << BAND_SHIFT)
    valid = xp.arange(entries.shape[-1]) < xp.asarray(blocks.counts)[..., None]
    return entries, valid


def _gather(x: Any, order: Any) -> Any:
    return _module(x).take_along_axis(x, order, -1)


def _front(entries: Any, valid: Any) -> Any:
    """Valid entries first, in their order (last axis)."""
    return _gather(entries, _module(entries).argsort(~valid, axis=-1, stable=True))


def for_queries(blocks: Any, tiles: int) -> Lists:
    """Lists whose home tiles are 128 queries and whose entries are key blocks."""
    entries, valid = _packed(blocks)
    xp = _module(entries)
    b, n, rows, capacity = entries.shape
    counts = valid.sum(-1).astype(xp.int32)
    if xp is np:
        flat, begin = _flatten(entries, valid, counts)
    else:
        flat = _front(entries, valid).reshape(b, n, rows * capacity)
        begin = xp.broadcast_to(xp.arange(rows, dtype=xp.int32) * capacity, counts.shape)
    if blocks.block_size < TILE_ROWS:
        return _side_by_side(flat, begin, counts, capacity)
    row = np.minimum(np.arange(tiles) // (blocks.block_size // TILE_ROWS), rows - 1)
    longest = int(counts.max()) if xp is np else capacity
    return Lists(flat, begin[..., row], counts[..., row], longest)


def _side_by_side(flat: Any, begin: Any, counts: Any, capacity: int) -> Lists:
    """The lists of rows 2i and 2i + 1 as pairs of entries, the shorter one filled up."""
    xp = _module(flat)
    if counts.shape[-1] % 2:
        begin, counts = (xp.pad(x, ((0, 0), (0, 0), (0, 1))) for x in (begin, counts))
    longer = xp.maximum(counts[..., ::2], counts[..., 1::2])
    ends = xp.cumsum(longer, -1, dtype=xp.int32)
    first = ends - longer
    size = max(1, int(ends[..., -1].max())) if xp is np else flat.shape[-1]
    # Place p belongs to the tile before whose end it lies.
    tile = xp.minimum(_search(ends, size + 1)[..., 1:], longer.shape[-1] - 1)
    rank = xp.arange(size, dtype=xp.int32) - _gather(first, tile)
    lanes = []
    for lane in range(2):
        source = _gather(begin[..., lane::2], tile) + rank
        found = _gather(flat, xp.minimum(source, flat.shape[-1] - 1))
        lanes.append(xp.where(rank < _gather(counts[..., lane::2], tile), found, EMPTY))
    entries = xp.stack(lanes, -1).reshape(*flat.shape[:2], 2 * size).astype(xp.int32)
    return Lists(entries, first, longer, int(longer.max()) if xp is np else capacity)


def _flatten(entries: np.ndarray, valid: np.ndarray, counts: np.ndarray) -> tuple[Any, Any]:
    """Rows of static lists one after the other, without what is not valid."""
    begin = np.cumsum(counts, -1, dtype=np.int32) - counts
    flat = np.zeros((*counts.shape[:2], max(1, int(counts.sum(-1).max()))), np.int32)
    for place in np.ndindex(*counts.shape[:2]):
        kept = entries[place][valid[place]]
        flat[place][: len(kept)] = kept
    return flat, begin.astype(np.int32)


def for_keys(blocks: Any, tiles: int, heads: int, kv_heads: int) -> Lists:
    """The transposed lists: home tiles are 128 keys, entries are query blocks of a member head.

    A member is a query head within the group of its key head; lists that the heads of a group
    share are repeated for each.
    """
    entries, valid = _packed(blocks)
    xp = _module(entries)
    group = heads // kv_heads
    b, n, rows, capacity = entries.shape
    own = n == heads and group > 1
    shape = (b, n // group if own else n, group, rows, capacity)
    if own:
        entries, valid = entries.reshape(shape), valid.reshape(shape)
    else:
        entries, valid = (xp.broadcast_to(x[:, :, None], shape) for x in (entries, valid))
    column = entries & ((1 << BLOCK_BITS) - 1)
    fields = (entries - column) | xp.arange(rows, dtype=xp.int32)[:, None]
    fields = fields | (xp.arange(group, dtype=xp.int32) << MEMBER_SHIFT)[:, None, None]
    ratio = max(1, blocks.block_size // TILE_ROWS)
    homes = tiles * 2 if blocks.block_size < TILE_ROWS else -(-tiles // ratio)
    flat = (*shape[:2], group * rows * capacity)
    home, fields = xp.where(valid, column, homes).reshape(flat), fields.reshape(flat)
    # Entries are in the order of heads and rows, which a stable sort by home keeps.
    order = xp.argsort(home, axis=-1, stable=True)
    home, fields = _gather(home, order), _gather(fields, order)
    edges = _search(home, homes + 1)
    begin, counts = edges[..., :-1], edges[..., 1:] - edges[..., :-1]
    if xp is np:
        fields = fields[..., : max(1, int(edges[..., -1].max()))]
    if blocks.block_size < TILE_ROWS:
        return _side_by_side(fields, begin, counts, group * rows)
    row = np.arange(tiles) // ratio
    longest = int(counts.max()) if xp is np else fields.shape[-1]
    return Lists(fields, begin[..., row], counts[..., row], longest)


def _search(home: Any, count: int) -> Any:
    """Where each of `count` values begins in sorted arrays `[b, n, E]`."""
    if isinstance(home, np.ndarray):
        result = np.zeros((*home.shape[:2], count), np.int32)
        for place in np.ndindex(*home.shape[:2]):
            result[place] = np.searchsorted(home[place], np.arange(count))
        return result
    search = jax.vmap(jax.vmap(lambda row: jnp.searchsorted(row, jnp.arange(count))))
    return search(home).astype(jnp.int32)
