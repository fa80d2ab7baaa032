"""Dilated attention with fixed options, alone and inside Flax's own modules."""

import functools
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dilax
from dilax import reference
from tests.compare import assert_exact

B, T, E, N = 2, 12, 32, 4
SPEC = ((6,), (2,))
TWO = ((6, 12), (1, 2))
IDS = np.sort(np.random.default_rng(0).integers(0, 3, (B, T)), axis=1).astype(np.int32)


def inputs(*lengths, dtype: Any = np.float64):
    rng = np.random.default_rng(sum(lengths))
    return tuple(jnp.asarray(rng.normal(size=(B, n, E)), dtype) for n in lengths)


def heads(K=N):
    rng = np.random.default_rng(K)
    q, k, v = (jnp.asarray(rng.normal(size=(B, T, n, 8))) for n in (N, K, K))
    return q, k, v


def oracle(q, k, v, **options):
    """The definition, with the branches of `SPEC`."""
    return reference.dilated_attention(q, k, v, *SPEC, **options)[0]


# The plain callable.


SUM_HEADS = {"combine": "heads", "average_branches": False, "head_offset": "blocked"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, {}),
        ({"attention_scale": 0.3, "add_zero_attn": True}, {"scale": 0.3, "zero_attn": True}),
        ({"use_gradient_checkpointing": True, **SUM_HEADS}, SUM_HEADS),
        ({"pad_mode": "zeros", "embed_dim": E, "num_heads": N}, {"pad_mode": "zeros"}),
    ],
)
def test_callable_is_the_function(options, named, x64):
    q, k, v = heads(2)
    call: dict[str, Any] = {"q_segment_ids": jnp.asarray(IDS), "bias_k": k[0, 0], "bias_v": v[0, 0]}
    if "pad_mode" not in options:
        call |= {"is_causal": True, "q_start": 3, "k_start": 2}
    starts = {name: call.pop(name) for name in tuple(call) if not isinstance(call[name], jax.Array)}
    spec = TWO if "combine" in options else SPEC
    oracle = functools.partial(reference.dilated_attention, **named, **starts)
    exact = jax.jit(lambda q, k, v, call: oracle(q, k, v, *spec, **call))(q, k, v, call)
    attention = functools.partial(dilax.DilatedAttention(*spec, **options), return_lse=True)
    found = jax.jit(lambda q, k, v, call: attention(q, k, v, **starts, **call))(q, k, v, call)
    assert_exact(found, exact)


def test_callable_returns_out_alone(x64):
    attention = dilax.DilatedAttention(*SPEC)
    both = functools.partial(attention, return_lse=True)
    assert_exact(jax.jit(attention)(*heads()), jax.jit(both)(*heads())[0])


def test_callable_drops_with_a_key_and_only_then(x64):
    attention = dilax.DilatedAttention(*SPEC, dropout=0.3)
    key = jax.random.key(1)
    exactly = functools.partial(oracle, dropout_rate=0.3, deterministic=False)
    exact = jax.jit(exactly)(*heads(), dropout_key=key)
    assert_exact(jax.jit(attention)(*heads(), dropout_key=key), exact)
    plain = jax.jit(functools.partial(attention, deterministic=True))(*heads())
    assert_exact(plain, jax.jit(oracle)(*heads()))
    with pytest.raises(ValueError, match=r"^dropout_key: wanted a jax.random key"):
        attention(*heads())


def test_callable_is_a_value():
    one = dilax.DilatedAttention([6, 12], [1, 2], dropout=0.1)
    other = dilax.DilatedAttention(dilax.DilatedSpec((6, 12), (1, 2)), dropout=0.1)
    assert one == other
    assert hash(one) == hash(other)
    assert eval(repr(one), {"DilatedAttention": dilax.DilatedAttention}) == one
    assert one != dilax.DilatedAttention([6, 12], [1, 2])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dilation_rates", {"dilation_rates": (1,)}),
        ("combine", {"combine": "mean"}),
        ("combine", {"combine": "heads", "num_heads": 1}),
        ("head_offset", {"head_offset": 0}),
        ("pad_mode", {"pad_mode": None}),
        ("average_branches", {"average_branches": "no"}),
        ("attention_scale", {"attention_scale": "1"}),
        ("dropout", {"dropout": 1}),
        ("add_zero_attn", {"add_zero_attn": 1}),
        ("use_gradient_checkpointing", {"use_gradient_checkpointing": "offload"}),
        ("implementation", {"implementation": "cudnn"}),
        ("embed_dim", {"embed_dim": -32}),
        ("num_heads", {"num_heads": 0}),
        ("embed_dim", {"embed_dim": 33, "num_heads": 4}),
    ],
)
def test_callable_refuses_bad_options(name, options):
    with pytest.raises(ValueError, match=rf"^{name}: wanted "):
        dilax.DilatedAttention(**{"segment_lengths": TWO[0], "dilation_rates": TWO[1], **options})


