"""The fused backward kernel: one pass gives the gradients of queries, keys and values.

A block holds a tile of keys and values and visits the queries that see it. What a step gives to
the queries' gradient is added to float32 memory by the copy engine, in an order that varies.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import (
    config,
    gradient_loop,
    gradient_memory,
    gradient_queries,
    schedule,
    visits,
)
from pallas_kernels.backward import Options
from pallas_kernels.backward_keys import operands_of
from pallas_kernels.compat import (
    COLUMN,
    add_to_global,
    aligned_rows,
    launch,
    pl,
    plgpu,
    shared_tile,
)
from pallas_kernels.config import CONSUMERS, ROWS
from pallas_kernels.copies import copy_boxes, piece
from pallas_kernels.forward_results import LOG2E
from pallas_kernels.instructions import load_rows, recomputed, store_tile, take_view
from pallas_kernels.marks import Marks
from pallas_kernels.products import multiply_columns
from pallas_kernels.support import tile_columns


def _body(plan: schedule.Launch, opt: Options, keep: Any, *refs: Any) -> None:
    it = iter(refs)
    items, part, geometry, words, seed_ref, k_ref, v_ref = (next(it) for _ in range(7))
    q_refs, do_refs, lse_refs, delta_refs = ([next(it) for _ in plan.away_views] for _ in range(4))
    k_marks, q_marks = opt.marks.take(it), [opt.marks.take(it) for _ in plan.away_views]
    dq_refs = _queries_refs(plan.views, it, opt.interpret)
    dk_ref, dv_ref, out_smem = next(it), next(it), next(it)
    memory = gradient_memory.Memory(*it)
    queries = gradient_queries.Queries(memory, dq_refs)

    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    bq = plan.block_away
    kv_heads, branches = plan.heads // opt.group, len(plan.rates)
    # Rows of the queries' gradient: the interpreter's is a view `[B, N, T / rate, rate, H]`.
    dq_rows = math.prod(dq_refs[plan.views[0]].shape[2:-1])
    plan, continues = visits.running(plan, words, opt.add)
    take_view(words[schedule.VIEW], plan.series, opt.interpret)
    copy_boxes(memory.head_dim, opt.interpret)
    multiply_columns(k_ref.shape[-1], opt.interpret)

    def visit(branch: Any, head: Any, residue: Any, tile: Any) -> visits.Visit:
        return visits.visit(plan, geometry, branch, part[head, residue], residue, tile)

    def steps_of(current: Any, kv_head: Any, residue: Any, tile: Any) -> Any:
        if schedule.knows_starts(plan):
            return current[2]
        members = [kv_head * opt.group + m for m in range(opt.group)]
        found = [visit(i, n, residue, tile).steps for i in range(branches) for n in members]
        return sum(found, jnp.int32(0))

    def items_of() -> tuple[Any, Any]:
        """(how many, of which block), read by each warpgroup: what all share takes registers."""
        block = recomputed(cta, opt.interpret)
        return items[block, 0, 0], block

    def consume() -> None:
        config.set_fused_registers(memory.head_dim, "keys")
        warpgroup = gradient_loop.Keys(wg, memory, opt.scale, opt.rate, queries)

        def sight_of(t: Any) -> gradient_loop.Sight:
            shape = (ROWS, bq)

            def home(me: Any) -> tuple[Any, ...]:
                """(batch, residue, tile, first row, residue in the home array)."""
                b, residue, tile, local = (memory.item(t, i) for i in (1, 3, 4, 5))
                return b, residue, tile, tile * plan.block_home + me * ROWS, local

            def visited(place: gradient_memory.Place, residue: Any, tile: Any) -> visits.Visit:
                return visits.visit(plan, geometry, place.branch, None, residue, tile)

            def seen(me: Any, place: gradient_memory.Place) -> jax.Array:
                _, residue, tile, row, local = home(me)
                v, end = visited(place, residue, tile), home_end(plan, local)
                v = visits.segmented(plan, v, tile * plan.block_home)
                return visits.seen_pairs(plan, v, row, place.start, shape, end)

            def marks(me: Any, slot: Any) -> tuple[Marks, Marks]:
                b, _, _, row, local = home(me)
                at = (b, row, local)
                own = opt.marks.read(
                    k_marks, lambda ref: load_rows(ref, at, plan.stride, opt.interpret)
                )
                return own, opt.marks.load(functools.partial(memory.mark, slot), COLUMN)

            def marked(s: jax.Array, me: Any, slot: Any) -> jax.Array:
                return opt.marks.hide(s, *marks(me, slot), plan.transposed)

            def kept(me: Any, slot: Any) -> jax.Array:
                place = memory.place(slot)
                b, residue, tile, row, _ = home(me)
                at = (b, place.head, place.branch, row, place.start)
                seed, v = (seed_ref[0], seed_ref[1]), visited(place, residue, tile)
                places = opt.marks.places(*marks(me, slot))
                return visits.kept(plan, keep, opt.rate, seed, v, at, shape, places)

            hides = schedule.hides(plan)
            return gradient_loop.Sight(
                seen if hides else None,
                marked if opt.marks.count else None,
                kept if opt.rate else None,
            )

        def one_item(t: Any, base: Any) -> Any:
            dk, dv, total = warpgroup.run(t, base, sight_of(t))
            b, kv_head, tile, local = (memory.item(t, i) for i in (1, 2, 4, 5))
            row = aligned_rows(tile * plan.block_home + wg * ROWS, ROWS)
            window = (b, row, local, kv_head)
            write(dv, dv_ref, window)
            write(dk * (opt.scale / LOG2E), dk_ref, window)
            return total

        def write(tile: jax.Array, ref: Any, window: tuple[Any, ...]) -> None:
            """Writes one warpgroup's tile, or adds it: each place once a launch, so in order."""
            smem = out_smem.at[wg]
            width = smem.shape[1]
            for first in range(0, tile.shape[1], width):
                at = ref.at[(*window, piece(first, width))]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                part = tile[:, first : first + width].astype(smem.dtype)
                store_tile(smem, part, opt.interpret)
                plgpu.commit_smem()
                for adds in (False, True):
                    # Whether it continues is known at run time only in a series.
                    pl.when(continues == adds)(functools.partial(leave, smem, at, adds))

        def leave(smem: Any, at: Any, adds: bool) -> None:
            if adds:
                add_to_global(smem, at, opt.interpret)
            else:
                plgpu.copy_smem_to_gmem(smem, at)

        lax.fori_loop(0, items_of()[0], one_item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def multiply() -> None:
        config.set_fused_registers(memory.head_dim, "queries")
        lax.fori_loop(0, items_of()[0], queries.run, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        config.set_fused_registers(memory.head_dim, "copies")
        columns = piece(0, memory.head_dim)

        count, block = items_of()

        def one_item(t: Any, state: Any) -> Any:
            fill, current = state
            following = visits.entry(items, block, t + 1, count)
            b, kv_head, residue, tile, local = visits.place(plan, geometry, current[0], kv_heads)

            def home(w: int) -> tuple[Any, Any]:
                row = aligned_rows(tile * plan.block_home + w * ROWS, ROWS)
                at = (b, row, local, kv_head, columns)
                return k_ref.at[at], v_ref.at[at]

            steps = steps_of(current, kv_head, residue, tile)
            memory.bring_home(t, home, steps, b, kv_head, residue, tile, local)

            def member(m: Any, fill: Any, branch: int) -> Any:
                head, number = kv_head * opt.group + m, plan.away_view(branch)
                view = words[schedule.VIEW] if plan.series else number
                lse_ref, delta_ref = lse_refs[number], delta_refs[number]
                v = visit(branch, head, residue, tile)
                first, end = tile * plan.block_home, home_end(plan, local)
                v = visits.segmented(plan, v, first)
                whole = visits.unmasked(plan, v, first, plan.block_home, end)
                limits = (*whole, *hidden(plan, v, first))
                plane = (b * plan.heads + head) * dq_rows + v.away_residue
                ordered = visits.before(v, lse_ref.shape[-1])

                def step(j: Any, i: Any) -> Any:
                    start = v.first + j * bq
                    at = (b, aligned_rows(start, bq), v.away_residue, head, columns)
                    vector = aligned_rows(ordered + start, bq)
                    place = gradient_memory.Place(start, *limits, plane, view, branch, head)
                    marks = [ref.at[b, vector] for ref in q_marks[number]]
                    tiles = (q_refs[number].at[at], marks, do_refs[number].at[at])
                    vectors = (ref.at[b, head, vector] for ref in (lse_ref, delta_ref))
                    memory.bring(i, place, *tiles, *vectors)
                    return i + 1

                return lax.fori_loop(0, v.steps, step, fill)

            for branch in range(branches):
                body = functools.partial(member, branch=branch)
                fill = lax.fori_loop(0, opt.group, body, fill) if opt.group > 1 else body(0, fill)
            return fill, following

        first = visits.entry(items, block, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), first))

    apart = config.queries_apart(memory.head_dim)
    pl.when(wg < CONSUMERS)(consume)
    if apart:
        pl.when(wg == CONSUMERS)(multiply)
    pl.when(wg == CONSUMERS + apart)(produce)


