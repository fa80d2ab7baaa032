"""Block-sparse attention on a mesh: the numbers of one device, and only wanted hops."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dilax
from dilax import reference, sharded_blocks
from dilax.block_lists import from_mask
from sharding import block_plan
from sharding.mesh import from_layout, to_layout
from tests.compare import assert_exact, error

T, BLOCK = 64, 4
MARKS = ("q_segment_ids", "q_positions")


@pytest.fixture(autouse=True)
def every_gap(monkeypatch):
    """Blocks that nobody wants do not travel, however small they are."""
    monkeypatch.setattr(block_plan, "GAP_BYTES", 0)


def pattern_of(name):
    """Lists of blocks: exact windows by a band, block 0 that sees all, or is also seen; random."""
    n = 32 if name == "global" else T // BLOCK
    rng = np.random.default_rng(0)
    if name == "heads":  # one for each kv head
        return from_mask(rng.random((1, 2, 16, 16)) < 0.3, BLOCK)
    tokens, reach = {"window": (9, 3), "block": (3, 0)}.get(name, (7, 2))
    distance = np.arange(n)[:, None] - np.arange(n)
    band, mask = (abs(distance) <= reach).astype(int), abs(distance) <= reach
    if name != "window":
        mask[0], band[0] = True, 0
    if name == "global":
        mask[:, 0], band[:, 0] = True, 0
    return from_mask(mask, BLOCK, ((None, None), (tokens, tokens)), band)


def placed(name, devices, mesh=None, **options):
    """The function of arrays over `devices` devices."""
    auto = jax.sharding.AxisType.Auto
    mesh = mesh or jax.make_mesh((devices,), ("sequence",), axis_types=(auto,))
    part = jax.P(None, "sequence")

    def run(q, k, v, *marks):
        return dilax.sharded_block_sparse_attention(
            q,
            k,
            v,
            pattern_of(name),
            axis_name="sequence",
            implementation="xla",  # the only one for such blocks
            **dict(zip(MARKS, marks, strict=False)),
            **options,
        )

    out = (part, part) if options.get("return_lse") else part

    def mapped(*arrays):
        specs = (part,) * len(arrays)
        return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=out)(*arrays)

    return mapped


def with_gradients(f):
    """out, lse, dq, dk, dv of f with cotangents."""

    def run(q, k, v, do, dl, *marks):
        result, vjp = jax.vjp(lambda *x: f(*x, *marks), q, k, v)
        return *result, *vjp((do, dl))

    return jax.jit(run)


def options_of(causal, drops):
    options = {"is_causal": causal, "return_lse": True}
    if drops:
        options |= {"dropout_rate": 0.3, "dropout_key": jax.random.key(5), "deterministic": False}
    return options


def arrays_of():
    """q, k, v, cotangents of out and lse, segment ids."""
    rng = np.random.default_rng(1)
    q, do = rng.normal(size=(2, 2, T, 4, 8))
    k, v = rng.normal(size=(2, 2, T, 2, 8))
    ids = np.sort(rng.integers(0, 3, (2, T)), 1).astype(np.int32)
    return q, k, v, do, rng.normal(size=(2, T, 4)), ids


def moves(name, devices, **options):
    """Whether queries of `arrays_of` travel."""
    q, k = (jax.ShapeDtypeStruct((2, T // devices, n, 8), jnp.float64) for n in (4, 2))
    plan, _ = sharded_blocks.block_plan_of(pattern_of(name), q, k, devices=devices, **options)
    return plan.moves is not None


@pytest.mark.parametrize(
    ("name", "devices", "causal", "layout", "ids", "drops"),
    [
        ("window", 8, True, "contiguous", False, False),
        ("block", 2, False, "zigzag", True, True),  # the queries of block 0 move
        ("heads", 4, True, "contiguous", False, False),
    ],
)
def test_equals_one_device(name, devices, causal, layout, ids, drops, x64):
    arrays = arrays_of()[: 6 if ids else 5]
    options = options_of(causal, drops)

    def one(q, k, v, *ids):
        more = {"implementation": "xla"} | ({"q_segment_ids": ids[0]} if ids else {})
        return dilax.block_sparse_attention(q, k, v, pattern_of(name), **more, **options)

    assert moves(name, devices, is_causal=causal, layout=layout, packed=ids) == (name == "block")
    wanted = with_gradients(one)(*arrays)
    there = [to_layout(x, devices, layout) for x in arrays]
    found = with_gradients(placed(name, devices, layout=layout, **options))(*there)
    found = [from_layout(x, devices, layout) for x in found]
    assert max(error(a, b) for a, b in zip(found, wanted, strict=True)) <= 1e-12


def test_causality_goes_by_the_positions_of_a_token_order(x64):
    """As in the oracle; they travel with keys, and with the queries of block 0, which move."""
    q, k, v, *others, ids = arrays_of()
    order = np.random.default_rng(2).permutation(T).astype(np.int32)
    positions = np.stack([order, order[::-1]])  # of the two examples
    options = options_of(True, True)
    attend = with_gradients(placed("queries", 4, **options))
    dense = options | {"q_segment_ids": ids, "q_positions": positions}
    del dense["return_lse"]

    def exact(*arrays):
        return reference.block_sparse_attention(*arrays, pattern_of("queries"), **dense)

    def found(*arrays):
        return list(attend(*arrays, *others, ids, positions))

    assert_exact(found(q, k, v), list(with_gradients(exact)(q, k, v, *others)))
    assert moves("queries", 4, packed=True, ordered=True)
    late = (positions > T // 2)[..., None, None]
    out, changed = found(q, k, v)[0], found(q, k + late, v - late)[0]
    early = np.broadcast_to(~late, out.shape)
    assert (np.asarray(out)[early] == np.asarray(changed)[early]).all()
    assert (out != changed).any()


@pytest.mark.parametrize(
    ("name", "causal", "rows", "moves"),
    # Of 8 tokens a device the window reaches 9 back, two blocks of 4 and one of the device before.
    # Of 16 tokens the keys of block 0 travel from device 0 to each other one, and the two blocks
    # before a device's. Not causal, the queries of block 0 travel to each other device, and what
    # they saw comes back in float32.
    [
        ("window", True, [(1, 0, 8), (2, 4, 8)], 0),
        ("global", True, [(1, 0, 4), (1, 8, 16)] + [(i, 0, 4) for i in range(2, 8)], 0),
        (
            "global",
            False,
            [(1, 0, 4), (1, 8, 16)] + [(i, 0, 4) for i in range(2, 7)] + [(7, 0, 8)],
            7,
        ),
    ],
)
def test_only_wanted_blocks_travel(name, causal, rows, moves):
    T = 128 if name == "global" else 64
    x = jax.ShapeDtypeStruct((1, T // 8, 2, 8), jnp.float32)
    plan, _ = sharded_blocks.block_plan_of(pattern_of(name), x, x, devices=8, is_causal=causal)
    assert [(hop.shift, *(hop.rows[0] or ())) for hop in plan.hops[1:]] == rows
    keys = sum(high - low for _, low, high in rows) * 2 * 2 * 8 * 4
    assert plan.bytes == keys + moves * BLOCK * 2 * (8 + 8 + 1) * 4
    assert plan.messages == 2 * len(rows) + 3 * moves
    x = jnp.ones((1, T, 2, 8))
    text = jax.jit(placed(name, 8, is_causal=causal)).lower(x, x, x).compile().as_text() or ""
    assert "all-gather" not in text
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* collective-permute\(", text)
    assert sum(np.prod(list(map(int, s.split(",")))) for s in shapes) * 4 == plan.bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ring_size": 3}, "ring_size: wanted None or 4"),
        ({"devices": 32}, "64 tokens on 32 devices: wanted a multiple of 128.* to 128"),
        ({"axis_name": "rows"}, "axis_name: wanted axes"),
        ({"head_axis": "sequence", "name": "heads"}, "pattern: wanted one pattern for all heads"),
    ],
)
def test_refused(options, message):
    options = {"name": "window", "devices": 4, "T": T} | options
    x = jnp.ones((1, options.pop("T"), 2, 8))
    auto = jax.sharding.AxisType.Auto
    name, devices = options.pop("name"), options.pop("devices")
    mesh = jax.sharding.AbstractMesh((devices,), ("sequence",), axis_types=(auto,))
    call = functools.partial(
        dilax.sharded_block_sparse_attention,
        pattern=pattern_of(name),
        **{"axis_name": "sequence"} | options,
    )
    part = jax.P(None, "sequence")
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(part,) * 3, out_specs=part)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(mapped, x, x, x)
