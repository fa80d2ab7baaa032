"""The collectives that move rows, as an argument: the real ones, or none at all.

`SILENT` computes on arrays of the same shapes without sending anything: what is left is the time
that messages cannot hide behind.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Groups = list[list[int]]


class Messages(NamedTuple):
    """What a ring, an all-to-all and a gather send.

    permute(x, axis_name, pairs); all_to_all(x, axis_name, split, join, groups); all_gather and
    reduce_scatter(x, axis_name, axis, groups).
    """

    permute: Callable[..., jax.Array]
    all_to_all: Callable[..., jax.Array]
    all_gather: Callable[..., jax.Array]
    reduce_scatter: Callable[..., jax.Array]


def _all_to_all(x: jax.Array, axis_name: Any, split: int, join: int, groups: Groups) -> jax.Array:
    return lax.all_to_all(x, axis_name, split, join, axis_index_groups=groups, tiled=True)


def _all_gather(x: jax.Array, axis_name: Any, axis: int, groups: Groups) -> jax.Array:
    return lax.all_gather(x, axis_name, axis=axis, axis_index_groups=groups, tiled=True)


def _reduce_scatter(x: jax.Array, axis_name: Any, axis: int, groups: Groups) -> jax.Array:
    return lax.psum_scatter(
        x, axis_name, scatter_dimension=axis, axis_index_groups=groups, tiled=True
    )


def _stay(x: jax.Array, axis_name: Any, pairs: Any) -> jax.Array:
    # The number keeps XLA from computing one hop in place of two that now look alike.
    number = jnp.uint32(hash(tuple(pairs)) % 2**32)
    return lax.optimization_barrier((x, number))[0]


def _stay_dealt(x: jax.Array, axis_name: Any, split: int, join: int, groups: Groups) -> jax.Array:
    parts = jnp.split(x, len(groups[0]), axis=split)
    return jnp.concatenate(parts, axis=join)


def _stay_gathered(x: jax.Array, axis_name: Any, axis: int, groups: Groups) -> jax.Array:
    return jnp.concatenate([x] * len(groups[0]), axis=axis)


def _stay_reduced(x: jax.Array, axis_name: Any, axis: int, groups: Groups) -> jax.Array:
    return functools.reduce(jnp.add, jnp.split(x, len(groups[0]), axis=axis))


MESSAGES = Messages(lax.ppermute, _all_to_all, _all_gather, _reduce_scatter)
SILENT = Messages(_stay, _stay_dealt, _stay_gathered, _stay_reduced)
