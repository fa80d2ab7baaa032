"""Attention of one tile of queries on one tile of keys, and its gradients, in jax.numpy.

The loops of `dilax.tile_loop` and `dilax.block_loop` are made of these. Every array of a tile has a
leading axis of groups. Softmax is in base 2 (Dao, arXiv:2307.08691).
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dilax import dropout
from dilax._types import stats_dtype

# ln(2)^n / n!, from n = 6 down: 2^x on [-1/2, 1/2] to 1e-8.
_EXP2 = [math.log(2) ** n / math.factorial(n) for n in range(6, -1, -1)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the loops know of a call at trace time."""

    is_causal: bool
    scale: float
    dropout_rate: float
    platform: str


def scales(scale: float, dtype) -> tuple[float, float]:
    """The logits' factor as one on the queries and one on the products; softmax is in base 2.

    All of it on the queries saves a pass over the logits, but in half precision the product would
    round: there the queries get only a power of two, and not one that could overflow.
    """
    scale = scale / math.log(2)
    if jnp.finfo(dtype).bits >= 32 or scale == 0:
        return scale, 1.0
    early = math.copysign(2.0 ** min(max(math.floor(math.log2(abs(scale))), -4), 0), scale)
    return early, scale / early


def _times(s: jax.Array, factor: float) -> jax.Array:
    return s if factor == 1 else s * factor


def exp2(x: jax.Array, platform: str) -> jax.Array:
    """2^min(x, 0), 0 at -inf, NaN at NaN.

    XLA's own exp takes as long as a matrix product on a CPU, where half of the forward pass went
    into it. In float32 x is split into an integer, which goes into the exponent bits, and a rest
    in [-1/2, 1/2], for which a polynomial of degree 6 is exact to one ulp. (Adding and subtracting
    1.5 * 2^23 would round faster, but the XLA of jax 0.11 simplifies that to nothing.) The barrier
    stops XLA from computing it again in every consumer.
    """
    if platform != "cpu" or x.dtype != jnp.float32:
        return jnp.exp2(jnp.minimum(x, 0.0))
    # At -127 the exponent bits are 0, so that is exactly 0. Above 0 lies rounding only, but of
    # large logits that can be a lot: without a limit it would carry into the sign bit.
    x = jnp.clip(x, -127.0, 0.0)
    whole = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    rest = x - whole
    y = jnp.float32(_EXP2[0])
    for c in _EXP2[1:]:
        y = y * rest + c
    power = (whole.astype(jnp.int32) + 127) << 23
    return lax.optimization_barrier(y * lax.bitcast_convert_type(power, jnp.float32))


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype) -> jax.Array:
    """Batched matrix product over the leading axis, accumulated in `dtype`."""
    a, b = a.astype(b.dtype), b
    numbers = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(a, b, numbers, preferred_element_type=dtype)


def turned(x: jax.Array) -> jax.Array:
    """x with its last two axes swapped, in memory: XLA may not fold the swap into a product."""
    return lax.optimization_barrier(jnp.swapaxes(x, -1, -2))


class Running(NamedTuple):
    """Softmax attention over the keys so far, not yet divided by its sum."""

    top: jax.Array  # [groups, q_size], the largest logit, in units of the late scale
    total: jax.Array  # [groups, q_size]
    acc: jax.Array  # [groups, q_size, H]


def zeros(shape: tuple[int, ...], dtype: Any, *like: Any) -> jax.Array:
    """Zeros that vary over the axes of a shard_map over which any array of `like` does.

    What a loop carries must vary as what its body returns, where shard_map checks it.
    """
    axes: set[str] = set()
    for x in like:
        kind = jax.typeof(x)
        manual = getattr(kind, "manual_axis_type", None)
        axes |= set(getattr(kind, "vma", ()) if manual is None else manual.varying)
    x = jnp.zeros(shape, dtype)
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def start(q: jax.Array, k: jax.Array, v: jax.Array, stats: Any) -> Running:
    """Attention of q [groups, q_size, H] over no key of k and v."""
    zero = zeros(q.shape, stats, q, k, v)
    return Running(zero[..., 0] - jnp.inf, zero[..., 0], zero)


