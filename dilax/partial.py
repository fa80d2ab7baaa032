"""Partial attention and how partial results add up.

`Partial(out, lse)` is softmax attention over some of the keys. Two of them over disjoint lists of
keys merge into the attention over both lists (Milakov and Gimelshein, 2018; LongNet,
arXiv:2307.02486, eq. 9-10). Dilated branches, extra keys and ring hops all add up here.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Partial(NamedTuple):
    """Attention over some of the keys: out [..., H] and lse [...], the log of the softmax's sum.

    Rows that saw no key have out 0 and lse -inf.
    """

    out: jax.Array
    lse: jax.Array


def empty(shape: tuple[int, ...], dtype) -> Partial:
    """The Partial over no key at all, the identity of `merge`; `shape` is that of out [..., H].

    Example:
        >>> empty((2, 3, 8), "float32").lse.shape
        (2, 3)
    """
    return Partial(jnp.zeros(shape, dtype), jnp.full(shape[:-1], -jnp.inf, dtype))


def weight(part: jax.Array, total: jax.Array) -> jax.Array:
    """exp(part - total) for log-sum-exps; 0, and so its gradient, where nothing was seen.

    A NaN stays one: it must not pass for a row that saw nothing.
    """
    seen = (part != -jnp.inf) & (total != -jnp.inf)
    return jnp.where(seen, jnp.exp(jnp.where(seen, part - total, 0.0)), 0.0)


def merge(*parts: Partial) -> Partial:
    """One Partial over the union of the keys of all `parts`; associative and order-free.

    Differentiable in every out and lse.

    Example:
        >>> import jax.numpy as jnp
        >>> a = Partial(jnp.ones((4, 8)), jnp.zeros(4))
        >>> float(merge(a, empty((4, 8), "float32")).out[0, 0])
        1.0
    """
    if len(parts) == 1:
        return parts[0]
    lses = jnp.stack([part.lse for part in parts])
    top = jax.lax.stop_gradient(lses.max(axis=0))
    top = jnp.where(top != -jnp.inf, top, 0.0)
    weights = [weight(part.lse, top) for part in parts]
    sums = sum(weights)
    seen = sums != 0
    safe = jnp.where(seen, sums, 1.0)
    lse = jnp.where(seen, top + jnp.log(safe), -jnp.inf)
    # Not exp(part.lse - lse): a large lse has no bits left for the log of the sum.
    outs = [(w / safe)[..., None] * part.out for w, part in zip(weights, parts, strict=True)]
    return Partial(functools.reduce(jnp.add, outs), lse)
