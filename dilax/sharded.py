"""Dilated attention of a sequence on a mesh axis, inside a shard_map: the same answer."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dilax import dropout
from dilax._types import refuse, stats_dtype
from dilax.checks import (
    check_bool,
    check_choice,
    check_dropout,
    check_index,
    check_qkv,
    check_scale,
    segment_ids_of,
)
from dilax.partial import Partial, merge
from dilax.select import check_implementation
from dilax.sharded_local import choose_local
from dilax.spec import Combine, HeadOffset, as_spec, branches_of, within
from dilax.union import bias_key, check_extra_keys, constant_key, positions_of, zero_keys
from sharding import attention as sharded
from sharding.cost import Link as Link
from sharding.cost import Sizes
from sharding.mesh import LAYOUTS, local_positions
from sharding.mesh import chunk_length as chunk_length
from sharding.mesh import from_layout as from_layout
from sharding.mesh import positions as layout_positions  # noqa: F401
from sharding.mesh import to_layout as to_layout
from sharding.plan import METHODS, Plan, make_plan


def sharded_dilated_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_lengths: Any,
    dilation_rates: Any = None,
    *,
    axis_name: Any,
    layout: str = "contiguous",
    method: Any = None,
    ring_size: int | None = None,
    head_axis: Any = None,
    batch_axis: Any = None,
    combine: Combine = "lse",
    head_offset: HeadOffset = "interleaved",
    pad_mode: str = "mask",
    average_branches: bool | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    key_padding_mask: jax.Array | None = None,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    bias_k: jax.Array | None = None,
    bias_v: jax.Array | None = None,
    zero_attn: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    deterministic: bool = True,
    implementation: str | None = None,
    return_lse: bool = False,
) -> Any:
    """`dilax.dilated_attention` of a sequence on a mesh axis, inside a `jax.shard_map` over it.

    T, S, N, B are those of one device: T = S is the sequence over the P devices of axis_name. The
    result, its gradients and what dropout drops are those of one device with everything.

    Args:
        query: [B, T, N, H]; key, value: [B, T, K, H]: this device's part in `layout`.
        segment_lengths, dilation_rates: in tokens of the whole sequence, as in
            `dilax.dilated_attention`, as are combine, head_offset, pad_mode, average_branches,
            is_causal, scale, bias_k, bias_v, zero_attn, dropout_rate, deterministic.
        axis_name: the mesh axis of the sequence, or a tuple of several in the mesh's order; None
            if every device has all of it.
        layout: "contiguous", device d holds the d-th part; "zigzag", chunks d and 2P - 1 - d of 2P,
            which balances causal work. `dilax.to_layout` brings data, labels and positions there.
        method: how a branch moves that reaches beyond a device: "ring", "all_to_all", "all_gather"
            or "hybrid"; a sequence has one (or None) per branch; None takes the fastest expected.
        ring_size: if given, must be P.
        head_axis, batch_axis: mesh axes that heads and examples are sharded over, if any: residues
            follow the head's, dropout also the example's place in the whole.
        q_segment_ids, kv_segment_ids: int32 [B, T]; key_padding_mask: bool [B, T]; q_positions,
            kv_positions: int32 [T] or [B, T]: this device's. Causality and dropout go by positions
            where these are given; then every key of a segment may be seen, and moves.
        dropout_key: the same on all devices.
        implementation: of the attention on one device: "xla", "pallas" (inside shard_map with
            check_vma=False) or None.
        return_lse: return (out, lse), lse [B, T, N].

    Returns:
        out [B, T, N, H] in the query's dtype, this device's part.

    Raises:
        ValueError: an argument is wrong; the message says which, what was wanted and what came.
        UnsupportedError: the named implementation cannot take the call, with reasons.

    Source: LongNet (arXiv:2307.02486); Ring Attention (arXiv:2310.01889); DeepSpeed-Ulysses
    (arXiv:2309.14509).

    Example:
        >>> import functools, jax, dilax
        >>> auto = jax.sharding.AxisType.Auto
        >>> mesh = jax.make_mesh((1,), ("sequence",), axis_types=(auto,))
        >>> attend = functools.partial(
        ...     dilax.sharded_dilated_attention, segment_lengths=[8, 32], dilation_rates=[1, 2],
        ...     axis_name="sequence",
        ... )
        >>> part = jax.P(None, "sequence")
        >>> attend = jax.shard_map(attend, mesh=mesh, in_specs=(part,) * 3, out_specs=part)
        >>> q = jax.numpy.ones((1, 32, 4, 8))
        >>> jax.jit(attend)(q, q, q).shape
        (1, 32, 4, 8)
    """
    check_qkv(query, key, value)
    if key.shape[1] != query.shape[1]:
        raise refuse("key", f"the {query.shape[1]} rows of the query on every device", key)
    spec = as_spec(segment_lengths, dilation_rates)
    check_choice("combine", combine, ("lse", "heads"))
    check_choice("pad_mode", pad_mode, ("mask", "zeros"))
    check_choice("layout", layout, LAYOUTS)
    for name, x in (("is_causal", is_causal), ("zero_attn", zero_attn), ("return_lse", return_lse)):
        check_bool(name, x)
    average_branches = combine == "heads" if average_branches is None else average_branches
    check_bool("average_branches", average_branches)
    check_scale(scale)
    check_extra_keys(key, bias_k, bias_v)
    check_implementation(implementation)
    drops = check_dropout(dropout_rate, dropout_key, deterministic)
    sizes = () if axis_name is None else axis_sizes_of("axis_name", axis_name)
    devices = math.prod(sizes)
    check_ring_size(ring_size, devices)
    (B, T, N, H), total = query.shape, query.shape[1] * devices
    head_parts = 1 if head_axis is None else math.prod(axis_sizes_of("head_axis", head_axis))
    if batch_axis is not None:
        axis_sizes_of("batch_axis", batch_axis)
    branches = tuple(
        within(branch, total) for branch in branches_of(spec, N * head_parts, combine, head_offset)
    )
    places = positions_of(query, key, q_positions, kv_positions)
    if axis_name is None:
        refuse_without_sequence(layout, method)
    ids = segment_ids_of(query, key, q_segment_ids, kv_segment_ids, key_padding_mask)
    rate, seed = 0.0, None
    if drops and dropout_key is not None:
        rate, seed = float(dropout_rate), dropout.seed_bits(dropout_key)
    if not (is_causal or drops):
        places = None  # they change nothing
    factor = H**-0.5 if scale is None else float(scale)
    plan = plan_of(
        branches,
        (B, total, N, key.shape[2], H),
        query.dtype,
        devices=devices,
        layout=layout,
        is_causal=is_causal and places is None,
        head_parts=head_parts,
        method=method,
        packed=ids[0] is not None,
        ordered=places is not None,
        link=link_of(sizes),
    )
    local = choose_local(implementation, query, key, value, plan, factor, ids, rate)
    setup = sharded.Setup(plan, local, axis_name, head_axis, batch_axis, is_causal, factor, rate)
    masks = *ids, seed, *(places or ())
    parts = [Partial(*sharded.attend(setup, query, key, value, *masks))]
    place = _Place(axis_name, head_axis, batch_axis, plan.layout, head_parts)
    if pad_mode == "zeros" and not is_causal:
        parts.append(zero_keys(query, branches, place.rows(T), total, place.heads(N)))
    if zero_attn:
        lse = jnp.zeros(query.shape[:-1], stats_dtype(query.dtype))
        parts.append(constant_key(query, lse))
    if bias_k is not None:
        rows = place.rows(T)[None] if places is None else places[0]
        where = place.batch(B), place.heads(N), rows
        parts.append(bias_key(query, bias_k, bias_v, factor, where, rate, seed, len(branches)))
    out, lse = merge(*parts)
    if average_branches:
        out = out / len(branches)
    out = out.astype(query.dtype)
    return (out, lse) if return_lse else out


class _Place:
    """Where this device's rows, heads and examples are in the whole."""

    def __init__(self, axis_name, head_axis, batch_axis, layout, head_parts):
        self.axis_name, self.layout = axis_name, layout
        self.head_axis, self.batch_axis = head_axis, batch_axis

    def rows(self, length: int) -> jax.Array:
        """int32 [T]: positions."""
        if self.axis_name is None:
            return jnp.arange(length, dtype=jnp.int32)
        return local_positions(length, self.axis_name, self.layout)

    def heads(self, count: int) -> Any:
        """int [N]: query heads."""
        return np.arange(count) + _first(self.head_axis, count)

    def batch(self, count: int) -> Any:
        """int [B]: examples."""
        return np.arange(count) + _first(self.batch_axis, count)