@pytest.mark.parametrize("options", [{"embed_dim": 64}, {"num_heads": 8}])
def test_callable_checks_sizes(options):
    with pytest.raises(ValueError, match=rf"^query: wanted {next(iter(options))}="):
        dilax.DilatedAttention(*SPEC, **options)(*heads())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("name", "x"),
    [
        ("query", "x"),
        ("key", None),
        ("value", [1.0]),
        ("value", np.array(["a"])),
        ("q_segment_ids", {"x": "y"}),
        ("key_padding_mask", "x"),
        ("dropout_key", "k"),
        ("dropout_key", 3),
    ],
)
def test_callable_refuses_what_is_no_array(name, x, checkpointing):
    attention = dilax.DilatedAttention(*SPEC, use_gradient_checkpointing=checkpointing)
    q, k, v = heads()
    with pytest.raises(ValueError, match=rf"^{name}: wanted "):
        attention(**{"query": q, "key": k, "value": v, name: x})


# Dilated attention inside Flax's own modules.


def flax_nnx(attention=None, dropout=0.0, **options: Any) -> Any:
    attention = dilax.DilatedAttention(*SPEC) if attention is None else attention
    return nnx.MultiHeadAttention(
        num_heads=N,
        in_features=E,
        decode=False,
        dropout_rate=dropout,
        broadcast_dropout=False,
        attention_fn=dilax.DilatedAttentionFn(attention),
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
        **options,
    )


def around(layer, attend, query, key=None):
    """Flax's projections around `attend`."""
    key = query if key is None else key
    return layer.out(jax.jit(attend)(layer.query(query), layer.key(key), layer.value(key)))


@pytest.mark.parametrize(
    ("lengths", "is_causal", "kv_heads"),
    [((T,), False, None), ((T,), True, 2), ((T, 7), True, None)],
)
def test_drops_into_nnx(lengths, is_causal, kv_heads, x64):
    layer, arrays = flax_nnx(num_kv_heads=kv_heads), inputs(*lengths)
    exact = around(
        layer,
        functools.partial(oracle, is_causal=is_causal),
        *arrays,
    )
    assert_exact(layer(*arrays, is_causal=is_causal), exact)
    assert_exact(nnx.jit(lambda m, *a: m(*a, is_causal=is_causal))(layer, *arrays), exact)


@pytest.mark.parametrize(("lengths", "is_causal"), [((T,), True), ((T, 7), False)])
def test_drops_into_linen(lengths, is_causal, x64):
    arrays = inputs(*lengths)
    layer = flax.linen.MultiHeadDotProductAttention(
        num_heads=N,
        param_dtype=jnp.float64,
        attention_fn=dilax.DilatedAttentionFn(dilax.DilatedAttention(*SPEC), is_causal=is_causal),
    )
    variables = layer.init(jax.random.key(0), *arrays)
    params = variables["params"]

    def project(name, x):
        return jnp.einsum("BTE,ENH->BTNH", x, params[name]["kernel"])

    query, key = arrays[0], arrays[-1]
    out = jax.jit(functools.partial(oracle, is_causal=is_causal))(
        project("query", query), project("key", key), project("value", key)
    )
    exact = jnp.einsum("BTNH,NHE->BTE", out, params["out"]["kernel"])
    assert_exact(layer.apply(variables, *arrays), exact)
    assert_exact(jax.jit(layer.apply)(variables, *arrays), exact)


