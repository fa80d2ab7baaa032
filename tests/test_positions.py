"""Rotary positions and xPos against their formulas in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dilax.positions import RotaryPosition, XPos
from tests.compare import EXACT, error


def _rotary_formula(q, k, i, j, paired):
    """sum over pairs of Re(q_pair conj(k_pair) e^{i (i - j) f}), per pair: [..., H / 2]."""
    H = q.shape[-1]
    if paired == "halves":
        q, k = (x[..., : H // 2] + 1j * x[..., H // 2 :] for x in (q, k))
    else:
        q, k = (x[..., ::2] + 1j * x[..., 1::2] for x in (q, k))
    frequencies = 10000.0 ** (-np.arange(0, H, 2) / H)
    return (q * np.conj(k) * np.exp(1j * (i - j)[..., None] * frequencies)).real


def _xpos_formula(q, k, i, j, scale_base):
    """Logits without the factor 1 / sqrt(H): no centre, only the distance."""
    H = q.shape[-1]
    s = (np.arange(0, H, 2) + 0.4 * H) / (1.4 * H)
    fade = s ** ((i - j)[..., None] / scale_base)
    return (_rotary_formula(q, k, i, j, "neighbours") * fade).sum(-1)


def _pairs(rng, length, count=64):
    """Positions i >= j of `count` causal pairs, near and far."""
    i = rng.integers(0, length, count)
    return i, np.maximum(i - rng.integers(0, 600, count), 0)


def _logits(q, k, i, j):
    """Products of rows i of q and j of k [1, T, 1, H], in float64."""
    q, k = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k))
    return (q[i] * k[j]).sum(-1)


@pytest.mark.parametrize("position", [RotaryPosition(), XPos(scale_base=64.0)])
def test_batched_positions_are_those_of_each_example(position, rng, x64):
    q, k = (jnp.asarray(rng.normal(size=(3, 12, 2, 8))) for _ in range(2))
    places = jnp.asarray(rng.integers(0, 12, (3, 12)), jnp.int32)
    together = position(q, k, places, places)
    for b in range(3):
        alone = position(q[b : b + 1], k[b : b + 1], places[b], places[b])
        for x, y in zip(together, alone, strict=True):
            assert error(x[b : b + 1], y) <= EXACT
    assert error(together[0][0], together[0][1]) > 1e-2


def test_rope_is_flax_rope_and_the_formula(rng, x64):
    q, k = (jnp.asarray(rng.normal(size=(1, 40, 1, 16))) for _ in range(2))
    turned_q, turned_k = RotaryPosition()(q, k)
    assert error(turned_q[:, :, 0], nnx.RoPE()(q[:, :, 0])) <= EXACT
    i, j = _pairs(rng, 40)
    rows = np.asarray(q)[0, i, 0], np.asarray(k)[0, j, 0]
    exact = _rotary_formula(*rows, i, j, "halves").sum(-1)
    assert error(_logits(turned_q, turned_k, i, j), exact) <= EXACT


@pytest.mark.parametrize("T", [40, 41, 9216])
def test_xpos_is_the_formula(T, rng, x64):
    q, k = (jnp.asarray(rng.normal(size=(1, T, 1, 16))) for _ in range(2))
    scaled_q, scaled_k = XPos()(q, k)
    i, j = _pairs(rng, T)
    exact = _xpos_formula(np.asarray(q)[0, i, 0], np.asarray(k)[0, j, 0], i, j, 512.0)
    assert error(_logits(scaled_q, scaled_k, i, j), exact) <= EXACT


@pytest.mark.parametrize(
    ("dtype", "T", "scale_base"),
    [
        ("float16", 6000, 512.0),
        ("float16", 9216, 1024.0),
        ("bfloat16", 65536, 512.0),
        ("float32", 65536, 512.0),
    ],
)
def test_xpos_of_long_sequences_errs_like_the_dtype(dtype, T, scale_base, rng):
    """No overflow: torchscale's factors reach 1.1e5 at T = 9216, infinite in float16.

    Only the pairs near the two ends and the middle are formed, from 192 positions.
    """
    places = np.unique(np.r_[:64, T // 2 : T // 2 + 64, T - 64 : T]).astype(np.int32)
    shape = (1, len(places), 1, 64)
    q, k = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
    position = XPos(scale_base, max_length=T)
    scaled = position(q, k, jnp.asarray(places), jnp.asarray(places))
    assert all(x.dtype == q.dtype and bool(jnp.isfinite(x).all()) for x in scaled)
    i, j = np.tril_indices(len(places))
    near = places[i] - places[j] < 64  # farther ones have faded to nothing
    i, j = i[near], j[near]
    rows = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k))
    q64, k64 = (x[index] for x, index in zip(rows, (i, j), strict=True))
    exact = _xpos_formula(q64, k64, places[i], places[j], scale_base)
    eps = float(jnp.finfo(dtype).eps)
    # float32 angles of positions beyond 2^16 are themselves off by 2^16 eps32.
    assert error(_logits(*scaled, i, j), exact) <= 4 * eps + T * 2.0**-23


@pytest.mark.parametrize(("dtype", "T", "ok"), [("float16", 9216, False), ("bfloat16", 9216, True)])
def test_xpos_refuses_lengths_that_do_not_fit_the_dtype(dtype, T, ok):
    x = jnp.ones((1, T, 1, 8), dtype)
    if ok:
        assert bool(jnp.isfinite(XPos()(x, x)[1]).all())
    else:
        with pytest.raises(ValueError, match=r"at most \d+ positions in float16 .* got 9216"):
            XPos()(x, x)


def test_calls_that_share_max_length_share_the_centre(rng, x64):
    """A sequence rotated in two halves gives the products of the whole."""
    q, k = (jnp.asarray(rng.normal(size=(1, 64, 2, 8))) for _ in range(2))
    whole_q, whole_k = XPos()(q, k)
    shared = XPos(max_length=64)
    later = jnp.arange(32, 64, dtype=jnp.int32)
    half_q, _ = shared(q[:, 32:], k[:, 32:], later, later)
    _, half_k = shared(q[:, :32], k[:, :32])
    together = jnp.einsum("btnh,bsnh->bnts", half_q, half_k)
    assert error(together, jnp.einsum("btnh,bsnh->bnts", whole_q[:, 32:], whole_k[:, :32])) <= EXACT


X = jnp.ones((2, 4, 1, 8))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RotaryPosition(0.0), "theta"),
        (lambda: RotaryPosition(theta="10"), "theta"),
        (lambda: XPos(-1.0), "scale_base"),
        (lambda: XPos(max_length=0), "max_length"),
        (lambda: RotaryPosition()(X[0], X), "query"),
        (lambda: RotaryPosition()(X, X[..., :7]), "key"),
        (lambda: RotaryPosition()(X, X, jnp.zeros((3, 4), jnp.int32)), "q_positions"),
        (lambda: XPos()(X, X, None, jnp.zeros(5, jnp.int32)), "k_positions"),
        (lambda: XPos()(X, X, jnp.zeros(4)), "q_positions"),
    ],
)
def test_wrong_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
