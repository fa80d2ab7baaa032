"""The oracle: dense attention straight from the definition, float64-capable, with no cleverness.

Every array of logits is materialised, [B, N, T, S] per branch, so use it on short sequences only.
Everything else in the library is tested against this file.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dilax import dropout
from dilax.block_lists import BlockLists, token_mask
from dilax.spec import Branch, Combine, DilatedSpec, HeadOffset, as_spec, branches_of, within


def _sees(branch: Branch, n: int, q_position, k_position):
    """[T, S]: does head n of this branch link the two positions?"""
    w, r, first, offsets = branch
    if not first <= n < first + len(offsets):
        return np.zeros((len(q_position), len(k_position)), bool)
    kept_q = (q_position % w) % r == offsets[n - first]
    kept_k = (k_position % w) % r == offsets[n - first]
    same_segment = (q_position // w)[:, None] == (k_position // w)[None, :]
    return same_segment & kept_q[:, None] & kept_k[None, :]


def _zero_keys(branch: Branch, n: int, length: int):
    """[T]: how many padding keys each query of head n sees in this branch, pad_mode="zeros"."""
    w, r, first, offsets = branch
    if not first <= n < first + len(offsets):
        return np.zeros(length, int)
    w = min(w, length)
    padded = -(-w // r) * r
    counts = []
    for p in range(length):
        index = np.arange(padded)
        real = (index < w) & (p // w * w + index < length)
        kept = index % r == offsets[n - first]
        counts.append(int((kept & ~real).sum()) if (p % w) % r == offsets[n - first] else 0)
    return np.array(counts)


def dilated_attention(
    query,
    key,
    value,
    segment_lengths,
    dilation_rates=None,
    *,
    combine: Combine = "lse",
    head_offset: HeadOffset = "interleaved",
    pad_mode: str = "mask",
    average_branches: bool | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    key_padding_mask: Any = None,
    q_start: int = 0,
    k_start: int = 0,
    q_positions: Any = None,
    kv_positions: Any = None,
    bias_k: Any = None,
    bias_v: Any = None,
    zero_attn: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    deterministic: bool = True,
    masks: Any = None,
):
    """Dilated attention as one dense softmax over the multiset union of the branches' keys.

    Arguments as `dilax.dilated_attention`, and masks, a further boolean mask [1 or B, 1 or N, T, S]
    per branch; returns (out [B, T, N, H], lse [B, T, N]), computed in
    the dtype of the inputs. Source: LongNet (arXiv:2307.02486), eq. 3-15.

    Example:
        >>> import jax
        >>> q = k = v = jax.numpy.ones((1, 8, 2, 4))
        >>> out, lse = dilated_attention(q, k, v, [4, 8], [1, 2])
        >>> out.shape, lse.shape
        ((1, 8, 2, 4), (1, 8, 2))
    """
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    branches = branches_of(as_spec(segment_lengths, dilation_rates), N, combine, head_offset)
    scale = H**-0.5 if scale is None else scale
    key, value = jnp.repeat(key, N // K, axis=2), jnp.repeat(value, N // K, axis=2)
    q_position, k_position = q_start + np.arange(T), k_start + np.arange(S)

    shared = jnp.ones((B, T, S), bool)
    kv_positions = q_positions if kv_positions is None else kv_positions
    q_place = jnp.broadcast_to(q_position if q_positions is None else q_positions, (B, T))
    k_place = jnp.broadcast_to(k_position if q_positions is None else kv_positions, (B, S))
    if is_causal:
        shared &= q_place[:, :, None] >= k_place[:, None, :]
    if q_segment_ids is not None:
        kv_segment_ids = q_segment_ids if kv_segment_ids is None else kv_segment_ids
        same = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
        shared &= same & (kv_segment_ids != 0)[:, None, :]
    if key_padding_mask is not None:
        shared &= key_padding_mask[:, None, :]

    # One long row of keys: every branch's copy of all keys, then padding zeros, then extra keys.
    logits, visible, kept = [], [], []
    values = []
    dots = jnp.einsum("BTNH,BSNH->BNTS", query, key) * scale
    dropping = dropout_rate > 0 and not deterministic
    seed: Any = dropout.seed_bits(dropout_key) if dropping else None
    rows: Any = None
    if dropping:
        batch, head, _ = np.ogrid[:B, :N, :1]
        rows = dropout.row_bits(seed, batch, head, q_place[:, None])
    for i, branch in enumerate(branches):
        sees = np.stack([_sees(branch, n, q_position, k_position) for n in range(N)])
        logits.append(dots)
        mask = shared[:, None] & sees[None]
        visible.append(mask if masks is None else mask & masks[i])
        values.append(value)
        if dropping:
            columns = dropout.column_bits(seed, k_place[:, None], i)
            kept.append(dropout.keep(rows, columns, dropout_rate))
    if pad_mode == "zeros" and not is_causal:
        for branch in branches:
            counts = np.stack([_zero_keys(branch, n, T) for n in range(N)])
            most = int(counts.max())
            logits.append(jnp.zeros((B, N, T, most), query.dtype))
            visible.append(jnp.broadcast_to(np.arange(most) < counts[..., None], (B, N, T, most)))
            values.append(jnp.zeros((B, most, N, H), query.dtype))
            kept.append(jnp.ones((B, N, T, most), bool))
    if bias_k is not None:
        bias_k, bias_v = (jnp.repeat(x, N // K, axis=0) for x in (bias_k, bias_v))
        logits.append(jnp.einsum("BTNH,NH->BNT", query, bias_k)[..., None] * scale)
        visible.append(jnp.ones((B, N, T, 1), bool))
        values.append(jnp.broadcast_to(bias_v, (B, 1, N, H)))
        if dropping:
            column = dropout.column_bits(seed, np.array([[[-1]]]), len(branches))
            kept.append(dropout.keep(rows, column, dropout_rate))
    if zero_attn:
        logits.append(jnp.zeros((B, N, T, 1), query.dtype))
        visible.append(jnp.ones((B, N, T, 1), bool))
        values.append(jnp.zeros((B, 1, N, H), query.dtype))
        kept.append(jnp.ones((B, N, T, 1), bool))

    logits, visible = jnp.concatenate(logits, -1), jnp.concatenate(visible, -1)
    values = jnp.concatenate(values, 1)
    any_key = visible.any(-1)
    masked = jnp.where(visible, logits, -jnp.inf)
    top = jnp.where(any_key, masked.max(-1), 0.0)
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, logits - top[..., None], 0.0)), 0.0)
    total = weights.sum(-1)
    safe = jnp.where(any_key, total, 1.0)
    lse = jnp.where(any_key, jnp.log(safe) + top, -jnp.inf)
    probabilities = weights / safe[..., None]
    if dropping:
        kept = jnp.concatenate(kept, -1)
        probabilities = jnp.where(kept, probabilities / (1 - dropout_rate), 0.0)
    out = jnp.einsum("BNTS,BSNH->BTNH", probabilities, values)
    if average_branches or (average_branches is None and combine == "heads"):
        out = out / len(branches)
    return out, jax.numpy.swapaxes(lse, 1, 2)


def block_sparse_attention(
    query, key, value, blocks, *, segment_lengths=None, dilation_rates=None, **options
):
    """Block-sparse attention as one dense masked softmax.

    blocks is a `BlockLists`, or one per branch if there are segments; options as in
    `dilated_attention` above. Returns (out [B, T, N, H], lse [B, T, N]).

    Example:
        >>> from dilax.block_lists import from_mask
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> block_sparse_attention(x, x, x, from_mask(np.eye(2, dtype=bool), 4))[0].shape
        (1, 8, 2, 4)
    """
    (T, N), S = query.shape[1:3], key.shape[1]
    q_start, k_start = (options.get(name, 0) for name in ("q_start", "k_start"))
    extent = max(q_start + T, k_start + S)
    if isinstance(blocks, BlockLists):
        mask = token_mask(blocks, T, S, q_start, k_start)
        spec, masks = DilatedSpec((extent,), (1,)), [jnp.repeat(mask, N // mask.shape[1], 1)]
        return dilated_attention(query, key, value, spec, masks=masks, **options)
    spec, masks = as_spec(segment_lengths, dilation_rates), []
    for lists, w, r in zip(blocks, spec.segment_lengths, spec.dilation_rates, strict=True):
        w, r = within(Branch(w, r, 0, tuple(range(N))), extent)[:2]
        places = [(start + np.arange(n)) % w // r for start, n in ((q_start, T), (k_start, S))]
        mask = token_mask(lists, -(-w // r), -(-w // r))
        mask = mask[:, :, places[0]][..., places[1]]
        masks.append(jnp.repeat(mask, N // mask.shape[1], 1))
    return dilated_attention(query, key, value, spec, masks=masks, **options)