def home_end(plan: schedule.Launch, local: Any) -> Any:
    """Rows of keys that exist of a residue, or None where tiles end with them."""
    return schedule.home_end(plan, local) if plan.ragged else None


def hidden(plan: schedule.Launch, v: visits.Visit, row: Any) -> tuple[Any, Any]:
    """The last start of an away tile of which the second half of a tile's home rows sees nothing,
    and the first of which the first half sees nothing; row: the tile's first.
    """
    if plan.gaps:
        return jnp.int32(-schedule.UNBOUNDED), jnp.int32(schedule.UNBOUNDED)
    low, _ = visits.row_bounds(plan, v, v.home_row(row + ROWS))
    _, high = visits.row_bounds(plan, v, v.home_row(row + ROWS - 1))
    return low - v.away_shift - plan.block_away, high - v.away_shift


def _queries_refs(views: Sequence[int], it: Any, interpret: bool) -> dict[int, Any]:
    """Where the queries' gradient of each view is added: one array, see `fused_gradients`."""
    if interpret:
        return {r: next(it) for r in views}
    return dict.fromkeys(views, next(it))


def fused_gradients(
    plan: schedule.Launch,
    opt: Options,
    table: np.ndarray,
    arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    lse: jax.Array,
    delta: jax.Array,
    grads: tuple[jax.Array, jax.Array | None, jax.Array | None],
    *,
    out_dtype: Any,
    continues: bool,
    starts: jax.Array,
    seed: jax.Array,
    marks: tuple[Sequence[jax.Array], Sequence[jax.Array]],
    keep: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All gradients of one launch.

    arrays, lse, delta, marks as in `keys_gradient`. grads: (dq, dk, dv); dq float32 `[B, N, T', H]`
    without the scale, added to; dk and dv given when opt.add, and added to when this launch
    continues them.
    """
    operands = operands_of(plan, table, arrays, (lse, delta), starts, seed, marks, continues)
    given = grads if opt.add else grads[:1]
    return _run(schedule.program(plan), opt, keep, jnp.dtype(out_dtype), operands, given)


@functools.partial(jax.jit, static_argnums=range(4))
def _run(
    plan: schedule.Launch,
    opt: Options,
    keep: Any,
    out_dtype: Any,
    operands: list[jax.Array],
    grads: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`fused_gradients`; traced once for all launches of a series. grads: dq, and the others."""
    dq, *others = grads
    shape, dtype = operands[5].shape, operands[5].dtype
    head_dim = tile_columns(shape[-1], opt.interpret)
    # Float32 leaves by columns: there is no room for all of it.
    width = head_dim * 2 // jnp.dtype(out_dtype).itemsize
    scratch = [shared_tile((CONSUMERS, ROWS, width), out_dtype)]
    sizes = (head_dim, plan.block_away, opt.stages, dtype, opt.marks.count)
    scratch += gradient_memory.scratch(*sizes, opt.interpret, dq.shape[-1])
    # The interpreter has no additions to strided rows of one array, so there it is one a view.
    inplace = [dq]
    if opt.interpret:
        planes = (*dq.shape[:2], -1)
        inplace = [jnp.zeros_like(dq).reshape(*planes, r, dq.shape[-1]) for r in plan.views]
    inplace += [x.reshape(shape) for x in others]
    types = [] if others else [jax.ShapeDtypeStruct(shape, out_dtype)] * 2
    *added, dk, dv = launch(
        functools.partial(_body, plan, opt, keep),
        operands,
        types,
        scratch,
        ctas=operands[0].shape[0],
        threads=CONSUMERS + 1 + config.queries_apart(head_dim),
        name="dilated_gradients",
        reductions=False,
        inplace=inplace,
    )
    if opt.interpret:
        added = [sum((x.reshape(dq.shape) for x in added), dq)]
    dk, dv = (x.reshape(shape[0], -1, *shape[3:]) for x in (dk, dv))
    return added[0], dk, dv
