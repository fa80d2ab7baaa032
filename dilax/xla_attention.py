"""The attention primitive in jax.numpy: linear memory, runs everywhere.

`attend` computes softmax attention over the union of the keys of a list of branches. Per piece of
a branch the rows are gathered into [groups, L, H], a group being one head of one segment of one
example, and `dilax.tile_loop` runs over them. The backward pass needs the combined out, the total
lse and delta = sum(do * out) - dlse, nothing per branch.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dilax import dropout
from dilax._types import stats_dtype
from dilax.dilate import Piece, dilate, pieces, scatter
from dilax.partial import Partial, empty, merge, weight
from dilax.spec import Branch
from dilax.tile_loop import Groups, Settings, backward, forward, scales


@dataclasses.dataclass(frozen=True)
class _Static:
    """What `attend` knows at trace time."""

    branches: tuple[Branch, ...]
    q_start: int
    k_start: int
    orders: bool  # causality goes by given positions, not by indices
    settings: Settings


class _Marks(NamedTuple):
    """What is known of tokens besides their contents; it has no gradient."""

    segment_ids: tuple[Any, Any]  # of queries and keys, int32 [B, T] and [B, S] or None
    positions: tuple[Any, Any]
    seed: Any


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
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
    carry: Partial | None = None,
) -> Partial:
    """Attention of query [B, T, N, H] over the union of the branches' keys, from `carry` on.

    key, value are [B, S, K, H]; segment ids and positions, both or neither, int32 [B, T] and
    [B, S]; dropout_seed uint32[2]. Branches follow indices, from q_start and k_start on; causality
    and dropout follow the positions where they are given.
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
        q_start=q_start,
        k_start=k_start,
        orders=is_causal and q_positions is not None,
        settings=Settings(
            is_causal=is_causal and q_positions is None,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            dropout_rate=dropout_rate,
            platform=jax.default_backend(),
        ),
    )
    marks = _Marks((q_segment_ids, kv_segment_ids), (q_positions, kv_positions), dropout_seed)
    return _attend(static, query, key, value, carry, marks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, query, key, value, carry, marks) -> Partial:
    stats = stats_dtype(query.dtype)
    running = empty(query.shape, stats) if carry is None else carry
    T, S = query.shape[1], key.shape[1]
    for number, branch in enumerate(static.branches):
        w, r, first, offsets = branch
        heads = slice(first, first + len(offsets))
        with jax.named_scope(f"branch_{w}_{r}"):
            for piece in pieces(branch, T, S, static.q_start, static.k_start):
                q, k, v, groups = _gather(static, number, piece, query, key, value, marks)
                out, lse = forward(static.settings, q, k, v, groups)
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


def _attend_fwd(static, query, key, value, carry, marks):
    out, lse = _attend(static, query, key, value, carry, marks)
    # Named here, where they become residuals, so that a remat policy can save them.
    total = Partial(checkpoint_name(out, "dilax_out"), checkpoint_name(lse, "dilax_lse"))
    return total, (query, key, value, carry, marks, total)


def _attend_bwd(static: _Static, residuals, cotangents):
    query, key, value, carry, marks, total = residuals
    d_out, d_lse = cotangents
    seen = total.lse != -jnp.inf
    delta = (d_out * total.out).sum(-1) - jnp.where(seen, d_lse, 0)
    stats = total.lse.dtype
    dq, dk, dv = (jnp.zeros(x.shape, stats) for x in (query, key, value))
    T, S, share = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    for number, branch in enumerate(static.branches):
        w, r, first, offsets = branch
        heads = tuple((first + i, offset) for i, offset in enumerate(offsets))
        with jax.named_scope(f"branch_{w}_{r}_backward"):
            for piece in pieces(branch, T, S, static.q_start, static.k_start):
                q, k, v, groups = _gather(static, number, piece, query, key, value, marks)
                M = piece.segments
                do, lse, dlt = (
                    _flat(dilate(x, piece.queries, M, heads))
                    for x in (d_out.astype(query.dtype), total.lse, delta)
                )
                B, n = query.shape[0], len(offsets)
                gq, gk, gv = (
                    x.reshape(B, M, n, *x.shape[1:])
                    for x in backward(static.settings, q, k, v, groups, do, lse, dlt)
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
        d_carry = Partial(part[..., None] * d_out, part * ((d_out * carry.out).sum(-1) - delta))
    return dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype), d_carry, None


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


