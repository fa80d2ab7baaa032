"""The backward kernels: gradients of queries, and of keys and values, for the total lse.

Each branch (and each hop of a ring) contributes `p = exp(s - lse)` with the *total* lse of the
row, so its gradient is the ordinary flash backward with `delta = sum(do * out) - dlse`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import config, schedule, visits
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
    pl,
    plgpu,
    shared_tile,
)
from pallas_kernels.config import ROWS
from pallas_kernels.copies import copy_boxes, piece, piece_columns
from pallas_kernels.forward import mark_views, view
from pallas_kernels.forward_results import LOG2E
from pallas_kernels.marks import Kinds
from pallas_kernels.products import multiply_columns
from pallas_kernels.support import tile_columns


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options of a backward kernel beside its `schedule.Launch`.

    scale: softmax scale. stages: depth of the rings. stagings: tiles of shared memory that the
    keys' kernel writes from. group: query heads for each kv head.
    add: results are added to what the output holds. marks: what tokens carry. rate: dropout.
    """

    scale: float
    stages: int
    stagings: int
    group: int
    add: bool
    marks: Kinds
    rate: float
    interpret: bool


def write_tile(tile: jax.Array, smem: Any, refs: Sequence[Any], barrier: Any, add: bool) -> None:
    """Writes one warpgroup's result tile, in pieces, adding to what is there if asked."""
    if add:
        plgpu.barrier_wait(barrier)
    else:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    width = smem.shape[-1]
    for i in range(len(refs)):
        part = tile[:, i * width : (i + 1) * width]
        if add:
            part = part + load_shared(smem.at[i], TILE).astype(jnp.float32)
        smem.at[i][...] = part.astype(smem.dtype)
    plgpu.commit_smem()
    for i, ref in enumerate(refs):
        plgpu.copy_smem_to_gmem(smem.at[i], ref)


