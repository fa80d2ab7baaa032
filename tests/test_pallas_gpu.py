"""The kernels on a Hopper GPU: run by `-m gpu` only, and then a machine without one is a failure.

Compiling takes nearly all the time: `pytest -m gpu -n 8 -v` takes a quarter of that of one process,
and says which cases passed as they do.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilax import xla_attention
from pallas_kernels import config, flash
from tests.compare import FACTOR, error
from tests.test_pallas_cases import KernelCase, check, run_kernel

pytestmark = [pytest.mark.gpu, pytest.mark.kernel]

TWICE = (
    "three",
    "three causal 128",
    "gqa",
    "ragged causal",
    "starts traced",
    "ids",
    "positions",
    "dropout",
    "boxes 48",
    "boxes 40 series",
    "boxes 24 mqa",
    "boxes 56 carry",
)
LONG = {"w": (128, 256, 512), "r": (1, 2, 4), "T": 1024, "N": 4}
TWO = {"w": (64, 256), "r": (2, 4), "N": 4}
THREE = {"w": (96, 200, 400), "r": (1, 2, 4), "N": 4}
CASES = [
    KernelCase("dense", (1 << 20,), (1,), T=512),
    KernelCase("dense causal 128", (1 << 20,), (1,), T=640, H=128, causal=True),
    KernelCase("three warpgroups", (1 << 20,), (1,), T=4500, N=1),
    KernelCase("three warpgroups causal", (4096,), (1,), T=4500, N=1, H=48, causal=True, ids=True),
    # Maxima are looked for only where they rise.
    KernelCase("rising 128", (256, 1 << 20), (1, 2), T=1500, H=128, scale=1.0),
    KernelCase("rising", (1 << 20,), (1,), T=1500, causal=True, scale=1.0),
    KernelCase("rising in three", (1 << 20,), (1,), T=4500, N=1, causal=True, scale=1.0),
    KernelCase(
        "rising fp16", (1 << 20,), (2,), T=3000, H=48, dtype="float16", causal=True, scale=1.0
    ),
    KernelCase("segments", (256,), (1,), T=1024, H=128),
    KernelCase("dilated", (1024,), (4,), T=1024, H=64, N=4),
    KernelCase("three", **LONG),
    KernelCase("three causal", **LONG, causal=True),
    KernelCase("three 128", **LONG, H=128, B=2),
    KernelCase("three causal 128", **LONG, H=128, causal=True),
    KernelCase("fp16", **LONG, H=48, dtype="float16"),
    # Probabilities that float16 has no normal numbers for.
    KernelCase("many keys fp16 128", (1 << 20,), (1,), T=300, S=40000, N=1, H=128, dtype="float16"),
    KernelCase("long lists", (256, 512, 1024), (1, 2, 4), T=8192, N=8),
    KernelCase("gqa", **LONG, K=2),
    KernelCase("mqa causal", **LONG, K=1, causal=True),
    KernelCase("ragged", (128, 256), (1, 2), T=331, H=64),
    KernelCase("ragged causal", (96, 200, 400), (1, 2, 4), T=777, H=64, N=4, causal=True),
    KernelCase("one more than a segment", (256,), (2,), T=257, H=32, causal=True),
    KernelCase("tiny segments", (8, 16), (1, 2), T=200, H=32),
    KernelCase("w beyond T", (1001,), (2,), T=300, H=64),
    KernelCase("no rate 1", (128,), (2,), T=256, H=64),
    KernelCase("rate above heads", (512,), (8,), T=512, H=64),
    KernelCase("odd rates", (120, 360), (1, 3), T=720, H=64, N=3, causal=True),
    KernelCase("gaps causal", (601,), (3,), T=1300, causal=True),
    KernelCase("rates that divide nothing", (100, 250), (3, 4), T=700, N=4, causal=True),
    # Without dropout: rows of one key then have an out that 16 bits cannot hold, so that delta, and
    # their gradient, which is 0, are off by its rounding.
    KernelCase("a rate above its segment", (3, 500), (5, 7), T=300, H=32, N=5),
    KernelCase("blocked", **LONG, head_offset="blocked"),
    KernelCase("heads", **LONG, combine="heads"),
    KernelCase("heads causal", **LONG, combine="heads", causal=True),
    KernelCase("cross", (256, 512), (1, 2), T=300, S=700),
    KernelCase("starts", (256, 512), (1, 2), T=300, S=500, starts=(333, 101), causal=True),
    KernelCase("starts traced", (256, 512), (1, 2), T=300, S=500, starts=(333, 101), traced=True),
    KernelCase("queries before keys", (256,), (1,), T=100, S=100, starts=(0, 1000), causal=True),
    KernelCase("ids", **LONG, ids=True),
    KernelCase("ids causal 128", **LONG, H=128, ids=True, causal=True),
    KernelCase("ids ragged causal", (96, 200), (1, 2), T=333, ids=True, causal=True, B=2),
    KernelCase("dropout", **LONG, rate=0.2),
    KernelCase("dropout causal 128", **LONG, rate=0.3, H=128, causal=True, K=2),
    KernelCase("positions", **LONG, positions=True, causal=True, rate=0.2),
    KernelCase("positions 128", **LONG, H=128, positions=True, causal=True),
    KernelCase(
        "positions and ids 128",
        (96, 200),
        (1, 2),
        T=333,
        H=128,
        B=2,
        ids=True,
        positions=True,
        causal=True,
        rate=0.3,
        K=1,
    ),
    KernelCase("carry", (128, 256), (1, 2), T=300, carry=True, causal=True),
    KernelCase("carry 128", (128, 256), (1, 2), T=512, H=128, carry=True),
    KernelCase("carry and ids 256", (128, 256), (1, 2), T=300, H=256, carry=True, ids=True),
    KernelCase("logits below", (200, 500), (1, 2), T=300, apart=2.0, dtype="float16"),
    KernelCase("logits below 128", (1 << 20,), (1,), T=256, S=300, H=128, apart=4.0),
    KernelCase("scale", (128,), (1,), T=256, scale=0.5),
    # Tiles go past the last row and column of arrays: a residue has no multiple of 8 rows, a head
    # no power of 2. Of two examples, one must not write to the other.
    KernelCase("boxes 48", (128, 512), (1, 2), T=330, H=48, B=2, dtype="float16"),
    KernelCase("boxes 48 dropout", (128, 512), (1, 2), T=331, H=48, B=2, causal=True, rate=0.2),
    KernelCase("boxes 48 cross", **TWO, T=334, S=518, H=48, B=2, K=2, dtype="float16"),
    KernelCase("boxes 40 series", **THREE, T=780, S=516, H=40, B=2, K=2, causal=True),
    KernelCase("boxes 24 mqa", **TWO, T=1003, S=777, H=24, B=2, K=1, dtype="float16"),
    KernelCase("boxes 24 ids", **THREE, T=333, H=24, B=2, ids=True, causal=True),
    KernelCase("boxes 56 carry", (128, 256), (1, 2), T=330, H=56, B=2, carry=True, causal=True),
    KernelCase("boxes 24 carry", **THREE, T=301, H=24, B=2, carry=True, dtype="float16"),
    KernelCase("boxes 64", **THREE, T=780, S=516, B=2),
    KernelCase("boxes 16 one row", (1 << 20,), (8,), T=9, S=17, H=16, N=8, B=2, causal=True),
    KernelCase(
        "boxes of five branches",
        (1024, 5792, 32768, 185363, 1 << 20),
        (1, 2, 4, 8, 16),
        T=2000,
        N=16,
        H=48,
        dtype="float16",
    ),
    *(KernelCase(f"head {h}", (128, 256), (1, 2), T=300, H=h) for h in (16, 24, 40, 72, 80, 96)),
    *(
        KernelCase(f"head {h} causal", (128, 256), (1, 2), T=300, H=h, causal=True)
        for h in (96, 112, 160, 192, 232, 256)
    ),
]


CASES += [
    dataclasses.replace(case, name=f"{case.name}, deterministic", deterministic=True)
    for case in CASES
    if case.name in TWICE
]


@pytest.fixture(autouse=True)
def _hopper():
    if jax.default_backend() != "gpu" or not config.is_hopper(jax.local_devices()[0].device_kind):
        pytest.fail("no Hopper GPU")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_float64(case):
    check(case)


@pytest.mark.parametrize("name", ["three causal 128", "three", "dropout"])
def test_repeats_bit_for_bit(name):
    """`run_kernel` refuses bits that differ from those of the first run."""
    wanted = f"{name}, deterministic"
    results = run_kernel(next(c for c in CASES if c.name == wanted), repeats=100)
    assert all(np.isfinite(results[x]).all() for x in ("dq", "dk", "dv"))


def test_every_example_of_a_batch():
    check(KernelCase("batch", (128, 256), (1, 2), T=300, B=3, causal=True))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [24, 48, 64, 128])
def test_gradients_of_one_part_in_float32(head_dim, deterministic):
    """`attend_backward`, given the totals; its float32 results leave in pieces."""
    case = KernelCase("part", **THREE, T=334, S=519, H=head_dim, B=2, K=2, causal=True)
    (q, k, v, _), (do, dlse) = case.arrays()
    options = {"branches": case.branches, "is_causal": True}

    def gradients(of, dtype, **extra):
        stats = jnp.float64 if dtype == jnp.float64 else jnp.float32
        arrays = [jnp.asarray(x, dtype) for x in (q, k, v, do)]
        found = of(*arrays, *(jnp.asarray(x, stats) for x in (lse, delta)), **options, **extra)
        return [np.asarray(x, np.float64) for x in found]

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = (jnp.asarray(x, jnp.float64) for x in (q, k, v))
        out, lse = (np.asarray(x) for x in xla_attention.attend(*exact, **options))
        delta = (do * out).sum(-1) - np.where(np.isfinite(lse), dlse, 0.0)
        wanted = gradients(xla_attention.attend_backward, jnp.float64)
        # The kernels round probabilities, as a result of 16 bits would be.
        rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in wanted]
    found = gradients(flash.attend_backward, jnp.bfloat16, deterministic=deterministic)
    for name, x, y, z in zip(("dq", "dk", "dv"), found, rounded, wanted, strict=True):
        assert error(x, z) <= FACTOR * error(y, z), name
