"""Dilated attention, or block-sparse, with its options fixed: a callable of arrays."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from dilax._types import refuse
from dilax.block_sparse import VISITING_ORDERS, block_sparse_attention, refuse_branch_options
from dilax.checks import (
    check_bool,
    check_choice,
    check_index,
    check_number,
    is_array,
    is_traceable,
)
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
        others = {name: x for name, x in arrays.items() if not is_traceable(x)}
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
