"""LongNet: encoder, decoder and language model of dilated attention layers.

Layers are pre-norm with the sub-LayerNorms of MAGNETO. All layers of a model are one module whose
parameters have a leading layer axis, created by nnx.vmap and run by one scan: a deep model
compiles as fast as a shallow one. Letters as in `dilax._types`; E is the embedding dim.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dilax._types import FLOAT_DTYPES, refuse
from dilax.checks import check_array, check_bool
from dilax.longnet_config import LongNetConfig
from dilax.modules import MultiheadDilatedAttention
from dilax.on_mesh import AttentionSharding
from dilax.order import TokenOrder
from dilax.positions import RotaryPosition, XPos


def _position(config: LongNetConfig) -> Any:
    if config.position == "rope":
        return RotaryPosition(config.rope_theta)
    if config.position == "xpos":
        return XPos(config.xpos_scale_base, theta=config.rope_theta)
    return None


def _made(config: LongNetConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    """The arguments that every flax module of the model takes."""
    dtype = None if config.dtype is None else jnp.dtype(config.dtype)
    return {"dtype": dtype, "param_dtype": jnp.dtype(config.param_dtype), "rngs": rngs}


def _norm(config: LongNetConfig, size: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    eps = config.layer_norm_eps
    return nnx.LayerNorm(size, epsilon=eps, use_fast_variance=False, **_made(config, rngs))


def _dropped(x: jax.Array, rate: float, rngs: nnx.Rngs | None) -> jax.Array:
    """Dropout by flax, acting only when there is a source of randomness."""
    if rate == 0 or rngs is None:
        return x
    return nnx.Dropout(rate, deterministic=False)(x, rngs=rngs)


class _FeedForward(nnx.Module):
    """fc2(LayerNorm(gelu(fc1(x)))) on [..., E], the exact GELU computed in float32 or float64."""

    def __init__(self, config: LongNetConfig, *, rngs: nnx.Rngs):
        init = nnx.initializers.variance_scaling(_gain(config) ** 2, "fan_avg", "normal")
        E, F = config.embed_dim, config.ffn_dim
        options = {"kernel_init": init, **_made(config, rngs)}
        self.fc1, self.fc2 = nnx.Linear(E, F, **options), nnx.Linear(F, E, **options)
        self.norm = _norm(config, F, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., E] -> [..., E]."""
        x = self.fc1(x)
        inner = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return self.fc2(self.norm(jax.nn.gelu(inner, approximate=False).astype(x.dtype)))


def _gain(config: LongNetConfig) -> float:
    """MAGNETO's gain of an encoder-only or decoder-only model on v, out, fc1 and fc2."""
    return math.sqrt(math.log(2 * config.num_layers))


class LongNetLayer(nnx.Module):
    """One layer of MAGNETO (arXiv:2210.06423): x + attention(LayerNorm(x)), then x + ffn(LN(x)).

    Example:
        >>> config = LongNetConfig(64, 4, 1, 96, (8,), (1,))
        >>> layer = LongNetLayer(config, is_causal=True, rngs=nnx.Rngs(0))
        >>> nnx.jit(layer)(jnp.ones((1, 20, 64))).shape
        (1, 20, 64)
    """

    def __init__(
        self,
        config: LongNetConfig,
        *,
        is_causal: bool,
        sharding: AttentionSharding | None = None,
        rngs: nnx.Rngs,
    ):
        self.is_causal, self.dropout = is_causal, config.dropout
        self.attention_norm = _norm(config, config.embed_dim, rngs)
        self.attention = MultiheadDilatedAttention(
            config.embed_dim,
            config.num_heads,
            config.segment_lengths,
            config.dilation_rates,
            num_kv_heads=config.num_kv_heads,
            layer_norm=True,
            layer_norm_eps=config.layer_norm_eps,
            gamma_init=_gain(config),
            dropout=config.attention_dropout,
            head_offset=config.head_offset,
            pad_mode=config.pad_mode,
            position=_position(config),
            implementation=config.implementation,
            sharding=sharding,
            **_made(config, rngs),
        )
        self.ffn_norm = _norm(config, config.embed_dim, rngs)
        self.ffn = _FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        order: TokenOrder | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """[B, T, E] -> [B, T, E], tokens lying in `order`; dropout acts when there are rngs."""
        added = self.attention(
            self.attention_norm(x),
            is_causal=self.is_causal,
            q_segment_ids=segment_ids,
            positions=positions,
            order=order,
            deterministic=rngs is None,
            rngs=rngs,
        )
        x = x + _dropped(added, self.dropout, rngs)
        return x + _dropped(self.ffn(self.ffn_norm(x)), self.dropout, rngs)


