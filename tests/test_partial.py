"""Merging partial results: the laws, the identity, and rows that nobody has seen."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dilax.partial import Partial, empty, merge, weight
from tests.compare import assert_exact, error

ROWS, H = 5, 3
lse_rows = st.lists(
    st.one_of(st.just(-np.inf), st.floats(-1e4, 1e4, allow_subnormal=False)),
    min_size=ROWS,
    max_size=ROWS,
)


def partial_of(lses, seed):
    """A Partial with these lses and random outs: 0 where the lse is -inf."""
    lse = np.array(lses)
    out = np.random.default_rng(seed).normal(size=(ROWS, H))
    return Partial(jnp.asarray(np.where(np.isinf(lse)[:, None], 0, out)), jnp.asarray(lse))


@settings(max_examples=25)
@given(st.tuples(lse_rows, lse_rows, lse_rows))
def test_associative_and_order_free(lses):
    with jax.enable_x64(True):
        a, b, c = (partial_of(x, seed) for seed, x in enumerate(lses))
        whole = merge(a, b, c)
        for x, y, z in itertools.permutations((a, b, c)):
            assert_exact(merge(x, y, z), whole)
            assert_exact(merge(merge(x, y), z), whole)
            assert_exact(merge(x, merge(y, z)), whole)


@settings(max_examples=25)
@given(lse_rows)
def test_empty_is_identity(lses):
    with jax.enable_x64(True):
        a = partial_of(lses, 0)
        nothing = empty((ROWS, H), jnp.float64)
        for merged in (merge(a), merge(a, nothing), merge(nothing, a), merge(nothing, a, nothing)):
            assert_exact(merged, a)


@settings(max_examples=25)
@given(st.tuples(lse_rows, lse_rows))
def test_gradients_are_finite(lses):
    with jax.enable_x64(True):
        parts = tuple(partial_of(x, seed) for seed, x in enumerate(lses))

        def total(parts):
            out, lse = merge(*parts)
            return (out**2).sum() + jnp.where(jnp.isinf(lse), 0, lse).sum()

        assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.grad(total)(parts)))


def test_is_softmax_over_the_union(x64, rng):
    logits, values = rng.normal(size=(ROWS, 7)) * 5, rng.normal(size=(7, H))

    def attend(keys):
        weights = np.exp(logits[:, keys])
        total = weights.sum(1)
        return Partial(jnp.asarray(weights @ values[keys] / total[:, None]), jnp.log(total))

    merged = merge(attend([0, 3]), attend([1]), attend([2, 4, 5, 6]))
    assert_exact(merged, attend(list(range(7))))


def test_an_lse_of_zero_is_a_value(x64):
    """torchscale took a true lse of exactly 0 for a missing one."""
    one = Partial(jnp.ones((ROWS, H)), jnp.zeros(ROWS))
    three = Partial(jnp.full((ROWS, H), 3.0), jnp.zeros(ROWS))
    merged = merge(one, three)
    assert_exact(merged, Partial(np.full((ROWS, H), 2.0), np.full(ROWS, np.log(2))))


def test_nan_is_not_nothing():
    """A NaN shows in the result: it is not taken for a row that saw no key."""
    broken = Partial(jnp.ones((1, H)), jnp.array([jnp.nan]))
    for other in (Partial(jnp.ones((1, H)), jnp.zeros(1)), empty((1, H), "float32")):
        for merged in (merge(broken, other), merge(other, broken)):
            assert np.isnan(merged.out).all()
            assert np.isnan(merged.lse).all()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_empty_has_the_dtype_asked_for(dtype, x64):
    nothing = empty((2, H), dtype)
    assert nothing.out.dtype == nothing.lse.dtype == dtype
    assert not nothing.out.any()
    assert (nothing.lse == -np.inf).all()


def test_weight_of_nothing_is_zero():
    inf = np.inf
    found = weight(jnp.array([-inf, 0.0, -inf, 1.0]), jnp.array([-inf, -inf, 2.0, 1.0]))
    assert error(found, [0, 0, 0, 1]) == 0
