"""Block lists as the kernels read them: flat entries, and where each tile of 128 rows begins.

Lists come as an object with the fields of `dilax.block_lists.BlockLists`. A tile of 128 rows is two
warpgroups of 64, which follow one list; with blocks of 64 each has its own, side by side. Entries
name blocks of the other side ("away"). Everything here works alike on NumPy arrays, when the lists
are known at trace time, and on traced ones; sorts keep it at O(entries log entries) in time.
"""

from collections.abc import Sequence
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
    """entries int32 `[x, y, E]`; begin and counts int32 `[b, n, tiles]` say what a tile has.

    The lists lie side by side, x, y = b, n, or one after the other, x, y = 1, 1. With blocks of 64
    entries are pairs, `[x, y, 2 E]`. longest: no tile has more entries.
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


class _Flat(NamedTuple):
    """entries int32 `[x, y, E]` with their bands; starts and counts int32 `[b, n, rows]`.

    Where x and y are b and n, a row starts in the entries of its own list. capacity: if all rows
    take as much room, how much; else None. longest as in `Lists`.
    """

    entries: Any
    starts: Any
    counts: Any
    capacity: int | None
    longest: int


def is_static(blocks: Any) -> bool:
    """Whether lists are NumPy arrays, known at trace time."""
    arrays = (blocks.columns, blocks.counts, blocks.starts, blocks.band_index)
    return all(x is None or isinstance(x, np.ndarray) for x in arrays)


def _module(x: Any) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


def _flat(blocks: Any) -> _Flat:
    """Rows one after the other; static ones of all lists, without what does not count."""
    entries, starts, counts = blocks.columns, blocks.starts, blocks.counts
    if blocks.band_index is not None:
        entries = entries | (blocks.band_index << BAND_SHIFT)
    b, n, rows = counts.shape
    capacity = None if starts is not None else entries.shape[-1]
    entries = entries.reshape(b, n, -1)
    if starts is None:
        starts = np.arange(rows, dtype=np.int32) * capacity
        starts = _module(counts).broadcast_to(starts, counts.shape)
    if not is_static(blocks):
        longest = entries.shape[-1] if blocks.longest is None else blocks.longest
        return _Flat(entries, starts, counts, capacity, longest if capacity is None else capacity)
    lists = np.arange(b * n, dtype=np.int32).reshape(b, n, 1)
    new = (np.cumsum(counts).reshape(counts.shape) - counts).astype(np.int32)
    moved = np.repeat((starts + lists * entries.shape[-1] - new).reshape(-1), counts.reshape(-1))
    entries = entries.reshape(-1)[moved + np.arange(len(moved))]
    entries = entries if entries.size else np.zeros(1, np.int32)
    return _Flat(entries[None, None], new, counts, None, int(counts.max()))


def _owners(flat: _Flat) -> tuple[Any, Any]:
    """The row that each entry lies in, among those of `entries[x, y]`, and whether it counts."""
    xp, shape = _module(flat.entries), (*flat.entries.shape[:2], -1)
    place = xp.arange(flat.entries.shape[-1], dtype=xp.int32)
    starts, counts = flat.starts.reshape(shape), flat.counts.reshape(shape)
    if flat.capacity is not None:
        line, within = place // flat.capacity, place % flat.capacity
        return line, (within >= 0) & (within < counts[..., line])
    line = xp.maximum(_search(starts, len(place), "right") - 1, 0)
    within = place - _gather(starts, line)
    return line, (within >= 0) & (within < _gather(counts, line))


def _gather(x: Any, order: Any) -> Any:
    return _module(x).take_along_axis(x, order, -1)


def for_queries(blocks: Any, tiles: int, width: int = 1) -> Lists:
    """Lists whose home tiles are 128 queries and whose entries are key blocks, width at a time."""
    entries, starts, counts, _, longest = _flat(blocks)
    if blocks.block_size < TILE_ROWS:
        return _two_rows(entries, starts, counts, longest)
    rows = counts.shape[-1]
    row = np.minimum(np.arange(tiles) // (blocks.block_size // TILE_ROWS), rows - 1)
    starts, counts = starts[..., row], counts[..., row]
    if width == 1:
        return Lists(entries, starts, counts, longest)
    halves = [(starts, (counts + 1) // 2), (starts + 1, counts // 2)]
    return _side_by_side(entries, halves, 2, -(-longest // 2))


def _two_rows(flat: Any, begin: Any, counts: Any, longest: int) -> Lists:
    """The lists of rows 2i and 2i + 1 as pairs of entries."""
    if counts.shape[-1] % 2:
        pad = _module(flat).pad
        begin, counts = (pad(x, ((0, 0), (0, 0), (0, 1))) for x in (begin, counts))
    lanes = [(begin[..., lane::2], counts[..., lane::2]) for lane in range(2)]
    return _side_by_side(flat, lanes, 1, longest)


def _side_by_side(flat: Any, lanes: Sequence[tuple[Any, Any]], step: int, longest: int) -> Lists:
    """Two lists for each tile as pairs of entries, the shorter one filled up.

    lanes: where the entries of each begin, and how many they are, `[b, n, tiles]`; step: from one
    to the next.
    """
    xp, shape = _module(flat), lanes[0][1].shape
    lanes = [tuple(x.reshape(*flat.shape[:2], -1) for x in lane) for lane in lanes]
    longer = xp.maximum(lanes[0][1], lanes[1][1])
    ends = xp.cumsum(longer, -1, dtype=xp.int32)
    first = ends - longer
    size = max(1, int(ends[..., -1].max())) if xp is np else flat.shape[-1]
    # Place p belongs to the tile before whose end it lies.
    tile = xp.minimum(_search(ends, size + 1)[..., 1:], longer.shape[-1] - 1)
    rank = xp.arange(size, dtype=xp.int32) - _gather(first, tile)
    pairs = []
    for begin, counts in lanes:
        source = _gather(begin, tile) + step * rank
        found = _gather(flat, xp.clip(source, 0, flat.shape[-1] - 1))
        pairs.append(xp.where(rank < _gather(counts, tile), found, EMPTY))
    entries = xp.stack(pairs, -1).reshape(*flat.shape[:2], 2 * size).astype(xp.int32)
    return Lists(entries, first.reshape(shape), longer.reshape(shape), longest)


def for_keys(blocks: Any, tiles: int, heads: int, kv_heads: int) -> Lists:
    """The transposed lists: home tiles are 128 keys, entries are query blocks of a member head.

    A member is a query head within the group of its key head; lists that the heads of a group
    share are repeated for each.
    """
    flat = _flat(blocks)
    xp, group = _module(flat.entries), heads // kv_heads
    b, n, rows = flat.counts.shape
    share = group if n == heads else 1  # lists of one key head
    if flat.entries.shape[:2] == (b, n) and share > 1:  # those of a key head one after the other
        behind = np.arange(n, dtype=np.int32)[:, None] % share * flat.entries.shape[-1]
        entries = flat.entries.reshape(b, n // share, -1)
        flat = flat._replace(entries=entries, starts=flat.starts + behind)
    x, y, _ = flat.entries.shape
    line, valid = _owners(flat)
    column = flat.entries & ((1 << BLOCK_BITS) - 1)
    fields = (flat.entries - column) | (line % rows)
    fields = fields | (line // rows % share << MEMBER_SHIFT)
    ratio = max(1, blocks.block_size // TILE_ROWS)
    homes = tiles * 2 if blocks.block_size < TILE_ROWS else -(-tiles // ratio)
    lists = b * n // share // (x * y)  # for which entries[x, y] are
    home = xp.where(valid, line // (share * rows) * homes + column, lists * homes)
    if share < group:
        home = xp.concatenate([home] * group, -1)
        fields = xp.concatenate([fields | (i << MEMBER_SHIFT) for i in range(group)], -1)
    # Entries are in the order of heads and rows, which a stable sort by home keeps.
    order = xp.argsort(home, axis=-1, stable=True)
    home, fields = _gather(home, order), _gather(fields, order)
    edges = _search(home, lists * homes + 1)
    begin, counts = edges[..., :-1], edges[..., 1:] - edges[..., :-1]
    begin, counts = (x.reshape(b, n // share, homes) for x in (begin, counts))
    if xp is np:
        fields = fields[..., : max(1, int(edges[..., -1].max()))]
    longest = int(counts.max()) if xp is np else min(group * rows, fields.shape[-1])
    if blocks.block_size < TILE_ROWS:
        return _two_rows(fields, begin, counts, longest)
    row = np.arange(tiles) // ratio
    return Lists(fields, begin[..., row], counts[..., row], longest)


def _search(rows: Any, count: int, side: Any = "left") -> Any:
    """Where each of `count` values belongs in sorted arrays `[b, n, E]`."""
    if isinstance(rows, np.ndarray):
        result = np.zeros((*rows.shape[:2], count), np.int32)
        for place in np.ndindex(*rows.shape[:2]):
            result[place] = np.searchsorted(rows[place], np.arange(count), side)
        return result

    def search(row: jax.Array) -> jax.Array:
        return jnp.searchsorted(row, jnp.arange(count), side)

    return jax.vmap(jax.vmap(search))(rows).astype(jnp.int32)
