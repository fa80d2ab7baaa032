"""Kinds on a mesh: arrays go in and come out where they lie, with the numbers of one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dilax
from dilax import plan_table, sharded, sharded_blocks
from dilax.names import KINDS
from tests.compare import assert_exact, error

SPEC = (32,), (2,)
AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit


def mesh_of(shape=(2, 2, 2), kind=AUTO, names=("data", "sequence", "tensor")):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def heads(T=32):
    return jax.random.normal(jax.random.key(0), (3, 2, T, 4, 8), jnp.float64)


def results(attention, q, k, v):
    """out and the gradients of q, k and v."""

    def run(*x):
        out, vjp = jax.vjp(functools.partial(attention, is_causal=True), *x)
        return out, *vjp(jnp.cos(out))

    return jax.jit(run)(q, k, v)


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["auto", "explicit"])
def test_arrays_stay_where_they_lie(kind, x64):
    """Over examples, tokens and heads; the axes of examples and heads are those of the arrays."""
    mesh, part = mesh_of(kind=kind), jax.P("data", "sequence", "tensor")
    one = results(dilax.create_dilated_attention("dilated", *SPEC), *heads())
    attention = dilax.create_dilated_attention(
        "ring", *SPEC, ring_size=2, batch_axis="data", head_axis="tensor", mesh=mesh
    )
    found = results(attention, *jax.device_put(tuple(heads()), jax.NamedSharding(mesh, part)))
    for x in found:
        assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, part), 4)
    assert_exact([np.asarray(x) for x in found], [np.asarray(x) for x in one])


def test_plain_attention_on_explicit_axes(x64):
    mesh = mesh_of(kind=EXPLICIT)
    q, k, v = jax.device_put(tuple(heads()), jax.NamedSharding(mesh, jax.P("data", None, "tensor")))
    attention = dilax.create_dilated_attention("dilated", *SPEC)
    with jax.set_mesh(mesh):
        found = jax.jit(functools.partial(attention, is_causal=True))(q, k, v)
    assert error(found, jax.jit(functools.partial(attention, is_causal=True))(*heads())) < 1e-12


def test_two_axes_for_the_tokens(x64):
    """Inside a host and between hosts, in the mesh's order."""
    mesh = mesh_of((2, 2), names=("host", "device"))
    attention = dilax.create_dilated_attention(
        "ring", *SPEC, axis_name=("host", "device"), layout="zigzag", mesh=mesh
    )
    q, k, v = (dilax.to_layout(x, 4, "zigzag") for x in heads())
    found = jax.jit(functools.partial(attention, is_causal=True))(q, k, v)
    found = dilax.from_layout(found, 4, "zigzag")
    one = dilax.create_dilated_attention("dilated", *SPEC)
    assert error(found, jax.jit(functools.partial(one, is_causal=True))(*heads())) < 1e-12


def test_a_module_counts_positions_as_the_tokens_lie(x64):
    """Rotary positions of tokens in the zig-zag layout, outside a shard_map and inside."""
    mesh = mesh_of((2,), names=("sequence",))
    module = functools.partial(
        dilax.MultiheadDilatedAttention, 32, 4, *SPEC, position=dilax.RotaryPosition()
    )
    options = {"dtype": "float64", "param_dtype": "float64"}
    sharding = dilax.AttentionSharding(layout="zigzag", mesh=mesh)
    one, layer = (module(sharding=x, rngs=nnx.Rngs(0), **options) for x in (None, sharding))
    x = jax.random.normal(jax.random.key(1), (1, 32, 32), jnp.float64)
    placed = dilax.to_layout(x, 2, "zigzag")
    part = jax.P(None, "sequence")
    inside = jax.shard_map(layer, mesh=mesh, in_specs=part, out_specs=part)
    exact = jax.jit(one)(x)
    for run in (layer, inside):
        found = dilax.from_layout(jax.jit(run)(placed), 2, "zigzag")
        assert error(found, exact) < 1e-12


