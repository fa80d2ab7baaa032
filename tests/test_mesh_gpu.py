"""Attention on a mesh of all Hopper GPUs through the kernels: run by `-m gpu` only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dilax
from dilax.block_lists import from_mask
from tests.compare import FACTOR, error

pytestmark = [pytest.mark.gpu, pytest.mark.kernel]

BLOCK, BLOCKS = 128, 16


def lists():
    """Block 0 sees all and all see it, the rest an exact window of 100 tokens."""
    distance = abs(np.arange(BLOCKS)[:, None] - np.arange(BLOCKS))
    mask, band = distance <= 1, (distance <= 1).astype(int)
    mask[0], mask[:, 0], band[0], band[:, 0] = True, True, 0, 0
    return from_mask(mask, BLOCK, ((None, None), (100, 100)), band)


def with_gradients(attend, *arrays):
    """out, dq, dk, dv as float64."""

    def run(q, k, v, do, *places):
        out, vjp = jax.vjp(lambda *x: attend(*x, *places), q, k, v)
        return out, *vjp(do.astype(out.dtype))

    return [np.asarray(x, np.float64) for x in jax.jit(run)(*arrays)]


def with_positions(attend, **options):
    """attend of arrays alone: q, k, v and the positions of a token order, if any."""

    def run(q, k, v, *places):
        given = {"q_positions": places[0]} if places else {}
        return attend(q, k, v, **given, **options)

    return run


WAYS = {
    "lists": (dilax.sharded_block_sparse_attention, dilax.block_sparse_attention),
    "lists, in an order": (dilax.sharded_block_sparse_attention, dilax.block_sparse_attention),
    "branches": (dilax.sharded_dilated_attention, dilax.dilated_attention),
    "branches, in an order": (dilax.sharded_dilated_attention, dilax.dilated_attention),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("causal", "layout"), [(False, "contiguous"), (True, "zigzag")])
def test_kernels_on_a_mesh(way, causal, layout):
    there, alone = WAYS[way]
    options = {"pattern": lists()}
    if way.startswith("branches"):
        options = {"segment_lengths": (256, 2048), "dilation_rates": (1, 2)}
    options["is_causal"] = causal
    rng, devices, T = np.random.default_rng(0), jax.device_count(), BLOCK * BLOCKS
    q, do = rng.normal(size=(2, 1, T, 4, 64))
    k, v = rng.normal(size=(2, 1, T, 2, 64))
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, do)]
    places = []
    if way.endswith("in an order"):
        places.append(rng.permutation(T).astype(np.int32)[None])
    one = with_positions(alone, implementation="xla", **options)
    rounded = with_gradients(one, *arrays, *places)
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = with_gradients(one, *(np.asarray(x, np.float64) for x in arrays), *places)
    mesh = jax.make_mesh((devices,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    part = jax.P(None, "sequence")
    attend = with_positions(
        there, axis_name="sequence", layout=layout, implementation="pallas", **options
    )
    specs = (part,) * (3 + len(places))
    attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=part, check_vma=False)
    placed = [dilax.to_layout(x, devices, layout) for x in (*arrays, *places)]
    found = [dilax.from_layout(x, devices, layout) for x in with_gradients(attend, *placed)]
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), found, rounded, exact, strict=True):
        assert error(x, z) <= FACTOR * error(y, z), name
