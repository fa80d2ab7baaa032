"""The fused backward kernel over transposed block lists: all gradients in one pass.

A block holds a tile of keys and values and visits the query blocks of its list. What a step gives
to the queries' gradient is added to float32 memory by the copy engine, in an order that varies.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import block_lists, block_schedule, gradient_loop
from pallas_kernels.block_backward import add_parts, write_tile
from pallas_kernels.block_forward import LOG2E, Options, kept, masked_scores, same_ids, walk
from pallas_kernels.block_lists import TILE_ROWS
from pallas_kernels.compat import (
    ROW,
    aligned_rows,
    launch,
    load,
    pl,
    plgpu,
    shared_tile,
)
from pallas_kernels.config import CONSUMERS, ROWS
from pallas_kernels.instructions import add_rows, recomputed


def _body(plan: block_schedule.Plan, opt: Options, keep: Any, *refs: Any) -> None:
    it = iter(refs)
    items, entries, starts_ref, seed_ref = (next(it) for _ in range(4))
    k_ref, v_ref, q_ref, do_ref, lse_ref, delta_ref = (next(it) for _ in range(6))
    k_ids, q_ids = (next(it), next(it)) if opt.ids else (None, None)
    dq_ref, dk_ref, dv_ref = (next(it) for _ in range(3))
    part_dk, part_dv = (next(it), next(it)) if plan.parts else (None, None)
    out_smem = next(it)
    memory = gradient_loop.Memory(*it)

    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    count, bq = items[cta, 0, 0], plan.away
    heads = plan.heads * opt.group

    def consume() -> None:
        plgpu.set_max_registers(240, action="increase")
        warpgroup = gradient_loop.Warpgroup(wg, memory, opt.scale, opt.rate)

        def item(t: Any) -> tuple[block_schedule.Item, tuple[Any, Any, Any]]:
            """Item t and its place. Looked up whenever it is needed: registers are scarce."""
            found = block_schedule.item(items, cta, recomputed(t, opt.interpret), count)
            return found, block_schedule.place(plan, found.code)

        def describe(t: Any, j: Any, me: Any) -> gradient_loop.Tile:
            found, (b, kv_head, _) = item(t)
            index, inside = block_schedule.entry_of(plan, j)
            where, place = block_schedule.list_place(plan, b, kv_head), found.begin + index
            packed = block_schedule.load_entry(plan, entries, where, place, 0)

            def visited() -> tuple[block_lists.Entry, Any]:
                entry = block_lists.decode(packed)
                return entry, entry.block * (plan.away * plan.steps_per_entry) + inside

            def home_row() -> Any:
                return item(t)[1][2] * TILE_ROWS + me * ROWS

            def mask(scores: jax.Array, ids: Any) -> jax.Array:
                entry, start = visited()
                shift = starts_ref[1] - starts_ref[0]
                scores = masked_scores(plan, scores, entry, home_row(), start, shift)
                if ids is not None:
                    b, _, _ = item(t)[1]
                    rows = load(k_ids.at[b, pl.ds(home_row(), ROWS)], ROW)
                    scores = same_ids(scores, rows, ids)
                return scores

            def head_of(entry: block_lists.Entry, kv_head: Any) -> Any:
                return kv_head * opt.group + (entry.member if opt.group > 1 else 0)

            def seen() -> jax.Array:
                (entry, start), (b, kv_head, _) = visited(), item(t)[1]
                at = (b, head_of(entry, kv_head), home_row(), start)
                starts = (starts_ref[0], starts_ref[1])
                return kept(plan, opt, keep, seed_ref, starts, at, (ROWS, bq))

            def send(smem: Any, first: Any, column: Any) -> None:
                (entry, start), (b, kv_head, _) = visited(), item(t)[1]
                head = head_of(entry, kv_head)
                plane: Any = (b, head, jnp.int32(0))
                refs = {1: dq_ref}
                if not opt.interpret:
                    plane = (b * heads + head) * dq_ref.shape[2]
                add_rows(smem, refs, jnp.int32(1), (plane, start + first, column), opt.interpret)

            return gradient_loop.Tile(mask, seen if opt.rate else None, send)

        def one_item(t: Any, base: Any) -> Any:
            steps = item(t)[0].steps

            def loop(step: Any, state: Any) -> Any:
                def one_step(j: Any, state: Any) -> Any:
                    return step(state, functools.partial(describe, t, j))

                return lax.fori_loop(0, steps, one_step, state)

            dk, dv = warpgroup.run(loop, base, base + steps)
            found, (b, kv_head, tile) = item(t)
            window = (b, aligned_rows(tile * TILE_ROWS + wg * ROWS, ROWS), kv_head)
            out = out_smem.at[wg]
            write_tile(plan, dv, wg, found.part, out, dv_ref.at[window], part_dv)
            dk = dk * (opt.scale / LOG2E)
            write_tile(plan, dk, wg, found.part, out, dk_ref.at[window], part_dk)
            return base + found.steps

        lax.fori_loop(0, count, one_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        plgpu.set_max_registers(24, action="decrease")

        def visit(t: Any, item: Any, carry: Any, loop: Any) -> Any:
            fill, used = carry
            b, kv_head, tile = block_schedule.place(plan, item.code)
            pl.when(t > 0)(lambda: plgpu.barrier_wait(memory.k_free))
            for i in range(CONSUMERS):
                at = (b, aligned_rows(tile * TILE_ROWS + i * ROWS, ROWS), kv_head)
                plgpu.copy_gmem_to_smem(k_ref.at[at], memory.k.at[i], memory.k_ready.at[i])
                plgpu.copy_gmem_to_smem(v_ref.at[at], memory.v.at[i], memory.k_ready.at[i])

            def step(j: Any, packed: tuple[Any, ...], i: Any) -> Any:
                slot, reused = memory.slot(i), i >= opt.stages
                _, inside = block_schedule.entry_of(plan, j)
                entry = block_lists.decode(packed[0])
                start = entry.block * (plan.away * plan.steps_per_entry) + inside
                head = kv_head * opt.group + (entry.member if opt.group > 1 else 0)
                rows = aligned_rows(start, bq)
                at, vector = (b, rows, head), (b, head, rows)
                pl.when(reused)(lambda: plgpu.barrier_wait(memory.q_free.at[slot]))
                plgpu.copy_gmem_to_smem(q_ref.at[at], memory.q.at[slot], memory.q_ready.at[slot])
                pl.when(reused)(lambda: plgpu.barrier_wait(memory.do_free.at[slot]))
                copies = [(do_ref.at[at], memory.do), (lse_ref.at[vector], memory.lse)]
                copies += [(delta_ref.at[vector], memory.delta)]
                copies += [(q_ids.at[b, rows], memory.ids)] if opt.ids else []
                for source, target in copies:
                    plgpu.copy_gmem_to_smem(source, target.at[slot], memory.do_ready.at[slot])
                return i + 1

            return loop(step, fill), used

        walk(plan, items, entries, cta, visit)

    pl.when(wg < CONSUMERS)(consume)
    pl.when(wg == CONSUMERS)(produce)


def gradients(
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
    ids: tuple[jax.Array, jax.Array] | None,
    keep: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of padded queries, keys and values; arguments as in `keys_gradient`.

    The queries' is float32 `[B, N, T', H]`, without the scale.
    """
    query, key, value, do = arrays
    head_dim, dtype = query.shape[-1], query.dtype
    operands = [jnp.asarray(work.items), jnp.asarray(entries), starts, seed]
    operands += [key, value, query, do, lse, delta, *(ids[::-1] if ids else ())]
    types = [jax.ShapeDtypeStruct(key.shape, dtype)] * 2
    if plan.parts:
        types += [jax.ShapeDtypeStruct((plan.parts, TILE_ROWS, head_dim), jnp.float32)] * 2
    B, T, N, _ = query.shape
    # The interpreter adds to rows of a view, here of a rate of 1.
    planes = (B, N, T, 1, head_dim) if opt.interpret else (B, N, T, head_dim)
    scratch = [shared_tile((CONSUMERS, ROWS, head_dim), dtype)]
    scratch += gradient_loop.scratch(head_dim, plan.away, opt.stages, dtype, opt.ids, opt.interpret)
    dq, dk, dv, *parts = launch(
        functools.partial(_body, plan, opt, keep),
        operands,
        types,
        scratch,
        ctas=work.items.shape[0],
        threads=CONSUMERS + 1,
        name="block_gradients",
        inplace=[jnp.zeros(planes, jnp.float32)],
    )
    if plan.parts:
        dk, dv = (add_parts(plan, work, x, y) for x, y in zip((dk, dv), parts, strict=True))
    return dq.reshape(B, N, T, head_dim), dk, dv
