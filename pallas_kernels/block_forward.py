"""The forward kernel over block lists: one online softmax over the key blocks of a tile's list."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import block_lists, block_schedule
from pallas_kernels.block_lists import TILE_ROWS
from pallas_kernels.block_schedule import Options
from pallas_kernels.block_scores import first_entry, kept, masked_scores
from pallas_kernels.block_walk import away_rows, walk
from pallas_kernels.compat import (
    COLUMN,
    ROW,
    Sum,
    aligned_rows,
    launch,
    pl,
    plgpu,
    shared_tile,
    store,
)
from pallas_kernels.config import CONSUMERS, ROWS
from pallas_kernels.online_softmax import Tile, Warpgroup, nothing_seen

LOG2E = math.log2(math.e)


def _body(plan: block_schedule.Plan, opt: Options, keep: Any, *refs: Any) -> None:
    it = iter(refs)
    items, entries, starts_ref, seed_ref, q_ref, k_ref, v_ref = (next(it) for _ in range(7))
    q_marks, k_marks = opt.marks.take(it), opt.marks.take(it)
    out_ref, lse_ref = next(it), next(it)
    part_out, part_lse = (next(it), next(it)) if plan.parts else (None, None)
    q_smem, k_smem, v_smem, o_smem, mark_smem, p_smem, sum_smem = (next(it) for _ in range(7))
    q_ready, k_ready, v_ready, q_free, k_free, v_free = it

    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    count, head_dim = items[cta, 0, 0], q_smem.shape[-1]
    of_lane = functools.partial(block_schedule.of_lane, plan)

    def consume() -> None:
        plgpu.set_max_registers(240, action="increase")
        starts = (starts_ref[0], starts_ref[1])
        shift = starts[0] - starts[1]

        loop = Warpgroup(
            number=wg,
            consumers=CONSUMERS,
            scale=opt.scale,
            overlap=opt.overlap,
            lazy=opt.lazy,
            q=q_smem.at[wg],
            k=of_lane(k_smem, wg),
            v=of_lane(v_smem, wg),
            marks=lambda slot: opt.marks.of_slot(of_lane(mark_smem, wg), slot, COLUMN),
            ready=(q_ready.at[wg], k_ready, v_ready),
            free=(q_free.at[wg], k_free, v_free),
            stand_in=None if p_smem is None else (sum_smem.at[wg], p_smem.at[wg]),
        )

        def tile_at(j: Any, item: Any, at: Any, home: Any, odd: Any) -> Tile:
            b, n, row = at
            entry, start = block_lists.decode(jnp.int32(0)), jnp.int32(0)
            if plan.masks or opt.rate:
                # Read before the product, needed after it.
                index, inside = block_schedule.entry_of(plan, j)
                where = block_schedule.list_place(plan, b, n)
                at_entry = item.begin + index
                packed = block_schedule.load_entry(plan, entries, where, at_entry, wg)
                entry = block_lists.decode(packed)
                start = entry.block * plan.block + inside

            def mask(s: jax.Array, away: Any) -> jax.Array:
                s = masked_scores(plan, s, entry, row, start, shift)
                if plan.width > 1:
                    alone = (j == item.steps - 1) & odd
                    s = lax.cond(alone, lambda: first_entry(plan, s), lambda: s)
                return opt.marks.hide(s, home, away, plan.transposed)

            def drop(p: jax.Array, away: Any) -> jax.Array:
                if not opt.rate:
                    return p
                place, marks = (b, n, row, start), (home, away)
                seen = kept(plan, opt, keep, seed_ref, starts, place, p.shape, marks)
                return jnp.where(seen, p, 0.0)

            return Tile(mask, drop)

        def one_item(t: Any, state: Any) -> Any:
            base, item = state
            # Read early: the next tile must not start by waiting for memory.
            following = block_schedule.item(items, cta, t + 1, count)
            b, n, tile = block_schedule.place(plan, item.code)
            at = (b, n, tile * TILE_ROWS + wg * ROWS)
            home = opt.marks.of_rows(q_marks, (b, pl.ds(at[2], ROWS)), ROW)
            total, odd = base + item.steps, False
            if plan.width > 1:
                where, last = block_schedule.list_place(plan, b, n), item.begin + item.steps - 1
                second = block_schedule.load_entry(plan, entries, where, jnp.maximum(last, 0), 1)
                odd = block_lists.decode(second).empty != 0

            def look() -> Any:
                def tile(n: Any) -> Tile:
                    return tile_at(n - base, item, at, home, odd)

                state = loop.first(base, total, tile)

                def steps(acc: Sum) -> Any:
                    step = functools.partial(loop.step, acc, total, tile)
                    return loop.last(acc, total, lax.fori_loop(base + 1, total, step, state))

                return loop.with_sum(steps)

            acc, m, mass = lax.cond(item.steps > 0, look, lambda: nothing_seen(head_dim))
            finish(acc, m, mass, item, at)
            return total, following

        def finish(acc: Any, m: Any, mass: Any, item: Any, at: Any) -> None:
            b, n, row = at
            factor = 1.0 / (1.0 - opt.rate)
            inverse = jnp.where(mass > 0.0, factor / mass, 0.0)
            out = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
            lse = jnp.where(mass > 0.0, (m + jnp.log2(mass)) * (1.0 / LOG2E), -jnp.inf)

            def whole() -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                o_smem.at[wg][...] = out.astype(o_smem.dtype)
                plgpu.commit_smem()
                window = (b, aligned_rows(row, ROWS), n)
                plgpu.copy_smem_to_gmem(o_smem.at[wg], out_ref.at[window])
                store(lse_ref.at[b, n, pl.ds(row, ROWS)], lse)

            if not plan.parts:
                whole()
                return
            pl.when(item.part < 0)(whole)

            @pl.when(item.part >= 0)
            def _() -> None:
                rows = pl.ds(wg * ROWS, ROWS)
                store(part_out.at[item.part, rows], out)
                store(part_lse.at[item.part, rows], lse)

        loop.begin()
        first = block_schedule.item(items, cta, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), first))
        loop.end()
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        plgpu.set_max_registers(24, action="decrease")

        def place_of(ring: Any, number: int, slot: Any) -> Any:
            """Where one of the blocks of a step goes."""
            if plan.width == 1:
                return of_lane(ring, number).at[slot]
            return ring.at[slot, pl.ds(number * plan.block, plan.block)]

        def visit(t: Any, item: Any, carry: Any, loop: Any) -> Any:
            fill, queries = carry
            b, n, tile = block_schedule.place(plan, item.code)
            kv_head = lax.div(n, jnp.int32(opt.group))

            def load_queries() -> None:
                for i in range(CONSUMERS):
                    pl.when(queries > 0)(lambda i=i: plgpu.barrier_wait(q_free.at[i]))
                    rows = aligned_rows(tile * TILE_ROWS + i * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(q_ref.at[b, rows, n], q_smem.at[i], q_ready.at[i])

            def step(j: Any, packed: tuple[Any, ...], i: Any) -> Any:
                slot, reused = lax.rem(i, jnp.int32(opt.stages)), i >= opt.stages
                rows = away_rows(plan, packed, j)
                pl.when(reused)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                for lane, at in enumerate(rows):
                    to, ready = place_of(k_smem, lane, slot), k_ready.at[slot]
                    plgpu.copy_gmem_to_smem(k_ref.at[b, at, kv_head], to, ready)
                    opt.marks.bring(k_marks, (b, at), of_lane(mark_smem, lane), slot, ready)
                pl.when(j == 0)(load_queries)
                pl.when(reused)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                for lane, at in enumerate(rows):
                    to, ready = place_of(v_smem, lane, slot), v_ready.at[slot]
                    plgpu.copy_gmem_to_smem(v_ref.at[b, at, kv_head], to, ready)
                return i + 1

            return loop(step, fill), queries + jnp.where(item.steps > 0, 1, 0)

        walk(plan, items, entries, cta, visit)

    pl.when(wg < CONSUMERS)(consume)
    pl.when(wg == CONSUMERS)(produce)


def forward(
    plan: block_schedule.Plan,
    opt: Options,
    work: block_schedule.Work,
    entries: Any,
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    *,
    out_dtype: Any,
    starts: jax.Array,
    seed: jax.Array,
    marks: tuple[Sequence[jax.Array], Sequence[jax.Array]],
    keep: Any,
) -> tuple[jax.Array, jax.Array]:
    """out `[B, T', N, H]` and lse `[B, N, rows]` (rows whole tiles) of padded query, key, value.

    arrays: query `[B, T', N, H]`, key and value `[B, S', K, H]`, lengths multiples of 8.
    marks: int32 `[B, rows]` of queries and `[B, S']` of keys, those that `opt.marks` has.
    """
    query, key, value = arrays
    B, _, N, head_dim = query.shape
    dtype, stages, copies = query.dtype, opt.stages, plan.together
    operands = [jnp.asarray(work.items), jnp.asarray(entries), starts, seed, query, key, value]
    operands += [*marks[0], *marks[1]]
    types = [
        jax.ShapeDtypeStruct(query.shape, out_dtype),
        jax.ShapeDtypeStruct((B, N, plan.tiles * TILE_ROWS), jnp.float32),
    ]
    if plan.parts:
        types += [
            jax.ShapeDtypeStruct((plan.parts, TILE_ROWS, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((plan.parts, TILE_ROWS), jnp.float32),
        ]
    scratch = [
        shared_tile((CONSUMERS, ROWS, head_dim), dtype),
        shared_tile(block_schedule.ring(plan, stages, head_dim), dtype),
        shared_tile(block_schedule.ring(plan, stages, head_dim), dtype),
        shared_tile((CONSUMERS, ROWS, head_dim), out_dtype),
        opt.marks.rings(*block_schedule.ring(plan, stages)),
        shared_tile((CONSUMERS, ROWS, plan.away), dtype) if opt.interpret else None,
        plgpu.SMEM((CONSUMERS, ROWS, head_dim), jnp.float32) if opt.interpret else None,
        plgpu.Barrier(num_barriers=CONSUMERS),
        plgpu.Barrier(num_barriers=stages, num_arrivals=copies * (1 + opt.marks.count)),
        plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
        plgpu.Barrier(num_barriers=CONSUMERS),
        plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
    ]
    out, lse, *parts = launch(
        functools.partial(_body, plan, opt, keep),
        operands,
        types,
        scratch,
        ctas=work.items.shape[0],
        threads=CONSUMERS + 1,
        name="block_forward",
    )
    if plan.parts:
        out, lse = _merge(plan, work, out, lse, *parts)
    return out, lse


def split_rows(plan: block_schedule.Plan, work: block_schedule.Work) -> tuple[Any, Any, Any, Any]:
    """(batch, head, positions) of the split rows, and which parts `[R, parts]` are theirs.

    Places past the last row have batch one past the end: writes to them are dropped.
    """
    rows = jnp.asarray(work.rows)
    outer, tile = rows // plan.tiles, rows % plan.tiles
    positions = tile[:, None] * TILE_ROWS + jnp.arange(TILE_ROWS)
    mine = jnp.arange(rows.shape[0])[:, None] == jnp.asarray(work.owners)[None]
    return (outer // plan.heads)[:, None], (outer % plan.heads)[:, None], positions, mine


def _merge(
    plan: block_schedule.Plan, work: Any, out: Any, lse: Any, part_out: Any, part_lse: Any
) -> tuple[jax.Array, jax.Array]:
    """Writes the results of rows that were split: one softmax over their parts."""
    batch, head, positions, mine = split_rows(plan, work)
    logits = jnp.where(mine[..., None], part_lse[None], -jnp.inf)
    total = jax.nn.logsumexp(logits, axis=1)
    safe = jnp.where(total > -jnp.inf, total, 0.0)
    weights = jnp.exp(logits - safe[:, None])
    # Parts of nobody were never written and may be NaN.
    written = mine.any(0)[:, None, None]
    part_out = jnp.where(written, part_out, 0.0)
    merged = jnp.einsum("rpq,pqh->rqh", weights, part_out, precision=lax.Precision.HIGHEST)
    out = out.at[batch, positions, head].set(merged.astype(out.dtype), mode="drop")
    return out, lse.at[batch, head, positions].set(total, mode="drop")
