"""Block-sparse flash attention on Hopper: one differentiable function."""

import contextlib
import functools
import hashlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_lists, block_schedule
from pallas_kernels.block_launches import Blocks, Call, run_backward, run_forward
from pallas_kernels.block_support import unsupported
from pallas_kernels.compat import interpreting
from pallas_kernels.marks import kinds_of, marks_of
from pallas_kernels.support import current_device_kind, result_dtype, two_passes

__all__ = ["attend", "attend_backward", "unsupported"]


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    blocks: Any,
    is_causal: bool = False,
    scale: float | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_start: int | jax.Array = 0,
    k_start: int | jax.Array = 0,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
    keep: Any = None,
    carry: tuple[jax.Array, jax.Array] | None = None,
    out_dtype: Any = None,
    order: str = "longest_first",
    deterministic: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over the listed key blocks, in one softmax, by Pallas Mosaic GPU kernels.

    Differentiable in query, key, value and carry, also through lse. Rows that see nothing have out
    0, lse -inf and zero gradients. Works under jit, grad, vmap, remat, scan,
    and inside shard_map with check_vma=False.

    Args:
        query: `[B, T, N, H]`, bfloat16 or float16.
        key, value: `[B, S, K, H]` of the same dtype; N is a multiple of K.
        blocks: block lists as in `dilax.block_lists.BlockLists`; NumPy arrays (the schedule is
            then made at trace time) or JAX arrays, which may be traced.
        is_causal: a key is seen only from its own position on.
        scale: of the logits; None means 1 / sqrt(H).
        q_segment_ids, kv_segment_ids: int32 `[B, T]` and `[B, S]`; a pair is seen if its ids are
            equal and not 0. kv_segment_ids None means q_segment_ids.
        q_start, k_start: position of the first query and key: ints, or traced int32 scalars.
        q_positions, kv_positions: int32 `[1 or B, T]` and `[1 or B, S]`, for tokens that lie in
            another order: causality and dropout go by these, bands by the places all the same.
            kv_positions None means q_positions.
        dropout_rate, dropout_seed, keep: as in `pallas_kernels.flash.attend`; branch number 0.
        carry: a partial result (out float32 `[B, T, N, H]`, lse float32 `[B, T, N]`) over other
            keys, which the softmax continues.
        out_dtype: of out; None means query's dtype, or float32 when there is a carry.
        order: in which tiles are visited, "longest_first", "row" or "hilbert" (along Hilbert's
            curve through query tile and middle key block); the result is the same bit for bit,
            gradients where deterministic.
        deterministic: as in `pallas_kernels.flash.attend`.

    Returns:
        out `[B, T, N, H]` in out_dtype, lse `[B, T, N]` float32 (natural logarithm).

    Raises:
        ValueError: `unsupported` gives reasons against the call.

    Source: BigBird (arXiv:2007.14062); FlashAttention-3 (arXiv:2407.08608).

    Example:
        >>> attend(q, k, v, blocks=lists, is_causal=True)
    """
    kind = current_device_kind()
    options = {
        "blocks": blocks,
        "is_causal": is_causal,
        "scale": scale,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "q_start": q_start,
        "k_start": k_start,
        "q_positions": q_positions,
        "kv_positions": kv_positions,
        "dropout_rate": dropout_rate,
        "dropout_seed": dropout_seed,
        "keep": keep,
        "carry": carry,
        "out_dtype": out_dtype,
    }
    reasons = unsupported(query, key, value, device_kind=kind, **options)
    if reasons:
        raise ValueError(f"attend: not supported: {'; '.join(reasons)}")
    if dropout_rate and keep is None:
        raise ValueError("attend: dropout_rate without keep, which says what is dropped")
    if order not in block_schedule.ORDERS:
        raise ValueError(f"order: wanted one of {', '.join(block_schedule.ORDERS)}, got {order!r}")
    kinds = kinds_of(is_causal, dropout_rate, q_segment_ids, q_positions)
    ids, positions = (q_segment_ids, kv_segment_ids), (q_positions, kv_positions)
    marks = marks_of(kinds, query.shape[0], ids, positions)
    described, lists = _describe(blocks)
    final = result_dtype(query, carry, out_dtype)
    call = Call(
        blocks=described,
        causal=bool(is_causal) and not kinds.causal,
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        rate=float(dropout_rate),
        keep=keep if dropout_rate else None,
        out_dtype=final if carry is None else jnp.dtype(jnp.float32),
        marks=kinds,
        order=order,
        device_kind=kind,
        interpret=interpreting(),
        deterministic=two_passes(deterministic),
    )
    seed = jnp.zeros((2,), jnp.uint32) if dropout_seed is None else dropout_seed
    starts = jnp.stack([jnp.asarray(s, jnp.int32) for s in (q_start, k_start)])
    out, lse = _attend(call, query, key, value, lists, marks, starts, seed)
    if carry is not None:
        out, lse = _continue(out, lse, *carry)
    return out.astype(final), lse


def attend_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    blocks: Any,
    is_causal: bool = False,
    scale: float | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    q_start: int | jax.Array = 0,
    k_start: int | jax.Array = 0,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
    keep: Any = None,
    deterministic: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value through these keys alone, given the totals over all keys.

    lse `[B, T, N]` is the total log-sum-exp and delta `[B, T, N]` is sum(d_out * out) - d_lse of
    the total out. Returns float32, in which those of several calls can be added up. Other arguments
    as `attend`, as checked.
    """
    kinds = kinds_of(is_causal, dropout_rate, q_segment_ids, q_positions)
    ids, positions = (q_segment_ids, kv_segment_ids), (q_positions, kv_positions)
    marks = marks_of(kinds, query.shape[0], ids, positions)
    described, lists = _describe(blocks)
    call = Call(
        blocks=described,
        causal=bool(is_causal) and not kinds.causal,
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        rate=float(dropout_rate),
        keep=keep if dropout_rate else None,
        out_dtype=jnp.dtype(jnp.float32),
        marks=kinds,
        order="longest_first",
        device_kind=current_device_kind(),
        interpret=interpreting(),
        deterministic=two_passes(deterministic),
        wide=True,
    )
    seed = jnp.zeros((2,), jnp.uint32) if dropout_seed is None else dropout_seed
    starts = jnp.stack([jnp.asarray(s, jnp.int32) for s in (q_start, k_start)])
    with _numbers():
        found = run_backward(call, query, key, value, d_out, lse, delta, lists, marks, starts, seed)
    return tuple(x.astype(jnp.float32) for x in found)


