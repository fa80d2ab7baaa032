"""The attention of one device for tests of placement: dense, a few lines, quick to compile."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from dilax import dropout
from dilax.partial import Partial, merge
from sharding.local import Local


def _masks(
    q,
    k,
    branches,
    is_causal,
    q_segment_ids,
    kv_segment_ids,
    q_start,
    k_start,
    q_positions=None,
    kv_positions: Any = None,
):
    """bool [b, B, N, T, S]: which pairs each branch sees."""
    T, S, N = q.shape[1], k.shape[1], q.shape[2]
    i, j = q_start + jnp.arange(T)[:, None], k_start + jnp.arange(S)[None]
    past = i >= j
    if q_positions is not None:
        past = (q_positions[:, :, None] >= kv_positions[:, None])[:, None]
    shared = jnp.broadcast_to(past if is_causal else True, (q.shape[0], 1, T, S))
    if q_segment_ids is not None:
        same = q_segment_ids[:, :, None] == kv_segment_ids[:, None]
        shared = shared & (same & (kv_segment_ids != 0)[:, None])[:, None]
    masks = []
    for w, r, first, offsets in branches:
        table = np.full((N, 1, 1), -1)
        table[first : first + len(offsets), 0, 0] = offsets
        kept = (i % w % r)[None] == table, (j % w % r)[None] == table
        same = (i // w == j // w)[None] & kept[0] & kept[1]
        masks.append(shared & same[None])
    return jnp.stack(masks)


def _probabilities(q, k, masks, scale, rate, bits, lse):
    """exp(logits - lse) [b, B, N, T, S], and what dropout makes of them."""
    s = jnp.einsum("BTNH,BSNH->BNTS", q, k) * scale
    s = jnp.where(masks, s[None], -jnp.inf)
    if lse is None:
        top = s.max((0, -1))
        top = jnp.where(top > -jnp.inf, top, 0)
        sums = jnp.exp(s - top[None, ..., None]).sum((0, -1))
        seen = sums > 0
        lse = jnp.where(seen, jnp.log(jnp.where(seen, sums, 1)) + top, -jnp.inf)
    else:
        lse = jnp.moveaxis(lse, 1, 2)
    p = jnp.exp(s - jnp.where(lse > -jnp.inf, lse, jnp.inf)[None, ..., None])
    factor = jnp.ones(p.shape)
    if bits is not None:
        rows, columns = jnp.moveaxis(bits[0], 1, 2)[None], jnp.moveaxis(bits[1], 2, 3)
        shape = (*p.shape[:3], p.shape[4])
        repeated = jnp.repeat(columns, p.shape[2] // columns.shape[2], 2)
        columns = jnp.broadcast_to(repeated, shape)
        factor = dropout.keep(jnp.broadcast_to(rows, p.shape[:4]), columns, rate) / (1 - rate)
    return p, factor, jnp.moveaxis(lse, 2, 1)


def _common(q, k, v, where: Any, lse):
    where = dict(where)
    bits = _hashed(q, k, where) if "dropout_seed" in where else where.pop("dropout_bits")
    scale, rate = (where.pop(x) for x in ("scale", "dropout_rate"))
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    return k, v, _probabilities(q, k, _masks(q, k, **where), scale, rate, bits, lse)


def _hashed(q, k, where: dict):
    """The bits of rows and columns as kernels find them: counted from 0 and from the starts."""
    (B, T, N), S = q.shape[:3], k.shape[1]
    seed, numbers = where.pop("dropout_seed"), where.pop("dropout_numbers")
    keep = dropout.Numbered(numbers)
    batch, head = jnp.arange(B).reshape(B, 1, 1), jnp.arange(N).reshape(1, 1, N)
    rows = (where["q_start"] + jnp.arange(T)).reshape(1, T, 1)
    columns = (where["k_start"] + jnp.arange(S)).reshape(1, S, 1)
    found = [keep.column_bits(seed, columns, jnp.int32(i)) for i in range(len(numbers))]
    return keep.row_bits(seed, batch, head, rows), jnp.stack(found)


def _forward(q, k, v, *, carry, q_segment_ids=None, kv_segment_ids=None, **where):
    where |= {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
    _, v, (p, factor, lse) = _common(q, k, v, where, None)
    new = jnp.einsum("bBNTS,BSNH->BTNH", p * factor, v), lse
    return new if carry is None else _merge(carry, new)


def _backward(q, k, v, do, lse, delta, *, q_segment_ids=None, kv_segment_ids=None, **where):
    where |= {"q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}
    B, S, K, H = k.shape
    k, v, (p, factor, _) = _common(q, k, v, where, lse)
    dp = jnp.einsum("BTNH,BSNH->BNTS", do, v)[None] * factor
    ds = (p * (dp - jnp.moveaxis(delta, 1, 2)[None, ..., None])).sum(0) * where["scale"]
    dq, dk = jnp.einsum("BNTS,BSNH->BTNH", ds, k), jnp.einsum("BNTS,BTNH->BSNH", ds, q)
    dv = jnp.einsum("bBNTS,BTNH->BSNH", p * factor, do)
    return dq, *(x.reshape(B, S, K, -1, H).sum(3) for x in (dk, dv))


def _merge(*parts):
    return merge(*(Partial(*part) for part in parts))


# KERNEL finds out itself what to drop, from a seed and from where it is.
DENSE = Local(_forward, _backward, _merge, dropout.row_bits, dropout.column_bits)
KERNEL = DENSE._replace(seed_from=dropout.seed_from)
