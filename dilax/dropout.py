"""Which attention probabilities are dropped: a counter-based hash of who looks at whom.

The bits depend on (key, batch, head, global query position, global key position, branch) and on
nothing else, so every implementation and every sharding drops the same pairs, and the backward
pass computes the mask again in place of storing it. The mixer is the 32-bit finalizer of
MurmurHash3 (Appleby, 2011).
"""

import dataclasses

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


def seed_from(seed: jax.Array, batch) -> jax.Array:
    """The seed with which examples counted from 0 on get the bits of those from `batch` on.

    Example:
        >>> import jax
        >>> seed = seed_bits(jax.random.key(0))
        >>> bool(row_bits(seed, 5, 1, 2) == row_bits(seed_from(seed, 3), 2, 1, 2))
        True
    """
    return jnp.stack([seed[0] + _u32(batch) * jnp.uint32(_GOLDEN), seed[1]])


@dataclasses.dataclass(frozen=True)
class Numbered:
    """The hash for a call whose branches are those with these numbers in a longer list."""

    numbers: tuple[int, ...]

    def row_bits(self, *where) -> jax.Array:
        """As `row_bits`."""
        return row_bits(*where)

    def column_bits(self, seed: jax.Array, k_position, branch) -> jax.Array:
        """As `column_bits`, of the branch that `branch` is in the longer list."""
        number = jnp.int32(self.numbers[0])
        for i, x in enumerate(self.numbers[1:], 1):
            number = jnp.where(branch == i, jnp.int32(x), number)
        return column_bits(seed, k_position, number)

    def keep(self, *bits) -> jax.Array:
        """As `keep`."""
        return keep(*bits)


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
