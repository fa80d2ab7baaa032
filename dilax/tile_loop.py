"""Flash attention of one piece on gathered rows, tile by tile, in jax.numpy.

A piece is [G, Lq, H] queries and [rows, Lk, H] keys and values, where a group is one head of one
segment of one example. Loops over tiles of groups, queries and keys hold the logits of one tile at
a time (Rabe and Staats, arXiv:2112.05682; Dao, arXiv:2307.08691).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dilax._types import stats_dtype
from dilax.tile import Settings, base_two, finish, gradient_scales, gradients, look, start, zeros

# Logits alive at once. On a CPU a tile should stay in cache; an accelerator wants all its cores
# busy within one step of the loop.
_TILE = {"cpu": 1 << 20}
_TILE_ELSEWHERE = 1 << 27
_QUERY_TILE, _KEY_TILE = 1024, 1024
_CAUSAL_TILE = 256  # smaller, so that more tiles lie wholly in the future and are skipped


class Groups(NamedTuple):
    """One piece, gathered: what the tile loops need besides q, k and v."""

    key_row: np.ndarray  # [G] row of k and v that a group of queries reads
    q_ids: jax.Array | None  # int32 [G, Lq], None: every pair is visible but for causality
    k_ids: jax.Array | None  # int32 [G, Lk], 0: invisible; [G, L, 2]: ids and positions, causal
    q_bits: jax.Array | None  # uint32 [G, Lq], for dropout
    k_bits: jax.Array | None  # uint32 [G, Lk]
    behind: Any  # key j is visible to query i if j <= i + behind; only if causal; may be traced
    segment: int | None = None  # pairs attend only inside segments of this many rows
    q_first: Any = 0  # the place of query 0 among the rows that segments count; may be traced


class _Tiles(NamedTuple):
    """How the loops cut [G, Lq] x [G, Lk]: `count` tiles of `size` along each."""

    groups: int
    q_size: int
    k_size: int
    group_count: int
    q_count: int
    k_count: int


def _tiles(settings: Settings, G: int, Lq: int, Lk: int) -> _Tiles:
    most = _CAUSAL_TILE if settings.is_causal else max(_QUERY_TILE, _KEY_TILE)
    q_count, k_count = -(-Lq // min(most, _QUERY_TILE)), -(-Lk // min(most, _KEY_TILE))
    q_size, k_size = -(-Lq // q_count), -(-Lk // k_count)
    budget = _TILE.get(settings.platform, _TILE_ELSEWHERE)
    group_count = -(-G // max(1, min(G, budget // (q_size * k_size))))
    return _Tiles(-(-G // group_count), q_size, k_size, group_count, q_count, k_count)


def _cut(x: jax.Array | np.ndarray | None, tiles: _Tiles, count: int, size: int):
    """[G, L, ...] -> [group_count, count, groups, size, ...], padded with zeros."""
    if x is None:
        return None
    G, L, *rest = x.shape
    pad = [(0, tiles.group_count * tiles.groups - G), (0, count * size - L)] + [(0, 0)] * len(rest)
    x = jnp.pad(x, pad) if any(p[1] for p in pad) else x
    x = x.reshape(tiles.group_count, tiles.groups, count, size, *rest)
    return jnp.swapaxes(x, 1, 2)


def _join(x: jax.Array, G: int, L: int) -> jax.Array:
    """The inverse of `_cut`."""
    x = jnp.swapaxes(x, 1, 2)
    x = x.reshape(x.shape[0] * x.shape[1], x.shape[2] * x.shape[3], *x.shape[4:])
    return x[:G, :L]


class _Loop(NamedTuple):
    """The arrays a tile loop walks over: leading axes [group_count, count, groups, size]."""

    q: Any
    q_ids: Any
    q_bits: Any
    k: Any
    v: Any
    k_ids: Any
    k_bits: Any


def _loop_arrays(q, k, v, groups: Groups, tiles: _Tiles) -> _Loop:
    G, Lk = groups.key_row.size, k.shape[1]
    if not np.array_equal(groups.key_row, np.arange(k.shape[0])):
        k, v = (x.at[groups.key_row].get(mode="promise_in_bounds") for x in (k, v))
    q_ids, k_ids = groups.q_ids, groups.k_ids
    if k_ids is None and tiles.k_count * tiles.k_size != Lk:
        q_ids, k_ids = jnp.ones(q.shape[:2], jnp.int32), jnp.ones((G, Lk), jnp.int32)
    along_q = [_cut(x, tiles, tiles.q_count, tiles.q_size) for x in (q, q_ids, groups.q_bits)]
    along_k = [_cut(x, tiles, tiles.k_count, tiles.k_size) for x in (k, v, k_ids, groups.k_bits)]
    return _Loop(*along_q, *along_k)


def _visible(settings: Settings, groups: Groups, tiles: _Tiles, i, j, q_ids, k_ids):
    """bool [groups or 1, q_size, k_size]: which pairs of tile (i, j) attend; None: all of them."""
    visible = None
    row = i * tiles.q_size + groups.behind + jnp.arange(tiles.q_size)[:, None]
    column = j * tiles.k_size + jnp.arange(tiles.k_size)[None]
    if settings.is_causal:
        visible = (row >= column)[None]
    if groups.segment is not None:
        k_first = groups.q_first - groups.behind
        same = ((row + k_first) // groups.segment == (column + k_first) // groups.segment)[None]
        visible = same if visible is None else visible & same
    if k_ids is not None:
        same = same_document(q_ids, k_ids)
        visible = same if visible is None else visible & same
    return visible


def same_document(q_ids: jax.Array, k_ids: jax.Array) -> jax.Array:
    """bool [groups, q_size, k_size]: pairs of one document, none of padding, none in the future.

    Ids as in `Groups`: where they come with positions, a query sees no key after its own.
    """
    later = True
    if k_ids.ndim == 3:
        later = q_ids[:, :, None, 1] >= k_ids[:, None, :, 1]
        q_ids, k_ids = q_ids[..., 0], k_ids[..., 0]
    return (q_ids[:, :, None] == k_ids[:, None, :]) & (k_ids != 0)[:, None, :] & later


def _key_tiles(settings: Settings, groups: Groups, tiles: _Tiles, i):
    """The range of key tiles that some query of tile i may see."""
    low, high = 0, tiles.k_count
    last = (i + 1) * tiles.q_size - 1 + groups.behind
    if settings.is_causal:
        high = jnp.clip(last // tiles.k_size + 1, 0, high)
    if groups.segment is not None:
        w, k_first = groups.segment, groups.q_first - groups.behind
        first = (i * tiles.q_size + groups.q_first) // w * w - k_first
        end = ((last + k_first) // w + 1) * w - k_first
        low = jnp.clip(first // tiles.k_size, 0, tiles.k_count)
        high = jnp.clip(-(-end // tiles.k_size), 0, high)
    return low, high


def _query_tiles(settings: Settings, groups: Groups, tiles: _Tiles, j):
    """The range of query tiles in which some query may see key tile j."""
    low, high = 0, tiles.q_count
    if settings.is_causal:
        low = jnp.clip((j * tiles.k_size - groups.behind) // tiles.q_size, 0, high)
    if groups.segment is not None:
        w, k_first = groups.segment, groups.q_first - groups.behind
        first = (j * tiles.k_size + k_first) // w * w - groups.q_first
        end = (((j + 1) * tiles.k_size - 1 + k_first) // w + 1) * w - groups.q_first
        low = jnp.clip(first // tiles.q_size, low, high)
        high = jnp.clip(-(-end // tiles.q_size), 0, high)
    return low, high


def _at(x: Any, i: Any) -> Any:
    return None if x is None else lax.dynamic_index_in_dim(x, i, keepdims=False)


def _repeat(low, high, count: int, body, state):
    """fori_loop(low, high), without a loop where there is only one tile to visit."""
    return body(0, state) if count == 1 else lax.fori_loop(low, high, body, state)


def forward(settings: Settings, q, k, v, groups: Groups):
    """out [G, Lq, H] and lse [G, Lq] of one piece, in float32 (or float64)."""
    G, Lq, _ = q.shape
    tiles = _tiles(settings, G, Lq, k.shape[1])
    stats = stats_dtype(q.dtype)
    loop = _loop_arrays(q, k, v, groups, tiles)

    def key_tile(i, x, j, state):
        k, v, k_ids, k_bits = (_at(a, j) for a in (x.k, x.v, x.k_ids, x.k_bits))
        visible = _visible(settings, groups, tiles, i, j, x.q_ids, k_ids)
        return look(settings, state, x.q, k, v, visible, x.q_bits, k_bits)

    def query_tile(x, i, q, q_ids, q_bits):
        x = x._replace(q=q, q_ids=q_ids, q_bits=q_bits)
        low, high = _key_tiles(settings, groups, tiles, i)
        state = start(q, x.k, x.v, stats)
        state = _repeat(low, high, tiles.k_count, functools.partial(key_tile, i, x), state)
        return finish(settings, state, q.dtype)

    def group_tile(x: _Loop):
        if tiles.q_count == 1:
            one = query_tile(x, 0, *(_at(a, 0) for a in (x.q, x.q_ids, x.q_bits)))
            return jax.tree.map(lambda a: a[None], one)
        along = (jnp.arange(tiles.q_count), x.q, x.q_ids, x.q_bits)
        return lax.map(lambda a: query_tile(x, *a), along)

    out, lse = lax.map(group_tile, loop)
    return _join(out, G, Lq), _join(lse, G, Lq)


def backward(settings: Settings, q, k, v, groups: Groups, do, lse, delta):
    """dq [G, Lq, H], dk and dv [G, Lk, H] of one piece, given the total lse and delta."""
    (G, Lq, H), Lk = q.shape, k.shape[1]
    tiles = _tiles(settings, G, Lq, Lk)
    stats = stats_dtype(q.dtype)
    loop = _loop_arrays(q, k, v, groups, tiles)
    rows = tuple(_cut(x, tiles, tiles.q_count, tiles.q_size) for x in (do, base_two(lse), delta))

    def query_tile(x, rows, j, keys, i, state):
        dq, dk, dv = state
        k, v, k_ids, k_bits = keys
        q, q_ids, q_bits = (_at(a, i) for a in (x.q, x.q_ids, x.q_bits))
        do, lse, delta = (_at(a, i) for a in rows)
        visible = _visible(settings, groups, tiles, i, j, q_ids, k_ids)
        more = gradients(settings, q, k, v, do, lse, delta, visible, q_bits, k_bits)
        dq = lax.dynamic_update_index_in_dim(dq, _at(dq, i) + more[0], i, 0)
        return dq, dk + more[1], dv + more[2]

    def key_tile(x, rows, dq, along):
        j, *keys = along
        low, high = _query_tiles(settings, groups, tiles, j)
        zero = zeros((tiles.groups, tiles.k_size, H), stats, x.q, x.k, x.v, *rows)
        body = functools.partial(query_tile, x, rows, j, keys)
        dq, dk, dv = _repeat(low, high, tiles.q_count, body, (dq, zero, zero))
        return dq, (dk, dv)

    def group_tile(x_and_rows):
        x, rows = x_and_rows
        shape = (tiles.q_count, tiles.groups, tiles.q_size, H)
        dq = zeros(shape, stats, x.q, x.k, x.v, *rows)
        along = (jnp.arange(tiles.k_count), x.k, x.v, x.k_ids, x.k_bits)
        if tiles.k_count == 1:
            dq, (dk, dv) = key_tile(x, rows, dq, (0, *(_at(a, 0) for a in along[1:])))
            return dq, dk[None], dv[None]
        dq, (dk, dv) = lax.scan(functools.partial(key_tile, x, rows), dq, along)
        return dq, dk, dv

    dq, dk, dv = lax.map(group_tile, (loop, rows))
    q_factor, k_factor = gradient_scales(settings, q.dtype)
    dq, dk = dq * q_factor, dk * k_factor
    return _join(dq, G, Lq), _join(dk, G, Lk), _join(dv, G, Lk)