def _describe(blocks: Any) -> tuple[Blocks, Any]:
    """Lists as a hashable constant, or its description and the arrays to trace."""
    arrays = (blocks.columns, blocks.counts, blocks.starts, blocks.band_index)
    bands = tuple(tuple(band) for band in blocks.bands)
    if not block_lists.is_static(blocks):
        nothing = (None,) * len(arrays)
        return Blocks(*nothing, bands, int(blocks.block_size), blocks.longest, b""), arrays
    digest = hashlib.blake2b()
    for x in arrays:
        digest.update(b";")
        if x is not None:
            digest.update(repr(x.shape).encode())
            digest.update(np.ascontiguousarray(x))
    return Blocks(*arrays, bands, int(blocks.block_size), None, digest.digest()), None


def _continue(
    out: jax.Array, lse: jax.Array, old_out: jax.Array, old_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One softmax over the keys of two partial results."""
    top = jax.lax.stop_gradient(jnp.maximum(lse, old_lse))
    safe = jnp.where(top > -jnp.inf, top, 0.0)

    def weigh(x: jax.Array) -> jax.Array:
        return jnp.where(x > -jnp.inf, jnp.exp(jnp.where(x > -jnp.inf, x, 0.0) - safe), 0.0)

    ours, theirs = weigh(lse), weigh(old_lse)
    mass = ours + theirs
    seen = mass > 0.0
    mass = jnp.where(seen, mass, 1.0)
    old_out = jnp.where(theirs[..., None] > 0.0, old_out.astype(jnp.float32), 0.0)
    merged = (out * ours[..., None] + old_out * theirs[..., None]) / mass[..., None]
    return merged, jnp.where(seen, jnp.log(mass) + safe, -jnp.inf)


@contextlib.contextmanager
def _numbers() -> Iterator[None]:
    """Kernels count in int32 (with 64 bits as the default they would mix the two).

    The schedule is written once for NumPy and JAX, so it broadcasts as NumPy does.
    """
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: Call, query: Any, key: Any, value: Any, lists: Any, marks: Any, starts: Any, seed: Any
) -> tuple[jax.Array, jax.Array]:
    with _numbers():
        return run_forward(call, query, key, value, lists, marks, starts, seed)


def _attend_fwd(call: Call, *arrays: Any) -> tuple[Any, Any]:
    out, lse = _attend(call, *arrays)
    return (out, lse), (arrays, out, lse)


def _attend_bwd(call: Call, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    (query, key, value, lists, marks, starts, seed), out, lse = residuals
    do, dlse = cotangents
    seen = lse > -jnp.inf
    delta = (do.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - jnp.where(seen, dlse, 0.0)
    with _numbers():
        found = run_backward(call, query, key, value, do, lse, delta, lists, marks, starts, seed)
    return (*found, None, None, None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)
