"""One call of the primitive: what all variants share.

Checks of every argument, keys that are in no array (biases, zeros, padding) as a Partial to go on
from, dropout, the choice of the implementation.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dilax import dropout
from dilax._types import refuse, stats_dtype
from dilax.block_lists import BlockLists
from dilax.checks import (
    check_array,
    check_bool,
    check_choice,
    check_dropout,
    check_index,
    check_qkv,
    check_scale,
    segment_ids_of,
)
from dilax.partial import Partial, merge
from dilax.select import check_implementation, choose
from dilax.spec import Branch, Combine, DilatedSpec, HeadOffset, as_spec, branches_of, within

# The block lists of a call, of its branches (None: there are no segments), q_start and k_start.
Blocks = Callable[[tuple[Branch, ...] | None, int, int], BlockLists | tuple[BlockLists, ...]]


def union_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_lengths: Any,
    dilation_rates: Any,
    *,
    combine: Combine,
    head_offset: HeadOffset,
    pad_mode: str,
    average_branches: bool | None,
    is_causal: bool,
    scale: float | None,
    q_segment_ids: jax.Array | None,
    kv_segment_ids: jax.Array | None,
    key_padding_mask: jax.Array | None,
    q_start: int,
    k_start: int,
    q_positions: jax.Array | None,
    kv_positions: jax.Array | None,
    bias_k: jax.Array | None,
    bias_v: jax.Array | None,
    zero_attn: bool,
    dropout_rate: float,
    dropout_key: jax.Array | None,
    deterministic: bool,
    implementation: str | None,
    return_lse: bool,
    blocks: Blocks | None = None,
    visiting_order: str = "longest_first",
    dropout_bits: tuple[jax.Array, jax.Array] | None = None,
) -> Any:
    """One softmax over the union of the branches' keys; arguments as in `dilax.dilated_attention`.

    blocks: makes the block lists of the branches, once everything else is checked; with it
    segment_lengths may be None, for one sequence without segments. dropout_bits: where dropout
    acts, in place of the key's, as in `xla_attention.attend`.
    """
    check_qkv(query, key, value)
    T, N = query.shape[1:3]
    spec = None if segment_lengths is None and blocks else as_spec(segment_lengths, dilation_rates)
    check_choice("combine", combine, ("lse", "heads"))
    check_choice("head_offset", head_offset, ("interleaved", "blocked"))
    check_choice("pad_mode", pad_mode, ("mask", "zeros"))
    branches = branches_of(spec or DilatedSpec((1,), (1,)), N, combine, head_offset)
    for name, x in (("is_causal", is_causal), ("zero_attn", zero_attn), ("return_lse", return_lse)):
        check_bool(name, x)
    if average_branches is None:
        average_branches = combine == "heads"
    check_bool("average_branches", average_branches)
    check_scale(scale)
    q_start, k_start = check_index("q_start", q_start), check_index("k_start", k_start)
    extent = max(q_start + T, k_start + key.shape[1])
    branches = tuple(within(branch, extent) for branch in branches)
    check_extra_keys(key, bias_k, bias_v)
    if pad_mode == "zeros" and (T != key.shape[1] or q_start or k_start):
        raise refuse("pad_mode", "'mask' when T differs from S or a start is not 0", pad_mode)
    drops = check_dropout(dropout_rate, dropout_key, deterministic)
    check_implementation(implementation)
    positions = positions_of(query, key, q_positions, kv_positions)
    where: dict[str, Any] = {} if spec is None else {"branches": branches}
    if blocks is not None:
        where["blocks"] = blocks(None if spec is None else branches, q_start, k_start)
    # The last check, and the first thing that computes.
    q_ids, kv_ids = segment_ids_of(query, key, q_segment_ids, kv_segment_ids, key_padding_mask)
    rate, seed = 0.0, None
    if drops and dropout_key is not None:
        rate, seed = float(dropout_rate), dropout.seed_bits(dropout_key)

    scale = float(query.shape[-1] ** -0.5 if scale is None else scale)
    extra = []
    if pad_mode == "zeros" and not is_causal:
        extra.append(zero_keys(query, branches, np.arange(T), T, np.arange(N)))
    place = q_start + np.arange(T)[None] if positions is None else positions[0]
    drop = (rate, seed, len(branches))
    extra += extra_keys(
        query, scale, place, drop, bias_k=bias_k, bias_v=bias_v, zero_attn=zero_attn
    )
    options = dict(
        **where,
        is_causal=is_causal,
        scale=scale,
        q_segment_ids=q_ids,
        kv_segment_ids=kv_ids,
        q_start=q_start,
        k_start=k_start,
        dropout_rate=rate,
        dropout_seed=seed,
        carry=merge(*extra) if extra else None,
    )
    if positions is not None and (is_causal or rate > 0):  # else they change nothing
        options |= {"q_positions": positions[0], "kv_positions": positions[1]}
    if blocks is not None:
        options["order"] = visiting_order
    if dropout_bits is not None:
        options |= {"dropout_seed": None, "dropout_bits": dropout_bits}
    attend = choose(implementation, query, key, value, **options)
    arrays = {
        name: x
        for name, x in options.items()
        if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(x))
    }
    static = {name: x for name, x in options.items() if name not in arrays}

    def run(query, key, value, arrays):
        return tuple(attend(query, key, value, **arrays, **static))

    out, lse = placed_by_xla(run, query)(query, key, value, arrays)
    if average_branches:
        out = out / len(branches)
    out = out.astype(query.dtype)
    return (out, lse) if return_lse else out


def placed_by_xla(function: Callable, query: jax.Array, *others: bool) -> Callable:
    """function, of arrays alone, with its inside left to XLA where the query's axes are Explicit.

    It gives (out, lse) like the query; others: whether there is another array, or None, which lies
    on all devices.
    """
    sharding: Any = jax.typeof(query).sharding
    if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
        return function
    axes = tuple(sharding.spec)
    of_rows, of_all = (jax.NamedSharding(sharding.mesh, jax.P(*x)) for x in (axes[:3], ()))
    where: Any = (sharding, of_rows, *(of_all if x else None for x in others))
    return jax.sharding.auto_axes(function, out_sharding=where)


def positions_of(query: Any, key: Any, q_positions: Any, kv_positions: Any):
    """Both positions as int32 [B, T] and [B, S], or None."""
    if q_positions is None:
        if kv_positions is not None:
            raise refuse("q_positions", "positions too when kv_positions are given", None)
        return None
    (B, T), S = query.shape[:2], key.shape[1]
    if kv_positions is None:
        if T != S:
            raise refuse("kv_positions", f"positions too when T={T} differs from S={S}", None)
        kv_positions = q_positions
    for name, x, length in (("q_positions", q_positions, T), ("kv_positions", kv_positions, S)):
        batched = len(getattr(x, "shape", ())) == 2
        check_array(name, x, (B, length) if batched else (length,), ("int32",))
    return jnp.broadcast_to(q_positions, (B, T)), jnp.broadcast_to(kv_positions, (B, S))


def check_extra_keys(key: jax.Array, bias_k: Any, bias_v: Any) -> None:
    """Refuse an extra key without its value, and shapes that are not those of one key."""
    if (bias_k is None) != (bias_v is None):
        raise refuse("bias_v" if bias_v is None else "bias_k", "bias_k and bias_v together", None)
    if bias_k is not None:
        for name, x in (("bias_k", bias_k), ("bias_v", bias_v)):
            check_array(name, x, key.shape[2:], (jnp.dtype(key.dtype).name,))


def extra_keys(
    query: jax.Array, scale: float, place: Any, drop: tuple, *, bias_k, bias_v, zero_attn: bool
) -> list[Partial]:
    """The Partials over the keys that are in no array; place [1 or B, T] is that of the queries.

    drop: the rate of dropout, its seed, and the number of branches before these keys.
    """
    parts = []
    if zero_attn:
        parts.append(constant_key(query, jnp.zeros(query.shape[:-1], stats_dtype(query.dtype))))
    if bias_k is not None:
        rows = np.arange(query.shape[0]), np.arange(query.shape[2]), place
        parts.append(bias_key(query, bias_k, bias_v, scale, rows, *drop))
    return parts


def constant_key(query: jax.Array, lse: jax.Array) -> Partial:
    """A Partial over keys whose values are all 0."""
    return Partial(jnp.zeros(query.shape, lse.dtype), lse)


def zero_keys(query: jax.Array, branches: tuple[Branch, ...], position, length: int, head):
    """pad_mode="zeros": the padding keys of all branches, each with logit 0 and value 0.

    position [T] and head [N] are those of the query's rows and heads among `length` positions and
    all heads; they may be traced.
    """
    xp: Any = np if isinstance(position, np.ndarray) and isinstance(head, np.ndarray) else jnp
    position, head = position[:, None], head[None]
    counts = 0
    for w, r, first, offsets in branches:
        w = min(w, length)
        table = np.asarray(offsets)
        taking = (head >= first) & (head < first + len(table))
        offset = xp.asarray(table)[xp.where(taking, head - first, 0)]
        tokens = xp.minimum(length - position // w * w, w)  # real ones in the segment
        real = xp.maximum(-((offset - tokens) // r), 0)
        kept = taking & (position % w % r == offset)
        counts = counts + xp.where(kept, -(-w // r) - real, 0)
    stats = stats_dtype(query.dtype)
    with np.errstate(divide="ignore"):
        lse = jnp.asarray(xp.log(xp.asarray(counts).astype(stats)), stats)
    return constant_key(query, jnp.broadcast_to(lse, query.shape[:-1]))


def bias_key(query, bias_k, bias_v, scale, where, rate, seed, number) -> Partial:
    """The Partial over the one extra key that add_bias_kv gives every query.

    where: the places [B], [N] and [1 or B, T] of the query's examples, heads and rows, for dropout.
    """
    B, T, N, H = query.shape
    stats = stats_dtype(query.dtype)
    grouped = query.reshape(B, T, bias_k.shape[0], -1, H)
    lse = jnp.einsum("BTKGH,KH->BTKG", grouped, bias_k, preferred_element_type=stats) * scale
    lse = lse.reshape(B, T, N)
    values = jnp.repeat(bias_v.astype(stats), N // bias_v.shape[0], axis=0)
    out = jnp.broadcast_to(values, (B, T, N, H))
    if rate > 0:
        batch, head, row = where
        rows = dropout.row_bits(seed, batch[:, None, None], head[None, :, None], row[:, None])
        column = dropout.column_bits(seed, np.array([[[-1]]]), number)
        kept = dropout.keep(rows, column, rate)
        out = jnp.where(jnp.swapaxes(kept, 1, 2), out / (1 - rate), 0)
    return Partial(out, lse)
