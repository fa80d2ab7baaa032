"""Flax modules: multi-head dilated attention."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dilax._types import FLOAT_DTYPES, refuse
from dilax.adaptive import AdaptiveAttention
from dilax.attention import DilatedAttention, checkpointed, refuse_layout_of_order
from dilax.checks import (
    check_array,
    check_bool,
    check_dtype,
    check_index,
    check_positive,
    is_key,
    segment_ids_of,
)
from dilax.on_mesh import AttentionSharding
from dilax.order import TokenOrder
from dilax.projections import XAVIER_NORMAL, ZEROS, columns_of, linear_makers
from dilax.spec import Combine, HeadOffset


class MultiheadDilatedAttention(nnx.Module):
    """Query, key, value and output projections around `dilax.dilated_attention`.

    Weights start as in MAGNETO: Xavier normal, gain 1 on the query and key projections and
    `gamma_init` on the value and output projections, also per slice of a fused projection; biases
    start at 0. Nothing is normalised between the projections and the attention.

    Args:
        embed_dim: E, size of the last axis of inputs and outputs; the head dim is H = E / N, a
            multiple of 8 up to 256.
        num_heads: N.
        segment_lengths, dilation_rates, combine, head_offset, pad_mode, average_branches,
            implementation: as in `dilax.dilated_attention`.
        num_kv_heads: K, which divides N; None for N.
        bias: give the projections a bias.
        fused_qkv: one kernel [E, (N + 2 K) H], `qkv_proj`, in place of three.
        layer_norm: a LayerNorm over E, with parameters of its own, between the attention and the
            output projection (the sub-LN of MAGNETO); layer_norm_eps is its epsilon.
        gamma_init: gain of the value and output projections' weights at the start.
        add_bias_kv: one learned key and value [K, H] that every query sees.
        add_zero_attn: one key with logit 0 and value 0 that every query sees.
        dropout: share of attention probabilities dropped, in [0, 1), if not deterministic.
        attention_scale: factor on the logits, None for 1 / sqrt(H).
        position: callable (q [B, T, N, H], k [B, S, K, H], q_positions, k_positions) -> (q, k) that
            acts before the attention, e.g. a rotary embedding; positions are int32, [T] and [S] or
            [B, T] and [B, S]. Causality, segments and dilation follow the indices all the same.
        use_gradient_checkpointing: recompute projections and attention in the backward pass: True,
            the name of a policy in `jax.checkpoint_policies`, or a policy. The attention's output
            and log-sum-exp are named "dilax_out" and "dilax_lse".
        order: a `TokenOrder`, into which queries, keys and values go for the attention. A model of
            several layers gives the order to their calls instead, and permutes once.
        pattern: an `AdaptiveAttention`, which says its options itself and belongs to this module
            then; or a `SparsePatternConfig`, a pattern or the name of a preset, for
            `dilax.block_sparse_attention` in place of `dilax.dilated_attention`: inside the
            branches, or without any if segment_lengths is None. visiting_order is its.
        sharding: an `AttentionSharding`, where queries, keys and values lie on a mesh. Projections
            follow the shardings of inputs and parameters.
        dtype: of the computation; None: that of inputs and parameters together.
        param_dtype: of the parameters.
        kernel_init, out_kernel_init: initializers of the weights in place of Xavier normal, also
            with `nnx.with_partitioning`; the gains act on them too. out: None for kernel_init.
        bias_init, out_bias_init: initializers of the biases. out: None for bias_init.
        kernel_metadata, out_kernel_metadata, bias_metadata, out_bias_metadata: metadata of the
            parameters, such as shardings. out: None for that of the others.
        deterministic: no dropout; a call may say otherwise.
        rngs: "params" starts the weights, "dropout" is forked for dropout.

    Raises:
        ValueError: an argument is wrong; the message says which, what was wanted and what came.

    Source: LongNet (arXiv:2307.02486); MAGNETO (arXiv:2210.06423), sub-LN and gains.

    Example:
        >>> import jax, dilax
        >>> from flax import nnx
        >>> layer = dilax.MultiheadDilatedAttention(64, 4, [16, 32], [1, 2], rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (2, 50, 64))
        >>> nnx.jit(layer, static_argnames="is_causal")(x, is_causal=True).shape
        (2, 50, 64)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Any,
        dilation_rates: Any = None,
        *,
        num_kv_heads: int | None = None,
        bias: bool = True,
        fused_qkv: bool = False,
        layer_norm: bool = False,
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        dropout: float = 0.0,
        attention_scale: float | None = None,
        combine: Combine = "lse",
        head_offset: HeadOffset = "interleaved",
        pad_mode: str = "mask",
        average_branches: bool | None = None,
        position: Callable | None = None,
        use_gradient_checkpointing: bool | str | Callable = False,
        implementation: str | None = None,
        order: TokenOrder | None = None,
        pattern: Any = None,
        visiting_order: str = "longest_first",
        sharding: AttentionSharding | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable = XAVIER_NORMAL,
        out_kernel_init: Callable | None = None,
        bias_init: Callable = ZEROS,
        out_bias_init: Callable | None = None,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_kernel_metadata: Mapping[str, Any] | None = None,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        out_bias_metadata: Mapping[str, Any] | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs,
    ):
        flags = {"bias": bias, "fused_qkv": fused_qkv, "layer_norm": layer_norm}
        for name, flag in (*flags.items(), ("add_bias_kv", add_bias_kv)):
            check_bool(name, flag)
        check_positive("layer_norm_eps", layer_norm_eps)
        check_positive("gamma_init", gamma_init)
        self._set_sizes(embed_dim, num_heads, num_kv_heads)
        options: dict[str, Any] = {
            "segment_lengths": segment_lengths,
            "dilation_rates": dilation_rates,
            "combine": combine,
            "head_offset": head_offset,
            "pad_mode": pad_mode,
            "average_branches": average_branches,
            "attention_scale": attention_scale,
            "dropout": dropout,
            "add_zero_attn": add_zero_attn,
            "implementation": implementation,
            "order": order,
            "visiting_order": visiting_order,
            "sharding": sharding,
        }
        if isinstance(pattern, AdaptiveAttention):
            self.attention = self._with_router(pattern, options)
            dropout = pattern.dropout
        else:
            options |= {"embed_dim": embed_dim, "num_heads": num_heads}
            self.attention = DilatedAttention(**options, pattern=pattern)
        checkpointed(abs, use_gradient_checkpointing)
        self.use_gradient_checkpointing = use_gradient_checkpointing
        if position is not None and not callable(position):
            raise refuse("position", "None or a callable", position)
        self.position = position
        if deterministic is not None:
            check_bool("deterministic", deterministic)
        self.deterministic = deterministic
        _check_streams(rngs, "params", *(("dropout",) if dropout > 0 else ()))
        self.dtype = None if dtype is None else check_dtype("dtype", dtype)
        self.param_dtype = check_dtype("param_dtype", param_dtype)

        inner, outer = linear_makers(
            bias,
            kernel_init,
            out_kernel_init,
            bias_init,
            out_bias_init,
            kernel_metadata,
            out_kernel_metadata,
            bias_metadata,
            out_bias_metadata,
            dtype=self.dtype,
            param_dtype=param_dtype,
        )
        E, KH = self.embed_dim, self.num_kv_heads * self.head_dim
        slices = ((E, 1.0), (KH, 1.0), (KH, gamma_init))
        self.fused_qkv = fused_qkv
        if fused_qkv:
            self.qkv_proj = inner.make(E, slices, rngs)
        else:
            self.query_proj = inner.make(E, slices[:1], rngs)
            self.key_proj = inner.make(E, slices[1:2], rngs)
            self.value_proj = inner.make(E, slices[2:], rngs)
        self.bias_k, self.bias_v = (
            self._extra_key(rngs) if add_bias_kv else None for _ in range(2)
        )
        self.norm = self._layer_norm(layer_norm_eps, rngs) if layer_norm else None
        self.out_proj = outer.make(E, ((E, gamma_init),), rngs)
        self.rngs = rngs.dropout.fork() if dropout > 0 else None

    def _set_sizes(self, embed_dim: Any, num_heads: Any, num_kv_heads: Any) -> None:
        E, N = _positive("embed_dim", embed_dim), _positive("num_heads", num_heads)
        K = N if num_kv_heads is None else _positive("num_kv_heads", num_kv_heads)
        if E % N or E // N % 8 or E // N > 256:
            wanted = f"num_heads={N} times a head dim that is a multiple of 8 up to 256"
            raise refuse("embed_dim", wanted, embed_dim)
        if N % K:
            raise refuse("num_kv_heads", f"a divisor of num_heads={N}", num_kv_heads)
        self.embed_dim, self.num_heads, self.num_kv_heads, self.head_dim = E, N, K, E // N

    def _with_router(self, attention: AdaptiveAttention, options: dict) -> AdaptiveAttention:
        """The attention itself; refuses what it would have to be asked for."""
        sizes = (attention.num_heads, attention.num_kv_heads, attention.head_dim)
        if sizes != (self.num_heads, self.num_kv_heads, self.head_dim):
            wanted = f"{self.num_heads} heads of {self.head_dim}, {self.num_kv_heads} of keys"
            raise refuse("pattern", wanted, sizes)
        defaults = {f.name: f.default for f in dataclasses.fields(DilatedAttention)}
        for name, x in (options | {"segment_lengths": None}).items():
            if x is not defaults[name] and x is not None and x != defaults[name]:
                raise refuse(name, "its default with an AdaptiveAttention, which says it", x)
        if options["segment_lengths"] is not None:
            wanted = "None with an AdaptiveAttention"
            raise refuse("segment_lengths", wanted, options["segment_lengths"])
        return attention

    def _extra_key(self, rngs: nnx.Rngs) -> nnx.Param:
        # The standard deviation that torch.nn.MultiheadAttention gives its bias_k and bias_v.
        normal = nnx.initializers.normal(self.embed_dim**-0.5)
        return nnx.Param(
            normal(rngs.params(), (self.num_kv_heads, self.head_dim), self.param_dtype)
        )

    def _layer_norm(self, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
        return nnx.LayerNorm(
            self.embed_dim,
            epsilon=epsilon,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where the mean is large
            rngs=rngs,
        )

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array | None = None,
        value: jax.Array | None = None,
        *,
        is_causal: bool = False,
        q_segment_ids: jax.Array | None = None,
        kv_segment_ids: jax.Array | None = None,
        key_padding_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        kv_positions: jax.Array | None = None,
        order: TokenOrder | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
        return_loss: bool = False,
    ) -> Any:
        """Attend.

        Args:
            query: [B, T, E].
            key: [B, S, E], None for the query; value: [B, S, E], None for the key.
            is_causal, q_segment_ids, kv_segment_ids, key_padding_mask: as in
                `dilax.dilated_attention`.
            positions, kv_positions: int32 [T] and [S] or [B, T] and [B, S], given to `position`.
                Default: 0, 1, ...; kv_positions default to positions where T = S.
            order: the `TokenOrder` in which queries and keys already lie and the result stays;
                causality, dropout and the default positions are those of the original order.
            deterministic: no dropout; needed here or in the constructor if dropout > 0.
            rngs: nnx.Rngs with "dropout", an nnx.RngStream or a `jax.random` key, in place of the
                stream of the constructor.
            return_loss: with an `AdaptiveAttention`: also return its router's loss.

        Returns:
            [B, T, E] in `dtype`, or in that of inputs and parameters together.

        Raises:
            ValueError: an argument is wrong; the message says which, what was wanted and what came.
            UnsupportedError: the named implementation cannot take the call, with reasons.
        """
        inputs = self._inputs(query, key, value)
        query, key, _ = _three(inputs)
        check_bool("is_causal", is_causal)
        check_bool("return_loss", return_loss)
        adaptive = isinstance(self.attention, AdaptiveAttention)
        if return_loss and not adaptive:
            raise refuse("return_loss", "False without an AdaptiveAttention", return_loss)
        ids = segment_ids_of(query, key, q_segment_ids, kv_segment_ids, key_padding_mask)
        own = None if order is None else self._original_positions(query, key, order)
        if self.position is not None:
            positions = _first(positions, own)
        places = self._positions(query, key, positions, kv_positions)
        drops = self._drops(deterministic)
        if not (rngs is None or isinstance(rngs, nnx.Rngs | nnx.RngStream) or is_key(rngs)):
            wanted = 'None, nnx.Rngs with a "dropout" stream, an nnx.RngStream or a jax.random key'
            raise refuse("rngs", wanted, rngs)
        dropout_key = self._dropout_key(rngs) if drops else None

        more: dict[str, Any] = {} if own is None else {"q_positions": own}
        if adaptive:
            more = {"order": order}
        if return_loss:
            more["return_loss"] = True

        def mixed(inputs, ids, places, dropout_key):
            q, k, v = self._heads(inputs)
            if self.position is not None:
                q, k = self.position(q, k, *places)
            bias_k, bias_v = (
                None if x is None else x[...].astype(q.dtype) for x in (self.bias_k, self.bias_v)
            )
            out = self.attention(
                q,
                k,
                v,
                is_causal=is_causal,
                q_segment_ids=ids[0],
                kv_segment_ids=ids[1],
                bias_k=bias_k,
                bias_v=bias_v,
                dropout_key=dropout_key,
                deterministic=not drops,
                **more,
            )
            out, *loss = out if return_loss else (out,)
            out = out.reshape(*out.shape[:2], self.embed_dim)
            return (out if self.norm is None else self.norm(out)), loss

        with jax.named_scope("dilax.multihead_dilated_attention"):
            out, loss = checkpointed(mixed, self.use_gradient_checkpointing)(
                inputs, ids, places, dropout_key
            )
            out = self.out_proj(out)
            return (out, *loss) if return_loss else out

    def _inputs(self, query: Any, key: Any, value: Any) -> tuple[jax.Array, ...]:
        """The unlike ones of query, key and value, checked."""
        check_array("query", query, (None, None, self.embed_dim), FLOAT_DTYPES)
        if 0 in query.shape:
            raise refuse("query", "no dimension of size 0", query)
        if key is None:
            if value is not None:
                raise refuse("key", "an array when value is given", key)
            return (query,)
        check_array("key", key, (query.shape[0], None, self.embed_dim), FLOAT_DTYPES)
        if 0 in key.shape:
            raise refuse("key", "no dimension of size 0", key)
        if value is None or value is key:
            return (query,) if key is query else (query, key)
        check_array("value", value, key.shape, FLOAT_DTYPES)
        return (query, key, value)

    def _sharding(self) -> AttentionSharding | None:
        return self.attention.sharding if isinstance(self.attention, DilatedAttention) else None

    def _original_positions(self, query: Any, key: Any, order: Any) -> jax.Array:
        taken = self.attention.order is not None
        if not isinstance(order, TokenOrder) or taken:
            wanted = "None" if taken else "None or a TokenOrder"
            raise refuse("order", f"{wanted} in a call of this module", order)
        for name, x in (("query", query), ("key", key)):
            order.check_length(name, x)
        sharding = self._sharding()
        if sharding is not None:
            refuse_layout_of_order(sharding)
        return jnp.asarray(order.positions)

    def _positions(self, query: Any, key: Any, positions: Any, kv_positions: Any) -> tuple:
        (B, T), S = query.shape[:2], key.shape[1]
        for name, x, length in (("positions", positions, T), ("kv_positions", kv_positions, S)):
            if x is None:
                continue
            if self.position is None:
                raise refuse(name, "None in a module without `position`", x)
            batched = len(getattr(x, "shape", ())) == 2
            check_array(name, x, (B, length) if batched else (length,), ("int32",))
        if self.position is None:
            return (None, None)
        if kv_positions is None and positions is not None:
            if T != S:
                raise refuse("kv_positions", f"positions too when T={T} differs from S={S}", None)
            kv_positions = positions
        sharding = self._sharding() or AttentionSharding(sequence=None)
        places = (sharding.positions(query), sharding.positions(key))
        return _first(positions, places[0]), _first(kv_positions, places[1])

    def _drops(self, deterministic: Any) -> bool:
        """Does dropout act? With a rate of 0 nobody needs to say."""
        deterministic = _first(deterministic, self.deterministic)
        if deterministic is not None or self.attention.dropout > 0:
            check_bool("deterministic", deterministic)
        return self.attention.dropout > 0 and not deterministic

    def _dropout_key(self, rngs: Any) -> jax.Array:
        rngs = _first(rngs, self.rngs)
        if isinstance(rngs, nnx.Rngs):
            _check_streams(rngs, "dropout")
            return rngs.dropout()
        return rngs() if isinstance(rngs, nnx.RngStream) else rngs

    def _heads(self, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """q [B, T, N, H] and k, v [B, S, K, H]."""
        E, KH = self.embed_dim, self.num_kv_heads * self.head_dim
        if not self.fused_qkv:
            projections = (self.query_proj, self.key_proj, self.value_proj)
            parts = [f(x) for f, x in zip(projections, _three(inputs), strict=True)]
        elif len(inputs) == 1:
            parts = jnp.split(self.qkv_proj(inputs[0]), (E, E + KH), axis=-1)
        else:
            columns = (slice(0, E), slice(E, E + KH), slice(E + KH, E + 2 * KH))
            parts = [
                columns_of(self.qkv_proj, x, part, self.dtype)
                for x, part in zip(_three(inputs), columns, strict=True)
            ]
        return tuple(x.reshape(*x.shape[:2], -1, self.head_dim) for x in parts)


def _three(inputs: tuple) -> tuple:
    """query, key and value, the last one given standing for those after it."""
    return (*inputs, inputs[-1], inputs[-1])[:3]


def _first(x: Any, default: Any) -> Any:
    return default if x is None else x


def _positive(name: str, x: Any) -> int:
    number = check_index(name, x)
    if number == 0:
        raise refuse(name, "a positive int", x)
    return number


def _check_streams(rngs: Any, *names: str) -> None:
    """Refuse rngs unless it is nnx.Rngs with these streams, or with the default one."""
    for name in names:
        if not isinstance(rngs, nnx.Rngs) or not hasattr(rngs, name):
            raise refuse("rngs", f'nnx.Rngs with a "{name}" stream', rngs)
