"""The forward kernel: one online softmax over all visits of a tile of queries."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import schedule
from pallas_kernels.compat import (
    COLUMN,
    ROW,
    TILE,
    accumulate,
    aligned_rows,
    filled,
    launch,
    load,
    load_shared,
    named_barrier,
    pl,
    plgpu,
    product,
    shared_tile,
    store,
)

LOG2E = math.log2(math.e)
ROWS = 64
CONSUMERS = 2
# First of two numbered hardware barriers; Mosaic's own allocation starts from 0.
TURN = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options of the forward kernel beside its `schedule.Launch`."""

    scale: float
    stages: int
    group: int
    carry: bool
    ids: bool
    rate: float
    interpret: bool


def _softmax(s: jax.Array, m: jax.Array, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One online softmax step in base 2: (p, new row maximum, factor for what was summed)."""
    top = jnp.maximum(m, s.max(axis=1) * scale)
    # A row that has seen nothing yet has maximum -inf; its exponents must not become NaN.
    safe = jnp.where(top == -jnp.inf, 0.0, top)
    p = jnp.exp2(s * scale - lax.broadcast_in_dim(safe, s.shape, [0]))
    return p, top, jnp.exp2(m - safe)


def _body(plan: schedule.Launch, opt: Options, keep: Any, *refs: Any) -> None:
    views = sorted(set(plan.rates))
    it = iter(refs)
    items, geometry, seed_ref = (next(it) for _ in range(3))
    q_ref = next(it)
    k_refs = {r: next(it) for r in views}
    v_refs = {r: next(it) for r in views}
    q_ids = next(it) if opt.ids else None
    k_ids = {r: next(it) for r in views} if opt.ids else {}
    out_ref, lse_ref = next(it), next(it)
    q_smem, k_smem, v_smem, o_smem, id_smem, p_smem = (next(it) for _ in range(6))
    q_ready, k_ready, v_ready, c_ready, q_free, k_free, v_free = it

    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    count = items[cta, 0, 0]
    branches = len(plan.rates)
    bkv = plan.block_away
    head_dim = q_smem.shape[-1]

    def consume() -> None:
        plgpu.set_max_registers(240, action="increase")

        # The two warpgroups alternate: while one uses the tensor cores the other does its
        # softmax. Turns are passed on numbered barriers, which the interpreter does not have.
        def pass_turn() -> None:
            if not opt.interpret:
                named_barrier("arrive", TURN + 1 - wg, CONSUMERS * 128)

        def await_turn() -> None:
            if not opt.interpret:
                named_barrier("sync", TURN + wg, CONSUMERS * 128)

        def kv_step(j: Any, state: Any, v: schedule.Visit, drop: Any, total: Any, rows: Any) -> Any:
            acc, m, mass, n = state
            slot = lax.rem(n, jnp.int32(opt.stages))
            start = v.first + j * bkv
            s = product(q_smem.at[wg], k_smem.at[slot].transpose((1, 0)), (ROWS, bkv), pass_turn)
            ids = None
            if opt.ids:
                ids = load(id_smem.at[slot], COLUMN)
            plgpu.barrier_arrive(k_free.at[slot])
            g_rows, low, high, id_rows = rows

            def columns() -> Any:
                iota = plgpu.broadcasted_iota(jnp.int32, (ROWS, bkv), 1, layout=TILE)
                return iota + (start + v.away_shift)

            def masked() -> jax.Array:
                seen = schedule.visible(plan, v.length, g_rows, columns(), v.limit + v.away_shift)
                return jnp.where(seen, s, -jnp.inf)

            first, last = start + v.away_shift, start + v.away_shift + bkv
            edge = (first < low) | (last > high) | (start + bkv > v.limit)
            s = lax.cond(edge, masked, lambda: s)
            if opt.ids:
                a = lax.broadcast_in_dim(id_rows, s.shape, [0])
                c = lax.broadcast_in_dim(ids, s.shape, [1])
                s = jnp.where((a == c) & (c != 0), s, -jnp.inf)
            p, m, alpha = _softmax(s, m, opt.scale)
            acc *= lax.broadcast_in_dim(alpha, acc.shape, [0])
            mass = mass * alpha + p.sum(axis=1)
            if opt.rate:
                seed = (seed_ref[0], seed_ref[1])
                at = (*drop, start)
                p = jnp.where(schedule.kept(plan, keep, opt.rate, seed, v, at, p.shape), p, 0.0)
            p16 = p.astype(q_smem.dtype)
            acc, mass, m, p16 = lax.optimization_barrier((acc, mass, m, p16))
            plgpu.barrier_wait(v_ready.at[slot])
            await_turn()

            def await_next() -> None:
                @pl.when(n + 1 < total)
                def _() -> None:
                    plgpu.barrier_wait(k_ready.at[lax.rem(n + 1, jnp.int32(opt.stages))])

            staging = None if p_smem is None else p_smem.at[wg]
            acc = accumulate(acc, p16, v_smem.at[slot], staging, await_next)
            plgpu.barrier_arrive(v_free.at[slot])
            return acc, m, mass, n + 1

        def one_item(t: Any, state: Any) -> Any:
            base, (code, mask, steps) = state
            # Read early: the next tile must not start by waiting for memory.
            following = schedule.entry(items, cta, t + 1, count)
            b, n, residue, tile, local = schedule.place(plan, geometry, code, plan.heads)
            row = tile * plan.block_home + wg * ROWS
            window = (b, aligned_rows(row, ROWS), local, n)
            if opt.carry:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.copy_gmem_to_smem(out_ref.at[window], o_smem.at[wg], c_ready.at[wg])
            if not schedule.knows_starts(plan):
                total = base
                for branch in range(branches):
                    total += schedule.visit(plan, geometry, branch, mask, residue, tile).steps
            else:
                total = base + steps
            id_rows = None
            if opt.ids:
                id_rows = load(q_ids.at[b, pl.ds(row, ROWS), local], ROW)

            @pl.when(total > base)
            def _() -> None:
                plgpu.barrier_wait(q_ready.at[wg])
                plgpu.barrier_wait(k_ready.at[lax.rem(base, jnp.int32(opt.stages))])
                pl.when(wg == 1)(await_turn)

            def one_branch(branch: Any, state: Any) -> Any:
                v = schedule.visit(plan, geometry, branch, mask, residue, tile)
                iota = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
                g_rows = (iota + row) * v.home_step + v.home_shift
                g_first = row * v.home_step + v.home_shift
                _, high = schedule.row_bounds(plan, v.length, g_first)
                low, _ = schedule.row_bounds(plan, v.length, g_first + (ROWS - 1) * v.home_step)
                rows = (g_rows, low, high, id_rows)
                step = functools.partial(
                    kv_step, v=v, drop=(b, n, branch, row), total=total, rows=rows
                )
                return lax.fori_loop(0, v.steps, step, state)

            state = (
                filled((ROWS, head_dim), 0.0, jnp.float32, TILE),
                filled((ROWS,), -jnp.inf, jnp.float32, ROW),
                filled((ROWS,), 0.0, jnp.float32, ROW),
                base,
            )
            if branches == 1:
                acc, m, mass, end = one_branch(0, state)
            else:
                acc, m, mass, end = lax.fori_loop(0, branches, one_branch, state)

            @pl.when(end > base)
            def _() -> None:
                pl.when(wg == 0)(pass_turn)
                plgpu.barrier_arrive(q_free.at[wg])

            finish(acc, m, mass, window, lse_ref.at[b, n, pl.ds(row, ROWS), local])
            return end, following

        def finish(acc: Any, m: Any, mass: Any, window: Any, lse_at: Any) -> None:
            if opt.rate:
                acc = acc * (1.0 / (1.0 - opt.rate))
            if opt.carry:
                plgpu.barrier_wait(c_ready.at[wg])
                old = load(lse_at, ROW) * LOG2E
                top = jnp.maximum(m, old)
                safe = jnp.where(top == -jnp.inf, 0.0, top)
                ours, theirs = jnp.exp2(m - safe), jnp.exp2(old - safe)
                previous = load_shared(o_smem.at[wg], TILE).astype(jnp.float32)
                theirs_tile = lax.broadcast_in_dim(theirs, acc.shape, [0])
                # What lies under an lse of -inf was never written and may be NaN.
                previous = jnp.where(theirs_tile > 0.0, previous * theirs_tile, 0.0)
                acc = acc * lax.broadcast_in_dim(ours, acc.shape, [0]) + previous
                m, mass = top, mass * ours + theirs
            inverse = jnp.where(mass > 0.0, 1.0 / mass, 0.0)
            out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
            if not opt.carry:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            o_smem.at[wg][...] = out.astype(o_smem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem.at[wg], out_ref.at[window])
            store(lse_at, jnp.where(mass > 0.0, (m + jnp.log2(mass)) * (1.0 / LOG2E), -jnp.inf))

        first = schedule.entry(items, cta, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), first))
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        plgpu.set_max_registers(24, action="decrease")

        def one_item(t: Any, state: Any) -> Any:
            fill, queries = state
            code, mask, _ = schedule.entry(items, cta, t, count)
            b, n, residue, tile, local = schedule.place(plan, geometry, code, plan.heads)
            kv_head = lax.div(n, jnp.int32(opt.group))

            def load_queries() -> None:
                for i in range(CONSUMERS):

                    @pl.when(queries > 0)
                    def _(i: int = i) -> None:
                        plgpu.barrier_wait(q_free.at[i])

                    rows = aligned_rows(tile * plan.block_home + i * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(
                        q_ref.at[b, rows, local, n], q_smem.at[i], q_ready.at[i]
                    )

            begin = fill
            for branch in range(branches):
                v = schedule.visit(plan, geometry, branch, mask, residue, tile)
                rate = plan.rates[branch]

                def step(j: Any, n_fill: Any, v: Any = v, rate: int = rate) -> Any:
                    slot = lax.rem(n_fill, jnp.int32(opt.stages))
                    rows = aligned_rows(v.first + j * bkv, bkv)
                    window = (b, rows, v.away_residue, kv_head)
                    reused = n_fill >= opt.stages
                    pl.when(reused)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    k_ref, v_ref = k_refs[rate], v_refs[rate]
                    plgpu.copy_gmem_to_smem(k_ref.at[window], k_smem.at[slot], k_ready.at[slot])
                    if opt.ids:
                        plgpu.copy_gmem_to_smem(
                            k_ids[rate].at[b, v.away_residue, rows],
                            id_smem.at[slot],
                            k_ready.at[slot],
                        )
                    pl.when(n_fill == begin)(load_queries)
                    pl.when(reused)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    plgpu.copy_gmem_to_smem(v_ref.at[window], v_smem.at[slot], v_ready.at[slot])
                    return n_fill + 1

                fill = lax.fori_loop(0, v.steps, step, fill)
            return fill, queries + jnp.where(fill > begin, 1, 0)

        lax.fori_loop(0, count, one_item, (jnp.int32(0), jnp.int32(0)))

    pl.when(wg < CONSUMERS)(consume)
    pl.when(wg == CONSUMERS)(produce)


def view(x: jax.Array, rate: int) -> jax.Array:
    """`[B, T, ...]` seen as `[B, T / rate, rate, ...]`."""
    return x.reshape(x.shape[0], x.shape[1] // rate, rate, *x.shape[2:])


def forward(
    plan: schedule.Launch,
    opt: Options,
    table: np.ndarray,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array | None,
    lse: jax.Array | None,
    *,
    out_dtype: Any,
    lse_shape: tuple[int, int, int],
    starts: jax.Array,
    seed: jax.Array,
    q_ids: jax.Array | None = None,
    k_ids: jax.Array | None = None,
    keep: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs one launch.

    query [B, T', N, H], key and value [B, S', K, H], lengths already multiples of 8 x stride.
    out [B, T', N, H] and lse [B, N, rows] are continued from and updated when opt.carry; otherwise
    they are created. Returns them.
    """
    views = sorted(set(plan.rates))
    head_dim, dtype = query.shape[-1], query.dtype
    geometry = jnp.asarray(schedule.geometry(plan, starts))
    operands = [jnp.asarray(table), geometry, seed, view(query, plan.stride)]
    operands += [view(key, r) for r in views]
    operands += [view(value, r) for r in views]
    if opt.ids:
        operands += [view(q_ids, plan.stride)]
        operands += [view(k_ids, r).swapaxes(1, 2) for r in views]
    out_view = (query.shape[0], query.shape[1] // plan.stride, plan.stride, *query.shape[2:])
    lse_view = (*lse_shape[:2], lse_shape[2] // plan.stride, plan.stride)
    bkv, stages = plan.block_away, opt.stages
    pairs = CONSUMERS
    scratch = [
        shared_tile((pairs, ROWS, head_dim), dtype),
        shared_tile((stages, bkv, head_dim), dtype),
        shared_tile((stages, bkv, head_dim), dtype),
        shared_tile((pairs, ROWS, head_dim), out_dtype),
        plgpu.SMEM((stages, bkv), jnp.int32) if opt.ids else None,
        shared_tile((pairs, ROWS, bkv), dtype) if opt.interpret else None,
        plgpu.Barrier(num_barriers=pairs),
        plgpu.Barrier(num_barriers=stages, num_arrivals=2 if opt.ids else 1),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=pairs),
        plgpu.Barrier(num_barriers=pairs),
        plgpu.Barrier(num_barriers=stages, num_arrivals=pairs),
        plgpu.Barrier(num_barriers=stages, num_arrivals=pairs),
    ]
    args: dict[str, Any] = {}
    if opt.carry:
        args["inplace"] = [out.reshape(out_view), lse.reshape(lse_view)]
        types = []
    else:
        types = [
            jax.ShapeDtypeStruct(out_view, out_dtype),
            jax.ShapeDtypeStruct(lse_view, jnp.float32),
        ]
    out, lse = launch(
        functools.partial(_body, plan, opt, keep),
        operands,
        types,
        scratch,
        ctas=table.shape[0],
        threads=CONSUMERS + 1,
        name="dilated_forward",
        **args,
    )
    return out.reshape(query.shape), lse.reshape(lse_shape)