def test_a_mesh_with_both_kinds_of_axes(x64):
    kinds = (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=kinds)
    attention = dilax.create_dilated_attention("ring", *SPEC, mesh=mesh, batch_axis="data")
    one = dilax.create_dilated_attention("dilated", *SPEC)
    assert error(jax.jit(attention)(*heads()), jax.jit(one)(*heads())) < 1e-12


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"mesh": "foo"}, "mesh"),
        ({"method": 3}, "method"),
        ({"batch_axis": "sequence"}, "batch_axis"),
        ({"axis_name": ("sequence", "data")}, "axis_name"),
    ],
)
def test_wrong_meshes_are_refused_by_name(wrong, name, x64):
    mesh = mesh_of((2, 2), names=("data", "sequence"))
    with pytest.raises(ValueError, match=f"{name}.*wanted"):
        dilax.create_dilated_attention("ring", *SPEC, **{"mesh": mesh} | wrong)(*heads())


ON_MESH = [row for row in KINDS if row.mesh and not row.pattern]


def test_block_sparse_on_a_mesh():
    """Along a Hilbert curve, and sees no token after its own in the grid."""
    mesh = mesh_of((2, 2), names=("data", "sequence"))
    x = jax.random.normal(jax.random.key(1), (2, 256, 32))
    pattern = dilax.SparsePatternConfig(window_size=100, block_size=64)
    options = {"pattern": pattern, "order": dilax.TokenOrder((16, 16))}
    create = dilax.create_multihead_dilated_attention
    layer = create("block_sparse_distributed", 32, 4, mesh=mesh, **options)
    name = "BlockSparseRingDistributedDilatedAttention"
    assert create(name, 32, 4, mesh=mesh, **options).attention == layer.attention
    same = create("block_sparse", 32, 4, **options)
    run = nnx.jit(lambda layer, x: layer(x, is_causal=True))
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", "sequence")))
    assert error(run(layer, placed), run(same, x)) < 1e-5


def test_a_pattern_on_a_mesh_has_no_segments():
    mesh = mesh_of((2,), names=("sequence",))
    create = dilax.create_dilated_attention
    attention = create("block_sparse_distributed", [8, 32], [1, 2], mesh=mesh)
    x = jnp.ones((2, 128, 4, 8))
    with pytest.raises(ValueError, match="segment_lengths: wanted None with a pattern on a mesh"):
        attention(x, x, x)


@pytest.mark.parametrize("row", ON_MESH, ids=lambda row: row.names[0])
def test_every_kind_equals_one_device(row):
    name, mesh = row.names[0], mesh_of((2, 2), names=("data", "sequence"))
    options = {"grid": (4, 8)} if row.order else {}
    x = jax.random.normal(jax.random.key(1), (2, 32, 32))
    create = dilax.create_multihead_dilated_attention
    layer = create(name, 32, 4, *SPEC, mesh=mesh, **options)
    for alias in row.names:
        assert create(alias, 32, 4, *SPEC, mesh=mesh, **options).attention == layer.attention
    placed = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data", "sequence")))
    assert error(causal(layer, placed), on_one_device(bool(row.order))) < 1e-5


@nnx.jit
def causal(layer, x):
    return layer(x, is_causal=True)


@functools.cache
def on_one_device(ordered):
    """What the kinds on a mesh are to compute: along a Hilbert curve or as the tokens come."""
    plain, options = ("hilbert", {"grid": (4, 8)}) if ordered else ("multihead_dilated", {})
    layer = dilax.create_multihead_dilated_attention(plain, 32, 4, *SPEC, **options)
    return causal(layer, jax.random.normal(jax.random.key(1), (2, 32, 32)))