def look(settings: Settings, state: Running, q, k, v, visible, q_bits, k_bits) -> Running:
    """The state after one more tile of keys.

    q [groups, q_size, H] has the early scale; k, v are [groups, k_size, H]; visible is boolean
    [groups or 1, q_size, k_size], None for all pairs; q_bits and k_bits are None without dropout.
    """
    stats, late = stats_dtype(q.dtype), scales(settings.scale, q.dtype)[1]
    s = dot(q, k, (2, 2), stats)
    if visible is not None:
        s = jnp.where(visible, s, -jnp.inf)
    top = jnp.maximum(state.top, s.max(-1))
    safe = jnp.where(top != -jnp.inf, top, 0)
    # The rest of the scale after the difference: so the largest logit always gives 2^0.
    p = exp2(_times(s - safe[..., None], late), settings.platform)
    fade = jnp.exp2(_times(state.top - safe, late))
    total = state.total * fade + p.sum(-1)
    if k_bits is not None:
        kept = dropout.keep(q_bits, k_bits, settings.dropout_rate)
        p = jnp.where(kept, p / (1 - settings.dropout_rate), 0)
    return Running(top, total, state.acc * fade[..., None] + dot(p, v, (2, 1), stats))


def finish(settings: Settings, state: Running, dtype) -> tuple[jax.Array, jax.Array]:
    """out [groups, q_size, H] and lse [groups, q_size]; `dtype` is that of the queries."""
    late = scales(settings.scale, dtype)[1]
    seen = state.total != 0  # true of a NaN, which must not pass for a row that saw nothing
    safe = jnp.where(seen, state.total, 1)
    lse = (_times(state.top, late) + jnp.log2(safe)) * math.log(2)
    return state.acc / safe[..., None], jnp.where(seen, lse, -jnp.inf)


def base_two(lse: jax.Array) -> jax.Array:
    """lse as `gradients` takes it: in base 2, and such that 2^(s - lse) = 0 in unseen rows."""
    return jnp.where(lse != -jnp.inf, lse, jnp.inf) / math.log(2)


def gradients(settings: Settings, q, k, v, do, lse, delta, visible, q_bits, k_bits) -> Any:
    """dq, dk and dv of one tile, each without its part of the scale: see `gradient_scales`.

    Arguments as in `look`; do [groups, q_size, H], lse (of `base_two`) and delta [groups, q_size].
    """
    stats, late = stats_dtype(q.dtype), scales(settings.scale, q.dtype)[1]
    # The logits are laid out keys by queries here, so that only one of the five matrix products
    # has its left operand to turn: on a CPU one that does so on the fly takes three times as long.
    s = _times(dot(k, q, (2, 2), stats), late)
    p = exp2(s - lse[:, None, :], settings.platform)
    if visible is not None:
        p = jnp.where(jnp.swapaxes(visible, 1, 2), p, 0)
    dp = dot(v, do, (2, 2), stats)
    dropped = p
    if k_bits is not None:
        kept = jnp.swapaxes(dropout.keep(q_bits, k_bits, settings.dropout_rate), 1, 2)
        dropped, dp = (jnp.where(kept, a / (1 - settings.dropout_rate), 0) for a in (p, dp))
    ds = p * (dp - delta[:, None, :])
    dv = dot(dropped, do, (2, 1), stats)
    dk = dot(ds, q, (2, 1), stats)
    return turned(dot(turned(k), ds, (2, 1), stats)), dk, dv


def gradient_scales(settings: Settings, dtype) -> tuple[float, float]:
    """What dq and dk lack: dq all of the scale, dk has met the queries' part already."""
    return settings.scale, scales(settings.scale, dtype)[1] * math.log(2)
