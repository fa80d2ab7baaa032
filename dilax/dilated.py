"""Dilated attention: LongNet's branches and one softmax over all their keys."""

from typing import Any

import jax

from dilax.spec import Combine, HeadOffset
from dilax.union import union_attention


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
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 1024, 4, 64))
        >>> out = dilax.dilated_attention(q, k, v, [256, 1024], [1, 4], is_causal=True)
        >>> out.shape
        (1, 1024, 4, 64)
    """
    with jax.named_scope("dilax.dilated_attention"):
        return union_attention(
            query,
            key,
            value,
            segment_lengths,
            dilation_rates,
            combine=combine,
            head_offset=head_offset,
            pad_mode=pad_mode,
            average_branches=average_branches,
            is_causal=is_causal,
            scale=scale,
            q_segment_ids=q_segment_ids,
            kv_segment_ids=kv_segment_ids,
            key_padding_mask=key_padding_mask,
            q_start=q_start,
            k_start=k_start,
            q_positions=q_positions,
            kv_positions=kv_positions,
            bias_k=bias_k,
            bias_v=bias_v,
            zero_attn=zero_attn,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            deterministic=deterministic,
            implementation=implementation,
            return_lse=return_lse,
        )
