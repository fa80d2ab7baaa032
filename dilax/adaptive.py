"""Adaptive block-sparse attention: a router that learns which key blocks each query block needs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dilax._types import refuse
from dilax.adaptive_branches import attend_branch
from dilax.attention import checkpointed
from dilax.block_sparse import attend_lists, refuse_branch_options
from dilax.checks import (
    check_bool,
    check_choice,
    check_dropout,
    check_dtype,
    check_index,
    check_number,
    check_qkv,
    check_ratio,
    segment_ids_of,
)
from dilax.dropout import column_bits, row_bits, seed_bits
from dilax.order import TokenOrder
from dilax.partial import merge
from dilax.router import QUERY_FEATURES, Route, Routing, route
from dilax.router_signal import TARGETS, kept_mass, kl_loss, straight_through
from dilax.select import check_block_size, check_implementation
from dilax.spec import Combine, HeadOffset, as_spec, branches_of, within
from dilax.union import check_extra_keys, extra_keys, placed_by_xla


def _identity(heads: int, head_dim: int, dtype: Any) -> nnx.Param:
    return nnx.Param(jnp.broadcast_to(jnp.eye(head_dim, dtype=dtype), (heads, head_dim, head_dim)))


class AdaptiveAttention(nnx.Module):
    """Attention over the key blocks that a learned router chooses from the content.

    Blocks of queries and of keys are pooled, projected per head and compared; each row of blocks
    keeps its own block, the first one and those with the best scores, for each example and each
    key head. The projections start as identities, so that an untrained router compares the pooled
    queries and keys themselves. They learn by adding the loss of `return_loss=True` to one's own,
    or by `straight_through=True`. Nothing else gets a gradient from the loss.

    Args:
        num_heads: N.
        head_dim: H, a multiple of 8 up to 256.
        num_kv_heads: K, which divides N; None for N. The query heads of a key head share blocks.
        segment_lengths, dilation_rates, combine, head_offset, average_branches: None, or branches
            as in `dilax.dilated_attention`: the router then looks for blocks inside each segment of
            each branch, in blocks of the places that it has after dilation, with the same weights
            everywhere; heads share blocks where they keep the same places.
        sparsity_ratio: the share of admissible blocks that a row keeps, in (0, 1]; at least one.
        block_size: tokens of a block: 64 or a multiple of 128 (any, with implementation="xla").
        query_feature: "first", the first query of a block; "previous", the mean of the block before
            it; "mean", that of the block, which knows its later tokens and is refused in a causal
            call. None: "first" if causal, else "mean".
        loss_target: the attention that a kept block took, as the loss sees it: the "max" over a
            block's queries, for which one query that needs the block is enough, or the "mean",
            for which one of many does not count (it does not learn to retrieve).
        straight_through: the router also gets the gradient that a bias on the kept blocks' logits
            would have; the result does not change.
        order: a `TokenOrder` of the grid that the tokens are; they come and go row by row, blocks
            and segments are of the order, causality and dropout go by the original positions. Of a
            block that lies before a row only in part a causal router knows only its earliest key.
        attention_scale: factor on the logits, None for 1 / sqrt(H).
        dropout: share of attention probabilities dropped, in [0, 1), if not deterministic.
        add_zero_attn: one key with logit 0 and value 0 that every query sees.
        use_gradient_checkpointing: as in `DilatedAttention`.
        implementation: "xla", "pallas" or None, as in `dilax.block_sparse_attention`.
        param_dtype: of the projections q_weight [N, H, H] and k_weight [K, H, H].

    Raises:
        ValueError: an argument is wrong; the message says which, what was wanted and what came.

    Source: pooled top-k routing, MoBA (arXiv:2502.13189); the loss, SeerAttention
    (arXiv:2410.13276) and DeepSeek-V3.2.

    Example:
        >>> import jax, dilax
        >>> attention = dilax.AdaptiveAttention(4, 16, sparsity_ratio=0.25, block_size=64)
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 500, 4, 16))
        >>> attend = jax.jit(lambda *x: attention(*x, is_causal=True, return_loss=True))
        >>> out, loss = attend(q, k, v)
        >>> out.shape, loss.shape
        ((1, 500, 4, 16), ())
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        segment_lengths: Any = None,
        dilation_rates: Any = None,
        combine: Combine = "lse",
        head_offset: HeadOffset = "interleaved",
        average_branches: bool | None = None,
        sparsity_ratio: float = 0.1,
        block_size: int = 128,
        query_feature: str | None = None,
        loss_target: str = "max",
        straight_through: bool = False,
        order: TokenOrder | None = None,
        attention_scale: float | None = None,
        dropout: float = 0.0,
        add_zero_attn: bool = False,
        use_gradient_checkpointing: Any = False,
        implementation: str | None = None,
        param_dtype: Any = jnp.float32,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        for name, x in (
            ("num_heads", num_heads),
            ("head_dim", head_dim),
            ("num_kv_heads", num_kv_heads),
            ("block_size", block_size),
        ):
            if check_index(name, x) == 0:
                raise refuse(name, "a positive int", x)
        if head_dim % 8 or head_dim > 256:
            raise refuse("head_dim", "a multiple of 8 up to 256", head_dim)
        if num_heads % num_kv_heads:
            raise refuse("num_kv_heads", f"a divisor of num_heads={num_heads}", num_kv_heads)
        check_ratio(sparsity_ratio)
        if query_feature is not None:
            check_choice("query_feature", query_feature, QUERY_FEATURES)
        check_choice("loss_target", loss_target, TARGETS)
        check_bool("straight_through", straight_through)
        if order is not None and not isinstance(order, TokenOrder):
            raise refuse("order", "None or a TokenOrder", order)
        if segment_lengths is None:
            refuse_branch_options(dilation_rates, combine, head_offset, average_branches)
        else:
            spec = as_spec(segment_lengths, dilation_rates)
            segment_lengths, dilation_rates = spec.segment_lengths, spec.dilation_rates
            branches_of(spec, num_heads, combine, head_offset)
            if average_branches is not None:
                check_bool("average_branches", average_branches)
        if attention_scale is not None:
            wanted = "None or a finite Python number"
            check_number("attention_scale", attention_scale, -1e30, 1e30, wanted)
        check_number("dropout", dropout, 0.0, 1.0, "a Python number in [0, 1)")
        check_bool("add_zero_attn", add_zero_attn)
        checkpointed(abs, use_gradient_checkpointing)
        check_implementation(implementation)
        check_block_size(implementation, block_size)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.sparsity_ratio, self.block_size = sparsity_ratio, block_size
        self.query_feature, self.loss_target = query_feature, loss_target
        self.straight_through, self.dropout = straight_through, dropout
        self.attention_scale, self.implementation = attention_scale, implementation
        self.add_zero_attn = add_zero_attn
        self.use_gradient_checkpointing = use_gradient_checkpointing
        self.order, self.average_branches = order, average_branches
        self.segment_lengths, self.dilation_rates = segment_lengths, dilation_rates
        self.combine: Combine = combine
        self.head_offset: HeadOffset = head_offset
        dtype = check_dtype("param_dtype", param_dtype)
        self.q_weight = _identity(num_heads, head_dim, dtype)
        self.k_weight = _identity(num_kv_heads, head_dim, dtype)

    def route(
        self,
        query: jax.Array,
        key: jax.Array,
        *,
        is_causal: bool = False,
        q_segment_ids: jax.Array | None = None,
        kv_segment_ids: jax.Array | None = None,
        key_padding_mask: jax.Array | None = None,
        sparsity_ratio: float | None = None,
        order: TokenOrder | None = None,
    ) -> Route:
        """The kept blocks, and their scores; arguments as those of a call.

        The tokens are taken as they lie, in `order`, also by a router with an order of its own, and
        as one sequence without branches.

        Raises:
            ValueError: an argument is wrong; the message says which, what was wanted and what came.
        """
        check_qkv(query, key, key)
        self._check_sizes(query, key)
        check_bool("is_causal", is_causal)
        _check_order(order, query, key)
        ids = segment_ids_of(query, key, q_segment_ids, kv_segment_ids, key_padding_mask)
        routing = self._routing(query, key, is_causal, sparsity_ratio, _positions(order))
        weights = self.q_weight[...], self.k_weight[...]
        with jax.named_scope("dilax.router"):
            return route(query, key, *weights, routing, *ids)

    def _routing(self, query, key, is_causal: bool, sparsity_ratio, positions) -> Routing:
        ratio = self.sparsity_ratio if sparsity_ratio is None else sparsity_ratio
        check_ratio(ratio)
        T, S = query.shape[1], key.shape[1]
        feature = self.query_feature or ("first" if is_causal else "mean")
        if is_causal and feature == "mean":
            wanted = "'first' or 'previous' in a causal call: a mean knows the block's later tokens"
            raise refuse("query_feature", wanted, feature)
        if is_causal and positions is not None and feature != "first":
            wanted = "'first' in a causal call in an order: blocks do not follow each other in time"
            raise refuse("query_feature", wanted, feature)
        if is_causal and T != S:
            raise refuse("key", f"as many keys as queries, {T}, in a causal call", key)
        return Routing(ratio, self.block_size, feature, is_causal, positions)

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
        bias_k: jax.Array | None = None,
        bias_v: jax.Array | None = None,
        zero_attn: bool | None = None,
        dropout_key: jax.Array | None = None,
        deterministic: bool = False,
        sparsity_ratio: float | None = None,
        order: TokenOrder | None = None,
        return_lse: bool = False,
        return_loss: bool = False,
    ) -> Any:
        """Attend.

        Args:
            query: [B, T, N, H]; key, value: [B, S, K, H]. In a causal call T = S.
            sparsity_ratio: in place of the constructor's, such as 1.0 while a router warms up.
            zero_attn: in place of the constructor's add_zero_attn.
            order: the `TokenOrder` in which queries and keys already lie and the result stays, for
                a router without an order of its own.
            return_loss: also return the router's loss, a scalar: the KL divergence of its softmax
                over the kept blocks from the attention that they took.
            is_causal, q_segment_ids, kv_segment_ids, key_padding_mask, bias_k, bias_v,
                dropout_key, deterministic, return_lse: as in `dilax.dilated_attention`.

        Returns:
            out [B, T, N, H], then lse [B, T, N] and the loss if asked for.

        Raises:
            ValueError: an argument is wrong; the message says which, what was wanted and what came.
            UnsupportedError: the named implementation cannot take the call, with reasons.
        """
        check_qkv(query, key, value)
        self._check_sizes(query, key)
        for name, x in (("is_causal", is_causal), ("return_lse", return_lse)):
            check_bool(name, x)
        check_bool("return_loss", return_loss)
        if check_dropout(self.dropout, dropout_key, deterministic) and self.straight_through:
            raise refuse("straight_through", "False when dropout acts", True)
        ids = segment_ids_of(query, key, q_segment_ids, kv_segment_ids, key_padding_mask)
        order = self._order(query, key, order)
        zero_attn = self.add_zero_attn if zero_attn is None else zero_attn
        check_bool("zero_attn", zero_attn)
        check_extra_keys(key, bias_k, bias_v)
        said = {"is_causal": is_causal, "deterministic": deterministic}
        said |= {"sparsity_ratio": sparsity_ratio, "with_loss": return_loss}

        def attend(arrays, ids, weights, extra, dropout_key):
            extra = extra | {"zero_attn": zero_attn}
            if self.order is not None:
                arrays, ids = jax.tree.map(self.order.permute, (arrays, ids))
            q, k, v = arrays
            if self.segment_lengths is not None:
                return self._in_branches(q, k, v, ids, weights, order, dropout_key, said, extra)
            more: Any = said | {"positions": _positions(order), "dropout_key": dropout_key}
            return self._attend(q, k, v, ids, weights, **more, **extra)

        attend = checkpointed(attend, self.use_gradient_checkpointing)
        out, lse, loss = placed_by_xla(attend, query, return_loss)(
            (query, key, value),
            ids,
            (self.q_weight[...], self.k_weight[...]),
            {"bias_k": bias_k, "bias_v": bias_v},
            dropout_key,
        )
        results: list[Any] = [out, lse] if return_lse else [out]
        if self.order is not None:
            results = [self.order.unpermute(x) for x in results]
        if return_loss:
            results.append(loss)
        return tuple(results) if len(results) > 1 else results[0]

    def _attend(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        ids: Any,
        weights: tuple[jax.Array, jax.Array],
        *,
        is_causal: bool,
        sparsity_ratio: float | None,
        with_loss: bool,
        positions: np.ndarray | None = None,
        **options: Any,
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """out, lse and loss of one sequence: route, attend, and what the router learns from.

        positions: those of `Routing`.
        """
        routing = self._routing(query, key, is_causal, sparsity_ratio, positions)
        if positions is not None:
            repeats = (max(1, len(query) // len(positions)), 1)
            positions = np.tile(positions, repeats).astype(np.int32)
        with jax.named_scope("dilax.router"):
            found = route(query, key, *weights, routing, *ids)
        out, lse = attend_lists(
            query,
            key,
            value,
            found.lists,
            is_causal=is_causal,
            scale=self.attention_scale,
            q_segment_ids=ids[0],
            kv_segment_ids=ids[1],
            q_positions=None if positions is None else jnp.asarray(positions),
            dropout_rate=self.dropout,
            implementation=self.implementation,
            **options,
        )
        said: Any = {
            "scale": self._scale,
            "is_causal": is_causal,
            "positions": positions,
            "segment_ids": ids,
        }
        if self.straight_through:
            out, lse = straight_through((out, lse), found, query, key, value, **said)
        if not with_loss:
            return out, lse, None
        mass = kept_mass(query, key, lse, found.lists, target=self.loss_target, **said)
        return out, lse, kl_loss(found, mass)

    def _in_branches(
        self, query, key, value, ids, weights, order, dropout_key, said: dict, extra: dict
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """The same inside each segment of each branch; the loss is the mean over blocks of rows."""
        T, N = query.shape[1:3]
        if key.shape[1] != T:
            raise refuse("key", f"as many keys as queries, {T}, inside branches", key)
        spec = as_spec(self.segment_lengths, self.dilation_rates)
        branches = branches_of(spec, N, self.combine, self.head_offset)
        losses = []
        drops = self.dropout > 0 and not said["deterministic"]
        seed = seed_bits(dropout_key) if drops else None

        def bits(number, heads, of_rows, examples):
            """The hash of what is dropped, of where rows lie in the whole sequence."""
            if seed is None:
                return None
            batch = np.repeat(np.arange(examples // len(of_rows)), len(of_rows))
            of_rows = np.tile(of_rows, (examples // len(of_rows), 1))[..., None]
            rows = row_bits(seed, batch[:, None, None], np.array(heads)[None, None], of_rows)
            return rows, column_bits(seed, of_rows, number)[None]

        def attend(q, k, v, ids, heads, kv_heads, places, *, number):
            mine = weights[0][np.array(heads)], weights[1][np.array(kv_heads)]
            of_rows = None if order is None else np.where(places < 0, -1, order.positions[places])
            dropped = bits(number, heads, places if of_rows is None else of_rows, len(q))
            more: Any = said | {"positions": of_rows, "dropout_key": dropout_key}
            out, lse, loss = self._attend(q, k, v, ids, mine, **more, dropout_bits=dropped)
            losses.append((loss, len(q) * len(kv_heads) * -(-q.shape[1] // self.block_size)))
            return out, lse

        parts = [
            attend_branch(
                functools.partial(attend, number=number), within(branch, T), query, key, value, ids
            )
            for number, branch in enumerate(branches)
        ]
        drop = (self.dropout if drops else 0.0, seed, len(branches))
        place = np.arange(T)[None] if order is None else order.positions[None]
        parts += extra_keys(query, self._scale, place, drop, **extra)
        out, lse = merge(*parts)
        average = (
            self.combine == "heads" if self.average_branches is None else self.average_branches
        )
        out = (out / len(branches) if average else out).astype(query.dtype)
        if not said["with_loss"]:
            return out, lse, None
        values, weights = zip(*losses, strict=True)
        return out, lse, jnp.average(jnp.stack(values), weights=jnp.array(weights, values[0].dtype))

    @property
    def _scale(self) -> float:
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def _order(self, query: Any, key: Any, order: Any) -> TokenOrder | None:
        """The order that the tokens are in while attention runs, checked."""
        if order is not None and (self.order is not None or not isinstance(order, TokenOrder)):
            wanted = "None or a TokenOrder" if self.order is None else "None: the router has one"
            raise refuse("order", wanted, order)
        order = self.order if order is None else order
        _check_order(order, query, key)
        return order

    def _check_sizes(self, query: Any, key: Any) -> None:
        sizes = (self.num_heads, self.head_dim)
        if query.shape[2:] != sizes:
            raise refuse("query", f"{sizes[0]} heads of {sizes[1]}", query)
        if key.shape[2] != self.num_kv_heads:
            raise refuse("key", f"{self.num_kv_heads} heads", key)


def _check_order(order: Any, query: Any, key: Any) -> None:
    """Refuse an order that is none, and queries and keys that are not its tokens."""
    if order is None:
        return
    if not isinstance(order, TokenOrder):
        raise refuse("order", "None or a TokenOrder", order)
    for name, x in (("query", query), ("key", key)):
        order.check_length(name, x)


def _positions(order: TokenOrder | None) -> np.ndarray | None:
    return None if order is None else order.positions[None]
