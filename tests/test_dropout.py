"""Dropout: how much, where, the same everywhere, and only when asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dilax
from dilax import dropout, reference
from tests.compare import assert_exact

T, N, K, RATE = 32, 4, 2, 0.3
KEY = jax.random.key(11)


def counts(attend, key=KEY, **options):
    """[B, T, N, S]: how many branches keep each pair, read off equal logits and one-hot values."""
    query = jnp.zeros((2, T, N, T))
    value = jnp.broadcast_to(jnp.eye(T)[None, :, None], (2, T, K, T))
    options = {
        "segment_lengths": [16, 32],
        "dilation_rates": [1, 2],
        "dropout_rate": RATE,
        "dropout_key": key,
        "deterministic": False,
        "average_branches": False,
    } | options
    out, lse = jax.jit(functools.partial(attend, **options))(query, jnp.zeros((2, T, K, T)), value)
    found = np.asarray(out) * np.exp(lse)[..., None] * (1 - options["dropout_rate"])
    found = np.where(np.isfinite(found), found, 0)
    assert np.abs(found - np.round(found)).max() < 1e-3
    return np.round(found).astype(int)


def library(*arrays, **options):
    return dilax.dilated_attention(*arrays, **options, return_lse=True)


OPTIONS = (
    {},
    {"is_causal": True},
    {"combine": "heads"},
    {"head_offset": "blocked", "dilation_rates": [3, 4]},
    {"q_start": 40, "k_start": 37, "is_causal": True},
    {"pad_mode": "zeros", "segment_lengths": [7, 20]},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_drops_the_pairs_that_the_oracle_drops(options, monkeypatch):
    wanted = counts(reference.dilated_attention, **options)
    assert wanted.any()
    monkeypatch.setattr(dilax.tile_loop, "_QUERY_TILE", 5)
    monkeypatch.setattr(dilax.tile_loop, "_KEY_TILE", 3)
    assert (counts(library, **options) == wanted).all()


def test_share_and_mean(rng):
    """The oracle drops the same pairs, so it holds for that too."""
    without = counts(library, dropout_rate=0.0, deterministic=True, is_causal=True)
    for rate in (0.05, 0.9):
        kept = counts(library, dropout_rate=rate, is_causal=True)
        share, pairs = kept.sum() / without.sum(), without.sum()
        assert abs(share - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / pairs)
    x = jnp.asarray(rng.normal(size=(1, 16, 2, 8)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2000)

    def run(key):
        return dilax.dilated_attention(
            x, x, x, [8, 16], [1, 2], dropout_rate=0.3, dropout_key=key, deterministic=False
        )

    outs = np.asarray(jax.jit(jax.vmap(run))(keys), np.float64)
    branches = {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}
    exact = jax.jit(functools.partial(dilax.dilated_attention, **branches))(x, x, x)
    deviation = np.abs(outs.mean(0) - exact) / (outs.std(0) / np.sqrt(len(keys)) + 1e-6)
    assert deviation.max() < 5


def test_lse_knows_nothing_of_dropout(rng):
    x = jnp.asarray(rng.normal(size=(1, 16, 2, 8)), jnp.float32)
    options = {"dropout_rate": 0.7, "dropout_key": KEY}
    _, plain = library(x, x, x, segment_lengths=[8], dilation_rates=[1])
    _, lse = library(
        x, x, x, segment_lengths=[8], dilation_rates=[1], deterministic=False, **options
    )
    assert (plain == lse).all()


def agreement(a, b):
    """Share of pairs on which two boolean masks agree."""
    return float((np.asarray(a) == np.asarray(b)).mean())


def test_masks_of_keys_examples_heads_positions_and_branches_are_unrelated():
    position = np.arange(128)

    def mask(key=KEY, batch=0, head=0, branch=0, q=position, k=position):
        seed = dropout.seed_bits(key)
        rows = dropout.row_bits(seed, batch, head, q)
        return dropout.keep(rows, dropout.column_bits(seed, k, branch), 0.5)

    base = mask()
    others = {
        "key": mask(jax.random.key(12)),
        "split": mask(jax.random.split(KEY)[0]),
        "fold": mask(jax.random.fold_in(KEY, 1)),
        "batch": mask(batch=1),
        "head": mask(head=1),
        "branch": mask(branch=1),
        "queries": mask(q=position + 1),
        "keys": mask(k=position + 1),
        "transposed": mask().T,
        "batch and head": mask(batch=1, head=1),
        "far": mask(q=position + 2**31),
    }
    for name, other in others.items():
        assert 0.46 < agreement(base, other) < 0.54, name
    assert agreement(base[:-1], base[1:]) == pytest.approx(0.5, abs=0.04)
    assert agreement(base[:, :-1], base[:, 1:]) == pytest.approx(0.5, abs=0.04)
    assert (mask() == base).all()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_every_kind_of_key(impl):
    key = jax.random.key(5, impl=impl)
    raw = jax.random.key_data(key)
    assert (dropout.seed_bits(key) == dropout.seed_bits(raw)).all()
    for i in range(raw.size):
        changed = raw.at[i].add(1)
        assert (dropout.seed_bits(changed) != dropout.seed_bits(raw)).any()


def test_deterministic_ignores_the_rate(rng):
    x = jnp.asarray(rng.normal(size=(1, 16, 2, 8)), jnp.float32)
    plain = dilax.dilated_attention(x, x, x, [8, 16], [1, 2])
    for options in ({}, {"dropout_key": KEY}):
        same = dilax.dilated_attention(x, x, x, [8, 16], [1, 2], dropout_rate=0.5, **options)
        assert (same == plain).all()
    zero = dilax.dilated_attention(
        x, x, x, [8, 16], [1, 2], dropout_rate=0.0, dropout_key=KEY, deterministic=False
    )
    assert (zero == plain).all()


def test_seed_may_be_traced(x64, rng):
    x = rng.normal(size=(1, 16, 2, 8))

    def run(key):
        return dilax.dilated_attention(
            x, x, x, [8, 16], [1, 2], dropout_rate=0.4, dropout_key=key, deterministic=False
        )

    found = jax.jit(run)(KEY)
    for key in (KEY, jax.random.key_data(KEY)):
        assert_exact(found, jax.jit(functools.partial(run, key))())


@pytest.mark.newest
def test_a_router_inside_branches_drops_the_same_pairs(x64, rng):
    """One that keeps every block; segments, residues and heads are examples and heads inside."""
    q = jnp.asarray(rng.normal(size=(2, 136, 4, 8)))
    k, v = (jnp.asarray(rng.normal(size=(2, 136, 2, 8))) for _ in range(2))
    branches = {"segment_lengths": [24, 136], "dilation_rates": [2, 3]}
    sizes = {"num_kv_heads": 2, "sparsity_ratio": 1.0, "block_size": 64}
    options = {"is_causal": True, "deterministic": False, "dropout_key": KEY}
    found = dilax.AdaptiveAttention(4, 8, **sizes, **branches, dropout=RATE)(q, k, v, **options)
    right = dilax.dilated_attention(q, k, v, **branches, dropout_rate=RATE, **options)
    assert_exact(found, right)
