"""The primitive's own loops: many tiles of queries, keys and groups; linear memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dilax
from dilax import reference, tile_loop, xla_attention
from dilax.partial import Partial, empty, merge
from dilax.spec import Branch
from tests.cases import BY_NAME, Case
from tests.compare import assert_exact
from tests.test_dilated import values_and_gradients, with_lse

CAUSAL = (("is_causal", True),)
TILED_CAUSAL = Case("tiled_causal", (40,), (1,), T=40, options=CAUSAL)
TILED = (
    (Case("tiled", (40,), (1,), T=40), (7, 9, 100)),
    (TILED_CAUSAL, (16, 3, 100)),
    (TILED_CAUSAL, (3, 16, 100)),
    (Case("tiled_dilated", (19, 38), (2, 3), T=41, N=6, K=2, options=CAUSAL), (4, 5, 50)),
    (Case("tiled_even", (16,), (1,), T=32, options=CAUSAL), (4, 4, 64)),
    (TILED_CAUSAL, (7, 64, 100)),
    (TILED_CAUSAL, (64, 7, 1000)),
    (Case("tiled_cross", (64,), (2,), T=20, S=44, options=CAUSAL), (4, 5, 40)),
    (
        Case(
            "tiled_starts_later", (64,), (1,), T=20, S=33,
            options=(*CAUSAL, ("q_start", 3), ("k_start", 12)),
        ),
        (4, 5, 40),
    ),
    (
        Case("tiled_decode", (64,), (1,), T=3, S=50, options=(*CAUSAL, ("q_start", 47))),
        (2, 8, 40),
    ),
    *((BY_NAME[name], (3, 4, 30)) for name in ("cross_ids", "all_masks")),
)  # fmt: skip


@pytest.mark.parametrize(("case", "sizes"), TILED, ids=lambda x: getattr(x, "name", ""))
def test_many_tiles_equal_the_oracle(case, sizes, monkeypatch, x64):
    query_tile, key_tile, budget = sizes
    monkeypatch.setattr(tile_loop, "_QUERY_TILE", query_tile)
    monkeypatch.setattr(tile_loop, "_KEY_TILE", key_tile)
    monkeypatch.setattr(tile_loop, "_TILE", {jax.default_backend(): budget})
    used, tiles_of = [], tile_loop._tiles

    def spy(*arguments):
        used.append(tiles_of(*arguments))
        return used[-1]

    monkeypatch.setattr(tile_loop, "_tiles", spy)
    found = values_and_gradients(with_lse, case)
    assert max(t.q_count * t.k_count for t in used) > 2
    assert max(t.group_count for t in used) > 1
    assert_exact(found, exactly(case))


@functools.cache
def exactly(case):
    """The oracle's answer in float64: the same for every size of the tiles."""
    return values_and_gradients(reference.dilated_attention, case)


def test_continues_from_a_carry(x64, rng):
    """attend(carry=p) is merge(p, attend()), gradients of the carry included."""
    case = BY_NAME["prime"]
    arrays, (d_out, d_lse) = case.arrays(), case.cotangents()
    options = {
        "branches": tuple(
            Branch(w, r, 0, tuple(n % r for n in range(case.N)))
            for w, r in zip(case.segment_lengths, case.dilation_rates, strict=True)
        ),
        "is_causal": True,
    }
    lse = rng.normal(size=d_lse.shape)
    lse[:, ::3] = -np.inf
    carry = Partial(np.where(np.isinf(lse)[..., None], 0, rng.normal(size=d_out.shape)), lse)

    def direct(arrays, carry):
        return xla_attention.attend(**arrays, **options, carry=carry)

    def merged(arrays, carry):
        return merge(carry, xla_attention.attend(**arrays, **options))

    def with_gradients(run):
        value, pull = jax.vjp(run, arrays, carry)
        return tuple(value), pull(Partial(jnp.asarray(d_out), jnp.asarray(d_lse)))

    assert_exact(*(jax.jit(with_gradients, static_argnums=0)(run) for run in (direct, merged)))


def test_an_empty_carry_is_none(x64):
    case = BY_NAME["plain"]
    arrays = case.arrays()
    options = {"branches": (Branch(6, 2, 0, (0, 1, 0, 1)),)}
    nothing = empty(arrays["query"].shape, jnp.float64)
    attend = jax.jit(lambda carry: xla_attention.attend(**arrays, **options, carry=carry))
    assert_exact(tuple(attend(nothing)), tuple(attend(None)))


def temporary_bytes(T, segment_lengths, dilation_rates, **options):
    """Peak of the temporaries of the compiled passes, forward and back; nothing is run."""
    kv = jax.ShapeDtypeStruct((1, T, 1, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)

    def run(query, key, value, ids):
        masks = {"q_segment_ids": ids} if options.get("masked") else {}
        dropout = {}
        if options.get("dropout"):
            dropout = {"dropout_rate": 0.1, "deterministic": False}
            dropout["dropout_key"] = jax.random.key(0)
        return dilax.dilated_attention(
            query, key, value, segment_lengths, dilation_rates, is_causal=True, **masks, **dropout
        )

    def loss(*arguments):
        return run(*arguments).sum()

    function = jax.grad(loss, (0, 1, 2))
    query = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
    compiled = jax.jit(function).lower(query, kv, kv, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


MASKS = {"masked": True, "dropout": True}


@pytest.mark.parametrize("extras", [{}, MASKS], ids=["plain", "masks"])
def test_memory_is_linear(extras):
    """Four times the tokens, and four times the longest segment, under 4.5 times the memory."""
    T = 16384
    small = temporary_bytes(T, [1024, T], [1, 2], **extras)
    large = temporary_bytes(4 * T, [1024, 4 * T], [1, 2], **extras)
    assert 0 < large < 4.5 * small
    assert large < 4 * T * 4 * T  # one bool per pair of tokens would be more
