"""Which attention probabilities are dropped: a counter-based hash of who looks at whom.

The bits depend on (key, batch, head, global query position, global key position, branch) and on
nothing else, so every implementation and every sharding drops the same pairs, and the backward
pass computes the mask again in place of storing it. The mixer is the 32-bit finalizer of
MurmurHash3 (Appleby, 2011).
"""

import jax
import jax.numpy as jnp

_GOLDEN = 0x9E3779B1  # 2^32 / golden ratio: neighbouring counters land far apart
_PRIME = 0x85EBCA77


def _u32(x):
    return jnp.asarray(x).astype(jnp.uint32)


def _mix(x):
    x = x ^ (x >> jnp.uint32(16))
    x = x * jnp.uint32(0x85EBCA6B)
    x = x ^ (x >> jnp.uint32(13))
    x = x * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))


def seed_bits(key: jax.Array) -> jax.Array:
    """The uint32[2] seed of a `jax.random` key, typed or raw.

    Example:
        >>> import jax
        >>> seed_bits(jax.random.key(3)).shape
        (2,)
    """
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    data = _u32(data).reshape(-1)
    # Keys of other generators are longer: fold them in, so that no bit of the key is ignored.
    first, second = data[0], data[-1]
    for word in data[1:-1]:
        first, second = _mix(first ^ word), _mix(second + word)
    return jnp.stack([first, second])


def row_bits(seed: jax.Array, batch, head, q_position) -> jax.Array:
    """uint32 bits of a query row; arguments broadcast, `head` is the global query head."""
    bits = _mix(seed[0] + _u32(batch) * jnp.uint32(_GOLDEN))
    bits = _mix(bits + _u32(head) * jnp.uint32(_PRIME))
    return _mix(bits + _u32(q_position) * jnp.uint32(_GOLDEN))


def column_bits(seed: jax.Array, k_position, branch) -> jax.Array:
    """uint32 bits of a key column; `branch` counts the branches of the call from 0."""
    bits = _mix(seed[1] + _u32(branch) * jnp.uint32(_PRIME))
    return _mix(bits + _u32(k_position) * jnp.uint32(_GOLDEN))


def keep(rows: jax.Array, columns: jax.Array, rate: float) -> jax.Array:
    """True where the pair is kept: rows [..., T], columns [..., S] -> bool [..., T, S].

    Example:
        >>> import jax
        >>> seed = seed_bits(jax.random.key(0))
        >>> rows = row_bits(seed, 0, 0, jax.numpy.arange(64))
        >>> columns = column_bits(seed, jax.numpy.arange(64), 0)
        >>> 0.7 < float(keep(rows, columns, 0.25).mean()) < 0.8
        True
    """
    bits = _mix(rows[..., :, None] + columns[..., None, :])
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
