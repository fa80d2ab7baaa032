"""The module against projections around the oracle: values, gradients, starts, transformations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dilax
from dilax import reference
from dilax.attention import POLICIES
from tests.compare import assert_exact, assert_within

B, T, E, N = 2, 12, 32, 4
SPEC = ((6,), (2,))
TWO = ((6, 12), (1, 2))
KEEP_NAMES = jax.checkpoint_policies.save_only_these_names("dilax_out", "dilax_lse")


def rotate(q, k, q_positions, k_positions):
    """A position callable: turns neighbouring features by the position."""

    def turn(x, positions):
        half = x.shape[-1] // 2
        rate = jnp.arange(1, half + 1, dtype=x.dtype)
        angle = jnp.expand_dims(positions, (-1, -2)) * rate.reshape(
            (1,) * (positions.ndim + 1) + (half,)
        )
        angle = jnp.broadcast_to(angle, (*x.shape[:-1], half))
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate(
            [a * jnp.cos(angle) - b * jnp.sin(angle), a * jnp.sin(angle) + b * jnp.cos(angle)], -1
        )

    return turn(q, q_positions), turn(k, k_positions)


def inputs(*lengths, dtype: Any = np.float64):
    rng = np.random.default_rng(sum(lengths))
    return tuple(jnp.asarray(rng.normal(size=(B, n, E)), dtype) for n in lengths)


def make(param_dtype: Any = np.float64, spec: Any = SPEC, **options: Any) -> Any:
    """A module whose parameters are all random: at the start biases are 0 and scales 1."""
    layer = dilax.MultiheadDilatedAttention(
        E, N, *spec, param_dtype=param_dtype, rngs=nnx.Rngs(3), **options
    )
    rng = np.random.default_rng(7)
    state = nnx.state(layer, nnx.Param)
    state = jax.tree.map(
        lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape), param_dtype), state
    )
    nnx.update(layer, state)
    return layer


def parts_of(layer):
    """Kernels and biases of the query, key and value projections."""
    if not layer.fused_qkv:
        three = (layer.query_proj, layer.key_proj, layer.value_proj)
        return [(x.kernel[...], None if x.bias is None else x.bias[...]) for x in three]
    width = layer.num_kv_heads * layer.head_dim
    cuts = (E, E + width)
    kernels = jnp.split(layer.qkv_proj.kernel[...], cuts, axis=1)
    bias = layer.qkv_proj.bias
    biases = [None] * 3 if bias is None else jnp.split(bias[...], cuts)
    return list(zip(kernels, biases, strict=True))


def affine(x, kernel, bias):
    return x @ kernel if bias is None else x @ kernel + bias[None, None]


def by_hand(
    layer, query, key=None, value=None, *, spec=SPEC, positions=None, kv_positions=None, **call
):
    """The definition: projections, position, the oracle, LayerNorm, output projection."""
    key = query if key is None else key
    value = key if value is None else value
    q, k, v = (
        affine(x, *part).reshape(*x.shape[:2], -1, layer.head_dim)
        for x, part in zip((query, key, value), parts_of(layer), strict=True)
    )
    if layer.position is not None:
        positions = jnp.arange(q.shape[1]) if positions is None else positions
        kv_positions = jnp.arange(k.shape[1]) if kv_positions is None else kv_positions
        q, k = layer.position(q, k, positions, kv_positions)
    options = layer.attention
    if layer.bias_k is not None:
        call |= {"bias_k": layer.bias_k[...], "bias_v": layer.bias_v[...]}
    out, _ = reference.dilated_attention(
        q,
        k,
        v,
        *spec,
        combine=options.combine,
        head_offset=options.head_offset,
        pad_mode=options.pad_mode,
        average_branches=options.average_branches,
        scale=options.attention_scale,
        zero_attn=options.add_zero_attn,
        **call,
    )
    out = out.reshape(*out.shape[:2], E)
    if layer.norm is not None:
        centred = out - out.mean(-1, keepdims=True)
        out = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + layer.norm.epsilon)
        out = out * layer.norm.scale[...][None, None] + layer.norm.bias[...][None, None]
    bias = layer.out_proj.bias
    return affine(out, layer.out_proj.kernel[...], None if bias is None else bias[...])


def with_gradients(apply, layer, arrays, key=0):
    """Output and gradients of parameters and inputs for a random cotangent."""
    graph, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(params, arrays):
        out, pull = jax.vjp(lambda p, a: apply(nnx.merge(graph, p, rest), *a), params, arrays)
        return out, pull(jax.random.normal(jax.random.key(key), out.shape, out.dtype))

    out, (params, arrays) = run(params, arrays)
    return {"out": out, "params": joined(nnx.to_pure_dict(params)), "arrays": arrays}


def joined(params):
    """Kernel and bias of each projection as one array.

    A bias on every key shifts all logits of a row alike: its gradient is 0 but for rounding, and
    rounding is to be judged by the size of the whole.
    """
    both = {n: p for n, p in params.items() if isinstance(p, dict) and {"kernel", "bias"} <= {*p}}
    stacked = {
        n: jnp.concatenate([p["kernel"], p["bias"][..., None, :]], -2) for n, p in both.items()
    }
    return params | stacked


IDS = np.sort(np.random.default_rng(0).integers(0, 3, (B, T)), axis=1).astype(np.int32)
CASES = {
    "no_bias": ({"bias": False}, (T,), {}),
    "no_bias_fused_cross": ({"bias": False, "fused_qkv": True}, (T, 7), {}),
    "fused_gqa_cross": ({"fused_qkv": True, "num_kv_heads": 2}, (T, 7, 7), {}),
    "layer_norm": ({"layer_norm": True, "layer_norm_eps": 0.3}, (T,), {}),
    "extra_gqa": ({"add_bias_kv": True, "add_zero_attn": True, "num_kv_heads": 2}, (T, 17), {}),
    "options": (
        {
            "combine": "heads",
            "average_branches": False,
            "head_offset": "blocked",
            "attention_scale": 0.7,
            "spec": TWO,
        },
        (T,),
        {},
    ),
    "zeros_blocked": ({"pad_mode": "zeros", "head_offset": "blocked"}, (T - 1,), {}),
    "packed_cross": ({}, (T, T), {"q_segment_ids": IDS, "kv_segment_ids": IDS[::-1]}),
    "key_padding": ({}, (T,), {"key_padding_mask": IDS > 0}),
    "position_cross": ({"position": rotate, "num_kv_heads": 2}, (T, 7), {}),
    "position_packed": (
        {"position": rotate},
        (T,),
        {
            "positions": np.tile(np.arange(T, dtype=np.int32) % 5, (B, 1)),
            "kv_positions": np.arange(T, dtype=np.int32) // 2,
        },
    ),
    "everything": (
        {
            "fused_qkv": True,
            "layer_norm": True,
            "add_bias_kv": True,
            "add_zero_attn": True,
            "num_kv_heads": 2,
            "dropout": 0.3,
            "position": rotate,
            "use_gradient_checkpointing": True,
        },
        (T,),
        {"is_causal": True, "q_segment_ids": IDS},
    ),
}


# The others take no other path through the module that a gradient could take.
WITH_GRADIENTS = ("fused_gqa_cross", "extra_gqa", "everything")


def both_ways(name):
    """The module of a case, its inputs, and the calls (ours, theirs) to compare."""
    options, lengths, call = CASES[name]
    call = {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in call.items()}
    ours, theirs = dict(call), call | {"spec": options.get("spec", SPEC)}
    if "dropout" in options:
        key = jax.random.key(5)
        ours |= {"deterministic": False, "rngs": key}
        theirs |= {"deterministic": False, "dropout_key": key, "dropout_rate": options["dropout"]}
    return (
        make(**options),
        inputs(*lengths),
        lambda m, *a: m(*a, **ours),
        lambda m, *a: by_hand(m, *a, **theirs),
    )


@pytest.mark.newest
@pytest.mark.parametrize("name", [name for name in CASES if name not in WITH_GRADIENTS])
def test_equals_projections_around_oracle(name, x64):
    layer, arrays, ours, theirs = both_ways(name)
    assert_exact(nnx.jit(ours)(layer, *arrays), nnx.jit(theirs)(layer, *arrays))


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_equal_those_of_projections_around_oracle(name, x64):
    layer, arrays, ours, theirs = both_ways(name)
    exact = with_gradients(theirs, layer, arrays)
    assert_exact(with_gradients(ours, layer, arrays), exact)
    for path, gradient in jax.tree.leaves_with_path(exact):
        assert np.abs(gradient).max() > 1e-6, path  # nothing is there without acting


def plain(layer, x):
    """`by_hand` in the dtype of the layer, rounding after each step: the baseline of the rule."""
    graph, state = nnx.split(layer)
    return by_hand(nnx.merge(graph, jax.tree.map(lambda p: p.astype(x.dtype), state)), x)


@functools.cache
def in_float64():
    """What `test_lower_precision_errs_as_plain_xla` wants."""
    with jax.enable_x64(True):
        return nnx.jit(by_hand)(make(layer_norm=True), *inputs(T))


@pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(jnp.float32, marks=pytest.mark.newest),
        jnp.bfloat16,
        pytest.param(jnp.float16, marks=pytest.mark.newest),
    ],
    ids=lambda x: x.__name__,
)
def test_lower_precision_errs_as_plain_xla(dtype):
    layer, (x,) = make(np.float32, layer_norm=True, dtype=dtype), inputs(T, dtype=dtype)
    out = nnx.jit(layer)(x)
    assert out.dtype == dtype
    assert_within({"out": out}, {"out": plain(layer, x)}, {"out": in_float64()})


@pytest.mark.newest
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 2.5])
def test_magneto_gains(fused, gamma):
    width, heads, kv_heads = 256, 8, 4
    layer: Any = dilax.MultiheadDilatedAttention(
        width, heads, *SPEC, num_kv_heads=kv_heads, gamma_init=gamma, fused_qkv=fused,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    narrow = width * kv_heads // heads
    if fused:
        kernels = jnp.split(layer.qkv_proj.kernel[...], (width, width + narrow), axis=1)
        biases = [layer.qkv_proj.bias[...]]
    else:
        projections = (layer.query_proj, layer.key_proj, layer.value_proj)
        kernels, biases = ([getattr(p, x)[...] for p in projections] for x in ("kernel", "bias"))
    kernels, biases = [*kernels, layer.out_proj.kernel[...]], [*biases, layer.out_proj.bias[...]]
    gains = {"query": 1.0, "key": 1.0, "value": gamma, "out": gamma}
    for (name, gain), kernel in zip(gains.items(), kernels, strict=True):
        wanted = gain * np.sqrt(2 / sum(kernel.shape))  # Xavier: fans of the slice, not the row
        # Six standard deviations of the standard deviation of so many normal numbers.
        assert abs(np.std(kernel) / wanted - 1) < 6 / np.sqrt(2 * kernel.size), name
        assert abs(np.mean(kernel)) < 6 * wanted / np.sqrt(kernel.size), name
        # Untruncated normal numbers: a truncated one ends at 2.3 deviations.
        assert np.abs(kernel).max() > 3 * wanted, name
    assert all(not bias.any() for bias in biases)
    assert not np.array_equal(kernels[1], kernels[2] / gamma)


@pytest.mark.newest
def test_parameters_are_these_and_no_others(x64):
    layer = make(layer_norm=True, add_bias_kv=True)
    assert set(nnx.to_pure_dict(nnx.state(layer))) == {
        "query_proj", "key_proj", "value_proj", "out_proj", "norm", "bias_k", "bias_v",
    }  # fmt: skip
    assert set(nnx.to_pure_dict(nnx.state(make(fused_qkv=True)))) == {"qkv_proj", "out_proj"}


def test_gains_act_on_partitioned_initializers():
    ones = nnx.with_partitioning(nnx.initializers.ones_init(), (None, "model"))
    with jax.set_mesh(jax.make_mesh((2,), ("model",))):
        layer: Any = dilax.MultiheadDilatedAttention(
            E, N, *SPEC, fused_qkv=True, gamma_init=3.0, kernel_init=ones, rngs=nnx.Rngs(0)
        )
        kernel = layer.qkv_proj.kernel
        assert kernel[...].sharding.spec == jax.P(None, "model")
        np.testing.assert_array_equal(kernel[...][0], np.repeat([1.0, 1.0, 3.0], E))
        assert (np.asarray(layer.out_proj.kernel[...]) == 3.0).all()


def test_metadata_shards_the_weights(x64):
    sharding = {
        "kernel_metadata": {"out_sharding": (None, "model")},
        "out_kernel_metadata": {"out_sharding": ("model", None)},
    }
    (x,) = inputs(T)
    alone = dilax.MultiheadDilatedAttention(E, N, *SPEC, param_dtype=x.dtype, rngs=nnx.Rngs(0))
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        layer: Any = dilax.MultiheadDilatedAttention(
            E, N, *SPEC, param_dtype=x.dtype, rngs=nnx.Rngs(0), **sharding
        )
        assert layer.value_proj.kernel[...].sharding.spec == jax.P(None, "model")
        assert layer.out_proj.kernel[...].sharding.spec == jax.P("model", None)
        out = nnx.jit(lambda layer, x: layer(x, is_causal=True))(layer, x)
    assert_exact(jax.device_get(out), jax.device_get(alone(x, is_causal=True)))


def test_checkpointing_keeps_gradients(x64):
    def run(choice):
        layer = make(use_gradient_checkpointing=choice, dropout=0.3, layer_norm=True)
        call = {"deterministic": False, "rngs": jax.random.key(1)}
        return with_gradients(lambda m, x: m(x, **call), layer, inputs(T))

    exact = run(False)
    for choice in (True, KEEP_NAMES):
        assert_exact(run(choice), exact)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_are_those_of_jax(name):
    """Every name is a policy, not a function that makes one: JAX asks it and takes its answer."""
    assert loops(name) >= loops(False)


def loops(choice):
    """How many loops over tiles forward and backward take together."""
    graph, state = nnx.split(make(np.float32, use_gradient_checkpointing=choice))
    (x,) = inputs(T, dtype=np.float32)
    gradient = jax.grad(lambda state: nnx.merge(graph, state)(x).sum())
    return str(jax.make_jaxpr(gradient)(state)).count("scan[")


def test_checkpointing_recomputes():
    assert loops(True) > loops(False)
    assert loops("nothing_saveable") == loops(True)


@pytest.mark.newest
def test_dropout_needs_to_know_whether_to_act():
    (x,) = inputs(T, dtype=np.float32)
    with pytest.raises(ValueError, match="deterministic"):
        make(np.float32, dropout=0.5)(x)
    np.testing.assert_array_equal(
        make(np.float32, dropout=0.5)(x, deterministic=True), make(np.float32)(x)
    )


def test_dropout_follows_flags_and_streams():
    (x,) = inputs(T, dtype=np.float32)
    layer = make(np.float32, dropout=0.5, deterministic=False)
    run = nnx.jit(lambda layer, x, rngs=None: layer(x, rngs=rngs))
    first, second = run(layer, x), run(layer, x)
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(run(make(np.float32, dropout=0.5, deterministic=False), x), first)
    calls = [run(layer, x, nnx.Rngs(dropout=4)), run(layer, x, nnx.Rngs(dropout=4).dropout)]
    calls.append(run(layer, x, nnx.Rngs(dropout=4).dropout()))
    np.testing.assert_array_equal(calls[0], calls[1])
    np.testing.assert_array_equal(calls[0], calls[2])
    assert np.abs(calls[0] - first).max() > 1e-3
    still = layer(x, deterministic=True)
    np.testing.assert_array_equal(still, make(np.float32)(x))
    layer.eval()
    np.testing.assert_array_equal(layer(x), still)
    assert np.abs(layer(x, deterministic=False) - still).max() > 1e-3


def test_layers_scan_vmap_remat_jit(x64):
    """A stack of layers under nnx.vmap, nnx.scan and nnx.remat equals the same layers in a loop."""
    (x,) = inputs(T)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def create(rngs) -> Any:
        return dilax.MultiheadDilatedAttention(
            E, N, *SPEC, layer_norm=True, param_dtype=np.float64, rngs=rngs
        )

    stack = create(nnx.Rngs(0))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def through(layer, x):
        return x + layer(x, is_causal=True)

    @nnx.jit
    def run(stack, x):
        return nnx.value_and_grad(lambda stack: (through(stack, x) ** 2).sum())(stack)

    graph, state = nnx.split(stack)

    def loop(state, x):
        for i in range(3):
            x = x + nnx.merge(graph, jax.tree.map(lambda p, i=i: p[i], state))(x, is_causal=True)
        return (x**2).sum()

    value, gradient = run(stack, x)
    exact = jax.jit(jax.value_and_grad(loop))(state, x)
    assert_exact(value, exact[0])
    assert_exact(joined(nnx.to_pure_dict(gradient)), joined(nnx.to_pure_dict(exact[1])))


@pytest.mark.newest
def test_queries_that_see_nothing_have_finite_gradients(x64):
    layer = make()
    ids = jnp.zeros((B, T), jnp.int32)
    found = with_gradients(lambda m, x: m(x, q_segment_ids=ids), layer, inputs(T))
    exact = jnp.broadcast_to(layer.out_proj.bias[...][None, None], (B, T, E))
    assert_exact(found["out"], exact)
    assert not found["arrays"][0].any()


BAD_OPTIONS = {
    "embed_dim": [0, -8, 32.0, "32", True, 30, 36, 4 * 264],
    "num_heads": [0, 4.0, None, 3],
    "segment_lengths": [[], [0], [8, 4], "ab", [6]],
    "dilation_rates": [None, [1], [1, 0], [1, 2.0]],
    "num_kv_heads": [3, 0, 2.0],
    "bias": [1, None],
    "fused_qkv": ["yes"],
    "layer_norm": [0],
    "layer_norm_eps": [0.0, -1e-5, "small", float("inf"), float("nan")],
    "gamma_init": [0, -1.0, None, float("nan")],
    "add_bias_kv": [1],
    "add_zero_attn": [None],
    "dropout": [1.0, -0.1, True, "0.1", float("nan")],
    "attention_scale": [float("nan"), float("inf"), "1", True],
    "combine": ["sum"],
    "head_offset": ["none"],
    "pad_mode": ["zero"],
    "average_branches": [1],
    "position": [3],
    "use_gradient_checkpointing": ["dots", 1, None, "save_only_these_names"],
    "implementation": ["triton", 3],
    "dtype": ["int32", "nonsense", 3],
    "param_dtype": [jnp.int8, None],
    "deterministic": [0],
    "rngs": [0, None, jax.random, nnx.Rngs(dropout=0)],
    "kernel_init": [None, "xavier"],
    "bias_init": ["zeros", None],
    "out_kernel_init": ["xavier"],
    "out_bias_init": [0],
    "kernel_metadata": [3, None, {1: 2}],
    "bias_metadata": [[]],
    "out_kernel_metadata": [3],
    "out_bias_metadata": ["x"],
}


@pytest.mark.newest
@pytest.mark.parametrize(
    ("name", "x"), [(name, x) for name, values in BAD_OPTIONS.items() for x in values]
)
def test_bad_options_are_named(name, x):
    options: dict[str, Any] = {"embed_dim": E, "num_heads": N, "rngs": nnx.Rngs(0)}
    options |= {"segment_lengths": TWO[0], "dilation_rates": TWO[1], name: x}
    # embed_dim and num_heads, lengths and rates are wrong together.
    either = {"num_heads": "embed_dim", "segment_lengths": "dilation_rates"}
    with pytest.raises(ValueError, match=rf"^({name}|{either.get(name, name)})(\[\d\])?: wanted "):
        dilax.MultiheadDilatedAttention(**options)


X = jnp.ones((B, T, E))
BAD_CALLS = [
    ("query", (None,), {}),
    ("query", (X[0],), {}),
    ("query", (X[..., :8],), {}),
    ("query", (X.astype(int),), {}),
    ("query", (X[:0],), {}),
    ("query", (X[:, :0],), {}),
    ("key", (X, None, X), {}),
    ("key", (X, X[:1]), {}),
    ("key", (X, X[..., :8]), {}),
    ("key", (X, X[:, :0]), {}),
    ("value", (X, X, X[:, :3]), {}),
    ("is_causal", (X,), {"is_causal": 1}),
    ("q_segment_ids", (X,), {"q_segment_ids": jnp.ones((B, T))}),
    ("q_segment_ids", (X,), {"kv_segment_ids": jnp.ones((B, T), jnp.int32)}),
    ("kv_segment_ids", (X, X[:, :5]), {"q_segment_ids": jnp.ones((B, T), jnp.int32)}),
    ("key_padding_mask", (X,), {"key_padding_mask": jnp.ones((B, T))}),
    ("key_padding_mask", (X, X[:, :5]), {"key_padding_mask": jnp.ones((B, T), bool)}),
    ("positions", (X,), {"positions": jnp.arange(T)}),
    ("deterministic", (X,), {"deterministic": 1}),
    ("rngs", (X,), {"deterministic": True, "rngs": "abc"}),
    ("rngs", (X,), {"rngs": jax.random.split(jax.random.key(0))}),
]


@pytest.mark.newest
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rngs", [3, "abc", nnx.Rngs(params=0), jnp.ones(2)])
def test_rngs_without_dropout_are_named(rngs, checkpointing):
    layer = make(np.float32, dropout=0.1, use_gradient_checkpointing=checkpointing)
    with pytest.raises(ValueError, match=r'^rngs: wanted .*"dropout" stream'):
        layer(X, deterministic=False, rngs=rngs)
    with pytest.raises(ValueError, match=r'^rngs: wanted .*"dropout" stream'):
        dilax.MultiheadDilatedAttention(E, N, *SPEC, dropout=0.1, rngs=nnx.Rngs(params=0))


@pytest.mark.newest
@pytest.mark.parametrize(("name", "arrays", "call"), BAD_CALLS)
def test_bad_calls_are_named(name, arrays, call):
    with pytest.raises(ValueError, match=rf"^{name}: wanted "):
        make(np.float32)(*arrays, **call)


@pytest.mark.newest
@pytest.mark.parametrize(
    ("name", "arrays", "call"),
    [
        ("positions", (X,), {"positions": jnp.arange(T - 1)}),
        ("positions", (X,), {"positions": jnp.arange(1.0 * T)}),
        ("kv_positions", (X, X[:, :5]), {"kv_positions": jnp.arange(T)}),
        ("kv_positions", (X, X[:, :5]), {"positions": jnp.arange(T)}),
    ],
)
def test_bad_positions_are_named(name, arrays, call):
    with pytest.raises(ValueError, match=rf"^{name}: wanted "):
        make(np.float32, position=rotate)(*arrays, **call)
