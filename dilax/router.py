"""The router of adaptive block-sparse attention: which key blocks a block of queries needs.

A block of queries and a block of keys are each one pooled feature per head; a bilinear form of the
two is the block's score, and each row keeps its best blocks. The choice has no gradient: what the
router learns from is in `dilax.router_signal`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dilax._types import stats_dtype
from dilax.block_lists import BlockLists, admissible

QUERY_FEATURES = ("mean", "first", "previous")


@dataclasses.dataclass(frozen=True)
class Routing:
    """How a router chooses; static.

    Args:
        sparsity_ratio: the share of admissible blocks that a row keeps.
        block_size: tokens of a block.
        query_feature: "mean" of the block's queries (it knows later tokens of the block: not for
            causal attention), its "first" query, or the mean of the "previous" block's.
        is_causal: blocks after a row's own are not admissible.
    """

    sparsity_ratio: float
    block_size: int
    query_feature: str
    is_causal: bool


class Route(NamedTuple):
    """What a router chose: the lists, and the scores of the listed blocks.

    scores [B, K, rows, capacity] is differentiable in the router's weights only.
    """

    lists: BlockLists
    scores: jax.Array


def budgets(T: int, S: int, routing: Routing) -> np.ndarray:
    """int [rows]: how many blocks each row keeps.

    Example:
        >>> budgets(640, 640, Routing(0.25, 64, "first", True)).tolist()
        [1, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    """
    limit = admissible(T, S, routing.block_size, routing.is_causal)
    kept = np.floor(routing.sparsity_ratio * limit + 0.5).astype(int)
    return np.clip(kept, np.minimum(1, limit), limit)


def in_blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, L, ...] -> [B, blocks, size, ...], padded with zeros."""
    pad = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad).reshape(x.shape[0], -1, size, *x.shape[2:])


def ids_in_blocks(ids: Any, B: int, L: int, size: int) -> jax.Array:
    """Segment ids [B, blocks, size]; 0 where there is no token."""
    return in_blocks(jnp.ones((B, L), jnp.int32) if ids is None else ids, size)


def _mean(x: jax.Array, ids: jax.Array) -> jax.Array:
    """The mean of a block's real tokens, [B, blocks, heads, H]; 0 where there are none."""
    real = (ids != 0)[..., None, None]
    count = jnp.maximum(real.sum(2), 1)
    return jnp.where(real, x, 0).sum(2) / count


def _query_features(query: jax.Array, ids: jax.Array, routing: Routing) -> jax.Array:
    blocks = in_blocks(query, routing.block_size)
    if routing.query_feature == "mean":
        return _mean(blocks, ids)
    first = blocks[:, :, 0]
    if routing.query_feature == "first":
        return first
    return jnp.concatenate([first[:, :1], _mean(blocks, ids)[:, :-1]], axis=1)


def route(
    query: jax.Array,
    key: jax.Array,
    q_weight: jax.Array,
    k_weight: jax.Array,
    routing: Routing,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
) -> Route:
    """The blocks that each row of each example and key head keeps.

    query [B, T, N, H], key [B, S, K, H], q_weight [N, H, H] and k_weight [K, H, H]. Query heads of
    one key head share a list: their score is the mean of theirs. Kept first are the row's own block
    (if T = S), the first block, then the best scores. Query and key are taken as constants.

    Example:
        >>> x = jax.random.normal(jax.random.key(0), (1, 256, 2, 8))
        >>> eye = jnp.broadcast_to(jnp.eye(8), (2, 8, 8))
        >>> found = route(x, x, eye, eye, Routing(0.5, 64, "first", True))
        >>> found.lists.counts[0, 0].tolist(), found.lists.columns[0, 0, 1].tolist()
        ([1, 1, 2, 2], [1, 3])
    """
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    size, stats = routing.block_size, stats_dtype(query.dtype)
    query, key = (lax.stop_gradient(x).astype(stats) for x in (query, key))
    q_ids, k_ids = (
        ids_in_blocks(q_segment_ids, B, T, size),
        ids_in_blocks(kv_segment_ids, B, S, size),
    )
    q = jnp.einsum("BRNH,NHD->BRND", _query_features(query, q_ids, routing), q_weight)
    k = jnp.einsum("BCKH,KHD->BCKD", _mean(in_blocks(key, size), k_ids), k_weight)
    q = q.reshape(B, q.shape[1], K, N // K, H).mean(3)
    scores = jnp.einsum("BRKD,BCKD->BKRC", q, k) / math.sqrt(H)

    counts = budgets(T, S, routing)
    rows, columns = scores.shape[2:]
    limit = admissible(T, S, size, routing.is_causal)
    allowed = (np.arange(columns) < limit[:, None])[None, None]
    shared = _share_ids(q_ids, k_ids, routing)[:, None]
    first = (np.arange(columns) == 0)[None, None, None]
    rank = jnp.where(first, jnp.finfo(stats).max, lax.stop_gradient(scores))
    if routing.is_causal:
        # Later tokens of the row may have other ids: such blocks come last, but are not left out.
        rank = jnp.where(shared, rank, jnp.finfo(stats).min)
    else:
        allowed = allowed & shared
    rank = jnp.where(allowed, rank, -jnp.inf)
    if T == S:
        own = np.eye(rows, columns, dtype=bool)[None, None]
        rank = jnp.where(own, jnp.inf, rank)
    capacity = max(1, int(counts.max()))
    best, column = lax.top_k(rank, capacity)
    valid = (best > -jnp.inf) & (np.arange(capacity) < counts[:, None])[None, None]
    counts = valid.sum(-1, dtype=jnp.int32)
    column = jnp.sort(jnp.where(valid, column, columns), axis=-1)
    column = jnp.minimum(column, columns - 1).astype(jnp.int32)
    chosen = jnp.take_along_axis(scores, column, axis=-1)
    return Route(BlockLists(column, counts, block_size=size), chosen)


def _share_ids(q_ids: jax.Array, k_ids: jax.Array, routing: Routing) -> jax.Array:
    """bool [B, rows, columns]: may a query of the row and a key of the column have one id?

    Judged by the range of a block's ids. Causally the row is judged by its first token alone, for
    the choice may not know later ones.
    """
    low, high = (
        (jnp.where(ids != 0, ids, fill).min(2), jnp.where(ids != 0, ids, 0).max(2))
        for ids, fill in ((q_ids, np.int32(2**30)), (k_ids, np.int32(2**30)))
    )
    (q_low, k_low), (q_high, k_high) = zip(low, high, strict=True)
    if routing.is_causal:
        q_low = q_high = q_ids[:, :, 0]
    return (q_low[:, :, None] <= k_high[:, None]) & (q_high[:, :, None] >= k_low[:, None])
