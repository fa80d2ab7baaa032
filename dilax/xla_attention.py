"""The attention primitive in jax.numpy: linear memory, runs everywhere.

`attend` computes softmax attention over the union of the keys of a list of branches. Per piece of
a branch the rows are gathered into [groups, L, H], a group being one head of one segment of one
example, and `dilax.tile_loop` runs over them, or `dilax.block_loop` where there are block lists.
The backward pass needs the combined out, the total lse and delta = sum(do * out) - dlse, nothing
per branch.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dilax import block_loop, dropout, tile_loop
from dilax._types import stats_dtype
from dilax.block_lists import BlockLists, window
from dilax.dilate import Piece, Rows, dilate, pieces, scatter
from dilax.partial import Partial, empty, merge, weight
from dilax.spec import Branch
from dilax.tile import Settings, scales
from dilax.tile_loop import Groups

_ENDLESS = 2**30  # the segment of block lists over all rows


@dataclasses.dataclass(frozen=True)
class _Static:
    """What `attend` knows at trace time."""

    branches: tuple[Branch, ...]
    q_start: int | None  # None: traced
    k_start: int | None
    orders: bool  # causality goes by given positions, not by indices
    settings: Settings
    lists: tuple[BlockLists, ...] | None = None  # of each branch; None: there are none, or traced
    whole: bool = False  # the lists count blocks from the arrays' first rows, not a segment's
    order: str = "longest_first"  # in which order the lists are visited


class _Where(NamedTuple):
    """The arrays of a call that say who sees whom; none of them has a gradient."""

    q_segment_ids: jax.Array | None
    kv_segment_ids: jax.Array | None
    q_start: jax.Array | None  # None: static
    k_start: jax.Array | None
    dropout_seed: jax.Array | None
    dropout_bits: tuple[jax.Array, jax.Array] | None
    q_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None
    lists: tuple[BlockLists, ...] | None = None  # traced ones


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    branches: tuple[Branch, ...] | None = None,
    blocks: BlockLists | tuple[BlockLists, ...] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_start: int | jax.Array = 0,
    k_start: int | jax.Array = 0,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
    dropout_bits: tuple[jax.Array, jax.Array] | None = None,
    carry: Partial | None = None,
    order: str = "longest_first",
) -> Partial:
    """Attention of query [B, T, N, H] over the union of the branches' keys, from `carry` on.

    key, value are [B, S, K, H]; segment ids and positions, both or neither, int32 [B, T] and
    [B, S]; dropout_seed uint32[2], or in its place dropout_bits, the hash's bits of rows uint32 [B,
    T, N] and of columns [branches, B, S, K] or [branches, 1, S, 1]. Branches follow indices, from
    q_start and k_start on (traced only if every rate is 1); causality and dropout_seed follow the
    positions where they are given.
    blocks: which key blocks each block of queries visits: one BlockLists in place of branches, over
    the arrays' rows, or one per branch, over the places of its segments after dilation (the lists
    of a whole segment, cut where a segment is short). order: in which order they are visited,
    "longest_first", "row" or "hilbert"; the result is the same to the bit.
    Returns out [B, T, N, H] and lse [B, T, N] in float32 (float64 for float64 inputs). Gradients
    flow to query, key, value and carry, also from lse. Arguments are taken as checked.

    Source: LongNet (arXiv:2307.02486), eq. 3-15.

    Example:
        >>> x = jnp.ones((1, 8, 2, 16))
        >>> attend(x, x, x, branches=(Branch(4, 1, 0, (0, 0)),)).out.shape
        (1, 8, 2, 16)
    """
    static, where = _split(
        query,
        branches,
        is_causal,
        scale,
        _Where(
            q_segment_ids,
            kv_segment_ids,
            None,
            None,
            dropout_seed,
            dropout_bits,
            q_positions,
            kv_positions,
        ),
        (q_start, k_start),
        dropout_rate,
        blocks,
    )
    static = dataclasses.replace(static, order=order)
    carry = None if carry is None else Partial(*carry)
    return _attend(static, query, key, value, carry, where)


def attend_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    branches: tuple[Branch, ...] | None = None,
    blocks: BlockLists | tuple[BlockLists, ...] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_start: int | jax.Array = 0,
    k_start: int | jax.Array = 0,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
    dropout_bits: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value through these keys, given the totals over all keys.

    lse [B, T, N] is the total log-sum-exp, delta [B, T, N] is sum(d_out * out) - d_lse of the total
    out. Returns float32 (float64 for float64 inputs). Other arguments as `attend`.

    Example:
        >>> x, stat = jnp.ones((1, 8, 2, 16)), jnp.ones((1, 8, 2))
        >>> options = {"branches": (Branch(4, 1, 0, (0, 0)),)}
        >>> attend_backward(x, x, x, x, stat, stat, **options)[0].shape
        (1, 8, 2, 16)
    """
    static, where = _split(
        query,
        branches,
        is_causal,
        scale,
        _Where(
            q_segment_ids,
            kv_segment_ids,
            None,
            None,
            dropout_seed,
            dropout_bits,
            q_positions,
            kv_positions,
        ),
        (q_start, k_start),
        dropout_rate,
        blocks,
    )
    return _gradients(static, query, key, value, where, d_out, lse, delta)


