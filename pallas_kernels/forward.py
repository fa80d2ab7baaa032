"""The forward kernel: one online softmax over all visits of a tile of queries."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import config, forward_memory, schedule, visits
from pallas_kernels.compat import (
    COLUMN,
    Sum,
    aligned_rows,
    launch,
    pl,
    plgpu,
    shared_tile,
)
from pallas_kernels.config import ROWS
from pallas_kernels.copies import copy_boxes, piece, piece_columns
from pallas_kernels.forward_memory import Item, Memory, places_of
from pallas_kernels.forward_results import Results
from pallas_kernels.instructions import load_rows, recomputed, take_view
from pallas_kernels.marks import Kinds, Marks
from pallas_kernels.online_softmax import Tile, Warpgroup, nothing_seen
from pallas_kernels.products import multiply_columns
from pallas_kernels.support import tile_columns


@dataclasses.dataclass(frozen=True)
class Options:
    """Static options of the forward kernel beside its `schedule.Launch`.

    consumers: warpgroups that compute. overlap, lazy: see `online_softmax.Warpgroup`. carry: out
    and lse are handed to it; in a series it is said at run time whether it continues them. The
    others as in `backward`.
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
    it = iter(refs)
    items, geometry, launch_ref, seed_ref, q_ref = (next(it) for _ in range(5))
    k_refs = [next(it) for _ in plan.away_views]
    v_refs = [next(it) for _ in plan.away_views]
    q_marks, k_marks = opt.marks.take(it), [opt.marks.take(it) for _ in plan.away_views]
    out_ref, lse_ref = next(it), next(it)
    q_smem, k_smem, v_smem, o_smem, mark_smem, p_smem, sum_smem = (next(it) for _ in range(7))
    q_ready, k_ready, v_ready, c_ready, q_free, k_free, v_free, *words = it

    wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
    branches, consumers = len(plan.rates), opt.consumers
    bkv = plan.block_away
    head_dim = q_smem.shape[-1]
    memory, tells = Memory(*words, opt.interpret), tells_places(plan, opt)
    take_view(launch_ref[schedule.VIEW], plan.series, opt.interpret)
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

        # Larger heads leave no registers: what they want to know they read when they need it.
        reads_again = head_dim > ROWS

        def me() -> Any:
            """The number of this warpgroup, and what follows from it."""
            return recomputed(wg, opt.interpret) if reads_again else wg

        def running() -> tuple[schedule.Launch, Any]:
            return visits.running(plan, memory.launch, opt.carry) if reads_again else known

        known = visits.running(plan, launch_ref, opt.carry)
        results = Results(
            number=me,
            running=running,
            out=out_ref,
            lse=lse_ref,
            tiles=o_smem,
            ready=c_ready,
            carry=opt.carry,
            rate=opt.rate,
            interpret=opt.interpret,
        )

        def tile_at(item: Any, home: Marks, n: Any) -> Tile:
            """What is special about tile n, of an item."""
            hides = schedule.hides(plan)
            edge = mine(n, "edges") if hides else False

            def masked(s: jax.Array) -> jax.Array:
                one, row, start = running()[0], results.first_row(item), memory.place(n, "start")
                seen = visits.seen_pairs(one, memory.visit(one, n), row, start, s.shape)
                return jnp.where(seen, s, -jnp.inf)

            def mask(s: jax.Array, away: Marks) -> jax.Array:
                if hides:
                    s = lax.cond(edge, lambda: masked(s), lambda: s)
                return opt.marks.hide(s, home, away, plan.transposed)

            def drop(p: jax.Array, away: Marks) -> jax.Array:
                if not opt.rate:
                    return p
                one, seed = running()[0], (seed_ref[0], seed_ref[1])
                at = (item().batch, item().head, memory.place(n, "branch"))
                at = (*at, results.first_row(item), memory.place(n, "start"))
                v, places = memory.visit(one, n), opt.marks.places(home, away)
                seen = visits.kept(one, keep, opt.rate, seed, v, at, p.shape, places)
                return jnp.where(seen, p, 0.0)

            return Tile(mask, drop)

        def mine(n: Any, field: str) -> Any:
            """Whether this warpgroup's bit is set in a field of a tile's place."""
            return (memory.place(n, field) >> wg) & 1 != 0

        def look(item: Any, base: Any, total: Any, home: Marks) -> Any:
            """(sum, maximum, mass, lse that is there) of an item; it has at least one step."""
            tile = functools.partial(tile_at, item, home)
            state = loop.first(base, total, tile)
            # Only now, when what the item before wrote has left.
            results.bring(item)

            def all_tiles(acc: Sum) -> Any:
                step = functools.partial(loop.step, acc, total, tile)
                done = lax.fori_loop(base + 1, total, step, state)
                old = results.load_old(item)
                return *loop.last(acc, total, done), old

            def perhaps_half(acc: Sum) -> Any:
                """As `all_tiles`; the last tile is half a tile if no more is seen."""
                half = mine(base, "halves")
                end = total - jnp.where(half, 1, 0)
                step = functools.partial(loop.step, acc, total, tile)
                done = lax.fori_loop(base + 1, end, step, state)
                old = results.load_old(item)
                found = lax.cond(
                    half,
                    lambda: loop.last_half(acc, tile, end, done),
                    lambda: loop.last(acc, total, done),
                )
                return *found, old

            # Of the tile on the diagonal the first of two warpgroups sees half. (Larger heads gain
            # nothing, and have no registers left. Before a gap the last row is not the one that
            # sees most.)
            halves = plan.causal and branches == 1 and bkv == 2 * ROWS and opt.lazy and opt.overlap
            plain = not (opt.marks.count or opt.rate or plan.gaps) and head_dim <= ROWS
            return loop.with_sum(perhaps_half if halves and plain else all_tiles)

        def one_item(t: Any, base: Any) -> Any:
            memory.await_item(t)
            held = memory.item(t)

            def item() -> Item:
                return memory.item(t) if reads_again else held

            total, at = base + held.steps, (held.batch, held.row + wg * ROWS, held.residue)
            home = opt.marks.read(
                q_marks, lambda ref: load_rows(ref, at, running()[0].stride, opt.interpret)
            )

            def nothing() -> Any:
                results.bring(item)
                return *nothing_seen(head_dim), results.load_old(item)

            found = lax.cond(total > base, lambda: look(item, base, total, home), nothing)
            results.finish(item, *found)
            memory.release_item(t)
            return total

        loop.begin()
        count = items[recomputed(cta, opt.interpret), 0, 0]
        lax.fori_loop(0, count, one_item, jnp.int32(0))
        loop.end()
        plgpu.wait_smem_to_gmem(0)

    def produce() -> None:
        config.set_registers(consumers, computes=False)
        columns = piece(0, head_dim)

        block = recomputed(cta, opt.interpret)
        count = items[block, 0, 0]
        one, _ = visits.running(plan, launch_ref, opt.carry)
        memory.bring_launch([launch_ref[i] for i in range(launch_ref.shape[0])])

        def one_item(t: Any, state: Any) -> Any:
            fill, queries, current = state
            code, mask, _ = current
            # Read early: the next item must not start by waiting for memory.
            following = visits.entry(items, block, t + 1, count)
            b, n, residue, tile, local = visits.place(one, geometry, code, plan.heads)
            row = tile * plan.block_home
            steps = visits.known_steps(one, geometry, current, mask, residue, tile)
            memory.bring_item(t, Item(steps, b, n, row, local))
            kv_head = lax.div(n, jnp.int32(opt.group))

            def load_queries() -> None:
                for i in range(consumers):

                    @pl.when(queries > 0)
                    def _(i: int = i) -> None:
                        plgpu.barrier_wait(q_free.at[i])

                    rows = aligned_rows(row + i * ROWS, ROWS)
                    plgpu.copy_gmem_to_smem(
                        q_ref.at[b, rows, local, n, columns], q_smem.at[i], q_ready.at[i]
                    )

            begin = fill
            for branch in range(branches):
                v = visits.visit(one, geometry, branch, mask, residue, tile)
                number = plan.away_view(branch)
                k_ref, v_ref, ids = k_refs[number], v_refs[number], k_marks[number]
                ordered = visits.before(v, ids[0].shape[-1]) if ids else 0
                place = places_of(one, v, branch, row, consumers) if tells else None

                def step(
                    j: Any,
                    n_fill: Any,
                    v: Any = v,
                    k_ref: Any = k_ref,
                    v_ref: Any = v_ref,
                    ids: Any = ids,
                    ordered: Any = ordered,
                    place: Any = place,
                ) -> Any:
                    slot = lax.rem(n_fill, jnp.int32(opt.stages))
                    start = v.first + j * bkv
                    rows = aligned_rows(start, bkv)
                    window = (b, rows, v.away_residue, kv_head, columns)
                    reused = n_fill >= opt.stages
                    pl.when(reused)(lambda: plgpu.barrier_wait(k_free.at[slot]))
                    plgpu.copy_gmem_to_smem(k_ref.at[window], k_smem.at[slot], k_ready.at[slot])
                    if place is not None:
                        memory.leave(n_fill, place(start), k_ready.at[slot])
                    marked = (b, aligned_rows(ordered + start, bkv))
                    opt.marks.bring(ids, marked, mark_smem, slot, k_ready.at[slot])
                    pl.when(n_fill == begin)(load_queries)
                    pl.when(reused)(lambda: plgpu.barrier_wait(v_free.at[slot]))
                    plgpu.copy_gmem_to_smem(v_ref.at[window], v_smem.at[slot], v_ready.at[slot])
                    return n_fill + 1

                fill = lax.fori_loop(0, v.steps, step, fill)
            return fill, queries + jnp.where(fill > begin, 1, 0), following

        first = visits.entry(items, block, 0, count)
        lax.fori_loop(0, count, one_item, (jnp.int32(0), jnp.int32(0), first))

    pl.when(wg < consumers)(consume)
    pl.when(wg == consumers)(produce)


