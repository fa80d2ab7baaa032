"""The backward kernel for keys and values."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import config, schedule, visits
from pallas_kernels.backward import Options
from pallas_kernels.compat import (
    COLUMN,
    ROW,
    add_product,
    add_to_global,
    aligned_rows,
    launch,
    load,
    pl,
    plgpu,
    product,
    shared_tile,
)
from pallas_kernels.config import ROWS
from pallas_kernels.copies import copy_boxes, piece, piece_columns
from pallas_kernels.forward import by_residue, mark_views, view
from pallas_kernels.forward_results import LOG2E
from pallas_kernels.products import multiply_columns
from pallas_kernels.support import tile_columns


def _keys_body(plan: schedule.Launch, opt: Options, keep: Any, *refs: Any) -> None:
    views = sorted(set(plan.rates))
    it = iter(refs)
    items, part, geometry, _, seed_ref, k_ref, v_ref = (next(it) for _ in range(7))
    q_refs = {r: next(it) for r in views}
    do_refs = {r: next(it) for r in views}
    lse_refs = [next(it) for _ in views]
    delta_refs = [next(it) for _ in views]
    k_marks, q_marks = opt.marks.take(it), [opt.marks.take(it) for _ in views]
    dk_ref, dv_ref = next(it), next(it)
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem = (next(it) for _ in range(6))
    out_smem, mark_smem, p_smem = (next(it) for _ in range(3))
    k_ready, q_ready, do_ready, k_free, q_free, do_free = it

    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    consumers = plan.block_home // ROWS
    count, bq = items[cta, 0, 0], plan.block_away
    kv_heads = plan.heads // opt.group
    rounds = len(plan.rates) * opt.group
    head_dim, (stagings, width) = k_smem.shape[-1], (out_smem.shape[0], out_smem.shape[-1])
    dtype = k_smem.dtype
    copy_boxes(head_dim, opt.interpret)
    multiply_columns(k_ref.shape[-1], opt.interpret)

    def place(entry: Any) -> tuple[Any, ...]:
        return visits.place(plan, geometry, entry[0], kv_heads)

    def visit(branch: Any, head: Any, residue: Any, tile: Any) -> visits.Visit:
        return visits.visit(plan, geometry, branch, part[head, residue], residue, tile)

    def consume() -> None:
        config.set_registers(consumers, computes=True)

        def one_item(t: Any, state: Any) -> Any:
            base, current = state
            following = visits.entry(items, cta, t + 1, count)
            b, kv_head, residue, tile, local = place(current)
            # With starts that are traced the last step is known only when it is over.
            total = base + current[2] if schedule.knows_starts(plan) else base
            row = tile * plan.block_home + wg * ROWS
            window = (b, aligned_rows(row, ROWS), local, kv_head)
            home = opt.marks.of_rows(k_marks, (b, pl.ds(row, ROWS), local), ROW)
            plgpu.barrier_wait(k_ready.at[wg])

            def step(j: Any, i: Any, v: visits.Visit, head: Any, branch: Any, accs: Any) -> Any:
                dk_acc, dv_acc = accs
                slot, start = lax.rem(i, jnp.int32(opt.stages)), v.first + j * bq
                shape = (ROWS, bq)
                plgpu.barrier_wait(q_ready.at[slot])

                s = product(k_smem.at[wg], q_smem.at[slot].transpose((1, 0)), shape, lambda: None)
                lse = load(lse_smem.at[slot], COLUMN)
                away = opt.marks.of_slot(mark_smem, slot, COLUMN)
                low, high = visits.unmasked(plan, v, row, ROWS)
                s = lax.cond(
                    (start < low) | (start > high),
                    lambda: jnp.where(visits.seen_pairs(plan, v, row, start, shape), s, -jnp.inf),
                    lambda: s,
                )
                s = opt.marks.hide(s, home, away, plan.transposed)
                p = jnp.exp2(s * opt.scale - lax.broadcast_in_dim(lse, shape, [1]))
                staging = None if p_smem is None else p_smem.at[wg]
                weight = p
                if opt.rate:
                    seed, at = (seed_ref[0], seed_ref[1]), (b, head, branch, row, start)
                    places = opt.marks.places(home, away)
                    seen = visits.kept(plan, keep, opt.rate, seed, v, at, shape, places)
                    weight = jnp.where(seen, p * (1.0 / (1.0 - opt.rate)), 0.0)
                weight = weight.astype(dtype)
                plgpu.barrier_wait(do_ready.at[slot])

                def weigh(dp_acc: Any) -> Any:
                    add_product(dv_acc, weight, do_smem.at[slot], staging)
                    plgpu.wgmma(dp_acc, v_smem.at[wg], do_smem.at[slot].transpose((1, 0)))
                    return dp_acc[...]

                dp = pl.run_scoped(weigh, plgpu.ACC(shape, jnp.float32))
                plgpu.barrier_arrive(do_free.at[slot])
                # The next tile arrives while this one finishes.
                pl.when(i + 1 == total)(lambda: plgpu.barrier_arrive(k_free.at[wg]))
                # Loaded only now: a column vector takes as many registers as half a score tile.
                delta = load(delta_smem.at[slot], COLUMN)
                if opt.rate:
                    dp = jnp.where(seen, dp * (1.0 / (1.0 - opt.rate)), 0.0)
                ds = (p * (dp - lax.broadcast_in_dim(delta, shape, [1]))).astype(dtype)
                add_product(dk_acc, ds, q_smem.at[slot], staging)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(q_free.at[slot])
                return i + 1

            def one_visit(index: Any, i: Any, accs: Any) -> Any:
                branch = lax.div(index, jnp.int32(opt.group))
                head = kv_head * opt.group + lax.rem(index, jnp.int32(opt.group))
                v = visit(branch, head, residue, tile)
                body = functools.partial(step, v=v, head=head, branch=branch, accs=accs)
                return lax.fori_loop(0, v.steps, body, i)

            def gradients(dk_acc: Any, dv_acc: Any) -> Any:
                body = functools.partial(one_visit, accs=(dk_acc, dv_acc))
                end = body(0, base) if rounds == 1 else lax.fori_loop(0, rounds, body, base)
                return dk_acc[...], dv_acc[...], end

            acc = plgpu.ACC((ROWS, head_dim), jnp.float32)
            dk, dv, end = pl.run_scoped(gradients, acc, acc)
            pl.when((end == base) | (total == base))(lambda: plgpu.barrier_arrive(k_free.at[wg]))
            write(dv, 0, dv_ref, window)
            write(dk * (opt.scale / LOG2E), stagings - 1, dk_ref, window)
            return end, following

        def write(tile: jax.Array, staging: int, ref: Any, window: tuple[Any, ...]) -> None:
            """Writes one warpgroup's tile, or adds it: each place once a launch, so in order."""
            firsts = range(0, head_dim, width)
            plgpu.wait_smem_to_gmem((stagings - 1) * len(firsts), wait_read_only=True)
            smem = out_smem.at[staging, wg]
            for i, first in enumerate(firsts):
                smem.at[i][...] = tile[:, first : first + width].astype(smem.dtype)
            plgpu.commit_smem()
            for i, first in enumerate(firsts):
                at = ref.at[(*window, piece(first, width))]
                if opt.add:
                    add_to_global(smem.at[i], at, opt.interpret)
                else:
                    plgpu.copy_smem_to_gmem(smem.at[i], at)

        first = visits.entry(items, cta, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), first))
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        config.set_registers(consumers, computes=False)
        columns = piece(0, head_dim)

        def one_item(t: Any, state: Any) -> Any:
            fill, current = state
            following = visits.entry(items, cta, t + 1, count)
            b, kv_head, residue, tile, local = place(current)
            for i in range(consumers):
                pl.when(t > 0)(lambda i=i: plgpu.barrier_wait(k_free.at[i]))
                rows = aligned_rows(tile * plan.block_home + i * ROWS, ROWS)
                at = (b, rows, local, kv_head, columns)
                plgpu.copy_gmem_to_smem(k_ref.at[at], k_smem.at[i], k_ready.at[i])
                plgpu.copy_gmem_to_smem(v_ref.at[at], v_smem.at[i], k_ready.at[i])

            def member(m: Any, fill: Any, branch: int) -> Any:
                head, rate = kv_head * opt.group + m, plan.rates[branch]
                v, number = visit(branch, head, residue, tile), plan.away_view(branch)
                lse_ref, delta_ref, ids = lse_refs[number], delta_refs[number], q_marks[number]
                ordered = visits.before(v, lse_ref.shape[-1])

                def step(j: Any, i: Any) -> Any:
                    slot = lax.rem(i, jnp.int32(opt.stages))
                    rows = aligned_rows(v.first + j * bq, bq)
                    at, reused = (b, rows, v.away_residue, head, columns), i >= opt.stages
                    vector = aligned_rows(ordered + v.first + j * bq, bq)
                    pl.when(reused)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                    ready = q_ready.at[slot]
                    plgpu.copy_gmem_to_smem(q_refs[rate].at[at], q_smem.at[slot], ready)
                    plgpu.copy_gmem_to_smem(lse_ref.at[b, head, vector], lse_smem.at[slot], ready)
                    plgpu.copy_gmem_to_smem(
                        delta_ref.at[b, head, vector], delta_smem.at[slot], ready
                    )
                    opt.marks.bring(ids, (b, vector), mark_smem, slot, ready)
                    pl.when(reused)(lambda: plgpu.barrier_wait(do_free.at[slot]))
                    plgpu.copy_gmem_to_smem(
                        do_refs[rate].at[at], do_smem.at[slot], do_ready.at[slot]
                    )
                    return i + 1

                return lax.fori_loop(0, v.steps, step, fill)

            for branch in range(len(plan.rates)):
                body = functools.partial(member, branch=branch)
                fill = lax.fori_loop(0, opt.group, body, fill) if opt.group > 1 else body(0, fill)
            return fill, following

        first = visits.entry(items, cta, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), first))

    pl.when(wg < consumers)(consume)
    pl.when(wg == consumers)(produce)


