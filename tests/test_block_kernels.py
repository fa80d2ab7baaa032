"""The kernels over block lists: numerics under the interpreter, lowering for CUDA, refusals."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import block_checks
from dilax import dropout
from dilax.block_lists import WHOLE, BlockLists
from pallas_kernels import blocks, config

pytestmark = pytest.mark.kernel
H100 = "NVIDIA H100 80GB HBM3"

SCRIPT = """
import runpy, sys, tempfile
from jax.experimental.pallas import mosaic_gpu as plgpu
plgpu.set_gpu_interpret_mode(plgpu.InterpretGPUParams(
    out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
))
for name in {names!r}:
    sys.argv = ["gpu_blocks.py", "--smoke", "--only", name, "--out", tempfile.mkdtemp()]
    runpy.run_path("benchmarks/gpu_blocks.py", run_name="__main__")
"""


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="the interpreter of older versions rejects them"
)
@pytest.mark.parametrize("names", [("split", "pairs"), ("positions", "window")], ids=", ".join)
def test_kernel_bodies(names):
    """The benchmark's smallest checks: all results against float64."""
    environment = os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(names=names)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment,
    )
    for name in names:
        assert f"agrees {name}" in done.stdout, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.count("wrong: none") == len(names)


@pytest.mark.gpu
@pytest.mark.parametrize("case", block_checks.checks(smoke=False), ids=lambda case: case.name)
def test_against_float64_on_a_gpu(case):
    if jax.default_backend() != "gpu" or not config.is_hopper(jax.local_devices()[0].device_kind):
        pytest.fail("no Hopper GPU")
    lowered, *rest = block_checks.prepare_check(case)
    errors = block_checks.run_check(lowered.compile(), *rest, repeats=5)
    assert errors.pop("lse") < 1e-5
    assert max(errors.values()) < 2e-2


def lists(rows, columns, block_size, n=1, bands=(WHOLE,)):
    """Every second block, the bands in turn."""
    kept = np.broadcast_to(np.arange(0, columns, 2, dtype=np.int32), (1, n, rows, -(-columns // 2)))
    counts = np.full(kept.shape[:3], kept.shape[-1], np.int32)
    index = None if len(bands) == 1 else (kept // 2 % len(bands)).astype(np.int32)
    return BlockLists(kept.copy(), counts, bands, index, block_size)


def lower(T, H, S=None, N=2, K=2, n=1, block_size=128, bands=(WHOLE,), traced=False, **options):
    """The lowered text of attend, with its gradients, for a GPU that is not there."""
    size = block_size
    static = lists(-(-T // size), -(-(S or T) // size), size, n, bands)
    q = jax.ShapeDtypeStruct((1, T, N, H), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, S or T, K, H), jnp.bfloat16)
    array = {name: x for name, x in options.items() if isinstance(x, jax.ShapeDtypeStruct | tuple)}
    fixed = {name: x for name, x in options.items() if name not in array}

    def run(q, k, v, array, given):
        def attend(q, k, v):
            return blocks.attend(q, k, v, blocks=given or static, **array, **fixed)

        result, pull = jax.vjp(attend, q, k, v)
        return result, pull(jax.tree.map(jnp.ones_like, result))

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), static)
    run = jax.jit(run).trace(q, k, k, array, shapes if traced else None)
    return run.lower(lowering_platforms=("cuda",)).as_text()


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


CALLS = {
    "bands gqa": {"T": 333, "H": 128, "N": 4, "K": 2, "n": 4, "bands": (WHOLE, (255, 0))},
    "block 64 ids": {"T": 200, "S": 300, "H": 64, "block_size": 64},
    "traced 256": {"T": 600, "H": 96, "block_size": 256, "traced": True, "is_causal": True},
    "starts": {"T": 256, "H": 192, "q_start": ints(), "k_start": ints(), "is_causal": True},
    "dropout": {"T": 256, "H": 64},
    "positions": {"T": 256, "H": 128, "N": 4, "is_causal": True, "q_positions": ints(1, 256)},
    "positions ids": {"T": 256, "H": 128, "is_causal": True, "q_positions": ints(1, 256)},
    "positions 64": {"T": 200, "S": 300, "H": 64, "block_size": 64, "q_positions": ints(1, 200)},
}
DROPS = {"dropout_rate": 0.1, "keep": dropout, "dropout_seed": jax.ShapeDtypeStruct((2,), "uint32")}
for name in ("dropout", "positions", "positions 64"):
    CALLS[name] |= DROPS
CALLS["positions ids"] |= {"q_segment_ids": ints(1, 256)}
CALLS["positions 64"] |= {"kv_positions": ints(1, 300)}
CALLS["block 64 ids"] |= {"q_segment_ids": ints(1, 200), "kv_segment_ids": ints(1, 300)}


@pytest.mark.parametrize("name", CALLS)
def test_lowers_for_cuda(name):
    text = lower(**CALLS[name])
    # With ids and positions the fused backward does not fit at H=128.
    one_pass = name in ("bands gqa", "dropout", "positions")
    assert "block_forward" in text
    assert ("block_gradients" in text) == one_pass
    assert ("block_queries_gradient" in text) == ("block_keys_gradient" in text) == (not one_pass)


def test_refusals_name_what_is_wrong():
    x = jax.ShapeDtypeStruct((1, 256, 2, 20), jnp.float32)
    found = blocks.unsupported(x, x, x, blocks=lists(3, 2, 128), device_kind="TPU v4")
    for part in ("TPU v4", "float32", "20", "(1, 1, 3)"):
        assert part in " | ".join(found)
    x = jax.ShapeDtypeStruct((1, 256, 2, 256), jnp.bfloat16)
    (reason,) = blocks.unsupported(x, x, x, blocks=lists(2, 2, 128), device_kind=H100)
    assert "256" in reason
    assert "shared memory" in reason
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    (reason,) = blocks.unsupported(x, x, x, blocks=lists(3, 3, 96), device_kind=H100)
    assert "block_size 96" in reason
    assert blocks.unsupported(x, x, x, blocks=lists(2, 2, 128), device_kind=H100) == ()
    x = jnp.ones((1, 256, 2, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"order.*'spiral'"):
        blocks.attend(x, x, x, blocks=lists(2, 2, 128), order="spiral")
