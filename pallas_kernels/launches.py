"""The launches of one call of dilated attention: forward, and its gradients in one pass or two."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    backward,
    backward_fused,
    backward_keys,
    config,
    forward,
    schedule,
    work_lists,
)
from pallas_kernels.copies import copies_boxes
from pallas_kernels.marks import Kinds
from pallas_kernels.support import pad, pad_marks, padded_head, tile_columns

LOG2E = math.log2(math.e)


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
    marks: Kinds
    device_kind: str
    interpret: bool
    deterministic: bool
    wide: bool = False
    tiles: tuple[tuple[str, config.Blocks], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """True sizes, and padded ones.

    query_shape, key_shape: (rows, columns) of arrays that tiles are copied from and to. padded_T:
    rows of vectors that are copied, and of the sum of the queries' gradients. rows, key_rows: of
    whole home tiles, for what is read directly. head_dim: columns of tiles.
    """

    T: int
    S: int
    H: int
    query_shape: tuple[int, int]
    key_shape: tuple[int, int]
    padded_T: int
    rows: int
    key_rows: int
    head_dim: int


def _sizes(call: Call, query: jax.Array, key: jax.Array, consumers: int) -> _Sizes:
    multiple = schedule.common_stride(tuple(r for _, r, _, _ in call.branches))
    (T, S), H = (query.shape[1], key.shape[1]), query.shape[-1]
    head_dim = tile_columns(H, call.interpret)
    boxes = copies_boxes(H, call.interpret)

    def whole(length: int, rows: int) -> int:
        return -(-length // (rows * multiple)) * rows * multiple

    rows, columns = (1, H) if boxes else (8, head_dim)
    tile = config.ROWS * consumers
    return _Sizes(
        T,
        S,
        H,
        (whole(T, rows), columns),
        (whole(S, rows), columns),
        whole(T, 8),
        whole(T, tile),
        whole(S, tile),
        head_dim,
    )


def launch_of(
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
    return work_lists.work_lists(
        plan,
        batch=query.shape[0],
        ctas=_blocks(call),
        row_bytes=2 * away.shape[-1] * away.dtype.itemsize,
        group=query.shape[2] // key.shape[2],
        skip_empty=skip,
    )


def _tables(call: Call, plans: list[schedule.Launch], query: Any, key: Any, carry: bool) -> Any:
    """(plan, whether it continues what others left, its work lists) of launches in order.

    carry: whether the first one does. Lists of a series are of one shape.
    """
    continues = [carry or number > 0 for number in range(len(plans))]
    tables = [
        _table(call, plan, query, key, skip) for plan, skip in zip(plans, continues, strict=True)
    ]
    items = max((t.shape[1] for p, t in zip(plans, tables, strict=True) if p.series), default=0)
    for plan, skip, table in zip(plans, continues, tables, strict=True):
        more = items - table.shape[1] if plan.series else 0
        yield plan, skip, np.pad(table, ((0, 0), (0, more), (0, 0)))


def _groups(whole: schedule.Launch) -> list[schedule.Launch]:
    """The launches of all branches."""
    return [config.subset(whole, group) for group in config.partition(whole)]


def _blocks(call: Call) -> int:
    if call.interpret:
        # The interpreter cannot add to memory that two blocks share.
        return 2 if call.deterministic else 1
    return config.multiprocessors(call.device_kind)


def _padded(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """`[B, T, N, H]` with (T', H') in place of (T, H)."""
    rows, columns = shape
    return pad(pad(x, 1, rows), 3, columns)


def _empty(shape: tuple[int, ...], dtype: Any, beside: jax.Array) -> jax.Array:
    """An array that is not written, for each iteration of a loop, and each example, of its own.

    beside: an array that differs in each. To transformations it is as if this came from it: else a
    loop would share one array, and copy it before each kernel that updates it.
    """

    @jax.custom_batching.custom_vmap
    def made(_: Any) -> jax.Array:
        return jax.lax.empty(shape, dtype)

    @made.def_vmap
    def _(size: int, mapped: Any, _: Any) -> tuple[jax.Array, bool]:
        del mapped
        return jax.lax.empty((size, *shape), dtype), True

    return made(beside)


def _rows(x: jax.Array, rows: int, fill: float) -> jax.Array:
    """`[B, T, N]` as `[B, N, rows]`."""
    return pad(x.swapaxes(1, 2), 2, rows, fill)


@functools.partial(jax.jit, static_argnums=0)
def run_forward(
    call: Call, query: Any, key: Any, value: Any, carry: Any, marks: Any, starts: Any, seed: Any
) -> tuple[jax.Array, jax.Array]:
    """out `[B, T, N, H]` and lse `[B, T, N]`; arguments of `attend`, checked."""
    head = tile_columns(query.shape[-1], call.interpret)
    length = min(schedule.rows_of(call.branches, max(query.shape[1], key.shape[1])))
    causal = call.causal or call.marks.causal
    blocks = dict(call.tiles).get("forward") or config.forward_blocks(
        head,
        call.out_dtype.itemsize,
        length,
        causal=causal,
        marks=call.marks.count,
        dropout=call.rate > 0.0,
    )
    sizes = _sizes(call, query, key, blocks.consumers)
    q = _padded(query, sizes.query_shape)
    k, v = (_padded(x, sizes.key_shape) for x in (key, value))
    marks = pad_marks(marks, sizes.rows, sizes.key_rows)
    whole = launch_of(call, q.shape[2], sizes.T, sizes.S, blocks, False)
    out = lse = None
    if carry is not None:
        out = _padded(carry[0].astype(call.out_dtype), sizes.query_shape)
        lse = _rows(carry[1], sizes.rows, -jnp.inf)
    plans, apart = _groups(whole), int(carry is None and config.first_apart(sizes.head_dim))
    rest = schedule.in_series(plans[apart:], q.shape[0] * q.shape[2], call.interpret)
    plans = plans[:apart] + rest
    if plans[0].series and out is None:
        # A series continues what its first launch, too, is handed.
        out = _empty(q.shape, call.out_dtype, q)
        lse = _empty((q.shape[0], q.shape[2], sizes.rows), jnp.float32, q)
    for plan, continues, table in _tables(call, plans, q, k, carry is not None):
        options = forward.Options(
            scale=call.scale * LOG2E,
            stages=blocks.stages,
            consumers=blocks.consumers,
            overlap=blocks.overlap,
            lazy=blocks.lazy,
            group=q.shape[2] // k.shape[2],
            carry=out is not None,
            marks=call.marks,
            rate=call.rate,
            interpret=call.interpret,
        )
        with jax.named_scope(f"dilated_forward_{'_'.join(map(str, plan.rates))}"):
            out, lse = forward.forward(
                plan,
                options,
                table,
                q,
                k,
                v,
                out,
                lse,
                out_dtype=call.out_dtype,
                lse_shape=(q.shape[0], q.shape[2], sizes.rows),
                continues=continues,
                starts=starts,
                seed=seed,
                marks=marks,
                keep=call.keep,
            )
    return out[:, : sizes.T, :, : sizes.H], lse[:, :, : sizes.T].swapaxes(1, 2)


@functools.partial(jax.jit, static_argnums=0)
def run_backward(
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    do: Any,
    lse: Any,
    delta: Any,
    marks: Any,
    starts: Any,
    seed: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value for the total lse and delta `[B, T, N]`."""
    sizes = _sizes(call, query, key, config.CONSUMERS)
    q, do = (_padded(x, sizes.query_shape) for x in (query, do.astype(query.dtype)))
    k, v = (_padded(x, sizes.key_shape) for x in (key, value))
    arrays = (q, k, v, do)
    # A row that sees nothing gives nothing, whatever its output's gradient holds.
    delta = jnp.where(lse == -jnp.inf, 0.0, delta)
    lse = _rows(jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E), sizes.rows, jnp.inf)
    delta = _rows(delta, sizes.rows, 0.0)
    marks = pad_marks(marks, sizes.rows, sizes.key_rows)
    shared = {"starts": starts, "seed": seed, "marks": marks, "keep": call.keep}
    heads, head_dim = query.shape[2], sizes.head_dim
    options = backward.Options(
        scale=call.scale * LOG2E,
        stages=1,
        stagings=1,
        group=heads // key.shape[2],
        add=False,
        marks=call.marks,
        rate=call.rate,
        interpret=call.interpret,
    )

    columns, tiles, count = slice(sizes.H), dict(call.tiles), call.marks.count
    fused = None if call.deterministic else config.fused_blocks(head_dim, count)

    def plans(blocks: config.Blocks, transposed: bool) -> Any:
        found = _groups(launch_of(call, heads, sizes.T, sizes.S, blocks, transposed))
        if fused is not None:
            items = query.shape[0] * key.shape[2]
            found = schedule.in_series(found, items, call.interpret)
        return _tables(call, found, q, k, False)

    def gradients_dtype(blocks_of: Any) -> tuple[Any, Any]:
        """(blocks, dtype of the gradients between launches)."""
        wide = blocks_of(4) if call.wide else None
        if wide is not None:
            return wide, jnp.dtype(jnp.float32)
        # Rounded after each launch: most rows take part in one or two branches.
        return blocks_of(query.dtype.itemsize), jnp.dtype(query.dtype)

    padded = tuple(x[:, :, : sizes.padded_T] for x in (lse, delta))
    dq = dk = dv = None
    if fused is not None:
        blocks, dtype = gradients_dtype(lambda _: tiles.get("fused") or fused)
        shape = (query.shape[0], heads, sizes.padded_T, padded_head(sizes.H))
        dq = jnp.zeros(shape, jnp.float32)
        for plan, continues, table in plans(blocks, True):
            if plan.series and dk is None:
                # A series adds to what its first launch, too, is handed.
                dk, dv = (_empty(x.shape, dtype, x) for x in (k, v))
            part = dataclasses.replace(options, stages=blocks.stages, add=dk is not None)
            with jax.named_scope(f"dilated_gradients_{'_'.join(map(str, plan.rates))}"):
                dq, dk, dv = backward_fused.fused_gradients(
                    plan,
                    part,
                    table,
                    arrays,
                    *padded,
                    (dq, dk, dv),
                    out_dtype=dtype,
                    continues=continues,
                    **shared,
                )
        dq = dq.swapaxes(1, 2) * call.scale
        dq = dq if call.wide else dq.astype(query.dtype)
    else:
        blocks, dtype = gradients_dtype(
            lambda size: tiles.get("queries") or config.queries_blocks(head_dim, count, size)
        )
        for plan, add, table in plans(blocks, False):
            part = dataclasses.replace(options, stages=blocks.stages, add=add)
            with jax.named_scope(f"dilated_queries_gradient_{'_'.join(map(str, plan.rates))}"):
                dq = backward.queries_gradient(
                    plan, part, table, arrays, lse, delta, dq, out_dtype=dtype, **shared
                )
        blocks, dtype = gradients_dtype(
            lambda size: tiles.get("keys") or config.keys_blocks(head_dim, count, size)
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
