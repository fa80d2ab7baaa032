"""Block-sparse attention of a sequence on a mesh axis, inside a shard_map: the same answer."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dilax import dropout
from dilax._types import UnsupportedError, refuse, shown, stats_dtype
from dilax.block_lists import BlockLists
from dilax.block_sparse import whole_lists
from dilax.checks import (
    check_bool,
    check_choice,
    check_dropout,
    check_qkv,
    check_scale,
    segment_ids_of,
)
from dilax.select import (
    IMPLEMENTATIONS,
    check_block_size,
    check_implementation,
    sibling,
    unsupported,
)
from dilax.sharded import (
    LAYOUTS,
    axis_sizes_of,
    check_ring_size,
    link_of,
)
from dilax.sharded_local import HEADS_FROM_0, XLA, kernel_options
from dilax.union import positions_of
from sharding.attention import Setup, attend
from sharding.block_plan import BlockPlan, TokenCost, make_block_plan
from sharding.local import Local


def sharded_block_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern: Any,
    *,
    axis_name: Any,
    layout: str = "contiguous",
    ring_size: int | None = None,
    head_axis: Any = None,
    batch_axis: Any = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    key_padding_mask: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    deterministic: bool = True,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Any:
    """`dilax.block_sparse_attention` of a sequence on a mesh axis, inside a shard_map over it.

    A device gets keys and values only from those whose blocks some row of it visits, straight from
    there, and of those the runs of blocks that are wanted by any. Blocks of queries that visit many
    devices, global ones, go to the keys instead, where that is less to send.

    Args:
        query: [B, T, N, H]; key, value: [B, T, K, H]: this device's part in `layout`, whole blocks.
        pattern: as in `dilax.block_sparse_attention`, over the whole sequence and known when
            tracing; one for all heads if there is a head_axis.
        axis_name, layout, ring_size, head_axis, batch_axis and the masks: as in
            `dilax.sharded_dilated_attention`; pattern and blocks count places in any layout.
        q_positions, kv_positions: int32 [T] or [B, T]: this device's; as in
            `dilax.block_sparse_attention`, causality and dropout go by them, and every key block of
            the pattern moves.
        is_causal, scale, dropout_rate, dropout_key, deterministic: as in `dilax.dilated_attention`.
        implementation: of the attention on one device, as in `dilax.sharded_dilated_attention`;
            blocks other than of 64 or a multiple of 128 need "xla".
        return_lse: return (out, lse), lse [B, T, N].

    Returns:
        out [B, T, N, H] in the query's dtype, this device's part.

    Raises:
        ValueError: an argument is wrong; the message says which, what was wanted and what came.
        UnsupportedError: the named implementation cannot take the call, with reasons.

    Source: Ring Attention (arXiv:2310.01889); BigBird (arXiv:2007.14062).

    Example:
        >>> import functools, jax, dilax
        >>> auto = jax.sharding.AxisType.Auto
        >>> mesh = jax.make_mesh((1,), ("sequence",), axis_types=(auto,))
        >>> config = dilax.SparsePatternConfig(window_size=128, block_size=64)
        >>> attend = functools.partial(
        ...     sharded_block_sparse_attention, pattern=config, axis_name="sequence"
        ... )
        >>> part = jax.P(None, "sequence")
        >>> attend = jax.shard_map(attend, mesh=mesh, in_specs=(part,) * 3, out_specs=part)
        >>> q = jax.numpy.ones((1, 256, 4, 8))
        >>> jax.jit(attend)(q, q, q).shape
        (1, 256, 4, 8)
    """
    check_qkv(query, key, value)
    if key.shape[1] != query.shape[1]:
        raise refuse("key", f"the {query.shape[1]} rows of the query on every device", key)
    for name, x in (("is_causal", is_causal), ("return_lse", return_lse)):
        check_bool(name, x)
    check_choice("layout", layout, LAYOUTS)
    check_scale(scale)
    check_implementation(implementation)
    dropping = check_dropout(dropout_rate, dropout_key, deterministic)
    sizes = axis_sizes_of("axis_name", axis_name)
    devices = math.prod(sizes)
    check_ring_size(ring_size, devices)
    for name, axis in (("head_axis", head_axis), ("batch_axis", batch_axis)):
        if axis is not None:
            axis_sizes_of(name, axis)
    places = positions_of(query, key, q_positions, kv_positions)
    if not (is_causal or dropping):
        places = None  # they change nothing
    ids = segment_ids_of(query, key, q_segment_ids, kv_segment_ids, key_padding_mask)
    rate, seed = 0.0, None
    if dropping and dropout_key is not None:
        rate, seed = float(dropout_rate), dropout.seed_bits(dropout_key)
    plan, make = block_plan_of(
        pattern,
        query,
        key,
        devices=devices,
        layout=layout,
        is_causal=is_causal and places is None,
        packed=ids[0] is not None,
        ordered=places is not None,
        one_for_all=head_axis is not None,
        link=link_of(sizes),
    )
    drops = rate, head_axis is not None
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    marks = ids[0], None if places is None else places[0]
    setup = Setup(
        plan,
        choose_block_local(implementation, query, key, value, plan, make, marks, factor, drops),
        axis_name,
        head_axis,
        batch_axis,
        is_causal,
        factor,
        rate,
        make_lists=make,
    )
    out, lse = attend(setup, query, key, value, *ids, seed, *(places or ()))
    out = out.astype(query.dtype)
    return (out, lse) if return_lse else out


def choose_block_local(
    implementation, query, key, value, plan: BlockPlan, make, marks, scale, drops
) -> Local:
    """The attention that runs on each device: the named one, or the first that takes the calls."""
    check_block_size(implementation, plan.block_size)
    reasons = {}
    for name in IMPLEMENTATIONS if implementation is None else (implementation,):
        if name == "xla":
            return XLA
        reasons[name] = block_reasons(name, query, key, value, plan, make, marks, scale, drops)
        if not reasons[name]:
            return _pallas()
    raise UnsupportedError(f"query {shown(query)}, key {shown(key)} on a mesh", reasons)


def block_reasons(
    name, query, key, value, plan: BlockPlan, make, marks, scale, drops, device_kind=None
) -> tuple[str, ...]:
    """Why an implementation cannot take the calls of a plan; empty if it can.

    marks: segment ids and positions of the queries, or None; with positions causality goes by them.
    drops: the rate of dropout, and whether heads are over several devices.
    """
    rate, one_for_all = drops
    if rate and one_for_all:
        return (HEADS_FROM_0,)

    def rows(x: Any, count: int) -> Any:
        return jax.ShapeDtypeStruct((x.shape[0], count, *x.shape[2:]), x.dtype)

    chunk = plan.length // plan.devices // plan.token_starts.shape[1]
    calls = [
        (chunk, *(hop.rows[call.key] or (0, 0)), call, 1) for hop in plan.hops for call in hop.calls
    ]
    if plan.moves is not None:
        calls += [(plan.block_size, 0, chunk, call, 2) for call in plan.moves.calls]
    reasons = []
    for count, low, high, call, leading in calls:
        q, k, v = rows(query, count), rows(key, high - low), rows(value, high - low)
        shapes = (
            x if x is None else jax.ShapeDtypeStruct(x.shape[leading:], x.dtype)
            for x in (call.columns, call.starts, call.counts, call.bands)
        )
        (q_ids, kv_ids), (q_places, kv_places) = (
            (None, None) if x is None else (rows(x, count), rows(x, high - low)) for x in marks
        )
        reasons += unsupported(
            name,
            q,
            k,
            v,
            blocks=make(*shapes, call.longest),
            is_causal=plan.causal or q_places is not None,
            scale=scale,
            q_segment_ids=q_ids,
            kv_segment_ids=kv_ids,
            q_positions=q_places,
            kv_positions=kv_places,
            q_start=plan.length - count,
            k_start=plan.length - (high - low),
            out_dtype=jnp.float32,
            device_kind=device_kind,
        )
    return tuple(dict.fromkeys(reasons))


@functools.cache
def _pallas() -> Local:
    kernels = sibling("pallas_kernels.blocks")
    assert kernels is not None  # `unsupported` looked

    def forward(query, key, value, *, carry, **options):
        options = kernel_options(**options)
        return kernels.attend(query, key, value, carry=carry, out_dtype=jnp.float32, **options)

    def backward(*arrays, **options):
        return kernels.attend_backward(*arrays, **kernel_options(**options))

    return Local(forward, backward, *XLA[2:5], alone=True, seed_from=dropout.seed_from)


def block_plan_of(
    pattern: Any,
    query: Any,
    key: Any,
    *,
    devices: int,
    layout: str = "contiguous",
    is_causal: bool = False,
    packed: bool = False,
    ordered: bool = False,
    one_for_all: bool = False,
    **link: Any,
) -> tuple[BlockPlan, Any]:
    """The plan of a pattern over `devices` parts like query and key, and what makes its lists.

    packed, ordered: whether the tokens have segment ids, and positions of their own.
    """
    (B, n, N, H), K = query.shape, key.shape[2]
    whole_q, whole_k = (jax.ShapeDtypeStruct((1, n * devices, x, H), query.dtype) for x in (N, K))
    lists = whole_lists(whole_q, whole_k, pattern, is_causal, 0, 0)
    if not lists.is_static:
        raise refuse("pattern", "a pattern that is known when tracing, on a mesh", pattern)
    if one_for_all and lists.counts.shape[1] > 1:
        raise refuse("pattern", "one pattern for all heads with a head_axis", pattern)
    kept = lists.kept()
    itemsize, stats = (jnp.dtype(x).itemsize for x in (query.dtype, stats_dtype(query.dtype)))
    marks = packed + ordered
    cost = TokenCost(
        keys=B * (2 * K * H * itemsize + 4 * marks),
        queries=B * (N * (H * itemsize + (H + 1) * stats) + 4 * marks),
        pair=4 * B * N * H,
        marks=marks,
    )
    plan = make_block_plan(
        kept.column,
        lists.counts,
        kept.band,
        length=n * devices,
        devices=devices,
        block_size=lists.block_size,
        is_causal=is_causal,
        cost=cost,
        layout=layout,
        **link,
    )

    def make(columns, starts, counts, bands, longest) -> BlockLists:
        return BlockLists(columns, counts, lists.bands, bands, lists.block_size, starts, longest)

    return plan, make
