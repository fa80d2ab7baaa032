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
_NEVER = 2**31 - 1  # later than every position


@dataclasses.dataclass(frozen=True)
class Routing:
    """How a router chooses; static.

    Args:
        sparsity_ratio: the share of admissible blocks that a row keeps.
        block_size: tokens of a block.
        query_feature: "mean" of the block's queries (it knows later tokens of the block: not for
            causal attention), its "first" query, or the mean of the "previous" block's.
        is_causal: blocks after a row's own are not admissible.
        positions: int [M, T], by which causality goes where tokens lie in an order, -1 where there
            is none; those of example b are in row b modulo M. None: the indices.
    """

    sparsity_ratio: float
    block_size: int
    query_feature: str
    is_causal: bool
    positions: np.ndarray | None = None


class Route(NamedTuple):
    """What a router chose: the lists, and the scores of the listed blocks.

    scores [B, K, rows, capacity] is differentiable in the router's weights only.
    """

    lists: BlockLists
    scores: jax.Array


class Reach(NamedTuple):
    """What causality leaves: bool [M, 1, rows, columns] each, but `first`; known when tracing."""

    admissible: np.ndarray  # some query of the row sees some key of the block
    past: np.ndarray  # every query sees every key
    begun: np.ndarray  # every query sees the block's earliest key, but not all keys
    first: np.ndarray  # int [M, blocks]: the place of a block's earliest token


def causal_reach(T: int, routing: Routing) -> Reach:
    """The reach of a causal call of T queries and keys.

    Example:
        >>> routing = Routing(0.5, 2, "first", True, np.array([[0, 3, 1, 2]]))
        >>> reach = causal_reach(4, routing)
        >>> reach.admissible[0, 0].astype(int).tolist(), reach.begun[0, 0].astype(int).tolist()
        ([[1, 1], [1, 1]], [[1, 0], [1, 1]])
    """
    size = routing.block_size
    place = np.arange(T)[None] if routing.positions is None else routing.positions
    place = np.pad(place, ((0, 0), (0, -T % size)), constant_values=-1)
    place = place.reshape(len(place), -1, size)
    late = np.where(place < 0, _NEVER, place)
    low, high = late.min(-1)[:, None, None], place.max(-1)[:, None, None]
    q_low, q_high = (np.swapaxes(x, 2, 3) for x in (low, high))
    past = high < q_low
    return Reach(low <= q_high, past, (low <= q_low) & ~past, late.argmin(-1))


def budgets(T: int, S: int, routing: Routing) -> np.ndarray:
    """int [rows], or [M, rows] causally by positions: how many blocks each row keeps.

    Example:
        >>> budgets(640, 640, Routing(0.25, 64, "first", True)).tolist()
        [1, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    """
    if routing.is_causal and routing.positions is not None:
        limit = causal_reach(T, routing).admissible[:, 0].sum(-1)
    else:
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


def _at(x: jax.Array, place: np.ndarray) -> jax.Array:
    """x [B, blocks, size, ...] at one place of each block: place [1 or B, blocks]."""
    if len(place) == 1:
        return x[:, np.arange(place.shape[1]), place[0]]
    place = place.reshape(*place.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, place, axis=2)[:, :, 0]


def _of_examples(x: np.ndarray, B: int) -> np.ndarray:
    """x [M, ...] of each of B examples, or [1, ...] of all."""
    return x if len(x) == 1 else np.tile(x, (B // len(x), *[1] * (x.ndim - 1)))


def _query_features(query: jax.Array, ids: jax.Array, first: np.ndarray, routing: Routing):
    blocks = in_blocks(query, routing.block_size)
    if routing.query_feature == "mean":
        return _mean(blocks, ids)
    earliest = _at(blocks, first)
    if routing.query_feature == "first":
        return earliest
    return jnp.concatenate([earliest[:, :1], _mean(blocks, ids)[:, :-1]], axis=1)


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

    Causally a choice may know what all queries of the row see. In an order, blocks lie in part
    before a row: the score of such a block is that of its earliest key, if all queries see this
    one; blocks that only some queries reach come last.

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
    rows, columns = q_ids.shape[1], k_ids.shape[1]
    reach = None
    if routing.is_causal:
        reach = Reach(*(_of_examples(x, B) for x in causal_reach(T, routing)))
    first = np.zeros((1, rows), int) if reach is None else reach.first
    own = (np.eye(rows, columns, dtype=bool) & (T == S))[None, None]
    blocks = in_blocks(key, size)
    q = jnp.einsum("BRNH,NHD->BRND", _query_features(query, q_ids, first, routing), q_weight)
    q = q.reshape(B, rows, K, N // K, H).mean(3)

    def scores_of(k):
        k = jnp.einsum("BCKH,KHD->BCKD", k, k_weight)
        return jnp.einsum("BRKD,BCKD->BKRC", q, k) / math.sqrt(H)

    scores = scores_of(_mean(blocks, k_ids))
    if reach is not None and (reach.begun & ~own).any():
        scores = jnp.where(reach.begun & ~own, scores_of(_at(blocks, first)), scores)

    counts = _of_examples(np.atleast_2d(budgets(T, S, routing)), B)[:, None]
    shared = _share_ids(q_ids, k_ids, reach)
    start = (np.arange(columns) == 0)[None, None, None]
    rank = jnp.where(start, jnp.finfo(stats).max, lax.stop_gradient(scores))
    if reach is None:
        allowed = shared
    else:
        # Later tokens of the row may have other ids: such blocks come last, but are not left out.
        rank = jnp.where(shared & (reach.past | reach.begun), rank, jnp.finfo(stats).min)
        allowed = reach.admissible
    rank = jnp.where(allowed, rank, -jnp.inf)
    rank = jnp.where(own, jnp.inf, rank)
    capacity = max(1, int(counts.max()))
    best, column = lax.top_k(rank, capacity)
    valid = (best > -jnp.inf) & (np.arange(capacity) < counts[..., None])
    counts = valid.sum(-1, dtype=jnp.int32)
    column = jnp.sort(jnp.where(valid, column, columns), axis=-1)
    column = jnp.minimum(column, columns - 1).astype(jnp.int32)
    chosen = jnp.take_along_axis(scores, column, axis=-1)
    return Route(BlockLists(column, counts, block_size=size), chosen)


def _share_ids(q_ids: jax.Array, k_ids: jax.Array, reach: Reach | None) -> jax.Array:
    """bool [B, 1, rows, columns]: may a query of the row and a key of the column have one id?

    Judged by the range of a block's ids. Causally the row is judged by its first token alone, and
    so is a block that is not past, for the choice may not know later ones.
    """

    def meet(q_ids, k_ids):
        (q_low, q_high), (k_low, k_high) = (
            (jnp.where(ids != 0, ids, 2**30).min(-1), jnp.where(ids != 0, ids, 0).max(-1))
            for ids in (q_ids[:, None, :, None], k_ids[:, None, None])
        )
        return (q_low <= k_high) & (q_high >= k_low)

    if reach is None:
        return meet(q_ids, k_ids)
    q_ids, k_first = (_at(ids, reach.first)[..., None] for ids in (q_ids, k_ids))
    return jnp.where(reach.past, meet(q_ids, k_ids), meet(q_ids, k_first))
