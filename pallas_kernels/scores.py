"""One tile of scores: its step of the online softmax."""

import jax
import jax.numpy as jnp
from jax import lax


def softmax(s: jax.Array, m: jax.Array, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One online softmax step in base 2: (p, new row maximum, factor for what was summed)."""
    top = jnp.maximum(m, s.max(axis=1) * scale)
    # A row that has seen nothing yet has maximum -inf; its exponents must not become NaN.
    safe = jnp.where(top == -jnp.inf, 0.0, top)
    return exponentials(s, safe, scale), top, jnp.exp2(m - safe)


def exponentials(s: jax.Array, m: jax.Array, scale: float) -> jax.Array:
    """2 to the scores times scale, of each row less m."""
    return jnp.exp2(s * scale - lax.broadcast_in_dim(m, s.shape, [0]))
