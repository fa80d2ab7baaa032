"""Dilated flash attention on Hopper: one differentiable function and the reasons against it."""

import dataclasses
import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backward, backward_fused, backward_keys, config, forward, schedule
from pallas_kernels.compat import interpreting
from pallas_kernels.support import is_static, padded_head, result_dtype, unsupported

LOG2E = math.log2(math.e)

__all__ = ["Call", "attend", "attend_backward", "unsupported"]


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything static about one call of `attend`."""

    branches: tuple[tuple[int, int, int, tuple[int, ...]], ...]
    causal: bool
    scale: float
    q_start: int | None
    k_start: int | None
    rate: float
    keep: Any
    out_dtype: Any
    ids: bool
    device_kind: str
    interpret: bool
    deterministic: bool
    wide: bool = False
    tiles: tuple[tuple[str, config.Blocks], ...] = ()


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
        dropout_rate, dropout_seed, keep: probability, uint32[2] and an object with `row_bits`,
            `column_bits` and `keep` as in `dilax.dropout`.
        carry: a partial result (out float32 `[B, T, N, H]`, lse float32 `[B, T, N]`) over other
            keys, which the softmax continues.
        out_dtype: of out; None means query's dtype, or float32 when there is a carry.
        deterministic: True asks for gradients whose bits do not vary from run to run: two passes
            in place of one. False: one pass wherever heads allow it. None: the faster one, but
            True if XLA_FLAGS ask for deterministic operations. out and lse never vary.
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
    kind = _device_kind()
    options = {
        "branches": branches,
        "is_causal": is_causal,
        "scale": scale,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "q_start": q_start,
        "k_start": k_start,
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
    if kv_segment_ids is None:
        kv_segment_ids = q_segment_ids
    starts = tuple(int(s) if is_static(s) else None for s in (q_start, k_start))
    call = Call(
        branches=tuple((int(w), int(r), int(f), tuple(map(int, o))) for w, r, f, o in branches),
        causal=bool(is_causal),
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        q_start=starts[0],
        k_start=starts[1],
        rate=float(dropout_rate),
        keep=keep if dropout_rate else None,
        out_dtype=result_dtype(query, carry, out_dtype),
        ids=q_segment_ids is not None,
        device_kind=kind,
        interpret=interpreting(),
        deterministic=two_passes(deterministic, config.fused_is_faster(len(branches))),
        tiles=tuple(sorted((tiles or {}).items())),
    )
    seed = jnp.zeros((2,), jnp.uint32) if dropout_seed is None else dropout_seed
    where = jnp.stack([jnp.asarray(s, jnp.int32) for s in (q_start, k_start)])
    ids = (q_segment_ids, kv_segment_ids) if call.ids else None
    carry = None if carry is None else (carry[0], carry[1])
    return _attend(call, query, key, value, carry, ids, where, seed)


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
    deterministic: bool | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value through these keys alone, given the totals over all keys.

    lse `[B, T, N]` is the total log-sum-exp and delta `[B, T, N]` is sum(d_out * out) - d_lse of
    the total out. Returns float32, in which those of several calls can be added up; dk and dv are
    not rounded before, where shared memory allows it. Other arguments as `attend`, as checked.
    """
    starts = tuple(int(s) if is_static(s) else None for s in (q_start, k_start))
    call = Call(
        branches=tuple((int(w), int(r), int(f), tuple(map(int, o))) for w, r, f, o in branches),
        causal=bool(is_causal),
        scale=float(query.shape[-1] ** -0.5 if scale is None else scale),
        q_start=starts[0],
        k_start=starts[1],
        rate=0.0,
        keep=None,
        out_dtype=jnp.dtype(jnp.float32),
        ids=q_segment_ids is not None,
        device_kind=_device_kind(),
        interpret=interpreting(),
        deterministic=two_passes(deterministic, config.fused_is_faster(len(branches))),
        wide=True,
    )
    seed = jnp.zeros((2,), jnp.uint32)
    where = jnp.stack([jnp.asarray(s, jnp.int32) for s in (q_start, k_start)])
    kv_segment_ids = q_segment_ids if kv_segment_ids is None else kv_segment_ids
    ids = (q_segment_ids, kv_segment_ids) if call.ids else None
    with jax.enable_x64(False):
        found = _run_backward(call, query, key, value, d_out, lse, delta, ids, where, seed)
    return tuple(x.astype(jnp.float32) for x in found)