def _gather(static: _Static, number, piece: Piece, query, key, value, marks: _Marks):
    """The rows of one piece as q [G, Lq, H], k and v [rows, Lk, H], and their `Groups`."""
    branch = static.branches[number]
    w, r, first, offsets = branch
    B, M, n = query.shape[0], piece.segments, len(offsets)
    share = query.shape[2] // key.shape[2]
    heads = tuple((first + i, offset) for i, offset in enumerate(offsets))
    # Query heads of one kv head that keep the same residue read the same rows: gather them once.
    slots = tuple(dict.fromkeys((head // share, offset) for head, offset in heads))
    slot = np.array([slots.index((head // share, offset)) for head, offset in heads])
    key_row = (np.arange(B * M)[:, None] * len(slots) + slot).reshape(-1)

    q = (
        _flat(dilate(query, piece.queries, M, heads))
        * scales(static.settings.scale, query.dtype)[0]
    )
    k, v = (_flat(dilate(x, piece.keys, M, slots)) for x in (key, value))

    q_ids: Any = None
    k_ids: Any = None
    real = np.stack([piece.keys.real(offset) for offset in offsets])
    if marks.segment_ids[0] is not None or not real.all() or static.orders:
        q_ids = _group_ids(marks.segment_ids[0], piece.queries, B, M, offsets)
        k_ids = _group_ids(marks.segment_ids[1], piece.keys, B, M, offsets)
        k_ids = jnp.where(np.tile(real, (B * M, 1)), k_ids, 0)
    places: tuple[Any, ...] = tuple(
        None if x is None else _dilated_ids(x, rows, M, offsets)
        for x, rows in zip(marks.positions, (piece.queries, piece.keys), strict=True)
    )
    if static.orders:
        q_ids, k_ids = (
            jnp.stack([ids, _flat(x)], -1) for ids, x in zip((q_ids, k_ids), places, strict=True)
        )

    q_bits = k_bits = None
    if static.settings.dropout_rate > 0:
        shape = (B, M, n, 1)
        start = (piece.first_segment + np.arange(M)).reshape(1, M, 1, 1) * w
        start = start + np.asarray(offsets).reshape(1, 1, n, 1)
        q_position, k_position = (
            start + (rows.index - rows.lead) + np.arange(rows.steps) * r if x is None else x
            for x, rows in zip(places, (piece.queries, piece.keys), strict=True)
        )
        batch = np.arange(B).reshape(B, 1, 1, 1)
        head = np.arange(first, first + n).reshape(1, 1, n, 1)
        q_bits = _flat(dropout.row_bits(marks.seed, batch, head, q_position))
        k_position = jnp.broadcast_to(k_position, (*shape[:3], piece.keys.steps))
        k_bits = dropout.column_bits(marks.seed, k_position, number)
        k_bits = _flat(k_bits)
    behind = (piece.queries.index // r) - (piece.keys.index // r)
    return q, k, v, Groups(key_row, q_ids, k_ids, q_bits, k_bits, behind)


def _group_ids(ids, rows, B: int, M: int, offsets) -> jax.Array:
    """Segment ids [B, T] of one piece as [G, L]; all 1 when there are none."""
    if ids is None:
        return jnp.ones((B * M * len(offsets), rows.steps), jnp.int32)
    return _flat(_dilated_ids(ids, rows, M, offsets))


def _dilated_ids(ids, rows, M: int, offsets) -> jax.Array:
    """int32 [B, T] of one piece as [B, M, heads, L]."""
    slots = tuple((0, offset) for offset in offsets)
    return dilate(ids[:, :, None], rows, M, slots)
