"""dilated_attention under the transformations of jax."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import dilax
from tests.cases import BY_NAME, Case
from tests.compare import assert_exact

SPEC = dilax.DilatedSpec((6,), (2,))
attend = functools.partial(dilax.dilated_attention, segment_lengths=SPEC, is_causal=True)


@pytest.fixture
def qkv(x64, rng):
    return tuple(rng.normal(size=(3, 2, 14, 4, 8)))


def test_jit_equals_eager(x64):
    case = dataclasses.replace(BY_NAME["all_masks"], segment_lengths=(8,), dilation_rates=(2,))
    run = functools.partial(dilax.dilated_attention, **case.keywords(), return_lse=True)
    assert_exact(jax.jit(run)(**case.arrays()), run(**case.arrays()))


def test_vmap_is_a_loop(qkv):
    """Over everything, over queries alone, and with gradients."""
    stacked = tuple(np.stack([x, 2 * x, -x]) for x in qkv)

    def gradients(q, k, v):
        return jax.grad(lambda *x: (attend(*x) ** 2).sum(), (0, 1, 2))(q, k, v)

    for run in (attend, gradients):
        one = jax.jit(run)
        loop = [one(*(x[i] for x in stacked)) for i in range(3)]
        wanted = jax.tree.map(lambda *x: jnp.stack(x), *loop)
        assert_exact(jax.jit(jax.vmap(run))(*stacked), wanted)
    queries = jax.jit(jax.vmap(attend, in_axes=(0, None, None)))(stacked[0], *qkv[1:])
    one = jax.jit(attend)
    assert_exact(queries, jnp.stack([one(q, *qkv[1:]) for q in stacked[0]]))


def test_vmap_over_masks_and_keys(qkv):
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 3, (3, 2, 14)), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 3)

    def run(ids, key):
        return attend(
            *qkv, q_segment_ids=ids, dropout_rate=0.3, dropout_key=key, deterministic=False
        )

    one = jax.jit(run)
    loop = jnp.stack([one(i, k) for i, k in zip(ids, keys, strict=True)])
    assert_exact(jax.jit(jax.vmap(run))(ids, keys), loop)
    assert not (loop[0] == loop[1]).all()


def test_remat_changes_no_gradient(qkv):
    options = {"dropout_rate": 0.3, "dropout_key": jax.random.key(0), "deterministic": False}

    def loss(q, k, v):
        out, lse = attend(jnp.sin(q), k, v, return_lse=True, **options)
        return (out**2).sum() + lse.sum()

    plain = jax.jit(jax.grad(loss, (0, 1, 2)))(*qkv)
    names = jax.checkpoint_policies.save_only_these_names("dilax_out", "dilax_lse")
    for policy in (None, names):
        again = jax.jit(jax.grad(jax.checkpoint(loss, policy=policy), (0, 1, 2)))(*qkv)
        assert_exact(again, plain)


def test_remat_by_name_does_not_attend_again(qkv):
    """Saving "dilax_out" and "dilax_lse" is enough: the products of the forward pass are gone."""

    def products(policy):
        def loss(q, k, v):
            return (attend(jnp.sin(q), k, v) ** 2).sum()

        again = jax.checkpoint(loss, policy=policy)
        run = jax.jit(jax.value_and_grad(again, (0, 1, 2)))
        return run.lower(*qkv).as_text().count("stablehlo.dot_general")

    names = jax.checkpoint_policies.save_only_these_names("dilax_out", "dilax_lse")
    everything = products(jax.checkpoint_policies.everything_saveable)
    assert products(names) == everything
    assert products(jax.checkpoint_policies.nothing_saveable) > everything


def test_scan_over_layers_is_a_loop(qkv, rng):
    x, weights = qkv[0], rng.normal(size=(3, 3, 8, 8))

    def layer(x, w):
        q, k, v = jnp.einsum("BTNH,cHO->cBTNO", x, w)
        return x + attend(q, k, v), None

    def scanned(x, weights):
        return (jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2).sum()

    def looped(x, weights):
        for w in weights:
            x, _ = layer(x, w)
        return (x**2).sum()

    results = [jax.jit(jax.value_and_grad(f, (0, 1)))(x, weights) for f in (scanned, looped)]
    assert_exact(*results)


def test_export_round_trip(qkv):
    def run(q, k, v):
        return attend(q, k, v, return_lse=True)

    back = export.deserialize(export.export(jax.jit(run))(*qkv).serialize(vjp_order=1))
    wanted, pull = jax.vjp(jax.jit(run), *qkv)
    found, pull_back = jax.vjp(back.call, *qkv)
    cotangents = jax.tree.map(lambda x: jnp.cos(jnp.exp(x)), wanted)  # an lse may be -inf
    cotangents_back = jax.tree.unflatten(jax.tree.structure(found), jax.tree.leaves(cotangents))
    assert_exact(tuple(found), wanted)
    assert_exact(pull_back(cotangents_back), pull(cotangents))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 8), (2, 13, 6, 24), (1, 100_003, 12, 128)])
def test_eval_shape(dtype, sizes):
    x = jax.ShapeDtypeStruct(sizes, dtype)
    out, lse = jax.eval_shape(functools.partial(attend, return_lse=True), x, x, x)
    assert (out.shape, out.dtype) == (sizes, x.dtype)
    assert (lse.shape, lse.dtype) == (sizes[:3], np.float32)


def test_traces_once_per_spec():
    case = Case("once", (6, 12), (1, 2))
    traced = []

    @functools.partial(jax.jit, static_argnames="spec")
    def run(arrays, spec):
        traced.append(spec)
        return dilax.dilated_attention(**arrays, segment_lengths=spec)

    for lengths in ((6, 12), [6, 12], (6, 14)):
        run(case.arrays(np.float32), dilax.DilatedSpec(lengths, (1, 2)))
    assert len(traced) == 2


def test_the_batch_may_be_sharded(qkv):
    """Under jit with sharded inputs the answer and its placement stay what they are."""
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=axes, devices=jax.devices("cpu")[:2])
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    placed = [jax.device_put(x, sharding) for x in qkv]
    out = jax.jit(attend, out_shardings=sharding)(*placed)
    assert_exact(out, jax.jit(attend)(*qkv))
    assert out.sharding.is_equivalent_to(sharding, out.ndim)
