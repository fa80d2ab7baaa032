"""LongNet models: structure, start, causality, packing, options."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dilax.longnet import LongNetDecoder, LongNetEncoder, LongNetLM
from dilax.longnet_config import LongNetConfig
from dilax.on_mesh import AttentionSharding
from tests.compare import assert_exact, error

SMALL = LongNetConfig(
    embed_dim=32,
    num_heads=4,
    num_layers=2,
    ffn_dim=48,
    segment_lengths=(8, 16),
    dilation_rates=(1, 2),
    vocab_size=50,
    param_dtype="float64",
)
ONE_BRANCH: dict[str, Any] = dict(segment_lengths=(16,), dilation_rates=(1,))
TOKENS = np.random.default_rng(7).integers(0, 50, (2, 23)).astype(np.int32)


def _lm(**options):
    return LongNetLM(dataclasses.replace(SMALL, **options), rngs=nnx.Rngs(params=0, dropout=1))


@pytest.mark.parametrize("position", ["rope", "xpos"])
def test_nothing_depends_on_the_future(position, x64):
    model = _lm(position=position)
    run = nnx.jit(model)
    whole = run(TOKENS)
    for t in (7, 8, 15, 16, 22):
        changed = TOKENS.copy()
        changed[:, t:] = (changed[:, t:] + 1) % 50
        assert_exact(run(changed)[:, :t], whole[:, :t])
    assert error(run(changed)[:, 22], whole[:, 22]) > 1e-3


def test_the_encoder_sees_both_sides_and_the_decoder_one(x64):
    config = dataclasses.replace(SMALL, **ONE_BRANCH)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 20, 32)))
    for model, sees in ((LongNetEncoder, True), (LongNetDecoder, False)):
        gradient_of = nnx.jit(nnx.grad(lambda x, model: model(x)[0, 5].sum()))
        gradient = gradient_of(x, model(config, rngs=nnx.Rngs(0)))
        assert bool(jnp.any(gradient[0, 6:] != 0)) == sees


def test_packed_documents_are_as_if_alone(x64):
    """With segments that hold both, documents do not see each other, and positions restart."""
    model = _lm(segment_lengths=(32,), dilation_rates=(1,))
    ids = jnp.asarray([[1] * 9 + [2] * 11 + [0] * 3], jnp.int32)
    positions = jnp.asarray([[*range(9), *range(11), *range(3)]], jnp.int32)
    run = nnx.jit(model)
    packed = run(TOKENS[:1], segment_ids=ids, positions=positions)
    assert_exact(packed[:, :9], run(TOKENS[:1, :9]))
    assert_exact(packed[:, 9:20], run(TOKENS[:1, 9:20]))


def test_every_layer_starts_on_its_own():
    layers = nnx.to_pure_dict(nnx.state(_lm(num_layers=3, param_dtype="float32").decoder.layers))
    kernels = [x for path, x in jax.tree.leaves_with_path(layers) if path[-1].key == "kernel"]
    assert len(kernels) == 6
    for kernel in kernels:
        assert kernel.shape[0] == 3
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not np.any(np.asarray(kernel[a]) == np.asarray(kernel[b]))


def test_magneto_gains():
    """Xavier normal; gain sqrt(log(2 L)) on v, out, fc1 and fc2, 1 on q and k."""
    config = dataclasses.replace(SMALL, embed_dim=128, ffn_dim=256, param_dtype="float32")
    layers = LongNetEncoder(config, rngs=nnx.Rngs(0)).layers
    gain = math.sqrt(math.log(2 * config.num_layers))
    attention, ffn = layers.attention, layers.ffn
    for kernel, expected in (
        (attention.query_proj.kernel, 1.0),
        (attention.key_proj.kernel, 1.0),
        (attention.value_proj.kernel, gain),
        (attention.out_proj.kernel, gain),
        (ffn.fc1.kernel, gain),
        (ffn.fc2.kernel, gain),
    ):
        xavier = math.sqrt(2 / sum(kernel.shape[1:]))
        assert float(jnp.std(kernel[...])) / xavier == pytest.approx(expected, rel=0.03)


def test_remat_and_gqa_change_memory_only(x64):
    small: dict[str, Any] = dict(num_kv_heads=2, segment_lengths=(24,), dilation_rates=(1,))
    plain = _lm(**small)
    graphdef, state = nnx.split(_lm(**small, remat="nothing_saveable"))
    params = nnx.state(plain, nnx.Param)
    assert plain.decoder.layers.attention.key_proj.kernel.shape == (2, 32, 16)

    def loss(state, graphdef):
        return (nnx.merge(graphdef, state)(TOKENS) ** 2).mean()

    gradients = [
        jax.jit(jax.grad(loss), static_argnums=1)(params, g)
        for g in (nnx.graphdef(plain), graphdef)
    ]
    pure = [nnx.to_pure_dict(g) for g in gradients]
    assert_exact(*pure)
    assert all(float(jnp.abs(x).max()) > 0 for x in jax.tree.leaves(pure[0]))
    program = str(jax.make_jaxpr(loss, static_argnums=1)(state, graphdef))
    assert "remat" in program or "checkpoint" in program
    assert program.count("scan[") >= 1


def test_on_explicit_axes(x64):
    """Examples and tokens lie on them, and the logits where the tokens do."""
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=kinds)
    branch: dict[str, Any] = dict(segment_lengths=(16,), dilation_rates=(2,))
    config = dataclasses.replace(SMALL, num_layers=1, position="xpos", remat=None, **branch)
    plain, placed = (
        LongNetLM(config, sharding=sharding, rngs=nnx.Rngs(0))
        for sharding in (None, AttentionSharding(batch="data", mesh=mesh))
    )
    tokens = np.tile(TOKENS[:, :8], (1, 2))
    where = jax.NamedSharding(mesh, jax.P("data", "sequence"))

    @nnx.jit
    def run(model, tokens):
        def loss(model):
            logits = model(tokens)
            return (jnp.cos(logits) * logits).sum(), logits

        return nnx.grad(loss, has_aux=True)(model)

    with jax.set_mesh(mesh):
        gradients, logits = run(placed, jax.device_put(tokens, where))
    assert logits.sharding.spec[:2] == ("data", "sequence")
    found, wanted = (
        jax.tree.map(np.asarray, (nnx.to_pure_dict(nnx.state(g)), out))
        for g, out in ((gradients, logits), run(plain, tokens))
    )
    assert_exact(found, wanted)


def test_dropout_needs_rngs_and_follows_them():
    model = _lm(dropout=0.2, attention_dropout=0.2, param_dtype="float32", **ONE_BRANCH)
    with pytest.raises(ValueError, match="rngs"):
        model(TOKENS, deterministic=False)
    run = nnx.jit(lambda model, rngs: model(TOKENS, deterministic=False, rngs=rngs))
    runs = [run(model, nnx.Rngs(dropout=i)) for i in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert error(runs[0], runs[2]) > 1e-2
    assert error(runs[0], nnx.jit(model)(TOKENS)) > 1e-2


def test_tied_embeddings_have_no_head(x64):
    model = _lm(tied_embeddings=True, **ONE_BRANCH)
    assert model.head is None
    assert sum(x.size for x in jax.tree.leaves(nnx.state(_lm(), nnx.Param))) == 50 * 32 + sum(
        x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param))
    )
    x = nnx.jit(model.decoder)(model.embed(jnp.asarray(TOKENS)) * 32**0.5)
    assert_exact(nnx.jit(model)(TOKENS), x @ model.embed.embedding[...].T)


def test_dtypes():
    model = _lm(param_dtype="float32", dtype="bfloat16", **ONE_BRANCH)
    found = nnx.jit(model)(TOKENS)
    assert found.dtype == jnp.bfloat16
    assert {x.dtype.name for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {"float32"}
    exact = nnx.jit(_lm(param_dtype="float32", **ONE_BRANCH))(TOKENS)
    assert error(found.astype(jnp.float32), exact) < 0.1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"embed_dim": 30}, "embed_dim"),
        ({"num_layers": 0}, "num_layers"),
        ({"ffn_dim": 1.5}, "ffn_dim"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"segment_lengths": (16, 8)}, "segment_lengths"),
        ({"dilation_rates": (1,)}, "dilation_rates"),
        ({"position": "alibi"}, "position"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_dropout": -0.1}, "attention_dropout"),
        ({"remat": "everything"}, "remat"),
        ({"dtype": "int8"}, "dtype"),
        ({"param_dtype": None}, "param_dtype"),
        ({"implementation": "triton"}, "implementation"),
        ({"head_offset": "none"}, "head_offset"),
        ({"pad_mode": "edge"}, "pad_mode"),
        ({"tied_embeddings": 1}, "tied_embeddings"),
        ({"layer_norm_eps": 0}, "layer_norm_eps"),
    ],
)
def test_wrong_config_fields_are_refused_by_name(options, name):
    with pytest.raises(ValueError, match=rf"^{name}.*: wanted .*, got"):
        dataclasses.replace(SMALL, **options)


def test_wrong_calls_are_refused_by_name():
    model = _lm(param_dtype="float32", position=None)
    for call, name in (
        (lambda: LongNetLM(dataclasses.replace(SMALL, vocab_size=None), rngs=nnx.Rngs(0)), "vocab"),
        (lambda: LongNetEncoder({"embed_dim": 32}, rngs=nnx.Rngs(0)), "config"),
        (lambda: model(TOKENS.astype(np.float32)), "tokens"),
        (lambda: model(TOKENS[0]), "tokens"),
        (lambda: model(TOKENS, segment_ids=TOKENS[:, :3]), "segment_ids"),
        (lambda: model(TOKENS, positions=TOKENS), "positions"),
        (lambda: model(TOKENS, deterministic=0), "deterministic"),
        (lambda: model.decoder(jnp.ones((1, 4, 31))), "x"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