def _queries_body(plan: schedule.Launch, opt: Options, keep: Any, *refs: Any) -> None:
    views = sorted(set(plan.rates))
    it = iter(refs)
    items, geometry, seed_ref, q_ref, do_ref, lse_ref, delta_ref = (next(it) for _ in range(7))
    k_refs = {r: next(it) for r in views}
    v_refs = {r: next(it) for r in views}
    q_marks, k_marks = opt.marks.take(it), [opt.marks.take(it) for _ in views]
    dq_ref = next(it)
    q_smem, do_smem, k_smem, v_smem, dq_smem, mark_smem, ds_smem = (next(it) for _ in range(7))
    q_ready, k_ready, v_ready, c_ready, q_free, k_free, v_free = it

    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    consumers = plan.block_home // ROWS
    count, branches, bkv = items[cta, 0, 0], len(plan.rates), plan.block_away
    head_dim, width = q_smem.shape[-1], dq_smem.shape[-1]
    copy_boxes(head_dim, opt.interpret)
    multiply_columns(q_ref.shape[-1], opt.interpret)

    def place(entry: Any) -> tuple[Any, ...]:
        return *visits.place(plan, geometry, entry[0], plan.heads), entry[1]

    def visit(branch: Any, mask: Any, residue: Any, tile: Any) -> visits.Visit:
        return visits.visit(plan, geometry, branch, mask, residue, tile)

    def consume() -> None:
        config.set_registers(consumers, computes=True)

        def one_item(t: Any, state: Any) -> Any:
            base, current = state
            following = visits.entry(items, cta, t + 1, count)
            b, n, residue, tile, local, mask = place(current)
            total = base + visits.known_steps(plan, geometry, current, mask, residue, tile)
            row = tile * plan.block_home + wg * ROWS
            window, firsts = (b, aligned_rows(row, ROWS), local, n), range(0, head_dim, width)
            pieces = [dq_ref.at[(*window, piece(first, width))] for first in firsts]
            if opt.add:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for i, ref in enumerate(pieces):
                    plgpu.copy_gmem_to_smem(ref, dq_smem.at[wg, i], c_ready.at[wg])
            lse = load(lse_ref.at[b, n, pl.ds(row, ROWS), local], ROW)
            delta = load(delta_ref.at[b, n, pl.ds(row, ROWS), local], ROW)
            home = opt.marks.of_rows(q_marks, (b, pl.ds(row, ROWS), local), ROW)

            def step(j: Any, state: Any, v: visits.Visit, branch: Any) -> Any:
                dq, i = state
                pl.when(i == base)(lambda: plgpu.barrier_wait(q_ready.at[wg]))
                slot, start = lax.rem(i, jnp.int32(opt.stages)), v.first + j * bkv
                plgpu.barrier_wait(k_ready.at[slot])
                plgpu.barrier_wait(v_ready.at[slot])

                def scores(s_acc: Any, dp_acc: Any) -> Any:
                    plgpu.wgmma(s_acc, q_smem.at[wg], k_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma(dp_acc, do_smem.at[wg], v_smem.at[slot].transpose((1, 0)))
                    plgpu.wgmma_wait(1)
                    return s_acc[...], dp_acc[...]

                shape = (ROWS, bkv)
                acc = plgpu.ACC(shape, jnp.float32)
                s, dp = pl.run_scoped(scores, acc, acc)
                away = opt.marks.of_slot(mark_smem, slot, COLUMN)
                plgpu.barrier_arrive(v_free.at[slot])
                # The next tile arrives while this one finishes.
                pl.when(i + 1 == total)(lambda: plgpu.barrier_arrive(q_free.at[wg]))
                low, high = visits.unmasked(plan, v, row, ROWS)
                s = lax.cond(
                    (start < low) | (start > high),
                    lambda: jnp.where(visits.seen_pairs(plan, v, row, start, shape), s, -jnp.inf),
                    lambda: s,
                )
                s = opt.marks.hide(s, home, away, plan.transposed)
                p = jnp.exp2(s * opt.scale - lax.broadcast_in_dim(lse, shape, [0]))
                if opt.rate:
                    seed, at = (seed_ref[0], seed_ref[1]), (b, n, branch, row, start)
                    places = opt.marks.places(home, away)
                    seen = visits.kept(plan, keep, opt.rate, seed, v, at, shape, places)
                    dp = jnp.where(seen, dp * (1.0 / (1.0 - opt.rate)), 0.0)
                ds = p * (dp - lax.broadcast_in_dim(delta, shape, [0]))
                staging = None if ds_smem is None else ds_smem.at[wg]
                dq = accumulate(dq, ds.astype(q_smem.dtype), k_smem.at[slot], staging)
                plgpu.barrier_arrive(k_free.at[slot])
                return dq, i + 1

            def one_branch(branch: Any, state: Any) -> Any:
                v = visit(branch, mask, residue, tile)
                return lax.fori_loop(0, v.steps, functools.partial(step, v=v, branch=branch), state)

            dq = filled((ROWS, head_dim), 0.0, jnp.float32, TILE)
            if branches == 1:
                dq, end = one_branch(0, (dq, base))
            else:
                dq, end = lax.fori_loop(0, branches, one_branch, (dq, base))
            write_tile(dq * (opt.scale / LOG2E), dq_smem.at[wg], pieces, c_ready.at[wg], opt.add)
            return end, following

        first = visits.entry(items, cta, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), first))
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        config.set_registers(consumers, computes=False)
        columns = piece(0, head_dim)

        def one_item(t: Any, state: Any) -> Any:
            fill, used, current = state
            following = visits.entry(items, cta, t + 1, count)
            b, n, residue, tile, local, mask = place(current)
            kv_head = lax.div(n, jnp.int32(opt.group))

            def load_home() -> None:
                for i in range(consumers):
                    pl.when(used > 0)(lambda i=i: plgpu.barrier_wait(q_free.at[i]))
                    rows = aligned_rows(tile * plan.block_home + i * ROWS, ROWS)
                    at = (b, rows, local, n, columns)
                    plgpu.copy_gmem_to_smem(q_ref.at[at], q_smem.at[i], q_ready.at[i])
                    plgpu.copy_gmem_to_smem(do_ref.at[at], do_smem.at[i], q_ready.at[i])

            begin = fill
            for branch in range(branches):
                v, rate = visit(branch, mask, residue, tile), plan.rates[branch]
                ids = k_marks[plan.away_view(branch)]
                ordered = visits.before(v, ids[0].shape[-1]) if ids else 0

                def step(
                    j: Any,
                    i: Any,
                    v: Any = v,
                    rate: int = rate,
                    ids: Any = ids,
                    ordered: Any = ordered,
                ) -> Any:
                    slot = lax.rem(i, jnp.int32(opt.stages))
                    rows = aligned_rows(v.first + j * bkv, bkv)
                    at, reused = (b, rows, v.away_residue, kv_head, columns), i >= opt.stages
                    pl.when(reused)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_refs[rate].at[at], k_smem.at[slot], k_ready.at[slot])
                    marked = (b, aligned_rows(ordered + v.first + j * bkv, bkv))
                    opt.marks.bring(ids, marked, mark_smem, slot, k_ready.at[slot])
                    pl.when(i == begin)(load_home)
                    pl.when(reused)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    plgpu.copy_gmem_to_smem(v_refs[rate].at[at], v_smem.at[slot], v_ready.at[slot])
                    return i + 1

                fill = lax.fori_loop(0, v.steps, step, fill)
            return fill, used + jnp.where(fill > begin, 1, 0), following

        first = visits.entry(items, cta, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), jnp.int32(0), first))

    pl.when(wg < consumers)(consume)
    pl.when(wg == consumers)(produce)