def _split(query, branches: Any, is_causal, scale, where: _Where, starts, rate, blocks: Any):
    """The arguments of a call as what is known at trace time and what is not."""
    whole = isinstance(blocks, BlockLists)
    if whole:
        branches, blocks = (Branch(_ENDLESS, 1, 0, (0,) * query.shape[2]),), (blocks,)
    traced = blocks is not None and not all(lists.is_static for lists in blocks)
    where = where._replace(lists=blocks if traced else None)
    known = [None if isinstance(start, jax.Array) else int(start) for start in starts]
    if None in known:
        known = [None, None]
        where = where._replace(q_start=starts[0], k_start=starts[1])
    static = _Static(
        branches=tuple(Branch(*branch) for branch in branches or ()),
        q_start=known[0],
        k_start=known[1],
        orders=is_causal and where.q_positions is not None,
        settings=Settings(
            is_causal=is_causal and where.q_positions is None,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            dropout_rate=rate,
            platform=jax.default_backend(),
        ),
        lists=None if traced or blocks is None else tuple(blocks),
        whole=whole,
    )
    return static, where


def _pieces(static: _Static, branch: Branch, T: int, S: int) -> Any:
    """The pieces of a branch; one of all rows if the starts are traced."""
    if static.q_start is None or static.k_start is None:
        return (Piece(1, 0, Rows(0, 0, T, 1), Rows(0, 0, S, 1)),)
    return pieces(branch, T, S, static.q_start, static.k_start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, query, key, value, carry, where: _Where) -> Partial:
    stats = stats_dtype(query.dtype)
    running = empty(query.shape, stats) if carry is None else carry
    T, S = query.shape[1], key.shape[1]
    for number, branch in enumerate(static.branches):
        w, r, first, offsets = branch
        heads = slice(first, first + len(offsets))
        with jax.named_scope(f"branch_{w}_{r}"):
            for piece in _pieces(static, branch, T, S):
                q, k, v, groups = _gather(static, number, piece, query, key, value, where)
                to = _visits(static, number, piece, query.shape[0], where.lists)
                if to is None:
                    out, lse = tile_loop.forward(static.settings, q, k, v, groups)
                else:
                    out, lse = block_loop.forward(static.settings, q, k, v, groups, to)
                B, M, n = query.shape[0], piece.segments, len(offsets)
                new = Partial(
                    scatter(out.reshape(B, M, n, *out.shape[1:]), piece.queries, offsets, 0),
                    scatter(lse.reshape(B, M, n, *lse.shape[1:]), piece.queries, offsets, -jnp.inf),
                )
                rows = slice(piece.queries.first, piece.queries.first + new.lse.shape[1])
                part = Partial(running.out[:, rows, heads], running.lse[:, rows, heads])
                part = new if carry is None and number == 0 else merge(part, new)
                place = (piece.queries.first, first)
                running = Partial(*(_put(x, place, y) for x, y in zip(running, part, strict=True)))
    return running