def _first(axis: Any, count: int) -> Any:
    return 0 if axis is None else lax.axis_index(axis) * count


def axis_sizes_of(name: str, axis: Any) -> tuple[int, ...]:
    """Devices along the mesh axis, or along each of the axes, that an argument names."""
    names = axis if isinstance(axis, tuple) else (axis,)
    if not names or not all(isinstance(x, str) for x in names):
        raise refuse(name, "the name of a mesh axis, or a tuple of names", axis)
    bound = jax.sharding.get_abstract_mesh()
    manual = tuple(bound.manual_axes)
    missing = [x for x in names if x not in manual]
    if missing:
        wanted = f"axes of the shard_map around this call ({', '.join(manual) or 'there is none'})"
        raise refuse(name, wanted, axis)
    return tuple(lax.axis_size(x) for x in names)


def link_of(sizes: tuple[int, ...], gigabytes_per_second: Any = None) -> Link:
    """What messages cost along mesh axes of the tokens with these sizes, the outermost first.

    gigabytes_per_second: that a device receives along each of them, or one number for all. None:
    340 along the innermost (NVLink, measured) and 50 along the others (InfiniBand of 400 Gbit/s).

    Example:
        >>> link_of((2, 4)).levels
        ((4, 50000000000.0),)
    """
    speeds = gigabytes_per_second
    if speeds is None:
        speeds = (*(50.0,) * (len(sizes) - 1), 340.0)
    elif not isinstance(speeds, tuple | list):
        speeds = (speeds,) * max(len(sizes), 1)
    real = all(isinstance(x, int | float) and not isinstance(x, bool) for x in speeds)
    if not real or not all(1e-6 <= x < 1e12 for x in speeds):
        raise refuse("gigabytes_per_second", "positive numbers", gigabytes_per_second)
    if len(speeds) != max(len(sizes), 1):
        wanted = f"one number, or one for each of the {len(sizes)} axes of the tokens"
        raise refuse("gigabytes_per_second", wanted, gigabytes_per_second)
    *outer, inner = (float(x) * 1e9 for x in speeds)
    runs = np.cumprod(sizes[:0:-1]).tolist()
    return Link(bandwidth=inner, levels=tuple(zip(runs, reversed(outer), strict=True)))


