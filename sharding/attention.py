"""Attention over a sequence that lies on a mesh axis: all branches of a plan, and its gradients.

The backward pass needs the queries, keys, values, output and total log-sum-exp of this device only.
JAX never differentiates a message: that would keep everything that arrived.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sharding.block_plan import BlockPlan
from sharding.blocks import BlockRing, Travellers
from sharding.local import Here, Local, empty, options, zeros
from sharding.mesh import AxisName, vary_like
from sharding.messages import MESSAGES, Messages
from sharding.plan import Plan
from sharding.ring import Ring


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything static about one call; an axis is None where nothing is sharded over one.

    make_lists: with a BlockPlan, what makes the lists for the local attention; see BlockRing.
    """

    plan: Plan | BlockPlan
    local: Local
    axis_name: AxisName | None
    head_axis: AxisName | None
    batch_axis: AxisName | None
    is_causal: bool
    scale: float
    dropout_rate: float
    messages: Messages = MESSAGES
    make_lists: Callable[..., Any] | None = None


def attend(
    setup: Setup,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    dropout_seed: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """out [B, n, N, H] and lse [B, n, N] of this device's rows, in float32 (float64 for float64).

    Inside a shard_map over setup.axis_name. query [B, n, N, H], key and value [B, n, K, H], segment
    ids int32 [B, n]: this device's part in the plan's layout. dropout_seed is uint32[2]. positions
    int32 [B, n]: what causality and dropout go by in place of the places in the sequence; the plan
    is then not causal. Gradients flow to query, key and value, also from lse. Arguments are taken
    as checked.
    """
    masks = (q_segment_ids, kv_segment_ids, dropout_seed, q_positions, kv_positions)
    everything = (query, key, value, *masks)
    arrays = (vary_like(x, everything) for x in everything)
    q, k, v, *masks = arrays
    return _attend(setup, q, k, v, tuple(masks))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(setup: Setup, query, key, value, masks):
    rings, here = rings_of(setup, masks)
    keys = [ring.keys(key, value) for ring in rings]
    # All first messages leave before anything is computed.
    arrived = [first_arrival(ring, k) for ring, k in zip(rings, keys, strict=True)]
    # Whole arrays leave at once, as the first call begins; rows that must be selected first would
    # leave in the middle of it.
    if not all(isinstance(ring, Ring) and ring.direct for ring in rings):
        arrived, query = setup.local.after(arrived, query)
    travellers = _travellers(setup, rings)
    moved = [one.attend(query, keys[0]) for one in travellers]
    moved, query = setup.local.after(moved, query)
    total = local_forward(setup, here, query, key, value)
    chunks = setup.plan.token_starts.shape[1]
    running: list[Any] = [None] * chunks if total is None else _split(total, chunks)
    for ring, own, first in zip(rings, keys, arrived, strict=True):
        with jax.named_scope(ring.name):
            running = ring_forward(ring, query, own, first, running)
    cut = [query] if chunks == 1 else jnp.split(query, chunks, axis=1)
    parts = [empty(q) if x is None else x for x, q in zip(running, cut, strict=True)]
    for one, back in zip(travellers, moved, strict=True):
        parts = one.merge(parts, back)
    return tuple(jnp.concatenate(x, 1) if chunks > 1 else x[0] for x in zip(*parts, strict=True))


def rings_of(setup: Setup, masks) -> tuple[list[Any], Here]:
    """What moves, and where this device is; masks: those of `Here`."""

    def index(axis: AxisName | None) -> Any:
        return 0 if axis is None else lax.axis_index(axis)

    axes = setup.axis_name, setup.head_axis, setup.batch_axis
    here = Here(*map(index, axes), *masks)
    args = setup.axis_name, setup.scale, setup.dropout_rate, setup.messages, here
    if isinstance(setup.plan, BlockPlan):
        assert setup.make_lists is not None
        first = setup.local, setup.plan, setup.make_lists, setup.axis_name, setup.is_causal
        return [BlockRing(*first, *args[1:])], here
    moving = [branch for branch in setup.plan.branches if not branch.in_place]
    return [
        Ring(setup.local, setup.plan, branch, setup.is_causal, *args) for branch in moving
    ], here


def _travellers(setup: Setup, rings: list[Any]) -> list[Travellers]:
    """Blocks of queries that move: none, or those of the one plan."""
    moves = setup.plan.moves if isinstance(setup.plan, BlockPlan) else None
    return [] if moves is None else [Travellers(rings[0], moves)]


def first_arrival(ring: Any, keys) -> Any:
    """What the first hop brings, None where there is none."""
    hops = ring.branch.hops
    return ring.send(hops[1], keys) if len(hops) > 1 else None


def local_forward(setup: Setup, here: Here, query, key, value) -> Any:
    """(out, lse) of the branches that are local, None if there is none."""
    branches = _local_branches(setup.plan)
    if not branches:
        return None
    with jax.named_scope("local"):
        return setup.local.forward(
            query,
            key,
            value,
            **options(setup.local, here, setup.plan, branches, query.shape),
            is_causal=setup.is_causal,
            scale=setup.scale,
            dropout_rate=setup.dropout_rate,
            carry=None,
        )


def _with_next(hops: Any) -> Any:
    """Each hop with the one after it, None at the end."""
    return zip(hops, (*hops[1:], None), strict=False)


def _split(arrays, chunks: int) -> list[tuple]:
    """Arrays [B, n, ...] as a list over chunks of tuples."""
    if chunks == 1:
        return [tuple(arrays)]
    return list(zip(*(jnp.split(x, chunks, axis=1) for x in arrays), strict=True))


def ring_forward(ring: Any, query, own, arrived, running: list) -> list:
    """The running (out, lse) per chunk with one branch added."""
    chunks = range(len(running))
    queries = [ring.queries(query, i) for i in chunks]
    marks = [ring.query_marks(i) for i in chunks]
    state: list[Any] = [None] * len(running)
    if ring.direct:
        state = [old and tuple(x[None] for x in old) for old in running]
    hops = ring.branch.hops
    state = ring.attend(hops[0], queries, marks, own, state)
    for hop, after in _with_next(hops[1:]):
        following = None
        if after is not None:
            # Not before the hop before is done, so that at most two hops' keys are here at once.
            own, state = lax.optimization_barrier((own, state))
            following, state = ring.local.after(ring.send(after, own), state)
        state = ring.attend(hop, queries, marks, arrived, state)
        arrived = following
    if ring.direct:
        return [new and tuple(x[0] for x in new) for new in state]
    return ring.merge(running, state, query)


def _attend_fwd(setup: Setup, query, key, value, masks):
    out, lse = _attend(setup, query, key, value, masks)
    return (out, lse), (query, key, value, masks, out, lse)


def _attend_bwd(setup: Setup, residuals, cotangents):
    query, key, value, masks, out, lse = residuals
    d_out, d_lse = cotangents
    delta = (d_out.astype(lse.dtype) * out.astype(lse.dtype)).sum(-1)
    delta = delta - jnp.where(lse != -jnp.inf, d_lse, 0)
    d_out = d_out.astype(query.dtype)
    rings, here = rings_of(setup, masks)
    keys = [ring.keys(key, value) for ring in rings]
    arrived = [first_arrival(ring, k) for ring, k in zip(rings, keys, strict=True)]
    arrived, query = setup.local.after(arrived, query)
    local = _in_place_gradients(setup, here, query, key, value, (d_out, lse, delta))
    chunks = setup.plan.token_starts.shape[1]
    totals = [[x for (x,) in _split((g,), chunks)] for g in local]
    for ring, own, first in zip(rings, keys, arrived, strict=True):
        with jax.named_scope(f"{ring.name}_backward"):
            totals = _backward(ring, (query, d_out, lse, delta), own, first, totals)
    for one in _travellers(setup, rings):
        totals = one.gradients((query, d_out, lse, delta), keys[0], totals)
    gradients = (jnp.concatenate(x, 1) if chunks > 1 else x[0] for x in totals)
    dq, dk, dv = (g.astype(x.dtype) for g, x in zip(gradients, (query, key, value), strict=True))
    return dq, dk, dv, None


_attend.defvjp(_attend_fwd, _attend_bwd)


def _local_branches(plan: Plan | BlockPlan) -> list:
    if isinstance(plan, BlockPlan):
        return []
    return [branch for branch in plan.branches if branch.in_place]


def _in_place_gradients(setup: Setup, here: Here, query, key, value, others) -> Any:
    branches = _local_branches(setup.plan)
    if not branches:
        return tuple(zeros(x) for x in (query, key, value))
    with jax.named_scope("local_backward"):
        return setup.local.backward(
            query,
            key,
            value,
            *others,
            **options(setup.local, here, setup.plan, branches, query.shape),
            is_causal=setup.is_causal,
            scale=setup.scale,
            dropout_rate=setup.dropout_rate,
        )


def _backward(ring: Any, arrays, own, arrived, totals: list) -> list:
    """Gradients [dq, dk, dv], each per chunk, with those of one branch added."""
    chunks = range(len(totals[0]))
    query, d_out, lse, delta = ([ring.queries(x, i) for i in chunks] for x in arrays)
    marks = [ring.query_marks(i) for i in chunks]
    rows = list(zip(query, marks, d_out, lse, delta, strict=True))
    hops = ring.branch.hops
    dq: list[Any] = [None for _ in chunks]
    mine: list[Any] = [None for _ in chunks]
    for hop, after in _with_next(hops[1:]):
        following = None if after is None else ring.send(after, own)
        following, arrived = ring.local.after(following, arrived)
        dq, back = ring.gradients(hop, rows, arrived, dq)
        # They go home while the next hop is computed, the last ones while the rows that are here
        # are: so those come last. And at most two hops' keys are here at once.
        own, back = lax.optimization_barrier((own, back))
        home, (own, following) = ring.local.after(ring.give_back(hop, back), (own, following))
        mine = _add_back(mine, home, hop.rows, own)
        arrived = following
    dq, back = ring.gradients(hops[0], rows, own, dq)
    mine = [
        jax.tree.map(jnp.add, x, y) if x and y else x or y for x, y in zip(mine, back, strict=True)
    ]
    dk, dv = ([None if x is None else x[i] for x in mine] for i in range(2))
    dtype = arrays[0].dtype
    return [
        ring.add_queries(totals[0], dq, dtype),
        ring.add_keys(totals[1], dk, dtype),
        ring.add_keys(totals[2], dv, dtype),
    ]


def _add_back(mine: list, back: list, rows, own) -> list:
    """Gradients of this device's keys and values per chunk, with what came back added."""
    result = []
    for old, new, sent, keys in zip(mine, back, rows, own, strict=True):
        if new is None:
            result.append(old)
            continue
        low, high = sent
        if old is None:
            old = tuple(jnp.zeros(keys.key.shape, x.dtype) for x in new)
        whole = sent == (0, keys.key.shape[2])
        result.append(
            tuple(
                x + y if whole else x.at[:, :, low:high].add(y)
                for x, y in zip(old, new, strict=True)
            )
        )
    return result
