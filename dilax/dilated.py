"""Dilated attention: LongNet's branches and one softmax over all their keys."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dilax import dropout
from dilax._types import refuse, stats_dtype
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
from dilax.spec import Branch, Combine, HeadOffset, as_spec, branches_of, within


def dilated_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_lengths: Any,
    dilation_rates: Any = None,
    *,
    combine: Combine = "lse",
    head_offset: HeadOffset = "interleaved",
    pad_mode: str = "mask",
    average_branches: bool | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    key_padding_mask: jax.Array | None = None,
    q_start: int = 0,
    k_start: int = 0,
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
    """Dilated attention (LongNet) of any length, on one device.

    A branch (W, R) cuts positions into segments of W; a query that its head keeps attends to the
    keys of its own segment that the head keeps, one in R. All branches share one softmax.

    Args:
        query: [B, T, N, H], float32, bfloat16, float16 or float64; H a multiple of 8 up to 256.
        key, value: [B, S, K, H] of the same dtype; N is a multiple of K.
        segment_lengths, dilation_rates: W and R of each branch, in tokens, as sequences of ints,
            or one `DilatedSpec` in place of both. Any lengths that do not decrease, any rates.
        combine: "lse", every head takes part in every branch and the branches share one softmax
            (a key that m branches see counts m times); "heads", the heads are split into
            contiguous groups, one per branch, and what a group does not keep is 0.
        head_offset: residue modulo R that head n keeps, with "lse": "interleaved", n mod R (the
            paper); "blocked", n // ceil(N / R) (Microsoft's torchscale, for its weights). With
            "heads", group i keeps i mod R.
        pad_mode: "mask", short segments have fewer keys; "zeros", the padding of the last segment
            up to W and of each segment up to a multiple of R are real keys with logit 0 and value
            0 (torchscale, for its weights). Under causality padding follows every query, so both
            are the same.
        average_branches: divide the result by the number of branches; None: only with "heads".
        is_causal: key position j is visible to query position i only if j <= i.
        scale: factor on the logits, None for 1 / sqrt(H).
        q_segment_ids, kv_segment_ids: int32 [B, T], [B, S]. Pairs with unlike ids do not attend, 0
            is padding that nobody sees and that sees nobody. kv ids default to the query's when
            T = S. Ids only mask: a packed document does not restart the segments.
        key_padding_mask: bool [B, S], True where a key is real (as masks in JAX, unlike torch).
        q_start, k_start: position of the first query and of the first key.
        q_positions, kv_positions: int32 [T] or [B, T], [S] or [B, S], for tokens that lie in
            another order than their own (see `dilax.order`): causality and dropout go by them.
            Segments and dilation go by the indices all the same. kv positions default to the
            query's when T = S.
        bias_k, bias_v: [K, H], one more key and value that every query of every head sees.
        zero_attn: one more key with logit 0 and value 0 that every query of every head sees.
        dropout_rate: share of probabilities dropped, in [0, 1), if not deterministic. Which ones
            depends only on the key, example, head, positions and branch: see `dilax.dropout`.
        dropout_key: a `jax.random` key, needed when dropout acts.
        deterministic: True: no dropout, whatever its rate.
        implementation: "xla", "pallas" or None, the fastest that takes the call.
        return_lse: return (out, lse), lse [B, T, N] float32 (float64 for float64), the natural log
            of the softmax's sum; it is differentiable.

    Returns:
        out [B, T, N, H] in the query's dtype. A query that sees no key gives 0, and lse -inf.

    Raises:
        ValueError: an argument is wrong; the message says which, what was wanted and what came.
        UnsupportedError: the named implementation cannot take the call, with reasons.

    Source: LongNet (arXiv:2307.02486), eq. 3-15; combine="heads" is that of the PyTorch libraries
    dilated-attention-pytorch.

    Example:
        >>> import jax, dilax
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 4096, 8, 64))
        >>> out = dilax.dilated_attention(q, k, v, [1024, 4096], [1, 4], is_causal=True)
        >>> out.shape
        (1, 4096, 8, 64)
    """
    check_qkv(query, key, value)
    spec = as_spec(segment_lengths, dilation_rates)
    T, N = query.shape[1:3]
    check_choice("combine", combine, ("lse", "heads"))
    check_choice("head_offset", head_offset, ("interleaved", "blocked"))
    check_choice("pad_mode", pad_mode, ("mask", "zeros"))
    branches = branches_of(spec, N, combine, head_offset)
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
    positions = _positions(query, key, q_positions, kv_positions)
    # The last check, and the first thing that computes.
    q_ids, kv_ids = segment_ids_of(query, key, q_segment_ids, kv_segment_ids, key_padding_mask)
    rate, seed = 0.0, None
    if drops and dropout_key is not None:
        rate, seed = float(dropout_rate), dropout.seed_bits(dropout_key)

    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    extra = []
    if pad_mode == "zeros" and not is_causal:
        extra.append(zero_keys(query, branches, np.arange(T), T, np.arange(N)))
    if zero_attn:
        extra.append(constant_key(query, jnp.zeros(query.shape[:-1], stats_dtype(query.dtype))))
    if bias_k is not None:
        place = q_start + np.arange(T)[None] if positions is None else positions[0]
        where = np.arange(query.shape[0]), np.arange(N), place
        extra.append(bias_key(query, bias_k, bias_v, scale, where, rate, seed, len(branches)))
    options = dict(
        branches=branches,
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
    attend = choose(implementation, query, key, value, **options)
    with jax.named_scope("dilax.dilated_attention"):
        out, lse = attend(query, key, value, **options)
    if average_branches:
        out = out / len(branches)
    out = out.astype(query.dtype)
    return (out, lse) if return_lse else out


def _positions(query: Any, key: Any, q_positions: Any, kv_positions: Any):
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