def refuse_without_sequence(layout: Any, method: Any) -> None:
    """Refuse what says how tokens lie and move, where every device has all of them."""
    for name, x, default in (("layout", layout, "contiguous"), ("method", method, None)):
        if x != default:
            wanted = f"{default!r} without a mesh axis of the tokens (axis_name, or sequence)"
            raise refuse(name, wanted, x)


def check_ring_size(ring_size: Any, devices: int) -> None:
    """Refuse a ring_size that is not the number of devices along the sequence axis."""
    if ring_size is not None and check_index("ring_size", ring_size) != devices:
        wanted = f"None or {devices}, the devices along the mesh axis of the sequence"
        raise refuse("ring_size", wanted, ring_size)


def plan_of(
    branches: Any,
    sizes: tuple[int, int, int, int, int],
    dtype: Any,
    *,
    devices: int,
    layout: str = "contiguous",
    is_causal: bool = False,
    head_parts: int = 1,
    method: Any = None,
    packed: bool = False,
    ordered: bool = False,
    **link: Any,
) -> Plan:
    """The plan for (B, T of all devices, N, K, H); N and K are those of one device.

    packed, ordered: whether the tokens have segment ids, and positions of their own.

    Example:
        >>> from dilax.spec import Branch
        >>> plan_of((Branch(8, 1, 0, (0, 0)),), (1, 64, 2, 2, 8), "float32", devices=8).bytes
        0
    """
    B, T, N, K, H = sizes
    methods = method if method is None or isinstance(method, str) else tuple(method)
    for one in (methods,) if isinstance(methods, str) else methods or ():
        if one is not None:
            check_choice("method", one, METHODS)
    stats = jnp.dtype(stats_dtype(dtype)).itemsize
    return make_plan(
        tuple((int(w), int(r), int(first), tuple(offsets)) for w, r, first, offsets in branches),
        length=T,
        devices=devices,
        sizes=Sizes(B, N, K, H, jnp.dtype(dtype).itemsize, stats, packed, ordered),
        layout=layout,
        is_causal=is_causal,
        head_parts=head_parts,
        method=methods,
        **link,
    )