@pytest.mark.parametrize("shape", [(B, 1, 1, T), (1, 1, 1, T), (B, 1, 1, 1), (T,), (1, T)])
def test_drop_in_honours_masks_of_keys(shape, x64):
    layer, (x,) = flax_nnx(), inputs(T)
    mask = np.random.default_rng(0).random(shape) < 0.6
    keys = np.broadcast_to(mask, (B, 1, 1, T)).reshape(B, T)
    exact = around(layer, functools.partial(oracle, key_padding_mask=keys), x)
    run = nnx.jit(lambda layer, x, mask: layer(x, mask=mask))
    for given in (mask, mask.astype(np.float32)):
        assert_exact(run(layer, x, jnp.asarray(given)), exact)


def test_drop_in_equals_flax_where_flax_can(x64):
    """One segment, rate 1: plain attention, which Flax computes itself, masks and all."""
    whole = flax_nnx(dilax.DilatedAttention([T], [1]))
    own = nnx.MultiHeadAttention(N, E, decode=False, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    (x,) = inputs(T)
    mask = jnp.arange(T).reshape(1, 1, 1, T) < jnp.array([T, 7]).reshape(2, 1, 1, 1)
    calls: list[dict[str, Any]] = [{}, {"is_causal": True}, {"mask": mask}]
    for call in calls:
        # jax.nn.dot_product_attention takes its softmax in float32.
        np.testing.assert_allclose(whole(x, **call), own(x, **call), rtol=0, atol=1e-5)


def test_drop_in_takes_any_batch_dimensions(x64):
    layer, (x,) = flax_nnx(), inputs(T)
    mask = jnp.asarray(IDS > 0)[:, None, None]
    assert_exact(layer(x.reshape(B, 1, T, E), mask=mask[:, None]), layer(x, mask=mask)[:, None])
    assert_exact(layer(x[0]), layer(x)[0])


def test_drop_in_honours_dropout(x64):
    layer, (x,) = flax_nnx(dropout=0.4), inputs(T)
    key = nnx.Rngs(dropout=2).dropout()
    drops = {"dropout_rate": 0.4, "dropout_key": key, "deterministic": False}
    exact = around(layer, lambda q, k, v: oracle(q, k, v, **drops), x)
    assert_exact(layer(x, rngs=nnx.Rngs(dropout=2), deterministic=False), exact)
    assert_exact(layer(x, deterministic=True), flax_nnx()(x))
    linen = flax.linen.MultiHeadDotProductAttention(
        N, dropout_rate=0.4, broadcast_dropout=False, param_dtype=jnp.float64,
        attention_fn=layer.attention_fn,
    )  # fmt: skip
    variables = linen.init(jax.random.key(0), x, deterministic=True)
    state = jax.tree.map(jnp.asarray, variables["params"])
    for name in ("query", "key", "value", "out"):
        getattr(layer, name).kernel[...] = state[name]["kernel"]
    nnx_out = layer(x, rngs=nnx.Rngs(dropout=2), deterministic=False)
    assert_exact(linen.apply(variables, x, dropout_rng=key, deterministic=False), nnx_out)


def test_drop_in_computes_in_dtype(x64):
    layer, (x,) = flax_nnx(dtype=jnp.bfloat16), inputs(T)
    assert jax.eval_shape(lambda x: layer(x), x).dtype == jnp.bfloat16
    q = jnp.ones((1, 8, 2, 8), jnp.float32)
    mixed = jax.eval_shape(layer.attention_fn, q, q.astype(jnp.bfloat16), q)
    assert mixed.dtype == jnp.float32
    narrow = functools.partial(layer.attention_fn, dtype=jnp.bfloat16)
    assert jax.eval_shape(narrow, q, q, q).dtype == jnp.bfloat16


Q, Q6 = jnp.ones((1, 8, 2, 8)), jnp.ones((6, 8, 2, 8))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("bias", {"bias": jnp.zeros((1, 2, 8, 8))}),
        ("mask", {"mask": jnp.tril(jnp.ones((8, 8), bool))}),
        ("mask", {"mask": jnp.ones((1, 1, 8, 8), bool)}),
        ("mask", {"mask": jnp.ones((1, 2, 1, 8), bool)}),
        ("mask", {"mask": jnp.ones((1, 1, 1, 7), bool)}),
        ("broadcast_dropout", {"dropout_rate": 0.1, "dropout_rng": jax.random.key(0)}),
        ("mask", {"mask": [[1]]}),
        ("mask", {"mask": np.array(["a"] * 8)}),
        ("mask", {"mask": jnp.ones((3, 1, 1, 8), bool)}),
        ("mask", {"mask": jnp.ones((1, 1, 1, 1, 8), bool)}),
        ("broadcast_dropout", {"broadcast_dropout": None}),
        ("dropout_rng", {"dropout_rate": 0.1, "broadcast_dropout": False}),
        ("dropout_rng", {"dropout_rng": "k"}),
        ("dropout_rate", {"dropout_rate": 1.5, "broadcast_dropout": False}),
        ("dropout_rate", {"dropout_rate": "a"}),
        ("dtype", {"dtype": "int32"}),
        ("dtype", {"dtype": "x"}),
        ("query", {"query": "x"}),
        ("query", {"query": Q[0, 0]}),
        ("query", {"query": Q.astype(int)}),
        ("key", {"key": None}),
        ("value", {"value": Q[:, :7]}),
        # Batches of the same size in all, and others.
        ("key", {"query": Q6.reshape(2, 3, 8, 2, 8), "key": Q6.reshape(3, 2, 8, 2, 8)}),
        ("key", {"query": Q6, "key": Q6.reshape(3, 2, 8, 2, 8)}),
        ("key", {"query": Q6}),
        ("value", {"value": Q6}),
        ("value", {"value": Q[None]}),
        ("precision", {"precision": "highest"}),
        ("module", {"module": object()}),
        ("is_causal", {"is_causal": 1}),
        ("deterministic", {"deterministic": None}),
        ("input_positions", {"input_positions": jnp.arange(8)}),
        ("qk_attn_weights_einsum", {"qk_attn_weights_einsum": jnp.einsum}),
        ("attn_weights_value_einsum", {"attn_weights_value_einsum": jnp.einsum}),
        ("force_fp32_for_softmax", {"force_fp32_for_softmax": 1}),
    ],
)
def test_drop_in_refuses_by_name(name, call):
    attend = dilax.DilatedAttentionFn(dilax.DilatedAttention([4], [1]))
    arguments: dict[str, Any] = {"query": Q, "key": Q, "value": Q, **call}
    with pytest.raises(ValueError, match=rf"^{name}: wanted .*, got "):
        attend(**arguments)


