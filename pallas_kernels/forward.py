"""The forward kernel: one online softmax over all visits of a tile of queries."""

import dataclasses
import functools
import math
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
    Sum,
    aligned_rows,
    launch,
    load,
    load_shared,
    pl,
    plgpu,
    shared_tile,
    store,
)
from pallas_kernels.config import ROWS
from pallas_kernels.copies import copy_boxes, piece, piece_columns
from pallas_kernels.marks import Kinds, Marks
from pallas_kernels.online_softmax import Tile, Warpgroup, nothing_seen
from pallas_kernels.products import multiply_columns
from pallas_kernels.scores import Rows, mask_scores, rows_of
from pallas_kernels.support import tile_columns

LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options of the forward kernel beside its `schedule.Launch`.

    consumers: warpgroups that compute. overlap, lazy: see `online_softmax.Warpgroup`. The others
    as in `backward`.
    """

    scale: float
    stages: int
    consumers: int
    overlap: bool
    lazy: bool
    group: int
    carry: bool
    marks: Kinds
    rate: float
    interpret: bool


def _body(plan: schedule.Launch, opt: Options, keep: Any, *refs: Any) -> None:
    views = sorted(set(plan.rates))
    it = iter(refs)
    items, geometry, seed_ref = (next(it) for _ in range(3))
    q_ref = next(it)
    k_refs = {r: next(it) for r in views}
    v_refs = {r: next(it) for r in views}
    q_marks, k_marks = opt.marks.take(it), {r: opt.marks.take(it) for r in views}
    out_ref, lse_ref = next(it), next(it)
    q_smem, k_smem, v_smem, o_smem, mark_smem, p_smem, sum_smem = (next(it) for _ in range(7))
    q_ready, k_ready, v_ready, c_ready, q_free, k_free, v_free = it

    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    count = items[cta, 0, 0]
    branches, consumers = len(plan.rates), opt.consumers
    bkv = plan.block_away
    head_dim, width = q_smem.shape[-1], o_smem.shape[-1]
    copy_boxes(head_dim, opt.interpret)
    multiply_columns(q_ref.shape[-1], opt.interpret)

    def consume() -> None:
        config.set_registers(consumers, computes=True)

        loop = Warpgroup(
            number=wg,
            consumers=consumers,
            scale=opt.scale,
            overlap=opt.overlap,
            lazy=opt.lazy,
            q=q_smem.at[wg],
            k=k_smem,
            v=v_smem,
            marks=lambda slot: opt.marks.of_slot(mark_smem, slot, COLUMN),
            ready=(q_ready.at[wg], k_ready, v_ready),
            free=(q_free.at[wg], k_free, v_free),
            stand_in=None if p_smem is None else (sum_smem.at[wg], p_smem.at[wg]),
        )

        def tile_at(j: Any, v: visits.Visit, rows: Rows, at: Any, home: Marks) -> Tile:
            def mask(s: jax.Array, away: Marks) -> jax.Array:
                s = mask_scores(plan, v, rows, v.first + j * bkv, s)
                return opt.marks.hide(s, home, away, plan.transposed)

            def drop(p: jax.Array, away: Marks) -> jax.Array:
                if not opt.rate:
                    return p
                seed, place = (seed_ref[0], seed_ref[1]), (*at, rows.row, v.first + j * bkv)
                places = opt.marks.places(home, away)
                seen = visits.kept(plan, keep, opt.rate, seed, v, place, p.shape, places)
                return jnp.where(seen, p, 0.0)

            return Tile(mask, drop)

        def look(
            base: Any, total: Any, mask: Any, where: Any, at: Any, row: Any, home: Marks
        ) -> Any:
            """(sum, maximum, mass) of the tile; it has at least one step."""

            def visit(branch: Any) -> tuple[visits.Visit, Rows]:
                v = visits.visit(plan, geometry, branch, mask, *where)
                return v, rows_of(plan, v, row)

            def steps(branch: Any, begin: Any, end: Any, state: Any, acc: Sum) -> Any:
                seen = (*visit(branch), (*at, branch), home)

                def step(j: Any, state: Any) -> Any:
                    return loop.step(state, acc, total, tile_at(j, *seen))

                return lax.fori_loop(begin, end, step, state)

            first = visits.first_branch(plan, geometry, mask, *where)
            state = loop.first(
                base, total, tile_at(jnp.int32(0), *visit(first), (*at, first), home)
            )

            def all_branches(acc: Sum) -> Any:
                def one_branch(branch: Any, state: Any) -> Any:
                    begin = jnp.where(branch == first, 1, 0)
                    return steps(branch, begin, visit(branch)[0].steps, state, acc)

                if branches == 1:
                    return loop.last(one_branch(0, state), acc)
                return loop.last(lax.fori_loop(0, branches, one_branch, state), acc)

            def perhaps_half(acc: Sum) -> Any:
                """As `all_branches`, of one; the last tile is half a tile if no more is seen."""
                v, rows = visit(0)
                end = v.steps - 1
                middle = v.first + v.away_shift + end * bkv + bkv // 2
                half = (end > 0) & (rows.end <= middle)
                done = steps(0, 1, v.steps - jnp.where(half, 1, 0), state, acc)
                tile = tile_at(end, v, rows, (*at, 0), home)
                return lax.cond(
                    half, lambda: loop.last_half(done, acc, tile), lambda: loop.last(done, acc)
                )

            # Of the tile on the diagonal the first of two warpgroups sees half. (Larger heads gain
            # nothing, and have no registers left. Before a gap the last row is not the one that
            # sees most.)
            halves = plan.causal and branches == 1 and bkv == 2 * ROWS and opt.lazy and opt.overlap
            plain = not (opt.marks.count or opt.rate or plan.gaps) and head_dim <= ROWS
            return loop.with_sum(perhaps_half if halves and plain else all_branches)

        def one_item(t: Any, state: Any) -> Any:
            base, current = state
            code, mask, _ = current
            # Read early: the next tile must not start by waiting for memory.
            following = visits.entry(items, cta, t + 1, count)
            b, n, residue, tile, local = visits.place(plan, geometry, code, plan.heads)
            row = tile * plan.block_home + wg * ROWS
            window = (b, aligned_rows(row, ROWS), local, n)
            lse_at = lse_ref.at[b, n, pl.ds(row, ROWS), local]
            old = None
            if opt.carry:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                for i, ref in enumerate(pieces(window)):
                    plgpu.copy_gmem_to_smem(ref, o_smem.at[wg, i], c_ready.at[wg])
                old = load(lse_at, ROW)
            total = base + visits.known_steps(plan, geometry, current, mask, residue, tile)
            home = opt.marks.of_rows(q_marks, (b, pl.ds(row, ROWS), local), ROW)
            acc, m, mass = lax.cond(
                total > base,
                lambda: look(base, total, mask, (residue, tile), (b, n), row, home),
                lambda: nothing_seen(head_dim),
            )
            finish(acc, m, mass, window, lse_at, old)
            return total, following

        def pieces(window: Any) -> Any:
            firsts = range(0, head_dim, width)
            return [out_ref.at[(*window, piece(first, width))] for first in firsts]

        def finish(acc: Any, m: Any, mass: Any, window: Any, lse_at: Any, old: Any) -> None:
            if opt.rate:
                acc = acc * (1.0 / (1.0 - opt.rate))
            if opt.carry:
                plgpu.barrier_wait(c_ready.at[wg])
                old = old * LOG2E
                top = jnp.maximum(m, old)
                safe = jnp.where(top == -jnp.inf, 0.0, top)
                ours, theirs = jnp.exp2(m - safe), jnp.exp2(old - safe)
                m, mass = top, mass * ours + theirs
            inverse = jnp.where(mass > 0.0, 1.0 / mass, 0.0)
            if not opt.carry:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i in range(head_dim // width):
                out = acc[:, i * width : (i + 1) * width]
                if opt.carry:
                    previous = load_shared(o_smem.at[wg, i], TILE).astype(jnp.float32)
                    theirs_tile = lax.broadcast_in_dim(theirs, out.shape, [0])
                    # What lies under an lse of -inf was never written and may be NaN.
                    previous = jnp.where(theirs_tile > 0.0, previous * theirs_tile, 0.0)
                    out = out * lax.broadcast_in_dim(ours, out.shape, [0]) + previous
                out = out * lax.broadcast_in_dim(inverse, out.shape, [0])
                o_smem.at[wg, i][...] = out.astype(o_smem.dtype)
            plgpu.commit_smem()
            for i, ref in enumerate(pieces(window)):
                plgpu.copy_smem_to_gmem(o_smem.at[wg, i], ref)
            store(lse_at, jnp.where(mass > 0.0, (m + jnp.log2(mass)) * (1.0 / LOG2E), -jnp.inf))

        loop.begin()
        first = visits.entry(items, cta, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), first))
        loop.end()
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        config.set_registers(consumers, computes=False)
        columns = piece(0, head_dim)

        def one_item(t: Any, state: Any) -> Any:
            fill, queries, (code, mask, _) = state
            following = visits.entry(items, cta, t + 1, count)
            b, n, residue, tile, local = visits.place(plan, geometry, code, plan.heads)
            kv_head = lax.div(n, jnp.int32(opt.group))

            def load_queries() -> None:
                for i in range(consumers):

                    @pl.when(queries > 0)
                    def _(i: int = i) -> None:
                        plgpu.barrier_wait(q_free.at[i])

                    rows = aligned_rows(tile * plan.block_home + i * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(
                        q_ref.at[b, rows, local, n, columns], q_smem.at[i], q_ready.at[i]
                    )

            begin = fill
            for branch in range(branches):
                v = visits.visit(plan, geometry, branch, mask, residue, tile)
                rate = plan.rates[branch]
                ids = k_marks[rate]
                ordered = visits.before(v, ids[0].shape[-1]) if ids else 0

                def step(
                    j: Any,
                    n_fill: Any,
                    v: Any = v,
                    rate: int = rate,
                    ids: Any = ids,
                    ordered: Any = ordered,
                ) -> Any:
                    slot = lax.rem(n_fill, jnp.int32(opt.stages))
                    rows = aligned_rows(v.first + j * bkv, bkv)
                    window = (b, rows, v.away_residue, kv_head, columns)
                    reused = n_fill >= opt.stages
                    pl.when(reused)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    k_ref, v_ref = k_refs[rate], v_refs[rate]
                    plgpu.copy_gmem_to_smem(k_ref.at[window], k_smem.at[slot], k_ready.at[slot])
                    marked = (b, aligned_rows(ordered + v.first + j * bkv, bkv))
                    opt.marks.bring(ids, marked, mark_smem, slot, k_ready.at[slot])
                    pl.when(n_fill == begin)(load_queries)
                    pl.when(reused)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    plgpu.copy_gmem_to_smem(v_ref.at[window], v_smem.at[slot], v_ready.at[slot])
                    return n_fill + 1

                fill = lax.fori_loop(0, v.steps, step, fill)
            return fill, queries + jnp.where(fill > begin, 1, 0), following

        first = visits.entry(items, cta, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), jnp.int32(0), first))

    pl.when(wg < consumers)(consume)
    pl.when(wg == consumers)(produce)


def view(x: jax.Array, rate: int) -> jax.Array:
    """`[B, T, ...]` seen as `[B, T / rate, rate, ...]`."""
    return x.reshape(x.shape[0], x.shape[1] // rate, rate, *x.shape[2:])


def mark_views(
    plan: schedule.Launch, home: Sequence[jax.Array], away: Sequence[jax.Array]
) -> list[jax.Array]:
    """Marks as a kernel reads them: of home rows directly, of away rows, by rate, as copies."""
    return [view(x, plan.home_view) for x in home] + by_residue(plan, away)


def by_residue(plan: schedule.Launch, vectors: Sequence[jax.Array]) -> list[jax.Array]:
    """`[..., T]` in the order of residues, then rows, by rate: see `visits.before`."""

    def ordered(x: jax.Array, rate: int) -> jax.Array:
        return x.reshape(*x.shape[:-1], -1, rate).swapaxes(-1, -2).reshape(x.shape)

    rates = plan.rates if plan.series else plan.views
    return [ordered(x, r) for r in rates for x in vectors]


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
    marks: tuple[Sequence[jax.Array], Sequence[jax.Array]],
    keep: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs one launch.

    query [B, T', N, H'], key and value [B, S', K, H'], padded as `launches` does. out like query
    and lse [B, N, rows] are continued from and updated when opt.carry; otherwise they are created.
    marks: int32 `[B, rows]` of queries and of keys, those that `opt.marks` has, for whole tiles.
    Returns out and lse.
    """
    views = sorted(set(plan.rates))
    head_dim, dtype = tile_columns(query.shape[-1], opt.interpret), query.dtype
    width = piece_columns(head_dim, out_dtype, opt.interpret)
    geometry = jnp.asarray(schedule.kernel_table(plan, starts))
    operands = [jnp.asarray(table), geometry, seed, view(query, plan.stride)]
    operands += [view(key, r) for r in views]
    operands += [view(value, r) for r in views]
    operands += mark_views(plan, *marks)
    out_view = (query.shape[0], query.shape[1] // plan.stride, plan.stride, *query.shape[2:])
    lse_view = (*lse_shape[:2], lse_shape[2] // plan.stride, plan.stride)
    bkv, stages = plan.block_away, opt.stages
    pairs = opt.consumers
    scratch = [
        shared_tile((pairs, ROWS, head_dim), dtype),
        shared_tile((stages, bkv, head_dim), dtype),
        shared_tile((stages, bkv, head_dim), dtype),
        shared_tile((pairs, head_dim // width, ROWS, width), out_dtype),
        opt.marks.rings(stages, bkv),
        shared_tile((pairs, ROWS, bkv), dtype) if opt.interpret else None,
        plgpu.SMEM((pairs, ROWS, head_dim), jnp.float32) if opt.interpret else None,
        plgpu.Barrier(num_barriers=pairs),
        plgpu.Barrier(num_barriers=stages, num_arrivals=1 + opt.marks.count),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=pairs, num_arrivals=head_dim // width),
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
