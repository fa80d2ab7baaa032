"""The launches of one call over block lists: forward, and its gradients in one pass or two."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import (
    block_backward,
    block_backward_keys,
    block_forward,
    block_fused,
    block_lists,
    block_schedule,
    config,
)
from pallas_kernels.block_forward import LOG2E
from pallas_kernels.block_lists import TILE_ROWS
from pallas_kernels.marks import Kinds
from pallas_kernels.support import pad, pad_marks, padded_head


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Block lists whose arrays are not traced, compared by content; or only their description."""

    columns: Any = dataclasses.field(compare=False)
    counts: Any = dataclasses.field(compare=False)
    starts: Any = dataclasses.field(compare=False)
    band_index: Any = dataclasses.field(compare=False)
    bands: tuple[tuple[int | None, int | None], ...]
    block_size: int
    longest: int | None
    digest: bytes


@dataclasses.dataclass(frozen=True)
class Call:
    """Everything static about one call of `blocks.attend`.

    With traced lists, `blocks` has no arrays.
    """

    blocks: Blocks
    causal: bool
    scale: float
    rate: float
    keep: Any
    out_dtype: Any
    marks: Kinds
    order: str
    device_kind: str
    interpret: bool
    deterministic: bool
    wide: bool = False  # gradients are added up, so they stay in float32 where they are


def _lists(call: Call, traced: Any) -> Blocks:
    if traced is None:
        return call.blocks
    names = ("columns", "counts", "starts", "band_index")
    arrays = (None if x is None else jnp.asarray(x) for x in traced)
    return dataclasses.replace(call.blocks, **dict(zip(names, arrays, strict=True)))