def test_ring_hilbert_drops_what_one_device_drops(x64):
    """And sees no token after its own in the grid; the order comes before the places on a mesh."""
    mesh = mesh_of((1, 4), names=("data", "sequence"))
    options = {"dropout": 0.3, "grid": (4, 8)}
    one = dilax.create_dilated_attention("hilbert", *SPEC, **options)
    attention = dilax.create_dilated_attention("ring_hilbert", *SPEC, mesh=mesh, **options)
    drop = {"dropout_key": jax.random.key(3)}
    found, wanted = (results(functools.partial(x, **drop), *heads()) for x in (attention, one))
    assert_exact([np.asarray(x) for x in found], [np.asarray(x) for x in wanted])
    explicit = mesh_of((2, 4), EXPLICIT, ("data", "sequence"))
    where = jax.NamedSharding(explicit, jax.P("data", "sequence"))
    attention = dilax.create_dilated_attention("ring_hilbert", *SPEC, **options)
    placed = jax.device_put(tuple(heads()), where)
    out = jax.jit(functools.partial(attention, is_causal=True, **drop))(*placed)
    assert out.sharding.spec[:2] == ("data", "sequence")
    assert error(out, wanted[0]) < 1e-12
    with pytest.raises(ValueError, match="layout: wanted 'contiguous' with an order"):
        dilax.create_dilated_attention("ring_hilbert", *SPEC, layout="zigzag", **options)


@pytest.mark.parametrize(("name", "x"), [("layout", "zigzag"), ("method", "ring")])
def test_without_an_axis_of_the_tokens_none_is_placed(name, x):
    with pytest.raises(ValueError, match=f"^{name}: wanted .* without a mesh axis of the tokens"):
        dilax.create_multihead_dilated_attention("distributed", 32, 4, *SPEC, **{name: x})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ring_size": 4}, "ring_size: wanted None or 2, the devices along"),
        ({"axis_name": "rows"}, r"axis_name \(.*\): wanted an axis of the mesh, which has data, s"),
        ({"batch_axis": "sample"}, r"batch_axis \(.*\): wanted an axis of the mesh"),
        ({"length": 31}, "31 tokens on 2 devices: wanted a multiple of 2 .*; pad it to 32"),
        ({"head_axis": "data", "num_heads": 3}, "heads: wanted axes that divide heads"),
        ({"layout": "striped"}, "layout: wanted 'contiguous' or 'zigzag'"),
        ({"mesh": None}, "mesh: wanted a mesh: arrays on one, jax.set_mesh"),
    ],
)
def test_refused(options, message):
    options = {"mesh": mesh_of((2, 2), names=("data", "sequence"))} | options
    x = jnp.ones((2, options.pop("length", 32), options.pop("num_heads", 4), 8))
    with pytest.raises(ValueError, match=message):
        dilax.create_dilated_attention("ring", *SPEC, **options)(x, x, x)


def test_only_kinds_on_a_mesh_take_axes():
    with pytest.raises(ValueError, match=r"axis_name: wanted None with kind 'dilated'"):
        dilax.create_dilated_attention("dilated", *SPEC, axis_name="sequence")


def test_explain_has_the_plan():
    decision = dilax.explain(
        "head_parallel",
        seq_len=1 << 16,
        num_heads=16,
        segment_lengths=(2048, 1 << 16),
        dilation_rates=(1, 8),
        devices=8,
    )
    assert decision.placement == "8 devices along the tokens, contiguous: local, all_to_all"
    assert "65536     8  all_to_all" in str(decision)
    assert "receives" in str(decision)


MESHES = {
    "ring": {"axis_name": ("host", "device"), "batch_axis": "data", "layout": "zigzag"},
    "head_parallel": {"axis_name": "device", "head_axis": "host"},
    "distributed": {"head_axis": ("host", "device")},
    "block_sparse_distributed": {"axis_name": ("host", "device"), "pattern": "local"},
}


