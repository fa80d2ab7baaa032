"""The backward kernel for queries over block lists, for the total lse of each row."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import block_lists, block_schedule
from pallas_kernels.block_forward import LOG2E, split_rows
from pallas_kernels.block_lists import TILE_ROWS
from pallas_kernels.block_schedule import Options
from pallas_kernels.block_scores import kept, masked_scores
from pallas_kernels.block_walk import away_rows, walk
from pallas_kernels.compat import (
    COLUMN,
    ROW,
    TILE,
    accumulate,
    aligned_rows,
    filled,
    launch,
    load,
    pl,
    plgpu,
    shared_tile,
    store,
)
from pallas_kernels.config import CONSUMERS, ROWS


def write_tile(
    plan: block_schedule.Plan, tile: jax.Array, wg: Any, part: Any, smem: Any, ref: Any, parts: Any
) -> None:
    """Writes one warpgroup's gradient: to its place, or as a part of a split row in float32."""

    def whole() -> None:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        smem[...] = tile.astype(smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, ref)

    if not plan.parts:
        whole()
        return
    pl.when(part < 0)(whole)
    pl.when(part >= 0)(lambda: store(parts.at[part, pl.ds(wg * ROWS, ROWS)], tile))


def add_parts(plan: block_schedule.Plan, work: Any, grad: jax.Array, parts: Any) -> jax.Array:
    """Writes the gradients of split rows: the sum of their parts."""
    batch, head, positions, mine = split_rows(plan, work)
    # Parts of nobody were never written and may be NaN.
    parts = jnp.where(mine.any(0)[:, None, None], parts, 0.0)
    weights = mine.astype(jnp.float32)
    total = jnp.einsum("rp,pqh->rqh", weights, parts, precision=lax.Precision.HIGHEST)
    return grad.at[batch, positions, head].set(total.astype(grad.dtype), mode="drop")


def _body(plan: block_schedule.Plan, opt: Options, keep: Any, *refs: Any) -> None:
    it = iter(refs)
    items, entries, starts_ref, seed_ref = (next(it) for _ in range(4))
    q_ref, do_ref, lse_ref, delta_ref, k_ref, v_ref = (next(it) for _ in range(6))
    q_marks, k_marks = opt.marks.take(it), opt.marks.take(it)
    dq_ref = next(it)
    part_dq = next(it) if plan.parts else None
    q_smem, do_smem, k_smem, v_smem, dq_smem, mark_smem, ds_smem = (next(it) for _ in range(7))
    q_ready, k_ready, v_ready, q_free, k_free, v_free = it

    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    count, bkv, head_dim = items[cta, 0, 0], plan.away, q_smem.shape[-1]
    shape, of_lane = (ROWS, bkv), functools.partial(block_schedule.of_lane, plan)

    def consume() -> None:
        plgpu.set_max_registers(240, action="increase")
        starts = (starts_ref[0], starts_ref[1])
        shift = starts[0] - starts[1]

        def one_item(t: Any, state: Any) -> Any:
            base, item = state
            following = block_schedule.item(items, cta, t + 1, count)
            b, n, tile = block_schedule.place(plan, item.code)
            row = tile * TILE_ROWS + wg * ROWS
            lse = load(lse_ref.at[b, n, pl.ds(row, ROWS)], ROW)
            delta = load(delta_ref.at[b, n, pl.ds(row, ROWS)], ROW)
            home = opt.marks.of_rows(q_marks, (b, pl.ds(row, ROWS)), ROW)
            pl.when(item.steps > 0)(lambda: plgpu.barrier_wait(q_ready.at[wg]))

            def step(j: Any, state: Any) -> Any:
                dq, i = state
                slot = lax.rem(i, jnp.int32(opt.stages))
                entry, start = block_lists.decode(jnp.int32(0)), jnp.int32(0)
                if plan.masks or opt.rate:
                    # Read before the products, needed after them.
                    index, inside = block_schedule.entry_of(plan, j)
                    where = block_schedule.list_place(plan, b, n)
                    at = item.begin + index
                    packed = block_schedule.load_entry(plan, entries, where, at, wg)
                    entry = block_lists.decode(packed)
                    start = entry.block * plan.block + inside
                plgpu.barrier_wait(k_ready.at[slot])
                plgpu.barrier_wait(v_ready.at[slot])

                keys, values = (of_lane(x, wg).at[slot] for x in (k_smem, v_smem))

                def scores(s_acc: Any, dp_acc: Any) -> Any:
                    plgpu.wgmma(s_acc, q_smem.at[wg], keys.transpose((1, 0)))
                    plgpu.wgmma(dp_acc, do_smem.at[wg], values.transpose((1, 0)))
                    plgpu.wgmma_wait(1)
                    return s_acc[...], dp_acc[...]

                acc = plgpu.ACC(shape, jnp.float32)
                s, dp = pl.run_scoped(scores, acc, acc)
                away = opt.marks.of_slot(of_lane(mark_smem, wg), slot, COLUMN)
                plgpu.barrier_arrive(v_free.at[slot])
                pl.when(j + 1 == item.steps)(lambda: plgpu.barrier_arrive(q_free.at[wg]))
                s = masked_scores(plan, s, entry, row, start, shift)
                s = opt.marks.hide(s, home, away, plan.transposed)
                p = jnp.exp2(s * opt.scale - lax.broadcast_in_dim(lse, shape, [0]))
                if opt.rate:
                    place, marks = (b, n, row, start), (home, away)
                    seen = kept(plan, opt, keep, seed_ref, starts, place, shape, marks)
                    dp = jnp.where(seen, dp * (1.0 / (1.0 - opt.rate)), 0.0)
                ds = p * (dp - lax.broadcast_in_dim(delta, shape, [0]))
                staging = None if ds_smem is None else ds_smem.at[wg]
                dq = accumulate(dq, ds.astype(q_smem.dtype), keys, staging)
                plgpu.barrier_arrive(k_free.at[slot])
                return dq, i + 1

            dq = filled((ROWS, head_dim), 0.0, jnp.float32, TILE)
            dq, end = lax.fori_loop(0, item.steps, step, (dq, base))
            window = (b, aligned_rows(row, ROWS), n)
            dq = dq * (opt.scale / LOG2E)
            write_tile(plan, dq, wg, item.part, dq_smem.at[wg], dq_ref.at[window], part_dq)
            return end, following

        first = block_schedule.item(items, cta, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), first))
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        plgpu.set_max_registers(24, action="decrease")

        def visit(t: Any, item: Any, carry: Any, loop: Any) -> Any:
            fill, used = carry
            b, n, tile = block_schedule.place(plan, item.code)
            kv_head = lax.div(n, jnp.int32(opt.group))

            def load_home() -> None:
                for i in range(CONSUMERS):
                    pl.when(used > 0)(lambda i=i: plgpu.barrier_wait(q_free.at[i]))
                    at = (b, aligned_rows(tile * TILE_ROWS + i * ROWS, ROWS), n)
                    plgpu.copy_gmem_to_smem(q_ref.at[at], q_smem.at[i], q_ready.at[i])
                    plgpu.copy_gmem_to_smem(do_ref.at[at], do_smem.at[i], q_ready.at[i])

            def step(j: Any, packed: tuple[Any, ...], i: Any) -> Any:
                slot, reused = lax.rem(i, jnp.int32(opt.stages)), i >= opt.stages
                rows = away_rows(plan, packed, j)
                pl.when(reused)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                for lane, at in enumerate(rows):
                    to, ready = of_lane(k_smem, lane).at[slot], k_ready.at[slot]
                    plgpu.copy_gmem_to_smem(k_ref.at[b, at, kv_head], to, ready)
                    opt.marks.bring(k_marks, (b, at), of_lane(mark_smem, lane), slot, ready)
                pl.when(j == 0)(load_home)
                pl.when(reused)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                for lane, at in enumerate(rows):
                    to, ready = of_lane(v_smem, lane).at[slot], v_ready.at[slot]
                    plgpu.copy_gmem_to_smem(v_ref.at[b, at, kv_head], to, ready)
                return i + 1

            return loop(step, fill), used + jnp.where(item.steps > 0, 1, 0)

        walk(plan, items, entries, cta, visit)

    pl.when(wg < CONSUMERS)(consume)
    pl.when(wg == CONSUMERS)(produce)


