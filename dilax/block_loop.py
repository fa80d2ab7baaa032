"""Flash attention of one piece on gathered rows, over lists of key blocks, in jax.numpy.

As `dilax.tile_loop`, but a block of queries meets only the key blocks of its list. The work items,
one per group and block of queries, are sorted by the length of their lists and cut into tiles, and
a tile makes as many steps as its longest list needs. So the cost follows the number of kept blocks
however unequal the rows are, also where the lists are known only at run time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dilax._types import stats_dtype
from dilax.block_lists import BlockLists, Flat
from dilax.tile import Settings, base_two, finish, gradient_scales, gradients, look, start, zeros
from dilax.tile_loop import Groups, same_document

# Logits alive at once, and how many keys one step looks at, at most.
_TILE = {"cpu": 1 << 18}
_TILE_ELSEWHERE = 1 << 24
_KEYS = 256
_FAR = 2**30  # beyond every position
_UNLIMITED = 2**29


class Visits(NamedTuple):
    """Block lists of one piece: one list after the other."""

    columns: Any  # int32 [size]
    bands: Any  # int32 [size], the band of each entry; None: all the first
    starts: Any  # int32 [G, rows], where in `columns` the list of each row of a group starts
    counts: Any  # int32 [G, rows]
    limits: tuple[tuple[int | None, int | None], ...]  # (left, right) of each band
    block_size: int
    q_lead: int  # places of the first block of queries that lie before the first query
    k_lead: int
    order: str = "longest_first"  # of the work items, or "row", or "hilbert"


def visits(lists: BlockLists, list_row: np.ndarray, q_lead: int, k_lead: int) -> Visits:
    """What groups visit whose lists are the rows list_row [G] of `lists` [b * n, ...].

    Example:
        >>> from dilax.block_lists import from_mask
        >>> lists = from_mask(np.tri(3, dtype=bool), 64)
        >>> visits(lists, np.array([0, 0]), 0, 0).columns.tolist()
        [0, 0, 1, 0, 1, 2]
    """
    if lists.is_static:  # without what no row keeps
        kept, counts = lists.kept(), lists.counts
        # Nothing can be taken from an empty array.
        column, band = (
            x if x is None else np.pad(x, (0, max(0, 1 - x.size))) for x in (kept.column, kept.band)
        )
        starts = np.cumsum(counts, dtype=np.int32).reshape(counts.shape) - counts
        flat = Flat(column, band, starts, counts)
    else:
        flat = lists.flat()
    starts, counts = (x.reshape(-1, x.shape[-1])[list_row] for x in (flat.starts, flat.counts))
    size, limits = lists.block_size, lists.bands
    return Visits(flat.columns, flat.band_index, starts, counts, limits, size, q_lead, k_lead)


class _Items(NamedTuple):
    """Work items of one tile or of all, each a block of queries of a group."""

    group: Any
    row: Any
    start: Any
    count: Any


class _Plan(NamedTuple):
    """How the work is cut: [tiles, items] of `_Items`, and where each item went."""

    items: _Items
    steps: Any  # [tiles]
    place: Any  # [G * rows]
    width: int  # key blocks of a step


def _plan(settings: Settings, to: Visits, columns: int) -> _Plan:
    xp: Any = np if isinstance(to.counts, np.ndarray) else jnp
    number, rows = to.counts.size, to.counts.shape[1]
    counts = to.counts.reshape(-1)
    order = _order(xp, to)
    counts = counts[order]
    width = max(1, min(columns, _KEYS // to.block_size))
    budget = _TILE.get(settings.platform, _TILE_ELSEWHERE) // to.block_size**2
    size = max(1, min(number, budget // width))
    if xp is np:
        while width > 1 and _work(counts, width, 1) > 1.25 * _work(counts, 1, 1):
            width -= 1
        while size > 1 and _work(counts, width, size) > 1.25 * _work(counts, width, 1):
            size -= -(-size // 4)

    def cut(x):
        return xp.pad(x.astype(np.int32), (0, -number % size)).reshape(-1, size)

    starts = xp.asarray(to.starts).reshape(-1)[order]
    items = _Items(cut(order // rows), cut(order % rows), cut(starts), cut(counts))
    return _Plan(items, -(-items.count.max(-1) // width), xp.argsort(order), width)


def _order(xp: Any, to: Visits) -> Any:
    """The order of the work items [G * rows]."""
    rows, counts = to.counts.shape[1], to.counts.reshape(-1)
    if to.order == "longest_first":
        return xp.argsort(-counts, stable=True)
    if to.order == "row":
        return xp.arange(counts.size)
    middle = xp.asarray(to.starts).reshape(-1) + xp.maximum(counts - 1, 0) // 2
    column = xp.asarray(to.columns)[xp.minimum(middle, to.columns.size - 1)]
    return xp.argsort(_hilbert(xp, xp.arange(counts.size) % rows, column), stable=True)


def _hilbert(xp: Any, x: Any, y: Any, bits: int = 15) -> Any:
    """How far along Hilbert's curve through a square of side 2^bits a point lies."""
    distance = xp.zeros(x.shape, np.int32)
    for bit in reversed(range(bits)):
        right, up = (x >> bit) & 1, (y >> bit) & 1
        distance = distance + (((3 * right) ^ up) << (2 * bit)).astype(np.int32)
        # The lower quadrants are turned: their axes change places, on the right also direction.
        whole = (1 << bit) - 1
        x, y = x & whole, y & whole
        flip = (up == 0) & (right == 1)
        x, y = xp.where(flip, whole - x, x), xp.where(flip, whole - y, y)
        x, y = xp.where(up == 0, y, x), xp.where(up == 0, x, y)
    return distance


