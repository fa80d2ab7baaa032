"""The backward kernel for keys and values over transposed block lists."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import block_lists, block_schedule
from pallas_kernels.block_backward import add_parts, write_tile
from pallas_kernels.block_forward import LOG2E
from pallas_kernels.block_lists import TILE_ROWS
from pallas_kernels.block_schedule import Options
from pallas_kernels.block_scores import kept, masked_scores
from pallas_kernels.block_walk import away_rows, walk
from pallas_kernels.compat import (
    COLUMN,
    ROW,
    add_product,
    aligned_rows,
    launch,
    load,
    pl,
    plgpu,
    product,
    shared_tile,
)
from pallas_kernels.config import CONSUMERS, ROWS


def _body(plan: block_schedule.Plan, opt: Options, keep: Any, *refs: Any) -> None:
    it = iter(refs)
    items, entries, starts_ref, seed_ref = (next(it) for _ in range(4))
    k_ref, v_ref, q_ref, do_ref, lse_ref, delta_ref = (next(it) for _ in range(6))
    k_marks, q_marks = opt.marks.take(it), opt.marks.take(it)
    dk_ref, dv_ref = next(it), next(it)
    part_dk, part_dv = (next(it), next(it)) if plan.parts else (None, None)
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem = (next(it) for _ in range(6))
    out_smem, mark_smem, p_smem = (next(it) for _ in range(3))
    k_ready, q_ready, do_ready, k_free, q_free, do_free = it

    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    count, bq, head_dim = items[cta, 0, 0], plan.away, k_smem.shape[-1]
    shape, dtype = (ROWS, bq), k_smem.dtype
    of_lane = functools.partial(block_schedule.of_lane, plan)

    def consume() -> None:
        plgpu.set_max_registers(240, action="increase")
        starts = (starts_ref[0], starts_ref[1])
        shift = starts[1] - starts[0]

        def one_item(t: Any, state: Any) -> Any:
            base, item = state
            following = block_schedule.item(items, cta, t + 1, count)
            b, kv_head, tile = block_schedule.place(plan, item.code)
            row = tile * TILE_ROWS + wg * ROWS
            home = opt.marks.of_rows(k_marks, (b, pl.ds(row, ROWS)), ROW)
            pl.when(item.steps > 0)(lambda: plgpu.barrier_wait(k_ready.at[wg]))

            def step(j: Any, i: Any, accs: Any) -> Any:
                dk_acc, dv_acc = accs
                slot = lax.rem(i, jnp.int32(opt.stages))
                entry, start = block_lists.decode(jnp.int32(0)), jnp.int32(0)
                if plan.masks or opt.rate:
                    # Read before the products, needed after them.
                    index, inside = block_schedule.entry_of(plan, j)
                    where = block_schedule.list_place(plan, b, kv_head)
                    at = item.begin + index
                    packed = block_schedule.load_entry(plan, entries, where, at, wg)
                    entry = block_lists.decode(packed)
                    start = entry.block * plan.block + inside
                plgpu.barrier_wait(q_ready.at[slot])
                queries = of_lane(q_smem, wg).at[slot]
                s = product(k_smem.at[wg], queries.transpose((1, 0)), shape, lambda: None)
                lse = load(of_lane(lse_smem, wg).at[slot], COLUMN)
                away = opt.marks.of_slot(of_lane(mark_smem, wg), slot, COLUMN)
                s = masked_scores(plan, s, entry, row, start, shift)
                s = opt.marks.hide(s, home, away, plan.transposed)
                p = jnp.exp2(s * opt.scale - lax.broadcast_in_dim(lse, shape, [1]))
                staging = None if p_smem is None else p_smem.at[wg]
                weight, seen = p, None
                if opt.rate:
                    at = (b, kv_head * opt.group + entry.member, row, start)
                    seen = kept(plan, opt, keep, seed_ref, starts, at, shape, (home, away))
                    weight = jnp.where(seen, p * (1.0 / (1.0 - opt.rate)), 0.0)
                weight = weight.astype(dtype)
                plgpu.barrier_wait(do_ready.at[slot])

                def weigh(dp_acc: Any) -> Any:
                    do = of_lane(do_smem, wg).at[slot]
                    add_product(dv_acc, weight, do, staging)
                    plgpu.wgmma(dp_acc, v_smem.at[wg], do.transpose((1, 0)))
                    return dp_acc[...]

                dp = pl.run_scoped(weigh, plgpu.ACC(shape, jnp.float32))
                plgpu.barrier_arrive(do_free.at[slot])
                pl.when(j + 1 == item.steps)(lambda: plgpu.barrier_arrive(k_free.at[wg]))
                # Loaded only now: a column vector takes as many registers as half a score tile.
                delta = load(of_lane(delta_smem, wg).at[slot], COLUMN)
                if opt.rate:
                    dp = jnp.where(seen, dp * (1.0 / (1.0 - opt.rate)), 0.0)
                ds = (p * (dp - lax.broadcast_in_dim(delta, shape, [1]))).astype(dtype)
                add_product(dk_acc, ds, queries, staging)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(q_free.at[slot])
                return i + 1

            def gradients(dk_acc: Any, dv_acc: Any) -> Any:
                body = functools.partial(step, accs=(dk_acc, dv_acc))
                end = lax.fori_loop(0, item.steps, body, base)
                return dk_acc[...], dv_acc[...], end

            acc = plgpu.ACC((ROWS, head_dim), jnp.float32)
            dk, dv, end = pl.run_scoped(gradients, acc, acc)
            window, out = (b, aligned_rows(row, ROWS), kv_head), out_smem.at[wg]
            write_tile(plan, dv, wg, item.part, out, dv_ref.at[window], part_dv)
            dk = dk * (opt.scale / LOG2E)
            write_tile(plan, dk, wg, item.part, out, dk_ref.at[window], part_dk)
            return end, following

        first = block_schedule.item(items, cta, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), first))
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        plgpu.set_max_registers(24, action="decrease")

        def visit(t: Any, item: Any, carry: Any, loop: Any) -> Any:
            fill, used = carry
            b, kv_head, tile = block_schedule.place(plan, item.code)

            def load_home() -> None:
                for i in range(CONSUMERS):
                    pl.when(used > 0)(lambda i=i: plgpu.barrier_wait(k_free.at[i]))
                    at = (b, aligned_rows(tile * TILE_ROWS + i * ROWS, ROWS), kv_head)
                    plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[i], k_ready.at[i])
                    plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[i], k_ready.at[i])

            def head_of(packed: Any) -> Any:
                member = block_lists.decode(packed).member if opt.group > 1 else 0
                return kv_head * opt.group + member

            def step(j: Any, packed: tuple[Any, ...], i: Any) -> Any:
                slot, reused = lax.rem(i, jnp.int32(opt.stages)), i >= opt.stages
                places = list(zip(away_rows(plan, packed, j), map(head_of, packed), strict=True))
                pl.when(j == 0)(load_home)
                pl.when(reused)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                for lane, (rows, head) in enumerate(places):
                    vector = (b, head, rows)
                    copies = [(q_ref.at[b, rows, head], q_smem)]
                    copies += [(lse_ref.at[vector], lse_smem), (delta_ref.at[vector], delta_smem)]
                    for source, to in copies:
                        to = of_lane(to, lane).at[slot]
                        plgpu.copy_gmem_to_smem(source, to, q_ready.at[slot])
                    rings, ready = of_lane(mark_smem, lane), q_ready.at[slot]
                    opt.marks.bring(q_marks, (b, rows), rings, slot, ready)
                pl.when(reused)(lambda: plgpu.barrier_wait(do_free.at[slot]))
                for lane, (rows, head) in enumerate(places):
                    to, ready = of_lane(do_smem, lane).at[slot], do_ready.at[slot]
                    plgpu.copy_gmem_to_smem(do_ref.at[b, rows, head], to, ready)
                return i + 1

            return loop(step, fill), used + jnp.where(item.steps > 0, 1, 0)

        walk(plan, items, entries, cta, visit)

    pl.when(wg < CONSUMERS)(consume)
    pl.when(wg == CONSUMERS)(produce)


def keys_gradient(
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
) -> tuple[jax.Array, jax.Array]:
    """The gradients `[B, S', K, H]` of padded keys and values; arguments as in `queries_gradient`.

    lse and delta: `[B, N, T']`. marks: int32 `[B, T']` of queries and `[B, rows]` of keys, rows
    whole tiles.
    """
    query, key, value, do = arrays
    head_dim, dtype, bq, stages = query.shape[-1], query.dtype, plan.away, opt.stages
    operands = [jnp.asarray(work.items), jnp.asarray(entries), starts, seed]
    operands += [key, value, query, do, lse, delta, *marks[1], *marks[0]]
    types = [jax.ShapeDtypeStruct(key.shape, dtype)] * 2
    if plan.parts:
        types += [jax.ShapeDtypeStruct((plan.parts, TILE_ROWS, head_dim), jnp.float32)] * 2
    home, lanes = (CONSUMERS, ROWS, head_dim), plan.lanes
    away = block_schedule.ring(plan, stages, head_dim)
    vectors = plgpu.SMEM(away[:-1], jnp.float32)
    scratch = [
        shared_tile(home, dtype),
        shared_tile(home, dtype),
        shared_tile(away, dtype),
        shared_tile(away, dtype),
        vectors,
        vectors,
        shared_tile(home, dtype),
        opt.marks.rings(*block_schedule.ring(plan, stages)),
        shared_tile((CONSUMERS, ROWS, bq), dtype) if opt.interpret else None,
        plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=2),
        plgpu.Barrier(num_barriers=stages, num_arrivals=lanes * (3 + opt.marks.count)),
        plgpu.Barrier(num_barriers=stages, num_arrivals=lanes),
        plgpu.Barrier(num_barriers=CONSUMERS),
        plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
    ]
    dk, dv, *parts = launch(
        functools.partial(_body, plan, opt, keep),
        operands,
        types,
        scratch,
        ctas=work.items.shape[0],
        threads=CONSUMERS + 1,
        name="block_keys_gradient",
        reductions=False,
    )
    if plan.parts:
        dk, dv = (add_parts(plan, work, x, y) for x, y in zip((dk, dv), parts, strict=True))
    return dk, dv