def _stacked_layers(
    config: LongNetConfig, is_causal: bool, sharding: Any, rngs: nnx.Rngs
) -> LongNetLayer:
    """All layers as one, every parameter with a leading layer axis and its own random start."""

    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return LongNetLayer(config, is_causal=is_causal, sharding=sharding, rngs=rngs)

    return create(rngs)


def _start_stack(stack: Any, config: Any, is_causal: bool, sharding: Any, rngs: nnx.Rngs) -> None:
    """Give an encoder or decoder its config, layers and final norm."""
    if not isinstance(config, LongNetConfig):
        raise refuse("config", "a LongNetConfig", config)
    for name in ("dtype", "param_dtype"):
        if getattr(config, name) == "float64" and not jax.config.jax_enable_x64:
            raise refuse(name, "float64 only with jax_enable_x64", getattr(config, name))
    stack.config = config
    stack.layers = _stacked_layers(config, is_causal, sharding, rngs)
    stack.norm = _norm(config, config.embed_dim, rngs) if config.final_norm else None


def _run_stack(stack: Any, x, segment_ids, positions, order, deterministic, rngs) -> jax.Array:
    """x through dropout, all layers, by one scan, and the final norm."""
    config = stack.config
    check_array("x", x, (None, None, config.embed_dim), FLOAT_DTYPES)
    if order is not None:
        if not isinstance(order, TokenOrder):
            raise refuse("order", "None or a TokenOrder", order)
        x = order.permute(x)
        segment_ids = None if segment_ids is None else order.permute(segment_ids)
        positions = None if positions is None else order.permute(positions, axis=-1)
    check_bool("deterministic", deterministic)
    if deterministic or not (config.dropout or config.attention_dropout):
        rngs = keys = None
    elif isinstance(rngs, nnx.Rngs):
        keys = jax.random.split(rngs.dropout(), config.num_layers)
    else:
        raise refuse("rngs", "nnx.Rngs with a dropout stream when dropout acts", rngs)

    # nnx.scan refuses layers that a user's jit or grad closes over; lax.scan takes their arrays.
    graphdef, arrays = nnx.split(stack.layers)

    def step(x, along):
        layer, key = nnx.merge(graphdef, along[0]), along[1]
        layer_rngs = None if key is None else nnx.Rngs(dropout=key)
        said = {"segment_ids": segment_ids, "positions": positions, "order": order}
        return layer(x, rngs=layer_rngs, **said), None

    if config.remat is not None:
        step = jax.checkpoint(step, policy=getattr(jax.checkpoint_policies, config.remat))
    x = _dropped(x, config.dropout, rngs)
    x, _ = jax.lax.scan(step, x, (arrays, keys))
    x = x if order is None else order.unpermute(x)
    return x if stack.norm is None else stack.norm(x)


class LongNetEncoder(nnx.Module):
    """Bidirectional LongNet: embeddings [B, T, E] -> [B, T, E].

    Args:
        config: see `LongNetConfig`.
        sharding: where the attention's arrays lie on a mesh; see `dilax.AttentionSharding`.
        rngs: "params" starts the weights.

    Call:
        x: [B, T, E], any T.
        segment_ids: int32 [B, T], packed documents; 0 is padding (its outputs mean nothing).
        positions: int32 [T] or [B, T] for rope and xpos; None for 0, 1, ...
        order: a `TokenOrder` of the grid that the tokens are, into which they go once for all
            layers and from which they return; causality and positions stay the original ones.
        deterministic: False for dropout, which needs `rngs` with a "dropout" stream.

    Raises:
        ValueError: an argument is wrong; the message says which, what was wanted and what came.

    Source: LongNet (arXiv:2307.02486).

    Example:
        >>> config = LongNetConfig(64, 4, 1, 96, (8,), (1,))
        >>> nnx.jit(LongNetEncoder(config, rngs=nnx.Rngs(0)))(jnp.ones((1, 20, 64))).shape
        (1, 20, 64)
    """

    def __init__(
        self, config: LongNetConfig, *, sharding: AttentionSharding | None = None, rngs: nnx.Rngs
    ):
        _start_stack(self, config, False, sharding, rngs)

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        order: TokenOrder | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """[B, T, E] -> [B, T, E]; see the class."""
        return _run_stack(self, x, segment_ids, positions, order, deterministic, rngs)


