"""The tile loops at the edges of floating point, also as LLVM optimises them for a user."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dilax
from dilax import reference
from dilax.tile import exp2
from tests.compare import assert_within


def test_exp2_is_exact_to_rounding():
    x = np.linspace(-126, 0, 100_001).astype(np.float32)
    found = np.asarray(jax.jit(lambda x: exp2(x, "cpu"))(x), np.float64)
    assert (np.abs(found / np.exp2(x.astype(np.float64)) - 1) < 2**-22).all()


def test_exp2_at_the_edges():
    payload = np.array([0x7FC00001, 0xFFC00003, 0x7F800001], np.uint32).view(np.float32)
    x = np.concatenate([np.float32([0, -127, -1e30, -np.inf, 300, 1e30, np.inf]), payload])
    found = np.asarray(jax.jit(lambda x: exp2(x, "cpu"))(x))
    assert found[:7].tolist() == [1, 0, 0, 0, 1, 1, 1]
    assert np.isnan(found[7:]).all()


def compiled(attend):
    """out and gradients of q, k and v as a function of them and a cotangent."""

    @jax.jit
    def run(q, k, v, cotangent):
        out, pull = jax.vjp(attend, q, k, v)
        return {"out": out, **dict(zip("qkv", pull(cotangent), strict=True))}

    return run


@pytest.mark.parametrize("scale", [1e3, 1e-3, 0.0, -0.3])
def test_any_scale_errs_as_xla_does(scale, rng):
    arrays64 = rng.normal(size=(4, 1, 24, 2, 8))

    def ours(q, k, v):
        return dilax.dilated_attention(q, k, v, [24], [1], scale=scale)

    def exactly(q, k, v):
        return reference.dilated_attention(q, k, v, [24], [1], scale=scale)[0]

    def plain(q, k, v):
        logits = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(logits * scale).astype(q.dtype)
        out = jnp.einsum("BNTS,BSNH->BTNH", p, v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype)

    ours, plain, exactly = (compiled(f) for f in (ours, plain, exactly))
    # The backward pass knows probabilities only as well as a float32 lse of large logits does.
    names = ("out",) if scale == 1e3 else ("out", "q", "k", "v")
    for dtype in ("bfloat16", "float16", "float32"):
        arrays = jnp.asarray(arrays64, dtype)
        found, baseline = ours(*arrays), plain(*arrays)
        with jax.enable_x64(True):
            exact = exactly(*(x.astype(np.float64) for x in arrays))
        assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found.values())
        assert_within(*({name: x[name] for name in names} for x in (found, baseline, exact)))


@pytest.mark.parametrize("size", [1e4, 1e9])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_probabilities_of_large_logits_stay_below_one(dtype, size, rng):
    """The lse has no bits left for them, but no gradient of the values exceeds the cotangents."""
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(1, 24, 2, 8)), dtype) for _ in range(4))
    q = q * jnp.asarray(size, dtype)
    attend = compiled(lambda *x: dilax.dilated_attention(*x, [24], [1], is_causal=True))
    found = attend(q, k, v, d_out)
    bound = np.abs(np.asarray(d_out, np.float32)).sum(1) * 1.01
    assert (np.abs(np.asarray(found["out"], np.float32)) <= np.abs(v).max() * 1.01).all()
    assert (np.abs(np.asarray(found["v"], np.float32)).max(1) <= bound).all()
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in found.values())


TWICE = {"segment_lengths": [24, 24], "dilation_rates": [1, 1]}


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0xFFC00003])
def test_nan_is_not_an_unseen_row(bits, rng):
    q, k, v = rng.normal(size=(3, 1, 24, 2, 8)).astype(np.float32)
    attend = jax.jit(lambda **x: dilax.dilated_attention(**x, **TWICE, return_lse=True))
    nan = np.array([bits], np.uint32).view(np.float32)[0]
    for place, rows in (("query", [5]), ("key", range(24))):
        arrays = {"query": q.copy(), "key": k.copy(), "value": v}
        arrays[place][0, 5, 1, 3] = nan
        out, lse = attend(**arrays)
        wrong = np.zeros((1, 24, 2), bool)
        wrong[0, list(rows), 1] = True
        assert (np.isnan(np.asarray(out)).all(-1) == wrong).all()
        assert (np.isnan(np.asarray(lse)) == wrong).all()


def test_a_rate_beyond_the_segment_costs_nothing(rng):
    x = jnp.asarray(rng.normal(size=(1, 20, 3, 8)), jnp.float32)

    def attend(rate, length=16):
        return jax.jit(lambda x: dilax.dilated_attention(x, x, x, [length], [rate]))

    sizes = [
        attend(rate).lower(x).compile().memory_analysis().temp_size_in_bytes
        for rate in (20, 10**6, 2**70)
    ]
    assert len(set(sizes)) == 1
    for length in (16, 2**70):
        near, far = attend(20, length)(x), attend(2**70, length)(x)
        assert (np.asarray(near) == np.asarray(far)).all()


def test_as_optimised_for_a_user():
    """Some tests of numbers in low precision, with LLVM's optimiser on (conftest turns it off)."""
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "optimization_level" not in f]
    environ = os.environ | {"XLA_FLAGS": " ".join([*flags, "--xla_backend_optimization_level=3"])}
    chosen = "exp2 or nan_is or stay_below or (lower_precision and plain)"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen),
            *("tests/test_dilated.py", "tests/test_tile_loop.py"),
        ],
        env=environ,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
