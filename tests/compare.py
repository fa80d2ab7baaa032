"""The one error rule of all numerical tests.

float64 must agree with the oracle to 1e-10 of the largest value. In a lower precision an
implementation may err at most 3 times as much as plain XLA in the same dtype, both measured
against the oracle in float64. There are no tolerances per test.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

EXACT = 1e-10
FACTOR = 3.0


def error(actual: Any, exact: Any) -> float:
    """Largest deviation from `exact` over the largest finite value of `exact`.

    Infinite where a NaN is, where shapes differ, and where infinities are not exactly the same.

    Example:
        >>> error([1.0, 4.0], [2.0, 4.0])
        0.25
        >>> error([float("nan")], [float("nan")])
        inf
    """
    actual, exact = (np.asarray(x, np.float64) for x in (actual, exact))
    if actual.shape != exact.shape or np.isnan(actual).any() or np.isnan(exact).any():
        return float("inf")
    finite = np.isfinite(exact)
    if not np.array_equal(actual[~finite], exact[~finite]) or not np.isfinite(actual[finite]).all():
        return float("inf")
    scale = np.abs(exact[finite]).max(initial=0.0)
    return float(np.abs(actual[finite] - exact[finite]).max(initial=0.0) / (scale or 1.0))


def assert_exact(actual: Any, exact: Any) -> None:
    """float64: every leaf of `actual` equals that of `exact` to 1e-10."""
    found = _named(actual)
    wanted = _named(exact)
    assert list(found) == list(wanted)
    for name, x in found.items():
        assert x.dtype == np.float64, f"{name} is {x.dtype}, not float64"
    errors = {name: error(found[name], wanted[name]) for name in wanted}
    assert all(e <= EXACT for e in errors.values()), errors


def assert_within(actual: Any, baseline: Any, exact: Any) -> None:
    """Lower precision: err(actual) <= 3 err(baseline), both against `exact`.

    A baseline that is right by luck counts as half a unit in the last place, the error of rounding.
    """
    found, base, wanted = _named(actual), _named(baseline), _named(exact)
    assert list(found) == list(base) == list(wanted)
    errors = {
        name: (
            error(found[name], wanted[name]),
            FACTOR
            * max(error(base[name], wanted[name]), float(jnp.finfo(base[name].dtype).eps) / 2),
        )
        for name in wanted
    }
    assert all(e <= allowed for e, allowed in errors.values()), errors


def _named(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}