def _attend_fwd(static, query, key, value, carry, where):
    out, lse = _attend(static, query, key, value, carry, where)
    # Named here, where they become residuals, so that a remat policy can save them.
    total = Partial(checkpoint_name(out, "dilax_out"), checkpoint_name(lse, "dilax_lse"))
    return total, (query, key, value, carry, where, total)


def _attend_bwd(static: _Static, residuals, cotangents):
    query, key, value, carry, where, total = residuals
    d_out, d_lse = cotangents
    seen = total.lse != -jnp.inf
    delta = (d_out * total.out).sum(-1) - jnp.where(seen, d_lse, 0)
    dq, dk, dv = _gradients(static, query, key, value, where, d_out, total.lse, delta)
    d_carry = None
    if carry is not None:
        part = weight(carry.lse, total.lse)
        d_carry = Partial(part[..., None] * d_out, part * ((d_out * carry.out).sum(-1) - delta))
    return dq.astype(query.dtype), dk.astype(key.dtype), dv.astype(value.dtype), d_carry, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _gradients(static: _Static, query, key, value, where: _Where, d_out, total_lse, delta):
    stats = stats_dtype(query.dtype)
    dq, dk, dv = (jnp.zeros(x.shape, stats) for x in (query, key, value))
    T, S, share = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    for number, branch in enumerate(static.branches):
        w, r, first, offsets = branch
        heads = tuple((first + i, offset) for i, offset in enumerate(offsets))
        with jax.named_scope(f"branch_{w}_{r}_backward"):
            for piece in _pieces(static, branch, T, S):
                q, k, v, groups = _gather(static, number, piece, query, key, value, where)
                M = piece.segments
                do, lse, dlt = (
                    _flat(dilate(x, piece.queries, M, heads))
                    for x in (d_out.astype(query.dtype), total_lse, delta)
                )
                B, n = query.shape[0], len(offsets)
                to = _visits(static, number, piece, B, where.lists)
                if to is None:
                    found = tile_loop.backward(static.settings, q, k, v, groups, do, lse, dlt)
                else:
                    found = block_loop.backward(static.settings, q, k, v, groups, to, do, lse, dlt)
                gq, gk, gv = (x.reshape(B, M, n, *x.shape[1:]) for x in found)
                gq = scatter(gq, piece.queries, offsets, 0)
                dq = _add(dq, (piece.queries.first, first), gq)
                low, high = first // share, (first + n - 1) // share + 1
                gk, gv = (
                    _sum_heads(
                        scatter(g, piece.keys, offsets, 0),
                        first - low * share,
                        (high - low) * share,
                        share,
                    )
                    for g in (gk, gv)
                )
                dk, dv = (_add(x, (piece.keys.first, low), g) for x, g in ((dk, gk), (dv, gv)))
    return dq, dk, dv


def _put(x: jax.Array, place: tuple[int, int], new: jax.Array) -> jax.Array:
    """x [B, T, N, ...] with `new` from a row and a head on.

    Not by x.at[...].set: of a whole array on several devices that ends the compiler of jax 0.11.2.
    """
    if new.shape == x.shape:
        return new
    return lax.dynamic_update_slice(x, new, (0, *place, *[0] * (x.ndim - 3)))


def _add(x: jax.Array, place: tuple[int, int], new: jax.Array) -> jax.Array:
    """x [B, T, N, ...] with `new` added from a row and a head on."""
    row, head = place
    old = x[:, row : row + new.shape[1], head : head + new.shape[2]]
    return _put(x, place, old + new)


def _flat(x: jax.Array) -> jax.Array:
    """[B, M, heads, L, ...] -> [G, L, ...]."""
    return x.reshape(-1, *x.shape[3:])


