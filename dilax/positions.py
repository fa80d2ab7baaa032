"""Positions in queries and keys: rotary embeddings, taken from flax, and xPos on top of them.

Both are callables `(query, key, q_positions, k_positions) -> (query, key)` on [B, T, N, H] and
[B, S, K, H], the form that the `position` argument of the attention modules takes. Neither has
parameters.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dilax._types import FLOAT_DTYPES, refuse, stats_dtype
from dilax.checks import check_array, check_index, check_positive, is_array

# Room, in units of log, that a scaled entry keeps below the largest float of its dtype: the
# entries of queries and keys themselves are seldom larger than e^3.
_MARGIN = 3.0


def _checked_positions(name: str, positions: Any, x: jax.Array) -> jax.Array:
    """Positions int32 [B, T] of x [B, T, N, H]: those given, [T] or [B, T], else 0, 1, ..."""
    B, T = x.shape[:2]
    if positions is None:
        positions = jnp.arange(T, dtype=jnp.int32)
    elif not is_array(positions) or positions.ndim not in (1, 2):
        raise refuse(name, f"None or an int32 array [{T}] or [{B}, {T}]", positions)
    else:
        check_array(name, positions, (B, T)[2 - positions.ndim :], ("int32",))
    positions = jnp.broadcast_to(positions, (B, T))
    sharding: Any = jax.typeof(x).sharding
    if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
        where = jax.NamedSharding(sharding.mesh, jax.P(*tuple(sharding.spec)[:2]))
        positions = jax.reshard(positions, where)  # to where x lies
    return positions


def _check_rotated(query: Any, key: Any) -> None:
    for name, x in (("query", query), ("key", key)):
        check_array(name, x, (None,) * 4, FLOAT_DTYPES)
        if x.shape[-1] % 2:
            raise refuse(name, "an even head dim", x)


def _rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """nnx.RoPE on x [B, T, N, H], whose positions [B, T] differ from example to example.

    nnx.RoPE flattens batched positions into one sequence, so examples go through it one by one.
    """
    turned = jax.vmap(nnx.RoPE(theta=theta))(jnp.swapaxes(x, 1, 2), positions)
    return jnp.swapaxes(turned, 1, 2)


@dataclasses.dataclass(frozen=True)
class RotaryPosition:
    """Rotary position embedding (RoPE) of queries and keys, by `flax.nnx.RoPE`.

    Args:
        theta: base of the wave lengths.

    Call:
        query [B, T, N, H], key [B, S, K, H], H even; q_positions, k_positions int32 [T], [S] or
        [B, T], [B, S], None for 0, 1, ...: the rotated query and key, in their own dtypes.

    Raises:
        ValueError: theta is not positive, or an array has the wrong shape or dtype.

    Source: RoFormer (arXiv:2104.09864).

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> q, k = RotaryPosition()(x, x)
        >>> bool((q[:, 0] == x[:, 0]).all()), bool((q == k).all())
        (True, True)
    """

    theta: float = 10000.0

    def __post_init__(self):
        check_positive("theta", self.theta)

    def __call__(self, query, key, q_positions=None, k_positions=None):
        _check_rotated(query, key)
        rotated = []
        for name, x, positions in (
            ("q_positions", query, q_positions),
            ("k_positions", key, k_positions),
        ):
            positions = _checked_positions(name, positions, x)
            exact = x.astype(stats_dtype(x.dtype))
            rotated.append(_rotate(exact, positions, self.theta).astype(x.dtype))
        return tuple(rotated)


@dataclasses.dataclass(frozen=True)
class XPos:
    """xPos: rotary embeddings whose products also fade with the distance, for causal attention.

    With s_d = (2d + 0.4 H) / (1.4 H) for the pair of channels (2d, 2d + 1), the contribution of
    that pair to the logit of query position i and key position j is multiplied by
    s_d^((i - j) / scale_base). Per token this is s_d^((i - c) / scale_base) on the query and
    s_d^(-(j - c) / scale_base) on the key; c cancels. Those factors leave the range of a float
    when positions are far from c, so c is the middle of the sequence, the factors are computed in
    float32 (float64 for float64), and a length whose factors do not fit the dtype of the query is
    refused: with scale_base 512, about 7000 tokens in float16 and 70000 in bfloat16 and float32.
    A larger scale_base fits more. The logits are therefore those of the formula, at any length
    that is taken.

    Args:
        scale_base: distance over which the pair d fades by s_d.
        theta: base of the rotary wave lengths.
        max_length: positions lie in [0, max_length); the middle c is max_length // 2. None: the
            longer of the call's query and key. Give it when queries and keys of one sequence are
            rotated in different calls (shards, caches), which must agree on c.

    Call:
        as `RotaryPosition`.

    Raises:
        ValueError: an argument is wrong, or the sequence is too long for the dtype.

    Source: A Length-Extrapolatable Transformer (arXiv:2212.10554); constants of Microsoft's
    torchscale.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 4, 2, 8))
        >>> q, k = XPos()(x, x)
        >>> q.shape
        (1, 4, 2, 8)
    """

    scale_base: float = 512.0
    _: dataclasses.KW_ONLY
    theta: float = 10000.0
    max_length: int | None = None

    def __post_init__(self):
        check_positive("scale_base", self.scale_base)
        check_positive("theta", self.theta)
        if self.max_length is not None and check_index("max_length", self.max_length) == 0:
            raise refuse("max_length", "None or a positive int", self.max_length)

    def _check_range(self, name: str, x: jax.Array, length: int) -> None:
        """Refuse a length whose largest factor, that of channel 0, does not fit the dtype of x."""
        room = math.log(float(jnp.finfo(x.dtype).max)) - _MARGIN
        per_token = math.log(1.4 / 0.4) / self.scale_base
        reach = max(length // 2, length - length // 2)
        if per_token * reach > room:
            longest = int(2 * room / per_token)
            raise refuse(
                name,
                f"at most {longest} positions in {jnp.dtype(x.dtype).name} with xPos of "
                f"scale_base {self.scale_base:g} (a larger scale_base takes more)",
                length,
            )

    def __call__(self, query, key, q_positions=None, k_positions=None):
        _check_rotated(query, key)
        length = self.max_length or max(query.shape[1], key.shape[1])
        scaled = []
        for name, x, positions, sign in (
            ("query", query, q_positions, 1.0),
            ("key", key, k_positions, -1.0),
        ):
            self._check_range(name, x, length)
            positions = _checked_positions(f"{name[0]}_positions", positions, x)
            stats, H = stats_dtype(x.dtype), x.shape[-1]
            # nnx.RoPE pairs channel d with d + H/2, xPos pairs neighbours.
            apart = jnp.concatenate([x[..., ::2], x[..., 1::2]], -1).astype(stats)
            turned = _rotate(apart, positions, self.theta)
            fade = jnp.log((jnp.arange(0, H, 2, dtype=stats) + 0.4 * H) / (1.4 * H))
            power = sign * (positions - length // 2).astype(stats) / self.scale_base
            factor = jnp.exp(power[:, :, None, None, None] * fade.reshape(1, 1, 1, 1, -1))
            pairs = turned.reshape(*x.shape[:-1], 2, H // 2) * factor
            scaled.append(jnp.swapaxes(pairs, -1, -2).reshape(x.shape).astype(x.dtype))
        return tuple(scaled)