def tells_places(plan: schedule.Launch, opt: Options) -> bool:
    """Whether steps want to know where their keys lie."""
    return schedule.hides(plan) or opt.rate > 0.0


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
    continues: bool,
    starts: jax.Array,
    seed: jax.Array,
    marks: tuple[Sequence[jax.Array], Sequence[jax.Array]],
    keep: Any,
) -> tuple[jax.Array, jax.Array]:
    """Runs one launch.

    query [B, T', N, H'], key and value [B, S', K, H'], padded as `launches` does. out like query
    and lse [B, N, rows] are updated when opt.carry, and continued when the launch continues;
    otherwise they are created. marks: int32 `[B, rows]` of queries and of keys, those that
    `opt.marks` has, for whole tiles. Returns out and lse.
    """
    geometry = jnp.asarray(schedule.kernel_table(plan, starts))
    words = jnp.asarray(schedule.words(plan, continues))
    operands = [jnp.asarray(table), geometry, words, seed, view(query, plan.home_view)]
    operands += [view(x, r) for x in (key, value) for r in plan.away_views]
    operands += mark_views(plan, *marks)
    before = (out, lse) if opt.carry else ()
    return _run(
        schedule.program(plan), opt, keep, jnp.dtype(out_dtype), lse_shape, operands, before
    )