def _sum_heads(g: jax.Array, before: int, heads: int, share: int) -> jax.Array:
    """Sum per-query-head gradients [B, S, n, H] into their kv heads [B, S, heads / share, H]."""
    if share == 1:
        return g
    g = jnp.pad(g, [(0, 0), (0, 0), (before, heads - before - g.shape[2]), (0, 0)])
    return g.reshape(*g.shape[:2], heads // share, share, -1).sum(3)


def _visits(static: _Static, number: int, piece: Piece, B: int, traced: Any):
    """The block lists of one piece, for each of its groups; None: there are none."""
    lists = static.lists if traced is None else traced
    if lists is None:
        return None
    one, (_, rate, first, offsets) = lists[number], static.branches[number]
    batch, heads = one.counts.shape[:2]
    N = max(b.first_head + len(b.offsets) for b in static.branches)
    head = (first + np.arange(len(offsets))) * heads // N  # of 1, K or N lists
    row = np.arange(B).reshape(B, 1, 1) * (batch > 1) * heads + head
    row = np.broadcast_to(row, (B, piece.segments, len(offsets))).reshape(-1)
    if static.whole:
        return block_loop.visits(one, row, 0, 0)._replace(order=static.order)
    places = [
        (rows.index // rate // one.block_size, rows.index // rate % one.block_size, rows.steps)
        for rows in (piece.queries, piece.keys)
    ]
    cut = [x for block, lead, L in places for x in (block, -(-(lead + L) // one.block_size))]
    to = block_loop.visits(window(one, *cut), row, places[0][1], places[1][1])
    return to._replace(order=static.order)


def _gather(static: _Static, number, piece: Piece, query, key, value, where: _Where):
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
    if where.q_segment_ids is not None or not real.all() or static.orders:
        q_ids = _group_ids(where.q_segment_ids, piece.queries, B, M, offsets)
        k_ids = _group_ids(where.kv_segment_ids, piece.keys, B, M, offsets)
        k_ids = jnp.where(np.tile(real, (B * M, 1)), k_ids, 0)
    places: tuple[Any, ...] = tuple(
        None if x is None else _dilated_ids(x, rows, M, offsets)
        for x, rows in (
            (where.q_positions, piece.queries),
            (where.kv_positions, piece.keys),
        )
    )
    if static.orders:
        q_ids, k_ids = (
            jnp.stack([ids, _flat(x)], -1) for ids, x in zip((q_ids, k_ids), places, strict=True)
        )

    q_bits = k_bits = None
    if where.dropout_bits is not None:
        rows, columns = where.dropout_bits
        columns = jnp.broadcast_to(columns[number], (B, key.shape[1], key.shape[2]))
        q_bits = _flat(dilate(rows, piece.queries, M, heads))
        k_bits = _flat(dilate(columns, piece.keys, M, tuple((h // share, o) for h, o in heads)))
    elif static.settings.dropout_rate > 0:
        seed: Any = where.dropout_seed
        shape = (B, M, n, 1)
        start = (piece.first_segment + np.arange(M)).reshape(1, M, 1, 1) * w
        start = start + np.asarray(offsets).reshape(1, 1, n, 1)
        q_position, k_position = (
            start + (rows.index - rows.lead) + np.arange(rows.steps) * r if x is None else x
            for x, rows in zip(places, (piece.queries, piece.keys), strict=True)
        )
        batch = np.arange(B).reshape(B, 1, 1, 1)
        head = np.arange(first, first + n).reshape(1, 1, n, 1)
        q_bits = _flat(dropout.row_bits(seed, batch, head, q_position))
        k_position = jnp.broadcast_to(k_position, (*shape[:3], piece.keys.steps))
        k_bits = _flat(dropout.column_bits(seed, k_position, number))
    groups = Groups(key_row, q_ids, k_ids, q_bits, k_bits, 0)
    if where.q_start is not None and where.k_start is not None:
        behind = where.q_start - where.k_start
        return q, k, v, groups._replace(behind=behind, segment=w, q_first=where.q_start)
    behind = (piece.queries.index // r) - (piece.keys.index // r)
    return q, k, v, groups._replace(behind=behind)


def _group_ids(ids, rows, B: int, M: int, offsets) -> jax.Array:
    """Segment ids [B, T] of one piece as [G, L]; all 1 when there are none."""
    if ids is None:
        return jnp.ones((B * M * len(offsets), rows.steps), jnp.int32)
    return _flat(_dilated_ids(ids, rows, M, offsets))


def _dilated_ids(ids, rows, M: int, offsets) -> jax.Array:
    """int32 [B, T] of one piece as [B, M, heads, L]."""
    slots = tuple((0, offset) for offset in offsets)
    return dilate(ids[:, :, None], rows, M, slots)
