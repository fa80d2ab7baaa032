"""Numerics of the real kernel bodies on the CPU, under Pallas's GPU interpreter.

They run in processes of their own: the interpreter needs NPROC in the environment before jax starts
(with fewer threads than warpgroups it waits for ever), and a failure in one simulated warpgroup
leaves the others waiting, so every process has a timeout.
"""

import os
import subprocess
import sys

import jax
import pytest

from tests.test_pallas_cases import KernelCase

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        jax.__version_info__ < (0, 12), reason="the interpreter of older versions rejects them"
    ),
]

CASES = [
    # A tile of keys goes past their end, none of queries does; the second warpgroup's keys see
    # nothing of the first of these.
    KernelCase(
        "logits below",
        (1 << 20,),
        (1,),
        T=128,
        S=100,
        H=128,
        N=1,
        dtype="float16",
        apart=2.0,
        causal=True,
    ),
    # Logits so large that maxima rise between tiles of keys.
    KernelCase("causal gqa", (128, 256), (1, 2), T=136, H=16, N=2, K=1, causal=True, scale=2.0),
    # A segment ends inside a warpgroup's rows, whose last ones lie in a gap.
    KernelCase("gaps causal", (601,), (3,), T=610, H=16, N=1, causal=True, deterministic=True),
    # Three warpgroups with tiles of 64 keys.
    KernelCase(
        "long causal",
        (1 << 20,),
        (1,),
        T=260,
        H=16,
        N=1,
        causal=True,
        scale=2.0,
        tiles_of=4096,
        deterministic=True,
    ),
    # One pass, of both branches at once.
    KernelCase("ids 128", (48, 1 << 20), (1, 2), T=72, S=136, H=128, N=2, K=1, ids=True, rate=0.2),
    KernelCase(
        "positions",
        (1 << 20,),
        (2,),
        T=40,
        S=72,
        H=16,
        ids=True,
        positions=True,
        causal=True,
        rate=0.2,
    ),
    KernelCase(
        "ids", (1 << 20,), (1,), T=72, H=232, N=1, ids=True, positions=True, causal=True, rate=0.2
    ),
    KernelCase(
        "carry traced",
        (64,),
        (1,),
        T=72,
        S=130,
        H=24,
        starts=(90, 37),
        carry=True,
        traced=True,
        N=1,
        causal=True,
        deterministic=True,
    ),
    KernelCase(
        # The segment of the first tile of keys ends inside a tile of queries.
        "dropout",
        (256,),
        (1,),
        T=128,
        S=256,
        H=16,
        N=1,
        rate=0.3,
        starts=(192, 128),
        traced=True,
    ),
]

SCRIPT = """
from jax.experimental.pallas import mosaic_gpu as plgpu
plgpu.set_gpu_interpret_mode(plgpu.InterpretGPUParams(
    out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
))
from tests.test_pallas_cases import KernelCase, check
for case in {cases!r}:
    print("case", case.name, flush=True)
    check(case)
print("checked")
"""
# Cases of one process share its start and what jax compiles for all of them.
TOGETHER = (CASES[:4], CASES[4:])
# The launches of a series run one program, told apart by words, as on a GPU; but each has the views
# of its rate, and what was empty is poisoned.
SERIES = """
import jax, jax.numpy as jnp
from pallas_kernels import config, schedule
config.first_apart = lambda head_dim: False
in_series, strides = schedule.in_series, set()
def together(launches, items, interpret):
    found = in_series(launches, items, False)
    strides.update(launch.series for launch in found)
    return found
schedule.in_series = together
schedule.Launch.home_view = property(lambda plan: plan.stride)
schedule.Launch.away_views = property(lambda plan: (plan.stride,) if plan.series else plan.views)
jax.lax.empty = lambda shape, dtype: jnp.full(shape, jnp.nan, dtype)
"""


@pytest.mark.parametrize(
    "cases", TOGETHER, ids=lambda cases: ", ".join(case.name for case in cases)
)
def test_kernel_bodies(cases):
    run(SCRIPT.format(cases=cases))


def test_kernels_of_a_series():
    case = KernelCase(
        "series",
        (128, 256),
        (1, 2),
        T=190,
        S=150,
        starts=(37, 21),
        H=16,
        K=1,
        causal=True,
        ids=True,
        rate=0.2,
        apart=3.0,
    )
    script = f"{SERIES}{SCRIPT.format(cases=[case])}"
    run(script.replace('print("checked")', 'assert (1, 2) in strides\nprint("checked")'))


def run(script):
    """Runs a script that ends with "checked"."""
    environment = os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu", "PYTHONPATH": "."}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment,
    )
    assert done.stdout.strip().endswith("checked"), (done.stdout + done.stderr)[-3000:]