@functools.partial(jax.jit, static_argnums=range(5))
def _run(
    plan: schedule.Launch,
    opt: Options,
    keep: Any,
    out_dtype: Any,
    lse_shape: tuple[int, int, int],
    operands: list[jax.Array],
    before: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
    """`forward`; traced once for all launches of a series. before: out and lse."""
    query = operands[4]
    head_dim, dtype = tile_columns(query.shape[-1], opt.interpret), query.dtype
    width = piece_columns(head_dim, out_dtype, opt.interpret)
    batch, rows, stride, *rest = query.shape
    out_shape = (batch, rows * stride, *rest)
    lse_view = (*lse_shape[:2], lse_shape[2] // plan.home_view, plan.home_view)
    bkv, stages = plan.block_away, opt.stages
    pairs, tells = opt.consumers, tells_places(plan, opt)
    scratch = [
        shared_tile((pairs, ROWS, head_dim), dtype),
        shared_tile((stages, bkv, head_dim), dtype),
        shared_tile((stages, bkv, head_dim), dtype),
        shared_tile((pairs, head_dim // width, ROWS, width), out_dtype),
        opt.marks.rings(stages, bkv),
        shared_tile((pairs, ROWS, bkv), dtype) if opt.interpret else None,
        plgpu.SMEM((pairs, ROWS, head_dim), jnp.float32) if opt.interpret else None,
        plgpu.Barrier(num_barriers=pairs),
        plgpu.Barrier(num_barriers=stages, num_arrivals=1 + opt.marks.count + tells),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=pairs, num_arrivals=head_dim // width),
        plgpu.Barrier(num_barriers=pairs),
        plgpu.Barrier(num_barriers=stages, num_arrivals=pairs),
        plgpu.Barrier(num_barriers=stages, num_arrivals=pairs),
        *forward_memory.scratch(stages, pairs),
    ]
    args: dict[str, Any] = {}
    if opt.carry:
        out, lse = before
        args["inplace"] = [out.reshape(query.shape), lse.reshape(lse_view)]
        types = []
    else:
        types = [
            jax.ShapeDtypeStruct(query.shape, out_dtype),
            jax.ShapeDtypeStruct(lse_view, jnp.float32),
        ]
    out, lse = launch(
        functools.partial(_body, plan, opt, keep),
        operands,
        types,
        scratch,
        ctas=operands[0].shape[0],
        threads=pairs + 1,
        name="dilated_forward",
        reductions=False,
        **args,
    )
    return out.reshape(out_shape), lse.reshape(lse_shape)