def two_passes(deterministic: bool | None, fused_is_faster: bool) -> bool:
    """Whether gradients come from two passes, whose sums have a fixed order.

    deterministic None: unless one pass is faster, and always if XLA_FLAGS ask for deterministic
    operations.

    Example:
        >>> two_passes(None, False), two_passes(None, True), two_passes(True, True)
        (True, False, True)
    """
    if deterministic is not None:
        return bool(deterministic)
    flags = os.environ.get("XLA_FLAGS", "").split()
    names = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")
    asked = any(flag in (name, f"{name}=true", f"{name}=1") for flag in flags for name in names)
    return asked or not fused_is_faster


def _device_kind() -> str:
    if jax.default_backend() == "gpu":
        return jax.local_devices()[0].device_kind
    # Lowered for a GPU elsewhere, or interpreted.
    return "NVIDIA H100 80GB HBM3"


def _pad(x: jax.Array, axis: int, size: int, fill: float = 0) -> jax.Array:
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=fill)


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """True sizes, sizes padded for copies, and for direct reads of whole home tiles (rows)."""

    T: int
    S: int
    padded_T: int
    padded_S: int
    rows: int
    key_rows: int
    head_dim: int


def _sizes(call: Call, query: jax.Array, key: jax.Array, consumers: int) -> _Sizes:
    multiple = schedule.common_stride(tuple(r for _, r, _, _ in call.branches))
    T, S = query.shape[1], key.shape[1]
    tile = config.ROWS * consumers * multiple
    return _Sizes(
        T,
        S,
        -(-T // (8 * multiple)) * 8 * multiple,
        -(-S // (8 * multiple)) * 8 * multiple,
        -(-T // tile) * tile,
        -(-S // tile) * tile,
        query.shape[-1],
    )


def _launch(
    call: Call, heads: int, T: int, S: int, blocks: config.Blocks, transposed: bool
) -> schedule.Launch:
    """All branches as one launch; `config.partition` and `config.subset` divide it."""
    starts = (call.q_start, call.k_start)
    end = None if None in starts else max(starts[0] + T, starts[1] + S)
    parts = []
    for number, (w, r, first, kept) in enumerate(call.branches):
        for phase in schedule.phases(w, r, end):
            begin = phase[0] if phase else 0
            row = [-1] * heads
            row[first : first + len(kept)] = ((offset + begin) % r for offset in kept)
            length = w // math.gcd(w, r)
            whole = end is not None and w >= end
            parts.append((r, schedule.UNBOUNDED if whole else length, tuple(row), number, phase))
    rates, lengths, offsets, numbers, phases = zip(*parts, strict=True)
    home, other = (S, T) if transposed else (T, S)
    return schedule.Launch(
        rates=rates,
        lengths=lengths,
        offsets=offsets,
        numbers=numbers,
        phases=phases,
        stride=schedule.common_stride(rates),
        home=home,
        away=other,
        home_start=starts[transposed],
        away_start=starts[not transposed],
        causal=call.causal,
        transposed=transposed,
        block_home=config.ROWS * blocks.consumers,
        block_away=blocks.away,
    )


def _table(call: Call, plan: schedule.Launch, query: Any, key: Any, skip: bool) -> np.ndarray:
    away = query if plan.transposed else key
    return schedule.work_lists(
        plan,
        batch=query.shape[0],
        ctas=_blocks(call),
        row_bytes=2 * away.shape[-1] * away.dtype.itemsize,
        group=query.shape[2] // key.shape[2],
        skip_empty=skip,
    )


def _blocks(call: Call) -> int:
    if call.interpret:
        # The interpreter cannot add to memory that two blocks share.
        return 2 if call.deterministic else 1
    return config.multiprocessors(call.device_kind)


def _pad_inputs(sizes: _Sizes, arrays: Sequence[jax.Array], lengths: Sequence[int]) -> list:
    head = padded_head(sizes.head_dim)
    return [_pad(_pad(x, 1, n), 3, head) for x, n in zip(arrays, lengths, strict=True)]


def _pad_ids(sizes: _Sizes, ids: Any) -> tuple[jax.Array | None, jax.Array | None]:
    if ids is None:
        return None, None
    # Rows past the end are read by whole tiles; id 0 sees nothing.
    q_ids = _pad(ids[0].astype(jnp.int32), 1, sizes.rows)
    return q_ids, _pad(ids[1].astype(jnp.int32), 1, sizes.key_rows)


def _rows(x: jax.Array, rows: int, fill: float) -> jax.Array:
    """`[B, T, N]` as `[B, N, rows]`."""
    return _pad(x.swapaxes(1, 2), 2, rows, fill)


@functools.partial(jax.jit, static_argnums=0)
def _run_forward(
    call: Call, query: Any, key: Any, value: Any, carry: Any, ids: Any, starts: Any, seed: Any
) -> tuple[jax.Array, jax.Array]:
    head = padded_head(query.shape[-1])
    length = min(schedule.rows_of(call.branches, max(query.shape[1], key.shape[1])))
    blocks = dict(call.tiles).get("forward") or config.forward_blocks(
        head, call.out_dtype.itemsize, length, causal=call.causal, ids=call.ids
    )
    sizes = _sizes(call, query, key, blocks.consumers)
    q, k, v = _pad_inputs(
        sizes, (query, key, value), (sizes.padded_T, sizes.padded_S, sizes.padded_S)
    )
    q_ids, k_ids = _pad_ids(sizes, ids)
    whole = _launch(call, q.shape[2], sizes.T, sizes.S, blocks, False)
    out = lse = None
    if carry is not None:
        (out,) = _pad_inputs(sizes, (carry[0].astype(call.out_dtype),), (sizes.padded_T,))
        lse = _rows(carry[1], sizes.rows, -jnp.inf)
    for group in config.partition(whole):
        plan = config.subset(whole, group)
        options = forward.Options(
            scale=call.scale * LOG2E,
            stages=blocks.stages,
            consumers=blocks.consumers,
            overlap=blocks.overlap,
            group=q.shape[2] // k.shape[2],
            carry=out is not None,
            ids=call.ids,
            rate=call.rate,
            interpret=call.interpret,
        )
        with jax.named_scope(f"dilated_forward_{'_'.join(map(str, plan.rates))}"):
            out, lse = forward.forward(
                plan,
                options,
                _table(call, plan, q, k, options.carry),
                q,
                k,
                v,
                out,
                lse,
                out_dtype=call.out_dtype,
                lse_shape=(q.shape[0], q.shape[2], sizes.rows),
                starts=starts,
                seed=seed,
                q_ids=q_ids,
                k_ids=k_ids,
                keep=call.keep,
            )
    return out[:, : sizes.T, :, : sizes.head_dim], lse[:, :, : sizes.T].swapaxes(1, 2)


@functools.partial(jax.jit, static_argnums=0)
def _run_backward(
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    do: Any,
    lse: Any,
    delta: Any,
    ids: Any,
    starts: Any,
    seed: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    sizes = _sizes(call, query, key, config.CONSUMERS)
    lengths = (sizes.padded_T, sizes.padded_S, sizes.padded_S, sizes.padded_T)
    arrays = tuple(_pad_inputs(sizes, (query, key, value, do.astype(query.dtype)), lengths))
    lse = _rows(jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E), sizes.rows, jnp.inf)
    delta = _rows(delta, sizes.rows, 0.0)
    q_ids, k_ids = _pad_ids(sizes, ids)
    shared = {
        "starts": starts,
        "seed": seed,
        "q_ids": q_ids,
        "k_ids": k_ids,
        "keep": call.keep,
    }
    heads, head_dim = query.shape[2], arrays[0].shape[-1]
    options = backward.Options(
        scale=call.scale * LOG2E,
        stages=1,
        stagings=1,
        group=heads // key.shape[2],
        add=False,
        ids=call.ids,
        rate=call.rate,
        interpret=call.interpret,
    )

    columns, tiles = slice(sizes.head_dim), dict(call.tiles)

    def groups(blocks: config.Blocks, transposed: bool) -> Any:
        whole = _launch(call, heads, sizes.T, sizes.S, blocks, transposed)
        for group in config.partition(whole):
            yield config.subset(whole, group)

    def plans(blocks: config.Blocks, transposed: bool) -> Any:
        for number, plan in enumerate(groups(blocks, transposed)):
            yield plan, number > 0, _table(call, plan, arrays[0], arrays[1], number > 0)

    def keys_dtype(blocks_of: Any) -> tuple[Any, Any]:
        """(blocks, dtype of dk and dv): several launches that add would round each time."""
        blocks, wide = blocks_of(query.dtype.itemsize), blocks_of(4)
        if wide is not None and (call.wide or len(list(groups(blocks, True))) > 1):
            return wide, jnp.dtype(jnp.float32)
        return blocks, jnp.dtype(query.dtype)

    padded = tuple(x[:, :, : sizes.padded_T] for x in (lse, delta))
    dq = dk = dv = None
    if not call.deterministic and config.fused_blocks(head_dim, 2, call.ids) is not None:
        blocks, dtype = keys_dtype(
            lambda size: tiles.get("fused") or config.fused_blocks(head_dim, size, call.ids)
        )
        dq = jnp.zeros((query.shape[0], heads, sizes.padded_T, head_dim), jnp.float32)
        for plan, add, table in plans(blocks, True):
            part = dataclasses.replace(options, stages=blocks.stages, add=add)
            with jax.named_scope(f"dilated_gradients_{'_'.join(map(str, plan.rates))}"):
                dq, dk, dv = backward_fused.fused_gradients(
                    plan, part, table, arrays, *padded, (dq, dk, dv), out_dtype=dtype, **shared
                )
        dq = dq.swapaxes(1, 2) * call.scale
        dq = dq if call.wide else dq.astype(query.dtype)
    else:
        blocks = tiles.get("queries") or config.queries_blocks(head_dim, call.ids)
        for plan, add, table in plans(blocks, False):
            part = dataclasses.replace(options, stages=blocks.stages, add=add)
            with jax.named_scope(f"dilated_queries_gradient_{'_'.join(map(str, plan.rates))}"):
                # Rounded after each launch: most queries take part in one or two branches.
                dq = backward.queries_gradient(
                    plan, part, table, arrays, lse, delta, dq, out_dtype=query.dtype, **shared
                )
        blocks, dtype = keys_dtype(
            lambda size: tiles.get("keys") or config.keys_blocks(head_dim, call.ids, size)
        )
        for plan, add, table in plans(blocks, True):
            part = dataclasses.replace(
                options, stages=blocks.stages, stagings=blocks.stagings, add=add
            )
            with jax.named_scope(f"dilated_keys_gradient_{'_'.join(map(str, plan.rates))}"):
                dk, dv = backward_keys.keys_gradient(
                    plan, part, table, arrays, *padded, (dk, dv), out_dtype=dtype, **shared
                )
    if not call.wide:
        dk, dv = dk.astype(key.dtype), dv.astype(value.dtype)
    return dq[:, : sizes.T, :, columns], dk[:, : sizes.S, :, columns], dv[:, : sizes.S, :, columns]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    call: Call, query: Any, key: Any, value: Any, carry: Any, ids: Any, starts: Any, seed: Any
) -> tuple[jax.Array, jax.Array]:
    # Kernels count in int32; with 64-bit integers as the default they would mix the two.
    with jax.enable_x64(False):
        return _run_forward(call, query, key, value, carry, ids, starts, seed)


def _attend_fwd(call: Call, *arrays: Any) -> tuple[Any, Any]:
    out, lse = _attend(call, *arrays)
    return (out, lse), (arrays, out, lse)


def _attend_bwd(call: Call, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    (query, key, value, carry, ids, starts, seed), out, lse = residuals
    do, dlse = cotangents
    do32 = do.astype(jnp.float32)
    seen = lse > -jnp.inf
    delta = (do32 * out.astype(jnp.float32)).sum(-1) - jnp.where(seen, dlse, 0.0)
    with jax.enable_x64(False):
        dq, dk, dv = _run_backward(call, query, key, value, do, lse, delta, ids, starts, seed)
    d_carry = None
    if carry is not None:
        old_out, old_lse = carry
        share = jnp.where(old_lse > -jnp.inf, jnp.exp(old_lse - jnp.where(seen, lse, 0.0)), 0.0)
        d_out = share[..., None] * do32
        d_lse = share * ((do32 * old_out.astype(jnp.float32)).sum(-1) - delta)
        d_carry = (d_out.astype(old_out.dtype), d_lse.astype(old_lse.dtype))
    return dq, dk, dv, d_carry, None, None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
