"""The forward kernel: one online softmax over all visits of a tile of queries."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import config, schedule
from pallas_kernels.compat import (
    COLUMN,
    ROW,
    TILE,
    Sum,
    aligned_rows,
    filled,
    launch,
    load,
    load_shared,
    named_barrier,
    partial_sums,
    pin,
    pl,
    plgpu,
    product,
    product_first,
    shared_tile,
    store,
    total_sums,
    with_sum,
)
from pallas_kernels.config import ROWS
from pallas_kernels.scores import Rows, mask_scores, rows_of, softmax

LOG2E = math.log2(math.e)
# First of two numbered hardware barriers; Mosaic's own allocation starts from 0.
TURN = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options of the forward kernel beside its `schedule.Launch`.

    consumers: warpgroups that compute. overlap: a warpgroup's softmax runs while its last product
    of probabilities and values does, at the price of registers. The others as in `backward`.
    """

    scale: float
    stages: int
    consumers: int
    overlap: bool
    group: int
    carry: bool
    ids: bool
    rate: float
    interpret: bool


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
    q_smem, k_smem, v_smem, o_smem, id_smem, p_smem, sum_smem = (next(it) for _ in range(7))
    q_ready, k_ready, v_ready, c_ready, q_free, k_free, v_free = it

    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    count = items[cta, 0, 0]
    branches, consumers = len(plan.rates), opt.consumers
    bkv = plan.block_away
    head_dim = q_smem.shape[-1]
    dtype = q_smem.dtype

    def slot_of(n: Any) -> Any:
        return lax.rem(n, jnp.int32(opt.stages))

    def consume() -> None:
        plgpu.set_max_registers(config.registers(consumers)[0], action="increase")

        # The warpgroups take turns to give the tensor cores work, so that while one's products
        # run the others do their softmax. Turns are passed on numbered barriers, which the
        # interpreter does not have.
        def pass_turn() -> None:
            if not opt.interpret:
                following = lax.rem(wg + 1, jnp.int32(consumers))
                named_barrier("arrive", TURN + following, 2 * 128)

        def await_turn() -> None:
            if not opt.interpret:
                named_barrier("sync", TURN + wg, 2 * 128)

        def weigh(s: Any, m: Any, n: Any, v: schedule.Visit, j: Any, rows: Rows, at: Any) -> Any:
            """Probabilities of the tile in slot n: (p, p for the product, maximum, factor)."""
            start = v.first + j * bkv
            ids = load(id_smem.at[slot_of(n)], COLUMN) if opt.ids else None
            plgpu.barrier_arrive(k_free.at[slot_of(n)])
            p, m, alpha = softmax(mask_scores(plan, v, rows, start, s, ids), m, opt.scale)
            dropped = p
            if opt.rate:
                seed = (seed_ref[0], seed_ref[1])
                seen = schedule.kept(plan, keep, opt.rate, seed, v, (*at, rows.row, start), p.shape)
                dropped = jnp.where(seen, p, 0.0)
            return p, dropped, m, alpha

        def scores(n: Any, begin_more: Any = None) -> Any:
            left, right = q_smem.at[wg], k_smem.at[slot_of(n)].transpose((1, 0))
            if begin_more is None:
                return product(left, right, (ROWS, bkv), pass_turn)
            return product_first(left, right, (ROWS, bkv), begin_more)

        def first_step(base: Any, total: Any, v: Any, rows: Rows, at: Any) -> Any:
            plgpu.barrier_wait(q_ready.at[wg])
            plgpu.barrier_wait(k_ready.at[slot_of(base)])
            await_turn()
            s = scores(base)
            pl.when(base + 1 == total)(lambda: plgpu.barrier_arrive(q_free.at[wg]))
            nothing = filled((ROWS,), -jnp.inf, jnp.float32, ROW)
            p, dropped, m, _ = weigh(s, nothing, base, v, jnp.int32(0), rows, at)
            return dropped.astype(dtype), m, partial_sums(p, opt.interpret), base + 1

        def step(j: Any, state: Any, acc: Sum, total: Any, v: Any, rows: Rows, at: Any) -> Any:
            """Weighs this tile, and adds the one before."""
            p16, m, mass, n = state
            plgpu.barrier_wait(k_ready.at[slot_of(n)])
            plgpu.barrier_wait(v_ready.at[slot_of(n - 1)])
            await_turn()

            def add_last() -> None:
                acc.add(p16, v_smem.at[slot_of(n - 1)])

            def begin_more() -> None:
                add_last()
                pass_turn()

            if opt.overlap:
                # The softmax runs while the sum does.
                s = scores(n, begin_more)
            else:
                add_last()
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(v_free.at[slot_of(n - 1)])
                s = scores(n)
            # The next tile's queries arrive while this one finishes.
            pl.when(n + 1 == total)(lambda: plgpu.barrier_arrive(q_free.at[wg]))
            p, dropped, m, alpha = weigh(s, m, n, v, j, rows, at)
            mass = mass * alpha + partial_sums(p, opt.interpret)
            dropped, m, mass, alpha = lax.optimization_barrier((dropped, m, mass, alpha))
            if opt.overlap:
                pin(mass, opt.interpret)
            acc.scale(alpha)
            if opt.overlap:
                plgpu.barrier_arrive(v_free.at[slot_of(n - 1)])
            return dropped.astype(dtype), m, mass, n + 1

        def look(base: Any, total: Any, mask: Any, where: Any, at: Any, row: Any, ids: Any) -> Any:
            """(sum, maximum, mass) of the tile; it has at least one step."""

            def visit(branch: Any) -> tuple[schedule.Visit, Rows]:
                v = schedule.visit(plan, geometry, branch, mask, *where)
                return v, rows_of(plan, v, row, ids)

            first = schedule.first_branch(plan, geometry, mask, *where)
            v, rows = visit(first)
            state = first_step(base, total, v, rows, (*at, first))

            def one_branch(branch: Any, state: Any, acc: Sum) -> Any:
                v, rows = visit(branch)
                body = functools.partial(
                    step, acc=acc, total=total, v=v, rows=rows, at=(*at, branch)
                )
                return lax.fori_loop(jnp.where(branch == first, 1, 0), v.steps, body, state)

            def all_branches(acc: Sum) -> Any:
                body = functools.partial(one_branch, acc=acc)
                if branches == 1:
                    p16, m, mass, n = body(0, state)
                else:
                    p16, m, mass, n = lax.fori_loop(0, branches, body, state)
                plgpu.barrier_wait(v_ready.at[slot_of(n - 1)])
                await_turn()
                acc.add(p16, v_smem.at[slot_of(n - 1)])
                pass_turn()
                result = acc.value()
                plgpu.barrier_arrive(v_free.at[slot_of(n - 1)])
                return result, m, total_sums(mass, opt.interpret)

            stand_in = None if p_smem is None else (sum_smem.at[wg], p_smem.at[wg])
            return with_sum(all_branches, (ROWS, head_dim), stand_in)

        def nothing_seen() -> Any:
            return (
                filled((ROWS, head_dim), 0.0, jnp.float32, TILE),
                filled((ROWS,), -jnp.inf, jnp.float32, ROW),
                filled((ROWS,), 0.0, jnp.float32, ROW),
            )

        def one_item(t: Any, state: Any) -> Any:
            base, current = state
            code, mask, _ = current
            # Read early: the next tile must not start by waiting for memory.
            following = schedule.entry(items, cta, t + 1, count)
            b, n, residue, tile, local = schedule.place(plan, geometry, code, plan.heads)
            row = tile * plan.block_home + wg * ROWS
            window = (b, aligned_rows(row, ROWS), local, n)
            lse_at = lse_ref.at[b, n, pl.ds(row, ROWS), local]
            old = None
            if opt.carry:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.copy_gmem_to_smem(out_ref.at[window], o_smem.at[wg], c_ready.at[wg])
                old = load(lse_at, ROW)
            total = base + schedule.known_steps(plan, geometry, current, mask, residue, tile)
            ids = load(q_ids.at[b, pl.ds(row, ROWS), local], ROW) if opt.ids else None
            acc, m, mass = lax.cond(
                total > base,
                lambda: look(base, total, mask, (residue, tile), (b, n), row, ids),
                nothing_seen,
            )
            finish(acc, m, mass, window, lse_at, old)
            return total, following

        def finish(acc: Any, m: Any, mass: Any, window: Any, lse_at: Any, old: Any) -> None:
            if opt.rate:
                acc = acc * (1.0 / (1.0 - opt.rate))
            if opt.carry:
                plgpu.barrier_wait(c_ready.at[wg])
                old = old * LOG2E
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

        pl.when(wg == consumers - 1)(pass_turn)
        first = schedule.entry(items, cta, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), first))
        pl.when(wg == 0)(await_turn)
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        plgpu.set_max_registers(config.registers(consumers)[1], action="decrease")

        def one_item(t: Any, state: Any) -> Any:
            fill, queries, (code, mask, _) = state
            following = schedule.entry(items, cta, t + 1, count)
            b, n, residue, tile, local = schedule.place(plan, geometry, code, plan.heads)
            kv_head = lax.div(n, jnp.int32(opt.group))

            def load_queries() -> None:
                for i in range(consumers):

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
            return fill, queries + jnp.where(fill > begin, 1, 0), following

        first = schedule.entry(items, cta, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), jnp.int32(0), first))

    pl.when(wg < consumers)(consume)
    pl.when(wg == consumers)(produce)


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
    geometry = jnp.asarray(schedule.kernel_table(plan, starts))
    operands = [jnp.asarray(table), geometry, seed, view(query, plan.stride)]
    operands += [view(key, r) for r in views]
    operands += [view(value, r) for r in views]
    if opt.ids:
        operands += [view(q_ids, plan.stride)]
        operands += [view(k_ids, r).swapaxes(1, 2) for r in views]
    out_view = (query.shape[0], query.shape[1] // plan.stride, plan.stride, *query.shape[2:])
    lse_view = (*lse_shape[:2], lse_shape[2] // plan.stride, plan.stride)
    bkv, stages = plan.block_away, opt.stages
    pairs = opt.consumers
    scratch = [
        shared_tile((pairs, ROWS, head_dim), dtype),
        shared_tile((stages, bkv, head_dim), dtype),
        shared_tile((stages, bkv, head_dim), dtype),
        shared_tile((pairs, ROWS, head_dim), out_dtype),
        plgpu.SMEM((stages, bkv), jnp.int32) if opt.ids else None,
        shared_tile((pairs, ROWS, bkv), dtype) if opt.interpret else None,
        plgpu.SMEM((pairs, ROWS, head_dim), jnp.float32) if opt.interpret else None,
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
        threads=pairs + 1,
        name="dilated_forward",
        **args,
    )
    return out.reshape(query.shape), lse.reshape(lse_shape)