def operands_of(
    plan: schedule.Launch,
    table: np.ndarray,
    arrays: tuple[jax.Array, ...],
    vectors: tuple[jax.Array, jax.Array],
    starts: jax.Array,
    seed: jax.Array,
    marks: tuple[Sequence[jax.Array], Sequence[jax.Array]],
    continues: bool,
) -> list[jax.Array]:
    """What a kernel with keys at home reads, in order. vectors: lse and delta.

    Marks of queries are cut to the length of those: away vectors of a kernel have one length.
    """
    query, key, value, do = arrays
    part = schedule.participation(plan).astype(np.int32)
    part = np.pad(part, ((0, 0), (0, plan.home_view - part.shape[1])))
    operands = [jnp.asarray(table), jnp.asarray(part)]
    operands += [jnp.asarray(schedule.kernel_table(plan, starts))]
    operands += [jnp.asarray(schedule.words(plan, continues)), seed]
    operands += [view(x, plan.home_view) for x in (key, value)]
    operands += [view(x, r) for x in (query, do) for r in plan.away_views]
    operands += [y for x in vectors for y in by_residue(plan, [x])]
    away = [x[:, : vectors[0].shape[-1]] for x in marks[0]]
    return operands + mark_views(plan, marks[1], away)


def keys_gradient(
    plan: schedule.Launch,
    opt: Options,
    table: np.ndarray,
    arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    lse: jax.Array,
    delta: jax.Array,
    grads: tuple[jax.Array | None, jax.Array | None],
    *,
    out_dtype: Any,
    starts: jax.Array,
    seed: jax.Array,
    marks: tuple[Sequence[jax.Array], Sequence[jax.Array]],
    keep: Any,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of keys and values of one launch.

    arrays, lse, delta, marks as in `queries_gradient`, lse and delta `[B, N, T']`. grads: (dk, dv),
    added to when opt.add.
    """
    query, key, _, _ = arrays
    dk, dv = grads
    head_dim, dtype = tile_columns(query.shape[-1], opt.interpret), query.dtype
    width = piece_columns(head_dim, out_dtype, opt.interpret)
    operands = operands_of(plan, table, arrays, (lse, delta), starts, seed, marks, opt.add)
    bq, stages, consumers = plan.block_away, opt.stages, plan.block_home // ROWS
    vectors = plgpu.SMEM((stages, bq), jnp.float32)
    scratch = [
        shared_tile((consumers, ROWS, head_dim), dtype),
        shared_tile((consumers, ROWS, head_dim), dtype),
        shared_tile((stages, bq, head_dim), dtype),
        shared_tile((stages, bq, head_dim), dtype),
        vectors,
        vectors,
        shared_tile((opt.stagings, consumers, head_dim // width, ROWS, width), out_dtype),
        opt.marks.rings(stages, bq),
        shared_tile((consumers, ROWS, bq), dtype) if opt.interpret else None,
        plgpu.Barrier(num_barriers=consumers, num_arrivals=2),
        plgpu.Barrier(num_barriers=stages, num_arrivals=3 + opt.marks.count),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=consumers),
        plgpu.Barrier(num_barriers=stages, num_arrivals=consumers),
        plgpu.Barrier(num_barriers=stages, num_arrivals=consumers),
    ]
    shape = (key.shape[0], key.shape[1] // plan.stride, plan.stride, *key.shape[2:])
    inplace = [dk.reshape(shape), dv.reshape(shape)] if opt.add else []
    types = [] if opt.add else [jax.ShapeDtypeStruct(shape, out_dtype)] * 2
    dk, dv = launch(
        functools.partial(_keys_body, plan, opt, keep),
        operands,
        types,
        scratch,
        ctas=table.shape[0],
        threads=consumers + 1,
        name="dilated_keys_gradient",
        inplace=inplace,
    )
    return dk.reshape(key.shape), dv.reshape(key.shape)