class LongNetDecoder(nnx.Module):
    """Causal LongNet: embeddings [B, T, E] -> [B, T, E]; arguments as of `LongNetEncoder`.

    Position t depends on positions 0 to t only. Source: LongNet (arXiv:2307.02486).

    Example:
        >>> config = LongNetConfig(64, 4, 1, 96, (8,), (1,))
        >>> nnx.jit(LongNetDecoder(config, rngs=nnx.Rngs(0)))(jnp.ones((1, 20, 64))).shape
        (1, 20, 64)
    """

    def __init__(
        self, config: LongNetConfig, *, sharding: AttentionSharding | None = None, rngs: nnx.Rngs
    ):
        _start_stack(self, config, True, sharding, rngs)

    def __call__(
        self,
        x: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        order: TokenOrder | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """[B, T, E] -> [B, T, E]; see `LongNetEncoder`."""
        return _run_stack(self, x, segment_ids, positions, order, deterministic, rngs)


class LongNetLM(nnx.Module):
    """Causal language model: tokens int32 [B, T] -> logits [B, T, vocab_size] of the next token.

    Embeddings are scaled by sqrt(E), to the size of what the layers add to them.

    Args:
        config: see `LongNetConfig`; vocab_size is needed.
        sharding: as of `LongNetEncoder`.
        rngs: "params" starts the weights.

    Call:
        tokens: int32 [B, T], any T; the other arguments as of `LongNetEncoder`.

    Raises:
        ValueError: an argument is wrong; the message says which, what was wanted and what came.

    Source: LongNet (arXiv:2307.02486), section 4.

    Example:
        >>> config = LongNetConfig(64, 4, 1, 96, (8,), (1,), vocab_size=258)
        >>> nnx.jit(LongNetLM(config, rngs=nnx.Rngs(0)))(jnp.zeros((1, 20), jnp.int32)).shape
        (1, 20, 258)
    """

    def __init__(
        self, config: LongNetConfig, *, sharding: AttentionSharding | None = None, rngs: nnx.Rngs
    ):
        if isinstance(config, LongNetConfig) and config.vocab_size is None:
            raise refuse("vocab_size", "a positive int in a language model", None)
        self.decoder = LongNetDecoder(config, sharding=sharding, rngs=rngs)
        self.config = config
        normal = nnx.initializers.normal(config.embed_dim**-0.5)
        options = _made(config, rngs)
        E, V = config.embed_dim, int(config.vocab_size or 0)
        self.embed = nnx.Embed(V, E, embedding_init=normal, **options)
        linear = functools.partial(nnx.Linear, use_bias=False, kernel_init=normal, **options)
        self.head = None if config.tied_embeddings else linear(E, V)

    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        order: TokenOrder | None = None,
        deterministic: bool = True,
        rngs: nnx.Rngs | None = None,
    ) -> jax.Array:
        """int32 [B, T] -> [B, T, vocab_size]; see the class."""
        check_array("tokens", tokens, (None, None), ("int32",))
        x = self.decoder(
            self._embedded(tokens) * self.config.embed_dim**0.5,
            segment_ids=segment_ids,
            positions=positions,
            order=order,
            deterministic=deterministic,
            rngs=rngs,
        )
        return self.embed.attend(x) if self.head is None else self.head(x)

    def _embedded(self, tokens: jax.Array) -> jax.Array:
        sharding: Any = jax.typeof(tokens).sharding
        if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
            return self.embed(tokens)
        # Flax's lookup does not say where the rows shall lie.
        where = jax.NamedSharding(sharding.mesh, jax.P(*sharding.spec, None))
        lookup: Any = jax.sharding.auto_axes(
            lambda table, tokens: jnp.take(table, tokens, axis=0), out_sharding=where
        )
        embed: Any = self.embed
        (table,) = embed.promote_dtype((embed.embedding[...],), dtype=embed.dtype, inexact=False)
        return lookup(table, tokens)
