"""What a router learns from: how much attention each kept block took, or would have used.

The choice of blocks has no gradient. Either the router's scores are drawn to the share of attention
that each kept block took (`kept_mass`, `kl_loss`), or they get the gradient that a bias on the kept
blocks' logits would have (`straight_through`). Both go through the kept blocks once more, one row
of blocks at a time, so memory is linear in the number of kept blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dilax._types import stats_dtype
from dilax.block_lists import BlockLists
from dilax.router import Route, ids_in_blocks, in_blocks

TARGETS = ("mean", "max")


def _heads_first(x: jax.Array, K: int, size: int) -> jax.Array:
    """[B, T, N, ...] -> [B, K, G, rows, size, ...]."""
    x = in_blocks(x, size)
    x = x.reshape(*x.shape[:3], K, -1, *x.shape[4:])
    return jnp.moveaxis(x, (3, 4), (1, 2))


def _per_kept_block(
    measure: Callable, query, key, lse, lists: BlockLists, masks, scale, is_causal: bool, more
) -> jax.Array:
    """measure(p, more) -> [B, K, capacity] for each row of blocks: [B, K, rows, capacity].

    p [B, K, G, queries, capacity, keys] are the probabilities of a row's kept blocks; masks are the
    ids of queries and of keys, and the positions; `more` is a pair of arrays of queries' and of
    keys', [B, T, N, ...] and [B, S, K, ...].
    """
    (B, T), (S, K), size = query.shape[:2], key.shape[1:3], lists.block_size
    stats = stats_dtype(query.dtype)
    q_ids, k_ids = ids_in_blocks(masks[0], B, T, size), ids_in_blocks(masks[1], B, S, size)
    place = jnp.arange(S)[None] if masks[2] is None else masks[2]
    place = in_blocks(jnp.broadcast_to(place, (B, S)), size)
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse)  # exp(s - inf) = 0: rows that saw nothing
    mine = [_heads_first(x, K, size) for x in (query, lse, *more[0])]
    theirs = [_heads_first(x, K, size)[:, :, 0] for x in (key, *more[1])]
    theirs += [jnp.broadcast_to(x[:, None], (B, K, *x.shape[1:])) for x in (k_ids, place)]

    def row(along):
        column, count, q_ids, q_place, mine = along
        met = [jax.vmap(jax.vmap(lambda x, c: x[c]))(x, column) for x in theirs]
        k, k_ids, k_place = met[0], *met[-2:]
        q, lse = mine[:2]
        s = jnp.einsum("BKGqH,BKcsH->BKGqcs", q, k, preferred_element_type=stats) * scale
        valid = np.arange(lists.capacity)[None, None] < count[..., None]
        visible = (k_ids[:, :, None] == q_ids[:, None, :, None, None]) & (k_ids != 0)[:, :, None]
        visible &= valid[:, :, None, :, None]
        if is_causal:
            visible &= q_place[:, None, :, None, None] >= k_place[:, :, None]
        visible = visible[:, :, None]
        s = jnp.where(visible, s, 0) - lse[..., None, None]
        return measure(jnp.where(visible, jnp.exp(s), 0), mine[2:], met[1:-2])

    along = (
        jnp.moveaxis(lists.columns, 2, 0),
        jnp.moveaxis(lists.counts, 2, 0),
        jnp.moveaxis(q_ids, 1, 0),
        jnp.moveaxis(place if is_causal else q_ids, 1, 0),  # causally as many queries as keys
        [jnp.moveaxis(x, 3, 0) for x in mine],
    )
    return jnp.moveaxis(lax.map(row, along), 0, 2)


def kept_mass(
    query: jax.Array,
    key: jax.Array,
    lse: jax.Array,
    lists: BlockLists,
    *,
    scale: float,
    is_causal: bool,
    positions: Any = None,
    segment_ids: tuple[Any, Any] = (None, None),
    target: str = "max",
) -> jax.Array:
    """The attention that went to each kept block, pooled over a row's queries and its heads.

    lse [B, T, N] is that of the attention over the lists; causality goes by positions [1 or B, T],
    if there are any. target: "max" over the queries and heads,
    for which one query that needs a block is enough, or "mean". Each row sums to 1, or to 0 where
    nothing is visible: [B, K, rows, capacity]. It is a constant: no gradient flows through it.

    Example:
        >>> lists = BlockLists(jnp.zeros((1, 1, 1, 1), jnp.int32), jnp.ones((1, 1, 1), jnp.int32))
        >>> x = jnp.ones((1, 128, 1, 8))
        >>> kept_mass(x, x, jnp.zeros((1, 128, 1)), lists, scale=1.0, is_causal=True).tolist()
        [[[[1.0]]]]
    """

    def measure(p, *_):
        mass = p.sum(-1)
        return mass.max((2, 3)) if target == "max" else mass.sum((2, 3))

    query, key, lse = (lax.stop_gradient(x) for x in (query, key, lse))
    masks = (*segment_ids, positions)
    mass = _per_kept_block(measure, query, key, lse, lists, masks, scale, is_causal, ((), ()))
    total = mass.sum(-1, keepdims=True)
    return lax.stop_gradient(mass / jnp.where(total > 0, total, 1))


def kl_loss(found: Route, mass: jax.Array) -> jax.Array:
    """KL(mass || softmax of the scores) over the kept blocks, a mean over the rows that see any.

    Example:
        >>> lists = BlockLists(jnp.zeros((1, 1, 1, 2), jnp.int32), jnp.full((1, 1, 1), 2))
        >>> float(kl_loss(Route(lists, jnp.zeros((1, 1, 1, 2))), jnp.full((1, 1, 1, 2), 0.5)))
        0.0
    """
    valid = found.lists.valid
    top = jnp.where(valid, lax.stop_gradient(found.scores), -jnp.inf).max(-1, keepdims=True)
    score = jnp.where(valid, found.scores - jnp.where(top > -jnp.inf, top, 0), 0)
    total = jnp.where(valid, jnp.exp(score), 0).sum(-1, keepdims=True)
    log_share = score - jnp.log(jnp.where(total > 0, total, 1))
    taken = valid & (mass > 0)
    terms = jnp.where(taken, mass * (jnp.log(jnp.where(taken, mass, 1)) - log_share), 0)
    rows = (mass.sum(-1) > 0).sum()
    return terms.sum() / jnp.maximum(rows, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _through(fixed: tuple[float, bool], result, scores, lists, arrays, masks):
    return result


def _through_fwd(fixed, result, scores, lists, arrays, masks):
    return result, (result, lists, arrays, masks)


def _through_bwd(fixed, residuals, cotangents):
    (out, lse), lists, (query, key, value), masks = residuals
    d_out, d_lse = cotangents
    scale, is_causal = fixed
    stats = lse.dtype
    delta = (d_out.astype(stats) * out.astype(stats)).sum(-1) - jnp.where(lse > -jnp.inf, d_lse, 0)

    def measure(p, mine, theirs):
        (d_out, delta), (v,) = mine, theirs
        dp = jnp.einsum("BKGqH,BKcsH->BKGqcs", d_out, v, preferred_element_type=stats)
        return (p * (dp - delta[..., None, None])).sum((2, 3, 5))

    more = ((d_out, delta), (value,))
    d_scores = _per_kept_block(measure, query, key, lse, lists, masks, scale, is_causal, more)
    return cotangents, d_scores, None, None, None


_through.defvjp(_through_fwd, _through_bwd)


def straight_through(
    result: tuple[jax.Array, jax.Array],
    found: Route,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    is_causal: bool,
    positions: Any = None,
    segment_ids: tuple[Any, Any] = (None, None),
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) as they are, with the gradient that a bias of 0 on each kept block would have.

    The bias of a block is its score less that score as a constant, added to the logits of all its
    pairs: nothing changes in the result, and the router learns where more attention would help.

    Example:
        >>> from dilax.router import Routing, route
        >>> x = jax.random.normal(jax.random.key(0), (1, 128, 1, 8))
        >>> eye = jnp.eye(8)[None]
        >>> found = route(x, x, eye, eye, Routing(1.0, 64, "mean", False))
        >>> out, lse = straight_through((x, x[..., 0]), found, x, x, x, scale=1.0, is_causal=False)
        >>> bool((out == x).all())
        True
    """
    scores, arrays = found.scores, tuple(map(lax.stop_gradient, (query, key, value)))
    masks = (*segment_ids, positions)
    return _through((scale, is_causal), result, scores, found.lists, arrays, masks)
