"""Dilated attention as the `attention_fn` of Flax's attention modules."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dilax._types import FLOAT_DTYPES, dtype_name, refuse
from dilax.attention import DilatedAttention
from dilax.checks import (
    check_bool,
    check_dtype,
    check_number,
    is_array,
    is_key,
    is_traceable,
)


@dataclasses.dataclass(frozen=True)
class DilatedAttentionFn:
    """Dilated attention as `attention_fn` of Flax's attention modules; hashable.

    It goes into `flax.nnx.MultiHeadAttention` and `flax.linen.MultiHeadDotProductAttention` and
    takes the keyword arguments that they pass. Honoured: `is_causal`, `deterministic`, `dtype`,
    dropout with `broadcast_dropout=False`, a `mask` that depends on the key alone ([..., 1, 1, S],
    a padding mask; a query whose keys are all masked gives 0), any number of batch dimensions.
    `force_fp32_for_softmax` is honoured always: softmax statistics are float32 or float64. Refused
    by name: every other mask (dilated attention never forms the array it would act on), `bias`,
    `precision`, dropout shared over batch and heads, `module` (sow_weights: no array of weights
    exists), einsum replacements, `input_positions`, and Flax's decoding with a cache.

    Args:
        attention: what to compute; its `dropout` must be 0, since the Flax module has its own.
        is_causal: attend causally whatever the call says; linen has no other way to say it.

    Raises:
        ValueError: an argument is wrong or is not supported; the message says which and why.

    Source: LongNet (arXiv:2307.02486).

    Example:
        >>> import jax, dilax
        >>> from flax import nnx
        >>> layer = nnx.MultiHeadAttention(
        ...     num_heads=4, in_features=32, decode=False, rngs=nnx.Rngs(0),
        ...     attention_fn=DilatedAttentionFn(DilatedAttention([16, 32], [1, 2])),
        ... )
        >>> nnx.jit(layer, static_argnames="is_causal")(
        ...     jax.numpy.ones((2, 50, 32)), is_causal=True).shape
        (2, 50, 32)
    """

    attention: DilatedAttention
    is_causal: bool = False

    def __post_init__(self):
        if not isinstance(self.attention, DilatedAttention):
            raise refuse("attention", "a DilatedAttention", self.attention)
        if self.attention.dropout:
            wanted = "0.0: the Flax module passes its own dropout_rate"
            raise refuse("attention.dropout", wanted, self.attention.dropout)
        check_bool("is_causal", self.is_causal)

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        input_positions: jax.Array | None = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Callable | None = None,
        attn_weights_value_einsum: Callable | None = None,
    ) -> jax.Array:
        """out [..., T, N, H] of query [..., T, N, H] and key, value [..., S, K, H]."""
        no_weights = "None: no array of attention weights is ever formed"
        for name, x, wanted in (
            ("bias", bias, no_weights),
            ("precision", precision, "None: see jax.default_matmul_precision"),
            ("module", module, f"{no_weights}, so none can be sown (sow_weights)"),
            ("input_positions", input_positions, "None: positions are indices here"),
            ("qk_attn_weights_einsum", qk_attn_weights_einsum, no_weights),
            ("attn_weights_value_einsum", attn_weights_value_einsum, no_weights),
        ):
            if x is not None:
                raise refuse(name, wanted, x)
        for name, flag in (("is_causal", is_causal), ("deterministic", deterministic)):
            check_bool(name, flag)
        check_bool("force_fp32_for_softmax", force_fp32_for_softmax)
        check_number("dropout_rate", dropout_rate, 0.0, 1.0, "a Python number in [0, 1)")
        check_bool("broadcast_dropout", broadcast_dropout)
        drops = dropout_rate > 0 and not deterministic
        if broadcast_dropout and drops:
            wanted = "False with dropout: each pair of tokens is dropped on its own"
            raise refuse("broadcast_dropout", wanted, broadcast_dropout)
        if not is_key(dropout_rng) and (drops or dropout_rng is not None):
            wanted = f"{'' if drops else 'None or '}one jax.random key"
            raise refuse("dropout_rng", wanted, dropout_rng)
        _check_flax_arrays(query, key, value)
        given = jnp.result_type(query, key, value) if dtype is None else dtype
        dtype = check_dtype("dtype", given)
        lead = query.shape[:-3]
        mask = _key_mask(mask, query, key)
        query, key, value = (
            x.astype(dtype).reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
            for x in (query, key, value)
        )
        attention = dataclasses.replace(self.attention, dropout=dropout_rate)
        out = attention(
            query,
            key,
            value,
            is_causal=self.is_causal or is_causal,
            key_padding_mask=mask,
            dropout_key=dropout_rng,
            deterministic=deterministic,
        )
        return out.reshape(*lead, *out.shape[1:])


def _check_flax_arrays(query: Any, key: Any, value: Any) -> None:
    """Refuse what is no floating array [..., T, N, H], and batches that are not the same."""
    wanted = f"an array [..., length, heads, head dim] of {' or '.join(FLOAT_DTYPES)}"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not is_array(x) or len(x.shape) < 3 or dtype_name(x) not in FLOAT_DTYPES:
            raise refuse(name, wanted, x)
        if x.shape[:-3] != query.shape[:-3]:
            raise refuse(name, f"the batch dimensions {query.shape[:-3]} of the query", x)
    if value.shape != key.shape:
        raise refuse("value", f"the shape {key.shape} of the key", value)


def _key_mask(mask: Any, query: jax.Array, key: jax.Array) -> jax.Array | None:
    """Flax's mask as a key_padding_mask [B, S], which it must be."""
    if mask is None:
        return None
    if not is_array(mask) or not is_traceable(mask):
        raise refuse("mask", "None or an array", mask)
    if not (jnp.issubdtype(mask.dtype, jnp.bool) or jnp.issubdtype(mask.dtype, jnp.number)):
        raise refuse("mask", "None or an array of booleans or numbers", mask)
    T, S = query.shape[-3], key.shape[-3]
    if T == 1 and S > 1:
        # Flax's cached decoding looks like this, and its one query is not at position 0.
        raise refuse(
            "mask", f"None with one query and {S} keys: decode=True is not supported", mask
        )
    shape = (1,) * (3 - len(mask.shape)) + mask.shape
    if shape[-3:-1] != (1, 1) or shape[-1] not in (1, S):
        wanted = (
            f"None or a mask of the keys alone, [..., 1, 1, {S}]: no array [T, S] is ever formed"
            " (say causality with is_causal)"
        )
        raise refuse("mask", wanted, mask)
    lead, given = key.shape[:-3], shape[:-3]
    last = lead[len(lead) - len(given) :]
    if len(given) > len(lead) or any(n not in (1, b) for n, b in zip(given, last, strict=True)):
        raise refuse("mask", f"batch dimensions that broadcast to {lead}", mask)
    return jnp.broadcast_to(mask != 0, (*lead, 1, 1, S)).reshape(math.prod(lead), S)