@pytest.mark.parametrize("kind", MESHES)
def test_explain_plans_what_runs(kind, monkeypatch):
    """The plan of the call that it explains, for the same description of the mesh."""
    plans = []

    def spy(make, *args, **options):
        plans.append(make(*args, **options))
        return plans[-1]

    for module, name in ((sharded, "plan_of"), (sharded_blocks, "block_plan_of")):
        monkeypatch.setattr(module, name, functools.partial(spy, getattr(module, name)))
    mesh = mesh_of((2, 2, 2), names=("data", "host", "device"))
    segments = {"segment_lengths": (64, 512), "dilation_rates": (1, 2)}
    options = MESHES[kind] | ({} if "pattern" in MESHES[kind] else segments)
    attention = dilax.create_multihead_dilated_attention(kind, 32, 4, mesh=mesh, **options)
    x = jax.ShapeDtypeStruct((2, 512, 4, 8), jnp.float32)
    jax.eval_shape(functools.partial(attention.attention, is_causal=True), x, x, x)
    sizes = {"seq_len": 512, "batch": 2, "num_heads": 4, "head_dim": 8, "is_causal": True}
    axes = {"data": 2, "host": 2, "device": 2}
    decision = dilax.explain(kind, mesh=axes, **sizes, **options)
    (plan,) = plans
    blocks = "pattern" in options
    text = plan_table.block_plan_table(plan[0]) if blocks else plan_table.plan_table(plan)
    assert decision.plan == text


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dilated", {"devices": 4}, "devices: wanted 1 with kind 'dilated'"),
        ("distributed", {"devices": 4}, "devices: wanted 1 with .*tokens lie on no mesh axis"),
        ("hilbert", {"mesh": "sequence=4"}, "mesh: wanted None with kind 'hilbert'"),
        ("ring", {"mesh": "sequence"}, "mesh: wanted axes with sizes"),
        (
            "ring",
            {"mesh": "data=2"},
            r"axis_name \(.*\): wanted an axis of the mesh, .*data",
        ),
        ("ring", {"mesh": "sequence=4", "devices": 4}, "devices: wanted 1 with a mesh"),
        ("ring", {"layout": "zigzag"}, "layout: wanted None without a mesh"),
        ("ring", {"devices": 4, "ring_size": 2}, "ring_size: wanted None or 4"),
        ("distributed", {"mesh": "data=2", "method": "ring"}, "method: wanted None without"),
        ("ring_distributed", {"mesh": "data=2,sequence=2"}, "batch: wanted axes that divide"),
        ("ring_hilbert", {"devices": 2, "layout": "zigzag"}, "layout: wanted 'contiguous' with"),
        ("dilated", {"gigabytes_per_second": 3.0}, "gigabytes_per_second: wanted None on one"),
    ],
)
def test_explain_refuses_a_mesh_that_does_not_apply(kind, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        dilax.explain(kind, seq_len=8192, **options)


def test_explain_has_the_plan_of_a_pattern():
    pattern = dilax.SparsePatternConfig("global_local", window_size=512, global_tokens=128)
    sizes = {"seq_len": 1 << 16, "num_heads": 2, "head_dim": 128, "dtype": "bfloat16"}
    sizes |= {"pattern": pattern, "devices": 8, "device_kind": "NVIDIA H100 80GB HBM3"}
    decision = dilax.explain("block_sparse_distributed", **sizes)
    assert decision.implementation == "pallas"
    assert decision.placement.endswith("contiguous: ring of 7 hops, global queries to 7 devices")
    assert decision.plan is not None
    assert decision.plan.splitlines()[1].split()[:2] == ["keys", "-1"]
    assert (
        dilax.explain("block_sparse_distributed", dropout=0.1, **sizes).implementation == "pallas"
    )


def test_kernels_drop_on_a_mesh_where_they_know_the_positions():
    options = {"seq_len": 1 << 14, "dtype": "bfloat16", "device_kind": "NVIDIA H100 80GB HBM3"}
    options |= {"segment_lengths": (2048, 1 << 14), "dropout": 0.1, "num_heads": 8}

    def explained(rates, mesh="sequence=4", kind="ring", **more):
        return dilax.explain(kind, mesh=mesh, dilation_rates=rates, **options, **more)

    assert explained((2, 1), method="ring").implementation == "pallas"
    in_order = explained((2, 1), method="ring", kind="ring_hilbert", is_causal=True)
    assert in_order.implementation == "pallas"
    for found, why in (
        (explained((1, 4)), "segments of 16384 at rate 4: its kernels do not know the positions"),
        (explained((1, 1), method="all_to_all"), "segments of 16384 at rate 1: its kernels do not"),
        (explained((1, 1), method="ring", layout="zigzag"), "count the rows of both chunks from"),
        (
            explained((1, 1), "sequence=4,tensor=2", method="ring", head_axis="tensor"),
            "dropout with heads over several devices",
        ),
    ):
        assert found.implementation == "xla"
        assert why in str(found)