def queries_gradient(
    plan: block_schedule.Plan,
    opt: Options,
    work: block_schedule.Work,
    entries: Any,
    arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    lse: jax.Array,
    delta: jax.Array,
    *,
    starts: jax.Array,
    seed: jax.Array,
    marks: tuple[Sequence[jax.Array], Sequence[jax.Array]],
    keep: Any,
) -> jax.Array:
    """The queries' gradient `[B, T', N, H]` of padded query, key, value and do.

    lse (base 2, +inf where a row sees nothing) and delta: float32 `[B, N, rows]`, rows whole tiles.
    """
    query, key, value, do = arrays
    head_dim, dtype, lanes, stages = query.shape[-1], query.dtype, plan.lanes, opt.stages
    operands = [jnp.asarray(work.items), jnp.asarray(entries), starts, seed]
    operands += [query, do, lse, delta, key, value, *marks[0], *marks[1]]
    types = [jax.ShapeDtypeStruct(query.shape, dtype)]
    if plan.parts:
        types += [jax.ShapeDtypeStruct((plan.parts, TILE_ROWS, head_dim), jnp.float32)]
    home, away = (CONSUMERS, ROWS, head_dim), block_schedule.ring(plan, stages, head_dim)
    scratch = [
        shared_tile(home, dtype),
        shared_tile(home, dtype),
        shared_tile(away, dtype),
        shared_tile(away, dtype),
        shared_tile(home, dtype),
        opt.marks.rings(*block_schedule.ring(plan, stages)),
        shared_tile((CONSUMERS, ROWS, plan.away), dtype) if opt.interpret else None,
        plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=2),
        plgpu.Barrier(num_barriers=stages, num_arrivals=lanes * (1 + opt.marks.count)),
        plgpu.Barrier(num_barriers=stages, num_arrivals=lanes),
        plgpu.Barrier(num_barriers=CONSUMERS),
        plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
    ]
    dq, *parts = launch(
        functools.partial(_body, plan, opt, keep),
        operands,
        types,
        scratch,
        ctas=work.items.shape[0],
        threads=CONSUMERS + 1,
        name="block_queries_gradient",
    )
    return add_parts(plan, work, dq, *parts) if plan.parts else dq
