"""Dilated flash attention on Hopper: one differentiable function and the reasons against it."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import config
from pallas_kernels.compat import interpreting
from pallas_kernels.launches import Call, run_backward, run_forward
from pallas_kernels.marks import kinds_of, marks_of
from pallas_kernels.support import (
    current_device_kind,
    is_static,
    result_dtype,
    two_passes,
    unsupported,
)

__all__ = ["Call", "attend", "attend_backward", "unsupported"]


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    branches: Sequence[tuple[int, int, int, tuple[int, ...]]],
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
    deterministic: bool | None = None,
    tiles: Mapping[str, config.Blocks] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention over the union of the branches' keys, in one softmax, by Pallas Mosaic GPU kernels.

    Differentiable in query, key, value and carry, also through lse. Rows that see nothing have out
    0, lse -inf and zero gradients. Works under jit, grad, vmap (dropout then counts the examples
    of each call from 0), remat, scan, and inside shard_map with check_vma=False.

    Args:
        query: `[B, T, N, H]`, bfloat16 or float16.
        key, value: `[B, S, K, H]` of the same dtype; N is a multiple of K.
        branches: tuples (segment length w, rate r, first head, offsets): head first + i keeps the
            positions p with (p % w) % r == offsets[i]; query and key must share p // w.
        is_causal: a key is seen only from its own position on.
        scale: of the logits; None means 1 / sqrt(H).
        q_segment_ids, kv_segment_ids: int32 `[B, T]` and `[B, S]`; a pair is seen if its ids are
            equal and not 0. kv_segment_ids None means q_segment_ids.
        q_start, k_start: position of the first query and key: ints, or traced int32 scalars.
        q_positions, kv_positions: int32 `[1 or B, T]` and `[1 or B, S]`, for tokens that lie in
            another order: causality and dropout go by these, branches by the places all the same,
            so that causality then skips no tiles. kv_positions None means q_positions.
        dropout_rate, dropout_seed, keep: probability, uint32[2] and an object with `row_bits`,
            `column_bits` and `keep` as in `dilax.dropout`.
        carry: a partial result (out float32 `[B, T, N, H]`, lse float32 `[B, T, N]`) over other
            keys, which the softmax continues; out is 0 where lse is -inf.
        out_dtype: of out; None means query's dtype, or float32 when there is a carry.
        deterministic: True asks for gradients whose bits do not vary from run to run: two passes
            in place of one. False: one pass wherever heads allow it (of 128 not with both ids
            and positions), which is faster. None: False unless XLA_FLAGS ask for deterministic
            operations. out and lse never vary.
        tiles: tile sizes in place of those of `config`, by kernel: "forward", "fused" and, of the
            deterministic backward pass, "queries" and "keys". Not checked: for tuning.

    Returns:
        out `[B, T, N, H]` in out_dtype, lse `[B, T, N]` float32 (natural logarithm).

    Raises:
        ValueError: `unsupported` gives reasons against the call.

    Source: LongNet (arXiv:2307.02486); FlashAttention-3 (arXiv:2407.08608).

    Example:
        >>> attend(q, k, v, branches=((2048, 1, 0, (0,) * 16), (4096, 2, 0, (0, 1) * 8)))
    """
    kind = current_device_kind()
    options = {
        "branches": branches,
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
    kinds = kinds_of(is_causal, dropout_rate, q_segment_ids, q_positions)
    ids, positions = (q_segment_ids, kv_segment_ids), (q_positions, kv_positions)
    marks = marks_of(kinds, query.shape[0], ids, positions)
    starts = tuple(int(s) if is_static(s) else None for s in (q_start, k_start))
    call = Call(
        branches=tuple((int(w), int(r), int(f), tuple(map(int, o))) for w, r, f, o in branches),
        causal=bool(is_causal) and not kinds.causal,
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        q_start=starts[0],
        k_start=starts[1],
        rate=float(dropout_rate),
        keep=keep if dropout_rate else None,
        out_dtype=result_dtype(query, carry, out_dtype),
        marks=kinds,
        device_kind=kind,
        interpret=interpreting(),
        deterministic=two_passes(deterministic),
        tiles=tuple(sorted((tiles or {}).items())),
    )
    seed = jnp.zeros((2,), jnp.uint32) if dropout_seed is None else dropout_seed
    where = jnp.stack([jnp.asarray(s, jnp.int32) for s in (q_start, k_start)])
    carry = None if carry is None else (carry[0], carry[1])
    return _attend(call, query, key, value, carry, marks, where, seed)


def attend_backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    branches: Sequence[tuple[int, int, int, tuple[int, ...]]],
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
    the total out. Returns float32, in which those of several calls can be added up; dk and dv are
    not rounded before, where shared memory allows it. Other arguments as `attend`, as checked.
    """
    kinds = kinds_of(is_causal, dropout_rate, q_segment_ids, q_positions)
    ids, positions = (q_segment_ids, kv_segment_ids), (q_positions, kv_positions)
    marks = marks_of(kinds, query.shape[0], ids, positions)
    starts = tuple(int(s) if is_static(s) else None for s in (q_start, k_start))
    call = Call(
        branches=tuple((int(w), int(r), int(f), tuple(map(int, o))) for w, r, f, o in branches),
        causal=bool(is_causal) and not kinds.causal,
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        q_start=starts[0],
        k_start=starts[1],
        rate=float(dropout_rate),
        keep=keep if dropout_rate else None,
        out_dtype=jnp.dtype(jnp.float32),
        marks=kinds,
        device_kind=current_device_kind(),
        interpret=interpreting(),
        deterministic=two_passes(deterministic),
        wide=True,
    )
    seed = jnp.zeros((2,), jnp.uint32) if dropout_seed is None else dropout_seed
    where = jnp.stack([jnp.asarray(s, jnp.int32) for s in (q_start, k_start)])
    with jax.enable_x64(False):
        found = run_backward(call, query, key, value, d_out, lse, delta, marks, where, seed)
    return tuple(x.astype(jnp.float32) for x in found)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: Call, query: Any, key: Any, value: Any, carry: Any, marks: Any, starts: Any, seed: Any
) -> tuple[jax.Array, jax.Array]:
    # Kernels count in int32; with 64-bit integers as the default they would mix the two.
    with jax.enable_x64(False):
        return run_forward(call, query, key, value, carry, marks, starts, seed)


def _attend_fwd(call: Call, *arrays: Any) -> tuple[Any, Any]:
    out, lse = _attend(call, *arrays)
    return (out, lse), (arrays, out, lse)


def _attend_bwd(call: Call, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    (query, key, value, carry, marks, starts, seed), out, lse = residuals
    do, dlse = cotangents
    do32 = do.astype(jnp.float32)
    seen = lse > -jnp.inf
    delta = (do32 * out.astype(jnp.float32)).sum(-1) - jnp.where(seen, dlse, 0.0)
    with jax.enable_x64(False):
        dq, dk, dv = run_backward(call, query, key, value, do, lse, delta, marks, starts, seed)
    d_carry = None
    if carry is not None:
        old_out, old_lse = carry
        share = jnp.where(old_lse > -jnp.inf, jnp.exp(old_lse - jnp.where(seen, lse, 0.0)), 0.0)
        d_out = share[..., None] * do32
        d_lse = share * ((do32 * old_out.astype(jnp.float32)).sum(-1) - delta)
        d_carry = (d_out.astype(old_out.dtype), d_lse.astype(old_lse.dtype))
    return dq, dk, dv, d_carry, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