def queries_gradient(
    plan: schedule.Launch,
    opt: Options,
    table: np.ndarray,
    arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    lse: jax.Array,
    delta: jax.Array,
    dq: jax.Array | None,
    *,
    out_dtype: Any,
    starts: jax.Array,
    seed: jax.Array,
    marks: tuple[Sequence[jax.Array], Sequence[jax.Array]],
    keep: Any,
) -> jax.Array:
    """The queries' gradient of one launch.

    arrays: query, key, value, do as `[B, T', N, H]` (padded). lse (base 2, +inf where a row sees
    nothing) and delta `[B, N, rows]` float32, rows padded to whole tiles. dq is added to when
    opt.add (float32). marks as in `forward.forward`.
    """
    query, key, value, do = arrays
    views = sorted(set(plan.rates))
    head_dim, dtype = tile_columns(query.shape[-1], opt.interpret), query.dtype
    width = piece_columns(head_dim, out_dtype, opt.interpret)
    operands = [jnp.asarray(table), jnp.asarray(schedule.kernel_table(plan, starts)), seed]
    operands += [view(query, plan.stride), view(do, plan.stride)]
    rows_view = (*lse.shape[:2], lse.shape[2] // plan.stride, plan.stride)
    operands += [lse.reshape(rows_view), delta.reshape(rows_view)]
    operands += [view(key, r) for r in views] + [view(value, r) for r in views]
    operands += mark_views(plan, *marks)
    bkv, stages, consumers = plan.block_away, opt.stages, plan.block_home // ROWS
    scratch = [
        shared_tile((consumers, ROWS, head_dim), dtype),
        shared_tile((consumers, ROWS, head_dim), dtype),
        shared_tile((stages, bkv, head_dim), dtype),
        shared_tile((stages, bkv, head_dim), dtype),
        shared_tile((consumers, head_dim // width, ROWS, width), out_dtype),
        opt.marks.rings(stages, bkv),
        shared_tile((consumers, ROWS, bkv), dtype) if opt.interpret else None,
        plgpu.Barrier(num_barriers=consumers, num_arrivals=2),
        plgpu.Barrier(num_barriers=stages, num_arrivals=1 + opt.marks.count),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=consumers, num_arrivals=head_dim // width),
        plgpu.Barrier(num_barriers=consumers),
        plgpu.Barrier(num_barriers=stages, num_arrivals=consumers),
        plgpu.Barrier(num_barriers=stages, num_arrivals=consumers),
    ]
    shape = (query.shape[0], query.shape[1] // plan.stride, plan.stride, *query.shape[2:])
    inplace = [dq.reshape(shape)] if opt.add else []
    types = [] if opt.add else [jax.ShapeDtypeStruct(shape, out_dtype)]
    (dq,) = launch(
        functools.partial(_queries_body, plan, opt, keep),
        operands,
        types,
        scratch,
        ctas=table.shape[0],
        threads=consumers + 1,
        name="dilated_queries_gradient",
        inplace=inplace,
    )
    return dq.reshape(query.shape)