def _work(counts: np.ndarray, width: int, size: int) -> int:
    """How many blocks are computed in tiles of `size` items."""
    counts = np.pad(counts, (0, -len(counts) % size)).reshape(-1, size).max(-1)
    return int((-(-counts // width)).sum()) * width * size


class _Blocks(NamedTuple):
    """The arrays of a piece cut into blocks, [groups * blocks, block_size, ...]."""

    q: Any
    q_ids: Any
    q_bits: Any
    k: Any
    v: Any
    k_ids: Any
    k_bits: Any
    k_position: np.ndarray  # int32 [columns, block_size], _FAR where there is no key


def _cut(x: Any, size: int, lead: int) -> Any:
    """[G, L, ...] -> [G * blocks, size, ...], padded with zeros before and after."""
    if x is None:
        return None
    L, *rest = x.shape[1:]
    pad = (lead, -(lead + L) % size)
    x = jnp.pad(x, [(0, 0), pad] + [(0, 0)] * len(rest)) if any(pad) else x
    return x.reshape(-1, size, *rest)


def _join(x: jax.Array, G: int, L: int, lead: int) -> jax.Array:
    """The inverse of `_cut`."""
    return x.reshape(G, -1, *x.shape[2:])[:, lead : lead + L]


def _blocks(q, k, v, groups: Groups, to: Visits) -> _Blocks:
    size, Lk = to.block_size, k.shape[1]
    position = np.arange(-to.k_lead, Lk + -(to.k_lead + Lk) % size, dtype=np.int32)
    position = np.where((position >= 0) & (position < Lk), position, _FAR).reshape(-1, size)
    q, q_ids, q_bits = (_cut(x, size, to.q_lead) for x in (q, groups.q_ids, groups.q_bits))
    k, v, k_ids, k_bits = (_cut(x, size, to.k_lead) for x in (k, v, groups.k_ids, groups.k_bits))
    return _Blocks(q, q_ids, q_bits, k, v, k_ids, k_bits, position)


def _limits(settings: Settings, to: Visits) -> tuple[np.ndarray, np.ndarray]:
    """Per band: a query sees a key if key + low <= query <= key + high."""
    low = [-_UNLIMITED if right is None else -right for _, right in to.limits]
    low = np.maximum(low, 0) if settings.is_causal else np.array(low)
    high = np.array([_UNLIMITED if left is None else left for left, _ in to.limits])
    return low.astype(np.int32), high.astype(np.int32)


class _Keys(NamedTuple):
    """The keys that the items of a tile meet in one step: [items, width * block_size, ...]."""

    k: jax.Array
    v: jax.Array
    k_bits: Any
    visible: jax.Array  # bool [items, block_size, width * block_size]
    line: jax.Array  # [items, width], which blocks of all groups' keys these are


def _keys(settings, x: _Blocks, groups: Groups, to: Visits, width, items: _Items, j, q_ids):
    """What the items of a tile meet in step j."""
    slot = (j * width + jnp.arange(width, dtype=jnp.int32))[None]
    valid = slot < items.count[:, None]
    entry = jnp.where(valid, items.start[:, None] + slot, 0)
    column = jnp.where(valid, _take(to.columns, entry), 0)
    columns = x.k_position.shape[0]
    line = items.group[:, None] * columns + column
    key_line = _take(groups.key_row.astype(np.int32), items.group)[:, None] * columns + column

    def keys(a, line) -> Any:
        return None if a is None else _flat(_take(a, line))

    # Each key as the first and the last position of a query that sees it.
    low, high = _limits(settings, to)
    band = jnp.zeros_like(entry) if to.bands is None else _take(to.bands, entry)
    position = _take(x.k_position, column)
    first = jnp.where(valid[..., None], position + _take(low, band)[..., None], _FAR)
    block = jnp.arange(to.block_size, dtype=jnp.int32) - to.q_lead + groups.behind
    q_position = (items.row[:, None] * to.block_size + block[None])[..., None]
    visible = q_position >= _flat(first)[:, None]
    if (high < _UNLIMITED).any():
        visible &= q_position <= _flat(position + _take(high, band)[..., None])[:, None]
    if x.k_ids is not None:
        visible &= same_document(q_ids, keys(x.k_ids, line))
    return _Keys(keys(x.k, key_line), keys(x.v, key_line), keys(x.k_bits, line), visible, line)


def _take(x: Any, index: Any) -> jax.Array:
    return jnp.asarray(x).at[index].get(mode="promise_in_bounds")


def _flat(x: jax.Array) -> jax.Array:
    """[items, width, block_size, ...] -> [items, width * block_size, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _queries(x: _Blocks, to: Visits, items: _Items, *more: Any) -> list[Any]:
    """The rows of a tile's items of q, q_ids, q_bits and `more`."""
    line = items.group * to.counts.shape[1] + items.row
    return [None if a is None else _take(a, line) for a in (x.q, x.q_ids, x.q_bits, *more)]


def forward(settings: Settings, q, k, v, groups: Groups, to: Visits):
    """out [G, Lq, H] and lse [G, Lq] of one piece, in float32 (or float64)."""
    (G, Lq, _), stats = q.shape, stats_dtype(q.dtype)
    x = _blocks(q, k, v, groups, to)
    plan = _plan(settings, to, x.k_position.shape[0])

    def tile(along):
        items, steps = along
        q, q_ids, q_bits = _queries(x, to, items)

        def step(j, state):
            met = _keys(settings, x, groups, to, plan.width, items, j, q_ids)
            return look(settings, state, q, met.k, met.v, met.visible, q_bits, met.k_bits)

        state = start(q, k, v, stats)
        return finish(settings, lax.fori_loop(0, steps, step, state), q.dtype)

    out, lse = lax.map(tile, (plan.items, plan.steps))
    return tuple(_back(a, plan, G, Lq, to) for a in (out, lse))


def _back(x: jax.Array, plan: _Plan, G: int, L: int, to: Visits) -> jax.Array:
    """[tiles, items, block_size, ...] of work items back as [G, L, ...]."""
    x = x.reshape(-1, *x.shape[2:])
    return _join(_take(x, plan.place), G, L, to.q_lead)


def backward(settings: Settings, q, k, v, groups: Groups, to: Visits, do, lse, delta):
    """dq [G, Lq, H], dk and dv [G, Lk, H] of one piece, given the total lse and delta."""
    (G, Lq, H), Lk, stats = q.shape, k.shape[1], stats_dtype(q.dtype)
    x = _blocks(q, k, v, groups, to)
    to = to._replace(order="longest_first")  # one order of the sums over queries
    plan = _plan(settings, to, x.k_position.shape[0])
    rows = [_cut(a, to.block_size, to.q_lead) for a in (do, base_two(lse), delta)]

    def tile(sums, along):
        items, steps = along
        q, q_ids, q_bits, do, lse, delta = _queries(x, to, items, *rows)

        def step(j, state):
            dq, dk, dv = state
            met = _keys(settings, x, groups, to, plan.width, items, j, q_ids)
            more = gradients(
                settings, q, met.k, met.v, do, lse, delta, met.visible, q_bits, met.k_bits
            )
            shape = (*met.line.shape, to.block_size, H)
            dk, dv = (
                a.at[met.line].add(b.reshape(shape), mode="promise_in_bounds")
                for a, b in ((dk, more[1]), (dv, more[2]))
            )
            return dq + more[0], dk, dv

        dq, *sums = lax.fori_loop(0, steps, step, (zeros(q.shape, stats, q, k, v, do), *sums))
        return tuple(sums), dq

    zero = zeros((G * x.k_position.shape[0], to.block_size, H), stats, q, k, v, do)
    (dk, dv), dq = lax.scan(tile, (zero, zero), (plan.items, plan.steps))
    q_factor, k_factor = gradient_scales(settings, q.dtype)
    dk, dv = (_join(a, G, Lk, to.k_lead) for a in (dk * k_factor, dv))
    return _back(dq * q_factor, plan, G, Lq, to), dk, dv
