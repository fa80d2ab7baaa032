"""The fused backward kernel over transposed block lists: all gradients in one pass.

A block holds a tile of keys and values and visits the query blocks of its list. What a step gives
to the queries' gradient is added to float32 memory by the copy engine, in an order that varies.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import (
    block_lists,
    block_schedule,
    config,
    gradient_loop,
    gradient_memory,
    gradient_queries,
)
from pallas_kernels.block_backward import add_parts, write_tile
from pallas_kernels.block_forward import LOG2E
from pallas_kernels.block_lists import TILE_ROWS
from pallas_kernels.block_schedule import Options
from pallas_kernels.block_scores import kept, seen_pairs
from pallas_kernels.block_walk import walk
from pallas_kernels.compat import (
    COLUMN,
    ROW,
    aligned_rows,
    launch,
    pl,
    plgpu,
    shared_tile,
)
from pallas_kernels.config import CONSUMERS, ROWS
from pallas_kernels.marks import Marks


def _body(plan: block_schedule.Plan, opt: Options, keep: Any, *refs: Any) -> None:
    it = iter(refs)
    items, entries, starts_ref, seed_ref = (next(it) for _ in range(4))
    k_ref, v_ref, q_ref, do_ref, lse_ref, delta_ref = (next(it) for _ in range(6))
    k_marks, q_marks = opt.marks.take(it), opt.marks.take(it)
    dq_ref, dk_ref, dv_ref = (next(it) for _ in range(3))
    part_dk, part_dv = (next(it), next(it)) if plan.parts else (None, None)
    out_smem = next(it)
    memory = gradient_memory.Memory(*it)
    # The interpreter adds to rows of a view, here of a rate of 1.
    queries = gradient_queries.Queries(memory, {1: dq_ref})

    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    count, bq = items[cta, 0, 0], plan.away
    heads, dq_rows = plan.heads * opt.group, dq_ref.shape[2]

    def consume() -> None:
        config.set_fused_registers(memory.head_dim, "keys")
        warpgroup = gradient_loop.Keys(wg, memory, opt.scale, opt.rate, queries)
        starts = (starts_ref[0], starts_ref[1])

        def sight_of(t: Any) -> gradient_loop.Sight:
            def row(me: Any) -> Any:
                return memory.item(t, 3) * TILE_ROWS + me * ROWS

            def seen(me: Any, place: gradient_memory.Place) -> jax.Array:
                shift, shape = starts[1] - starts[0], (ROWS, bq)
                at = (row(me), place.start, shape, shift, plan.away_rows)
                return seen_pairs(plan, place.branch, *at)

            def home(me: Any) -> Marks:
                rows = (memory.item(t, 1), pl.ds(row(me), ROWS))
                return opt.marks.of_rows(k_marks, rows, ROW)

            def away(slot: Any) -> Marks:
                return opt.marks.load(functools.partial(memory.mark, slot), COLUMN)

            def marked(s: jax.Array, me: Any, slot: Any) -> jax.Array:
                return opt.marks.hide(s, home(me), away(slot), plan.transposed)

            def dropped(me: Any, slot: Any) -> jax.Array:
                place = memory.place(slot)
                at = (memory.item(t, 1), place.head, row(me), place.start)
                marks = (home(me), away(slot))
                return kept(plan, opt, keep, seed_ref, starts, at, (ROWS, bq), marks)

            return gradient_loop.Sight(
                seen if plan.masks or plan.ragged_keys else None,
                marked if opt.marks.count else None,
                dropped if opt.rate else None,
            )

        def one_item(t: Any, base: Any) -> Any:
            dk, dv, total = warpgroup.run(t, base, sight_of(t))
            b, kv_head, tile, part = (memory.item(t, i) for i in (1, 2, 3, 4))
            window = (b, aligned_rows(tile * TILE_ROWS + wg * ROWS, ROWS), kv_head)
            out = out_smem.at[wg]
            write_tile(plan, dv, wg, part, out, dv_ref.at[window], part_dv)
            write_tile(plan, dk * (opt.scale / LOG2E), wg, part, out, dk_ref.at[window], part_dk)
            return total

        lax.fori_loop(0, count, one_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def multiply() -> None:
        config.set_fused_registers(memory.head_dim, "queries")
        lax.fori_loop(0, count, queries.run, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        config.set_fused_registers(memory.head_dim, "copies")
        shift = starts_ref[1] - starts_ref[0]

        def visit(t: Any, item: Any, carry: Any, loop: Any) -> Any:
            fill, used = carry
            b, kv_head, tile = block_schedule.place(plan, item.code)

            def home(w: int) -> tuple[Any, Any]:
                row = aligned_rows(tile * TILE_ROWS + w * ROWS, ROWS)
                return k_ref.at[b, row, kv_head], v_ref.at[b, row, kv_head]

            memory.bring_home(t, home, item.steps, b, kv_head, tile, item.part)

            def step(j: Any, packed: tuple[Any, ...], i: Any) -> Any:
                _, inside = block_schedule.entry_of(plan, j)
                entry = block_lists.decode(packed[0])
                start = entry.block * plan.block + inside
                head = kv_head * opt.group + (entry.member if opt.group > 1 else 0)
                rows = aligned_rows(start, bq)
                at, vector = (b, rows, head), (b, head, rows)
                at_home = (entry.band, tile * TILE_ROWS, shift)
                limits = block_schedule.unmasked(plan, *at_home)
                limits += block_schedule.hidden(plan, *at_home)
                plane = (b * heads + head) * dq_rows
                place = gradient_memory.Place(start, *limits, plane, 0, entry.band, head)
                marks = [ref.at[b, rows] for ref in q_marks]
                vectors = (lse_ref.at[vector], delta_ref.at[vector])
                memory.bring(i, place, q_ref.at[at], marks, do_ref.at[at], *vectors)
                return i + 1

            return loop(step, fill), used

        walk(plan, items, entries, cta, visit)

    apart = config.queries_apart(memory.head_dim)
    pl.when(wg < CONSUMERS)(consume)
    if apart:
        pl.when(wg == CONSUMERS)(multiply)
    pl.when(wg == CONSUMERS + apart)(produce)


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
    marks: tuple[Sequence[jax.Array], Sequence[jax.Array]],
    keep: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of padded queries, keys and values; arguments as in `keys_gradient`.

    The queries' is float32 `[B, N, T', H]`, without the scale.
    """
    query, key, value, do = arrays
    head_dim, dtype = query.shape[-1], query.dtype
    operands = [jnp.asarray(work.items), jnp.asarray(entries), starts, seed]
    operands += [key, value, query, do, lse, delta, *marks[1], *marks[0]]
    types = [jax.ShapeDtypeStruct(key.shape, dtype)] * 2
    if plan.parts:
        types += [jax.ShapeDtypeStruct((plan.parts, TILE_ROWS, head_dim), jnp.float32)] * 2
    B, T, N, _ = query.shape
    # The interpreter adds to rows of a view, here of a rate of 1.
    planes = (B, N, T, 1, head_dim) if opt.interpret else (B, N, T, head_dim)
    scratch = [shared_tile((CONSUMERS, ROWS, head_dim), dtype)]
    sizes = (head_dim, plan.away, opt.stages, dtype, opt.marks.count)
    scratch += gradient_memory.scratch(*sizes, opt.interpret, head_dim)
    dq, dk, dv, *parts = launch(
        functools.partial(_body, plan, opt, keep),
        operands,
        types,
        scratch,
        ctas=work.items.shape[0],
        threads=CONSUMERS + 1 + config.queries_apart(head_dim),
        name="block_gradients",
        reductions=False,
        inplace=[jnp.zeros(planes, jnp.float32)],
    )
    if plan.parts:
        dk, dv = (add_parts(plan, work, x, y) for x, y in zip((dk, dv), parts, strict=True))
    return dq.reshape(B, N, T, head_dim), dk, dv