def test_drop_in_refuses_through_flax(x64):
    layer, (x,) = flax_nnx(), inputs(T)
    with pytest.raises(ValueError, match=r"^module: .*sow_weights"):
        layer(x, sow_weights=True)
    with pytest.raises(ValueError, match=r"^input_positions: "):
        layer(x, input_positions=jnp.arange(T))
    layer.init_cache((B, T, E), dtype=jnp.float64)
    with pytest.raises(ValueError, match=r"^mask: .*decode=True"):
        layer(x[:, :1], decode=True)
    linen = flax.linen.MultiHeadDotProductAttention(
        N, decode=True, param_dtype=jnp.float64, attention_fn=layer.attention_fn
    )
    variables = linen.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"^mask: .*decode=True"):
        linen.apply(variables, x[:, :1], mutable=["cache"])
    linen = flax.linen.MultiHeadDotProductAttention(N, attention_fn=layer.attention_fn)
    with pytest.raises(ValueError, match=r"^module: .*sow_weights"):
        linen.init(jax.random.key(0), x, sow_weights=True)
    with pytest.raises(ValueError, match=r"^mask: .*is_causal"):
        linen.init(jax.random.key(0), x, mask=flax.linen.make_causal_mask(x[..., 0]))


def test_drop_in_refuses_bad_fields():
    with pytest.raises(ValueError, match=r"^attention: wanted a DilatedAttention"):
        dilax.DilatedAttentionFn([4])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^attention.dropout: wanted 0"):
        dilax.DilatedAttentionFn(dilax.DilatedAttention([4], [1], dropout=0.1))
    with pytest.raises(ValueError, match=r"^is_causal: wanted"):
        dilax.DilatedAttentionFn(dilax.DilatedAttention([4], [1]), is_causal=1)  # pyright: ignore[reportArgumentType]
