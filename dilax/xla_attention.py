"""The attention primitive in jax.numpy: linear memory, chunked, runs everywhere.

`attend` computes softmax attention over the union of the keys of a list of branches. Per piece of
a branch the rows are gathered into [groups, L, H] (a group is one head of one segment of one
example) and a flash-style loop over tiles of queries and keys runs over them, so that no array of
logits is larger than one tile (Rabe and Staats, arXiv:2112.05682; Dao, arXiv:2307.08691). The
backward pass needs the combined out, the total lse and delta = sum(do * out) - dlse, nothing per
branch.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dilax import dropout
from dilax._types import stats_dtype
from dilax.dilate import Piece, dilate, pieces, scatter
from dilax.partial import Partial, empty, merge, weight
from dilax.spec import Branch

# Logits alive at once. On a CPU a tile should stay in cache; an accelerator wants all its cores
# busy within one step of the loop.
_TILE = {"cpu": 1 << 20}
_TILE_ELSEWHERE = 1 << 27
_QUERY_TILE, _KEY_TILE = 1024, 1024
_CAUSAL_TILE = 256  # smaller, so that more tiles lie wholly in the future and are skipped
# ln(2)^n / n!, from n = 6 down: 2^x on [-1/2, 1/2] to 1e-8.
_EXP2 = [math.log(2) ** n / math.factorial(n) for n in range(6, -1, -1)]


@dataclasses.dataclass(frozen=True)
class _Static:
    """What `attend` knows at trace time."""

    branches: tuple[Branch, ...]
    is_causal: bool
    scale: float
    q_start: int
    k_start: int
    dropout_rate: float
    platform: str


class _Groups(NamedTuple):
    """One piece, gathered: what the tile loops need besides q, k and v."""

    key_row: np.ndarray  # [G] row of k and v that a group of queries reads
    q_ids: jax.Array | None  # int32 [G, Lq], None: every pair is visible but for causality
    k_ids: jax.Array | None  # int32 [G, Lk], 0: invisible
    q_bits: jax.Array | None  # uint32 [G, Lq], for dropout
    k_bits: jax.Array | None  # uint32 [G, Lk]
    behind: int  # key j is visible to query i if j <= i + behind; only if causal


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    branches: tuple[Branch, ...],
    is_causal: bool = False,
    scale: float | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_start: int = 0,
    k_start: int = 0,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
    carry: Partial | None = None,
) -> Partial:
    """Attention of query [B, T, N, H] over the union of the branches' keys, from `carry` on.

    key, value are [B, S, K, H]; segment ids int32 [B, T] and [B, S]; dropout_seed uint32[2].
    Returns out [B, T, N, H] and lse [B, T, N] in float32 (float64 for float64 inputs). Gradients
    flow to query, key, value and carry, also from lse. Arguments are taken as checked.

    Source: LongNet (arXiv:2307.02486), eq. 3-15.

    Example:
        >>> x = jnp.ones((1, 8, 2, 16))
        >>> attend(x, x, x, branches=(Branch(4, 1, 0, (0, 0)),)).out.shape
        (1, 8, 2, 16)
    """
    static = _Static(
        branches=tuple(branches),
        is_causal=is_causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        q_start=q_start,
        k_start=k_start,
        dropout_rate=dropout_rate,
        platform=jax.default_backend(),
    )
    return _attend(
        static, query, key, value, carry, (q_segment_ids, kv_segment_ids), dropout_seed
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, query, key, value, carry, segment_ids, seed) -> Partial:
    stats = stats_dtype(query.dtype)
    running = empty(query.shape, stats) if carry is None else carry
    T, S = query.shape[1], key.shape[1]
    for number, branch in enumerate(static.branches):
        w, r, first, offsets = branch
        heads = slice(first, first + len(offsets))
        with jax.named_scope(f"branch_{w}_{r}"):
            for piece in pieces(branch, T, S, static.q_start, static.k_start):
                q, k, v, groups = _gather(
                    static, number, piece, query, key, value, segment_ids, seed
                )
                out, lse = _forward(static, q, k, v, groups)
                B, M, n = query.shape[0], piece.segments, len(offsets)
                new = Partial(
                    scatter(out.reshape(B, M, n, *out.shape[1:]), piece.queries, offsets, 0),
                    scatter(lse.reshape(B, M, n, *lse.shape[1:]), piece.queries, offsets, -jnp.inf),
                )
                rows = slice(piece.queries.first, piece.queries.first + new.lse.shape[1])
                part = Partial(running.out[:, rows, heads], running.lse[:, rows, heads])
                part = new if carry is None and number == 0 else merge(part, new)
                running = Partial(
                    running.out.at[:, rows, heads].set(part.out),
                    running.lse.at[:, rows, heads].set(part.lse),
                )
    return running


def _attend_fwd(static, query, key, value, carry, segment_ids, seed):
    total = _attend(static, query, key, value, carry, segment_ids, seed)
    return total, (query, key, value, carry, segment_ids, seed, total)


def _attend_bwd(static: _Static, residuals, cotangents):
    query, key, value, carry, segment_ids, seed, total = residuals
    d_out, d_lse = cotangents
    seen = total.lse > -jnp.inf
    delta = (d_out * total.out).sum(-1) - jnp.where(seen, d_lse, 0)
    stats = total.lse.dtype
    dq, dk, dv = (jnp.zeros(x.shape, stats) for x in (query, key, value))
    T, S, share = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    for number, branch in enumerate(static.branches):
        w, r, first, offsets = branch
        heads = tuple((first + i, offset) for i, offset in enumerate(offsets))
        with jax.named_scope(f"branch_{w}_{r}_backward"):
            for piece in pieces(branch, T, S, static.q_start, static.k_start):
                q, k, v, groups = _gather(
                    static, number, piece, query, key, value, segment_ids, seed
                )
                M = piece.segments
                do, lse, dlt = (
                    _flat(dilate(x, piece.queries, M, heads))
                    for x in (d_out.astype(query.dtype), total.lse, delta)
                )
                B, n = query.shape[0], len(offsets)
                gq, gk, gv = (
                    x.reshape(B, M, n, *x.shape[1:])
                    for x in _backward(static, q, k, v, groups, do, lse, dlt)
                )
                gq = scatter(gq, piece.queries, offsets, 0)
                rows = slice(piece.queries.first, piece.queries.first + gq.shape[1])
                dq = dq.at[:, rows, first : first + n].add(gq)
                rows = slice(piece.keys.first, piece.keys.first + M * piece.keys.length)
                low, high = first // share, (first + n - 1) // share + 1
                for d, g in ((0, gk), (1, gv)):
                    g = scatter(g, piece.keys, offsets, 0)
                    g = _sum_heads(g, first - low * share, (high - low) * share, share)
                    if d == 0:
                        dk = dk.at[:, rows, low:high].add(g)
                    else:
                        dv = dv.at[:, rows, low:high].add(g)
    d_carry = None
    if carry is not None:
        part = weight(carry.lse, total.lse)
        d_carry = Partial(
            part[..., None] * d_out, part * ((d_out * carry.out).sum(-1) - delta)
        )
    return dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype), d_carry, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _flat(x: jax.Array) -> jax.Array:
    """[B, M, heads, L, ...] -> [G, L, ...]."""
    return x.reshape(-1, *x.shape[3:])


def _sum_heads(g: jax.Array, before: int, heads: int, share: int) -> jax.Array:
    """Sum per-query-head gradients [B, S, n, H] into their kv heads [B, S, heads / share, H]."""
    if share == 1:
        return g
    g = jnp.pad(g, [(0, 0), (0, 0), (before, heads - before - g.shape[2]), (0, 0)])
    return g.reshape(*g.shape[:2], heads // share, share, -1).sum(3)


def _gather(static: _Static, number, piece: Piece, query, key, value, segment_ids, seed):
    """The rows of one piece as q [G, Lq, H], k and v [rows, Lk, H], and their `_Groups`."""
    branch = static.branches[number]
    w, r, first, offsets = branch
    B, M, n = query.shape[0], piece.segments, len(offsets)
    share = query.shape[2] // key.shape[2]
    heads = tuple((first + i, offset) for i, offset in enumerate(offsets))
    # Query heads of one kv head that keep the same residue read the same rows: gather them once.
    slots = tuple(dict.fromkeys((head // share, offset) for head, offset in heads))
    slot = np.array([slots.index((head // share, offset)) for head, offset in heads])
    key_row = (np.arange(B * M)[:, None] * len(slots) + slot).reshape(-1)

    q = _flat(dilate(query, piece.queries, M, heads)) * _scales(static.scale, query.dtype)[0]
    k, v = (_flat(dilate(x, piece.keys, M, slots)) for x in (key, value))

    q_ids = k_ids = None
    real = np.stack([piece.keys.real(offset) for offset in offsets])
    if segment_ids[0] is not None or not real.all():
        q_ids = _group_ids(segment_ids[0], piece.queries, B, M, offsets)
        k_ids = _group_ids(segment_ids[1], piece.keys, B, M, offsets)
        k_ids = jnp.where(np.tile(real, (B * M, 1)), k_ids, 0)

    q_bits = k_bits = None
    if static.dropout_rate > 0:
        shape = (B, M, n, 1)
        start = (piece.first_segment + np.arange(M)).reshape(1, M, 1, 1) * w
        start = start + np.asarray(offsets).reshape(1, 1, n, 1)
        q_position, k_position = (
            start + (rows.index - rows.lead) + np.arange(rows.steps) * r
            for rows in (piece.queries, piece.keys)
        )
        batch = np.arange(B).reshape(B, 1, 1, 1)
        head = np.arange(first, first + n).reshape(1, 1, n, 1)
        q_bits = _flat(dropout.row_bits(seed, batch, head, q_position))
        k_bits = dropout.column_bits(seed, np.broadcast_to(k_position, (*shape[:3], piece.keys.steps)), number)
        k_bits = _flat(k_bits)
    behind = (piece.queries.index // r) - (piece.keys.index // r)
    return q, k, v, _Groups(key_row, q_ids, k_ids, q_bits, k_bits, behind)


def _scales(scale: float, dtype) -> tuple[float, float]:
    """The logits' factor as one on the queries and one on the products; softmax is in base 2.

    All of it on the queries saves a pass over the logits, but in half precision the product would
    round: there the queries get only a power of two.
    """
    scale = scale / math.log(2)
    if jnp.finfo(dtype).bits >= 32:
        return scale, 1.0
    if scale == 0:
        return 1.0, 0.0
    early = math.copysign(2.0 ** math.floor(math.log2(abs(scale))), scale)
    return early, scale / early


def _logits(static: _Static, a: jax.Array, b: jax.Array) -> jax.Array:
    """Logits over ln(2), rows of a by rows of b: queries, with their part of the scale, and keys."""
    s, late = _dot(a, b, (2, 2), stats_dtype(a.dtype)), _scales(static.scale, a.dtype)[1]
    return s if late == 1 else s * late


def _exp2(x: jax.Array, platform: str) -> jax.Array:
    """2^x, 0 at -inf; x at most about 0.

    XLA's own exp takes as long as a matrix product on a CPU, where half of the forward pass went
    into it. In float32 a rounding trick splits x into an integer, which goes into the exponent
    bits, and a rest in [-1/2, 1/2], for which a polynomial of degree 6 is exact to one ulp. The
    barrier stops XLA from computing it again in every consumer.
    """
    if platform != "cpu" or x.dtype != jnp.float32:
        return jnp.exp2(x)
    x = jnp.maximum(x, -127.0)  # 2^-127 has exponent bits 0 and mantissa 0 here: exactly 0
    shifted = x + 12582912.0  # 1.5 * 2^23: the sum's low mantissa bits are round(x)
    rest = x - (shifted - 12582912.0)
    y = jnp.float32(_EXP2[0])
    for c in _EXP2[1:]:
        y = y * rest + c
    bits = lax.bitcast_convert_type(y, jnp.int32)
    bits = bits + (lax.bitcast_convert_type(shifted, jnp.int32) << 23)
    return lax.optimization_barrier(lax.bitcast_convert_type(bits, jnp.float32))


def _group_ids(ids, rows, B: int, M: int, offsets) -> jax.Array:
    """Segment ids [B, T] of one piece as [G, L]; all 1 when there are none."""
    if ids is None:
        return jnp.ones((B * M * len(offsets), rows.steps), jnp.int32)
    slots = tuple((0, offset) for offset in offsets)
    return _flat(dilate(ids[:, :, None], rows, M, slots))


class _Tiles(NamedTuple):
    """How the loops cut [G, Lq] x [G, Lk]: `count` tiles of `size` along each."""

    groups: int
    q_size: int
    k_size: int
    group_count: int
    q_count: int
    k_count: int


def _tiles(static: _Static, G: int, Lq: int, Lk: int) -> _Tiles:
    most = _CAUSAL_TILE if static.is_causal else max(_QUERY_TILE, _KEY_TILE)
    q_count, k_count = -(-Lq // min(most, _QUERY_TILE)), -(-Lk // min(most, _KEY_TILE))
    q_size, k_size = -(-Lq // q_count), -(-Lk // k_count)
    budget = _TILE.get(static.platform, _TILE_ELSEWHERE)
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


def _loop_arrays(q, k, v, groups: _Groups, tiles: _Tiles) -> _Loop:
    G, Lk = groups.key_row.size, k.shape[1]
    if not np.array_equal(groups.key_row, np.arange(k.shape[0])):
        k, v = (x.at[groups.key_row].get(mode="promise_in_bounds") for x in (k, v))
    q_ids, k_ids = groups.q_ids, groups.k_ids
    if k_ids is None and tiles.k_count * tiles.k_size != Lk:
        q_ids, k_ids = jnp.ones(q.shape[:2], jnp.int32), jnp.ones((G, Lk), jnp.int32)
    along_q = [_cut(x, tiles, tiles.q_count, tiles.q_size) for x in (q, q_ids, groups.q_bits)]
    along_k = [_cut(x, tiles, tiles.k_count, tiles.k_size) for x in (k, v, k_ids, groups.k_bits)]
    return _Loop(*along_q, *along_k)


def _visible(static: _Static, behind: int, tiles: _Tiles, i, j, q_ids, k_ids):
    """bool [groups or 1, q_size, k_size]: which pairs of tile (i, j) attend; None: all of them."""
    visible = None
    if static.is_causal:
        row = i * tiles.q_size + behind + jnp.arange(tiles.q_size)[:, None]
        visible = (row >= j * tiles.k_size + jnp.arange(tiles.k_size)[None])[None]
    if k_ids is not None:
        same = (q_ids[:, :, None] == k_ids[:, None, :]) & (k_ids != 0)[:, None, :]
        visible = same if visible is None else visible & same
    return visible


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype) -> jax.Array:
    """Batched matrix product over the leading axis, accumulated in `dtype`."""
    a, b = a.astype(b.dtype), b
    numbers = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(a, b, numbers, preferred_element_type=dtype)


def _turned(x: jax.Array) -> jax.Array:
    """x with its last two axes swapped, in memory: XLA may not fold the swap into a product."""
    return lax.optimization_barrier(jnp.swapaxes(x, -1, -2))


def _at(x, i):
    return None if x is None else lax.dynamic_index_in_dim(x, i, keepdims=False)


def _repeat(low, high, count: int, body, state):
    """fori_loop(low, high), without a loop where there is only one tile to visit."""
    return body(0, state) if count == 1 else lax.fori_loop(low, high, body, state)


def _forward(static: _Static, q, k, v, groups: _Groups):
    """out [G, Lq, H] and lse [G, Lq] of one piece, in float32 (or float64)."""
    G, Lq, _ = q.shape
    tiles = _tiles(static, G, Lq, k.shape[1])
    stats = stats_dtype(q.dtype)
    loop = _loop_arrays(q, k, v, groups, tiles)

    def key_tile(i, x, j, state):
        m, total, acc = state
        k, v, k_ids, k_bits = (_at(a, j) for a in (x.k, x.v, x.k_ids, x.k_bits))
        s = _logits(static, x.q, k)
        visible = _visible(static, groups.behind, tiles, i, j, x.q_ids, k_ids)
        if visible is not None:
            s = jnp.where(visible, s, -jnp.inf)
        top = jnp.maximum(m, s.max(-1))
        safe = jnp.where(top > -jnp.inf, top, 0)
        p = _exp2(s - safe[..., None], static.platform)
        fade = jnp.exp2(m - safe)
        total = total * fade + p.sum(-1)
        if k_bits is not None:
            kept = dropout.keep(x.q_bits, k_bits, static.dropout_rate)
            p = jnp.where(kept, p / (1 - static.dropout_rate), 0)
        return top, total, acc * fade[..., None] + _dot(p, v, (2, 1), stats)

    def query_tile(x, i, q, q_ids, q_bits):
        x = x._replace(q=q, q_ids=q_ids, q_bits=q_bits)
        high = tiles.k_count
        if static.is_causal:
            last = (i + 1) * tiles.q_size - 1 + groups.behind
            high = jnp.clip(last // tiles.k_size + 1, 0, high)
        shape = (tiles.groups, tiles.q_size)
        state = (jnp.full(shape, -jnp.inf, stats), jnp.zeros(shape, stats))
        state = (*state, jnp.zeros((*shape, q.shape[-1]), stats))
        m, total, acc = _repeat(0, high, tiles.k_count, functools.partial(key_tile, i, x), state)
        seen = total > 0
        safe = jnp.where(seen, total, 1)
        return acc / safe[..., None], jnp.where(seen, (m + jnp.log2(safe)) * math.log(2), -jnp.inf)

    def group_tile(x: _Loop):
        if tiles.q_count == 1:
            one = query_tile(x, 0, *(_at(a, 0) for a in (x.q, x.q_ids, x.q_bits)))
            return jax.tree.map(lambda a: a[None], one)
        along = (jnp.arange(tiles.q_count), x.q, x.q_ids, x.q_bits)
        return lax.map(lambda a: query_tile(x, *a), along)

    out, lse = lax.map(group_tile, loop)
    return _join(out, G, Lq), _join(lse, G, Lq)


def _backward(static: _Static, q, k, v, groups: _Groups, do, lse, delta):
    """dq [G, Lq, H], dk and dv [G, Lk, H] of one piece, given the total lse and delta."""
    (G, Lq, H), Lk = q.shape, k.shape[1]
    tiles = _tiles(static, G, Lq, Lk)
    stats = stats_dtype(q.dtype)
    loop = _loop_arrays(q, k, v, groups, tiles)
    lse = jnp.where(lse > -jnp.inf, lse, jnp.inf) / math.log(2)  # 2^(s - inf) = 0: unseen rows
    rows = tuple(_cut(x, tiles, tiles.q_count, tiles.q_size) for x in (do, lse, delta))

    # The logits are laid out keys by queries here, so that only one of the five matrix products has
    # its left operand to turn: on a CPU a product that does so on the fly takes three times as long.
    def query_tile(x, rows, j, keys, i, state):
        dq, dk, dv = state
        k, v, k_ids, k_bits = keys
        q, q_ids, q_bits = (_at(a, i) for a in (x.q, x.q_ids, x.q_bits))
        do, lse, delta = (_at(a, i) for a in rows)
        p = _exp2(_logits(static, k, q) - lse[:, None, :], static.platform)
        visible = _visible(static, groups.behind, tiles, i, j, q_ids, k_ids)
        if visible is not None:
            p = jnp.where(jnp.swapaxes(visible, 1, 2), p, 0)
        dp = _dot(v, do, (2, 2), stats)
        dropped = p
        if k_bits is not None:
            kept = jnp.swapaxes(dropout.keep(q_bits, k_bits, static.dropout_rate), 1, 2)
            dropped, dp = (jnp.where(kept, a / (1 - static.dropout_rate), 0) for a in (p, dp))
        ds = p * (dp - delta[:, None, :])
        dv = dv + _dot(dropped, do, (2, 1), stats)
        dk = dk + _dot(ds, q, (2, 1), stats)
        dq_tile = _at(dq, i) + _turned(_dot(_turned(k), ds, (2, 1), stats))
        return lax.dynamic_update_index_in_dim(dq, dq_tile, i, 0), dk, dv

    def key_tile(x, rows, dq, along):
        j, *keys = along
        low = 0
        if static.is_causal:
            low = jnp.clip((j * tiles.k_size - groups.behind) // tiles.q_size, 0, tiles.q_count)
        zero = jnp.zeros((tiles.groups, tiles.k_size, H), stats)
        body = functools.partial(query_tile, x, rows, j, keys)
        dq, dk, dv = _repeat(low, tiles.q_count, tiles.q_count, body, (dq, zero, zero))
        return dq, (dk, dv)

    def group_tile(x_and_rows):
        x, rows = x_and_rows
        dq = jnp.zeros((tiles.q_count, tiles.groups, tiles.q_size, H), stats)
        along = (jnp.arange(tiles.k_count), x.k, x.v, x.k_ids, x.k_bits)
        if tiles.k_count == 1:
            dq, (dk, dv) = key_tile(x, rows, dq, (0, *(_at(a, 0) for a in along[1:])))
            return dq, dk[None], dv[None]
        dq, (dk, dv) = lax.scan(functools.partial(key_tile, x, rows), dq, along)
        return dq, dk, dv

    dq, dk, dv = lax.map(group_tile, (loop, rows))
    # ds lacks the scale of the logits: dq needs all of it, dk has met the queries' part already.
    dq = dq * static.scale
    dk = dk * (_scales(static.scale, q.dtype)[1] * math.log(2))
    return _join(dq, G, Lq), _join(dk, G, Lk), _join(dv, G, Lk)