def _pad_inputs(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Lengths to multiples of 8 and heads of 16, as copies want them."""
    head = padded_head(arrays[0].shape[-1])
    return tuple(pad(pad(x, 1, -(-x.shape[1] // 8) * 8), 3, head) for x in arrays)


def _whole(rows: int) -> int:
    return block_schedule.tiles_of(rows) * TILE_ROWS


def _plan(call: Call, blocks: Any, query: Any, key: Any, away: int, transposed: bool) -> Any:
    T, S = query.shape[1], key.shape[1]
    heads, kv_heads = query.shape[2], key.shape[2]
    home_rows, away_rows = (S, T) if transposed else (T, S)
    return block_schedule.Plan(
        batch=query.shape[0],
        heads=kv_heads if transposed else heads,
        tiles=block_schedule.tiles_of(home_rows),
        away=away,
        steps_per_entry=max(1, blocks.block_size // away),
        width=max(1, away // blocks.block_size),
        home_rows=home_rows,
        away_rows=away_rows,
        bands=block_schedule.bands(blocks, call.causal),
        lanes=config.lanes(blocks.block_size),
        transposed=transposed,
    )


def _work(call: Call, plan: Any, lists: Any, query: Any, key: Any) -> Any:
    other = query if plan.transposed else key
    work = block_schedule.work(
        plan,
        lists,
        ctas=_ctas(call),
        head_bytes=2 * other.shape[1] * other.shape[3] * other.dtype.itemsize,
        group=1 if plan.transposed else query.shape[2] // key.shape[2],
        order=call.order,
    )
    b, n = lists.entries.shape[:2]
    plan = dataclasses.replace(plan, parts=work.owners.shape[0], list_batch=b, list_heads=n)
    return plan, work


def _ctas(call: Call) -> int:
    if call.interpret:
        # The interpreter cannot add to memory that two blocks share.
        return 2 if call.deterministic else 1
    return config.multiprocessors(call.device_kind)


def _options(call: Call, query: Any, key: Any, tiles: config.Blocks) -> block_schedule.Options:
    return block_schedule.Options(
        scale=call.scale * LOG2E,
        stages=tiles.stages,
        overlap=tiles.overlap,
        lazy=tiles.lazy,
        group=query.shape[2] // key.shape[2],
        marks=call.marks,
        rate=call.rate,
        interpret=call.interpret,
    )


@functools.partial(jax.jit, static_argnums=0)
def run_forward(
    call: Call, query: Any, key: Any, value: Any, lists: Any, marks: Any, starts: Any, seed: Any
) -> tuple[jax.Array, jax.Array]:
    """out `[B, T, N, H]` and lse `[B, T, N]`; arguments of `blocks.attend`, checked."""
    T, H = query.shape[1], query.shape[3]
    blocks = _lists(call, lists)
    arrays = _pad_inputs(query, key, value)
    size, bytes_out, count = blocks.block_size, call.out_dtype.itemsize, call.marks.count
    tiles = config.block_forward_blocks(
        arrays[0].shape[-1], size, bytes_out, count, dropout=call.rate > 0.0
    )
    plan = _plan(call, blocks, query, key, tiles.away, False)
    if not (plan.masks or count or call.rate):
        whole = config.block_forward_blocks(arrays[0].shape[-1], size, bytes_out, 0, whole=True)
        larger = _plan(call, blocks, query, key, whole.away, False)
        tiles, plan = (tiles, plan) if larger.masks else (whole, larger)
    found = block_lists.for_queries(blocks, plan.tiles, plan.width)
    plan, work = _work(call, plan, found, arrays[0], arrays[1])
    with jax.named_scope("block_forward"):
        out, lse = block_forward.forward(
            plan,
            _options(call, query, key, tiles),
            work,
            found.entries,
            arrays,
            out_dtype=call.out_dtype,
            starts=starts,
            seed=seed,
            marks=pad_marks(marks, _whole(T), arrays[1].shape[1]),
            keep=call.keep,
        )
    return out[:, :T, :, :H], lse[:, :, :T].swapaxes(1, 2)


@functools.partial(jax.jit, static_argnums=0)
def run_backward(
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    do: Any,
    lse: Any,
    delta: Any,
    lists: Any,
    marks: Any,
    starts: Any,
    seed: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value for the total lse and delta `[B, T, N]`."""
    T, S, H = query.shape[1], key.shape[1], query.shape[3]
    blocks = _lists(call, lists)
    arrays = _pad_inputs(query, key, value, do.astype(query.dtype))
    padded_T, padded_S = arrays[0].shape[1], arrays[1].shape[1]
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E).swapaxes(1, 2)
    lse = pad(lse, 2, _whole(T), jnp.inf)
    delta = pad(delta.swapaxes(1, 2), 2, _whole(T))
    shared = {"starts": starts, "seed": seed, "keep": call.keep}
    head_dim, size = arrays[0].shape[-1], blocks.block_size
    narrow = (lse[:, :, :padded_T], delta[:, :, :padded_T])
    count = call.marks.count
    fused = None if call.deterministic else config.block_fused_blocks(head_dim, size, count)

    def prepared(tiles: Any, transposed: bool) -> tuple[Any, ...]:
        plan = _plan(call, blocks, query, key, tiles.away, transposed)
        if transposed:
            found = block_lists.for_keys(blocks, plan.tiles, query.shape[2], key.shape[2])
        else:
            found = block_lists.for_queries(blocks, plan.tiles)
        plan, work = _work(call, plan, found, arrays[0], arrays[1])
        return plan, _options(call, query, key, tiles), work, found.entries, arrays

    by_keys = {"marks": pad_marks(marks, padded_T, _whole(S)), **shared}
    if fused is not None:
        with jax.named_scope("block_gradients"):
            dq, dk, dv = block_fused.gradients(*prepared(fused, True), *narrow, **by_keys)
        dq = dq.swapaxes(1, 2) * call.scale
        dq = dq if call.wide else dq.astype(query.dtype)
        return dq[:, :T, :, :H], dk[:, :S, :, :H], dv[:, :S, :, :H]
    tiles = config.block_queries_blocks(head_dim, size, count)
    with jax.named_scope("block_queries_gradient"):
        own = pad_marks(marks, _whole(T), padded_S)
        dq = block_backward.queries_gradient(
            *prepared(tiles, False), lse, delta, marks=own, **shared
        )
    tiles = config.block_keys_blocks(head_dim, size, count)
    with jax.named_scope("block_keys_gradient"):
        dk, dv = block_backward_keys.keys_gradient(*prepared(tiles, True), *narrow, **by_keys)
    return dq[:, :T, :, :H], dk[:, :S, :, :H], dv[:, :S, :, :H]
