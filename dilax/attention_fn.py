"""Dilated attention with its options fixed: as a plain callable, and as Flax's `attention_fn`."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from dilax._types import FLOAT_DTYPES, dtype_name, refuse
from dilax.block_sparse import VISITING_ORDERS, block_sparse_attention, refuse_branch_options
from dilax.checks import check_bool, check_choice, check_index, is_array
from dilax.dilated import dilated_attention
from dilax.on_mesh import AttentionSharding, dilated_attention_on_mesh
from dilax.order import TokenOrder
from dilax.pattern_config import as_pattern
from dilax.select import check_implementation
from dilax.spec import Combine, HeadOffset, as_spec, branches_of

# The members of jax.checkpoint_policies that are policies; the others make one from arguments.
POLICIES = (
    "checkpoint_dots",
    "checkpoint_dots_with_no_batch_dims",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
    "nothing_saveable",
)


# Arguments of a call that have the tokens on axis 1 and go into the order with them.
_ALONG_TOKENS = ("query", "key", "value", "q_segment_ids", "kv_segment_ids", "key_padding_mask")


def check_number(name: str, x: Any, low: float, high: float, wanted: str) -> None:
    """Refuse x unless it is a Python number with low <= x < high."""
    if isinstance(x, bool) or not isinstance(x, int | float) or not low <= x < high:
        raise refuse(name, wanted, x)


def check_positive(name: str, x: Any) -> None:
    """Refuse x unless it is a positive finite Python number."""
    check_number(name, x, math.nextafter(0.0, 1.0), math.inf, "a positive finite Python number")


def check_dtype(name: str, x: Any) -> Any:
    """x as a dtype, refused unless it is a floating point one that attention takes."""
    try:
        dtype = None if x is None else jnp.dtype(x)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in FLOAT_DTYPES:
        raise refuse(name, f"one of {', '.join(FLOAT_DTYPES)}", x)
    return dtype


def is_key(x: Any) -> bool:
    """Is x one `jax.random` key, typed or raw?"""
    if not is_array(x):
        return False
    if dtype_name(x) == "uint32":
        return len(x.shape) == 1 and x.shape[0] > 0
    return _takes_part(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and x.shape == ()


def _takes_part(x: Any) -> bool:
    """May x be an argument of a function that JAX transforms?"""
    try:
        for leaf in jax.tree.leaves(x):
            jax.typeof(leaf)
    except TypeError:
        return False
    return True


def refuse_layout_of_order(sharding: AttentionSharding) -> None:
    """Refuse a layout of the tokens beside a token order: they come row by row of their grid."""
    if sharding.layout != "contiguous":
        raise refuse("layout", "'contiguous' with an order, which says it", sharding.layout)


def checkpointed(function: Callable, choice: Any) -> Callable:
    """`function` under `jax.checkpoint` as `use_gradient_checkpointing` says, or as it is.

    Raises:
        ValueError: choice is not True, False, a name in POLICIES or a policy.

    Example:
        >>> checkpointed(abs, False) is abs
        True
    """
    if isinstance(choice, bool):
        return jax.checkpoint(function) if choice else function
    if callable(choice):
        return jax.checkpoint(function, policy=cast(Callable[..., bool], choice))
    if not isinstance(choice, str) or choice not in POLICIES:
        wanted = f"True, False, a policy, or the name of one: {', '.join(POLICIES)}"
        raise refuse("use_gradient_checkpointing", wanted, choice)
    return jax.checkpoint(function, policy=getattr(jax.checkpoint_policies, choice))


@dataclasses.dataclass(frozen=True, repr=False)
class DilatedAttention:
    """`dilax.dilated_attention`, or block-sparse, with all but the arrays fixed; hashable.

    Args:
        segment_lengths, dilation_rates, combine, head_offset, pad_mode, average_branches,
            implementation: as in `dilax.dilated_attention`.
        attention_scale: its `scale`.
        dropout: its `dropout_rate`; a call then needs `dropout_key`, or `deterministic=True`.
        add_zero_attn: its `zero_attn`.
        use_gradient_checkpointing: recompute in the backward pass: True, the name of a policy in
            `jax.checkpoint_policies`, or a policy; out and lse are named "dilax_out", "dilax_lse".
        order: a `TokenOrder` of the grid that the tokens are; they come and go row by row, segments
            and dilation act along the order, causality and dropout go by the original positions.
        pattern: a `SparsePatternConfig`, a pattern or the name of a preset: then this is
            `dilax.block_sparse_attention`, inside the branches, or without any if segment_lengths
            is None; visiting_order is its.
        sharding: an `AttentionSharding`, where the arrays lie on a mesh; None: on one device, or
            as XLA will have it.
        embed_dim, num_heads: if given, queries must have num_heads heads and embed_dim features
            over all heads.

    Raises:
        ValueError: an option is wrong; the message says which, what was wanted and what came.

    Source: LongNet (arXiv:2307.02486).

    Example:
        >>> import jax
        >>> attention = DilatedAttention([16, 32], [1, 2])
        >>> attention
        DilatedAttention(segment_lengths=(16, 32), dilation_rates=(1, 2))
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 40, 4, 8))
        >>> jax.jit(attention, static_argnames="is_causal")(q, k, v, is_causal=True).shape
        (1, 40, 4, 8)
    """

    segment_lengths: Any
    dilation_rates: Any = None
    _: dataclasses.KW_ONLY
    combine: Combine = "lse"
    head_offset: HeadOffset = "interleaved"
    pad_mode: str = "mask"
    average_branches: bool | None = None
    attention_scale: float | None = None
    dropout: float = 0.0
    add_zero_attn: bool = False
    use_gradient_checkpointing: Any = False
    implementation: str | None = None
    order: TokenOrder | None = None
    pattern: Any = None
    visiting_order: str = "longest_first"
    sharding: AttentionSharding | None = None
    embed_dim: int | None = None
    num_heads: int | None = None

    def __post_init__(self):
        self._check_sizes()
        self._check_pattern()
        if self.segment_lengths is not None or self.pattern is None:
            spec = as_spec(self.segment_lengths, self.dilation_rates)
            object.__setattr__(self, "segment_lengths", spec.segment_lengths)
            object.__setattr__(self, "dilation_rates", spec.dilation_rates)
            # Names are checked on as many heads as every combine mode takes.
            branches_of(spec, self.num_heads or len(spec), self.combine, self.head_offset)
        check_choice("pad_mode", self.pad_mode, ("mask", "zeros"))
        if self.average_branches is not None:
            check_bool("average_branches", self.average_branches)
        check_bool("add_zero_attn", self.add_zero_attn)
        if self.attention_scale is not None:
            wanted = "None or a finite Python number"
            check_number("attention_scale", self.attention_scale, -1e30, 1e30, wanted)
        check_number("dropout", self.dropout, 0.0, 1.0, "a Python number in [0, 1)")
        checkpointed(abs, self.use_gradient_checkpointing)
        check_implementation(self.implementation)
        if self.order is not None and not isinstance(self.order, TokenOrder):
            raise refuse("order", "None or a TokenOrder", self.order)
        if self.sharding is not None and not isinstance(self.sharding, AttentionSharding):
            raise refuse("sharding", "None or an AttentionSharding", self.sharding)
        if self.order is not None and self.sharding is not None:
            refuse_layout_of_order(self.sharding)

    def _check_pattern(self) -> None:
        check_choice("visiting_order", self.visiting_order, VISITING_ORDERS)
        if self.pattern is None:
            if self.visiting_order != "longest_first":
                raise refuse("visiting_order", "its default without a pattern", self.visiting_order)
            return
        object.__setattr__(self, "pattern", as_pattern("pattern", self.pattern))
        if self.pad_mode != "mask":
            raise refuse("pad_mode", "'mask' with a pattern", self.pad_mode)
        if self.segment_lengths is None:
            branches = (self.combine, self.head_offset, self.average_branches)
            refuse_branch_options(self.dilation_rates, *branches)

    def _check_sizes(self) -> None:
        for name in ("embed_dim", "num_heads"):
            x = getattr(self, name)
            if x is not None and check_index(name, x) == 0:
                raise refuse(name, "None or a positive int", x)
        if self.embed_dim is not None and self.num_heads is not None:
            if self.embed_dim % self.num_heads:
                wanted = f"a multiple of num_heads={self.num_heads}"
                raise refuse("embed_dim", wanted, self.embed_dim)

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)
        said = [f for f in fields if getattr(self, f.name) != f.default]
        return f"DilatedAttention({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in said)})"

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        *,
        is_causal: bool = False,
        q_segment_ids: jax.Array | None = None,
        kv_segment_ids: jax.Array | None = None,
        key_padding_mask: jax.Array | None = None,
        q_start: int = 0,
        k_start: int = 0,
        q_positions: jax.Array | None = None,
        kv_positions: jax.Array | None = None,
        bias_k: jax.Array | None = None,
        bias_v: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
        deterministic: bool = False,
        return_lse: bool = False,
    ) -> Any:
        """out [B, T, N, H], or (out, lse [B, T, N]); arguments as `dilax.dilated_attention`."""
        check_bool("return_lse", return_lse)
        self._check_heads(query)
        order = self.order
        if order is not None:
            for name, x in (("query", query), ("key", key)):
                order.check_length(name, x)
            if q_positions is not None or kv_positions is not None or q_start or k_start:
                raise refuse("q_positions", "no positions or starts with an order", q_positions)
            q_positions = kv_positions = jnp.asarray(order.positions)

        attention: Callable = dilated_attention
        blocks = {"pattern": self.pattern, "visiting_order": self.visiting_order}
        if self.sharding is not None:
            more = {} if self.pattern is None else blocks
            attention = functools.partial(dilated_attention_on_mesh, self.sharding, **more)
        elif self.pattern is not None:
            attention = functools.partial(block_sparse_attention, **blocks)

        def attend(arrays):
            if order is not None:
                along = {name: x for name, x in arrays.items() if name in _ALONG_TOKENS}
                along = {name: x for name, x in along.items() if x is not None}
                arrays = arrays | {name: order.permute(x) for name, x in along.items()}
            out, lse = attention(
                **arrays,
                **others,
                segment_lengths=self.segment_lengths,
                dilation_rates=self.dilation_rates,
                combine=self.combine,
                head_offset=self.head_offset,
                pad_mode=self.pad_mode,
                average_branches=self.average_branches,
                is_causal=is_causal,
                scale=self.attention_scale,
                q_start=q_start,
                k_start=k_start,
                zero_attn=self.add_zero_attn,
                dropout_rate=self.dropout,
                deterministic=deterministic,
                implementation=self.implementation,
                return_lse=True,
            )
            return (out, lse) if order is None else (order.unpermute(out), order.unpermute(lse))

        arrays = {
            "query": query,
            "key": key,
            "value": value,
            "q_segment_ids": q_segment_ids,
            "kv_segment_ids": kv_segment_ids,
            "key_padding_mask": key_padding_mask,
            "q_positions": q_positions,
            "kv_positions": kv_positions,
            "bias_k": bias_k,
            "bias_v": bias_v,
            "dropout_key": dropout_key,
        }
        # What is no array goes around jax.checkpoint, for dilated_attention to refuse by name.
        others = {name: x for name, x in arrays.items() if not _takes_part(x)}
        arrays = {name: x for name, x in arrays.items() if name not in others}
        out, lse = checkpointed(attend, self.use_gradient_checkpointing)(arrays)
        return (out, lse) if return_lse else out

    def _check_heads(self, query: Any) -> None:
        if not is_array(query) or len(query.shape) != 4:
            return  # dilated_attention refuses it
        N, H = query.shape[2:]
        if self.num_heads is not None and N != self.num_heads:
            raise refuse("query", f"num_heads={self.num_heads} heads", query)
        if self.embed_dim is not None and N * H != self.embed_dim:
            raise refuse("query", f"embed_dim={self.embed_dim} features over all heads", query)


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
    if not is_array(mask) or not _takes_part(mask):
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
