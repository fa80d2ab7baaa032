"""The inner loop of the fused backward kernels: one warpgroup's steps over tiles of queries.

A step of two warpgroups, each with 64 rows of keys (FlashAttention-3, arXiv:2407.08608): scores
and probabilities of a tile of queries, transposed; what they give to the gradients of values and
keys, which stay in registers; then, across both warpgroups, the gradient of the queries. No product
runs from one step into the next, so a step with masks can be a branch of its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import (
    COLUMN,
    add_product,
    load,
    pl,
    plgpu,
    shared_tile,
    value_while,
)
from pallas_kernels.config import CONSUMERS, ROWS
from pallas_kernels.instructions import (
    add_rows,
    meet,
    recomputed,
    see_stores,
    store_tile,
    store_transposed,
    store_words,
)

# Of a `Place`, or of an item.
WORDS = 8


class Place(NamedTuple):
    """Where a tile of queries lies: int32 scalars, which the warpgroup that copies leaves behind.

    start: its first row in its view. low, high: the first and last start of a tile that all rows of
    keys see whole. plane: the row of the queries' gradient that row 0 of the view adds to. rate: of
    the view. branch, head: for what is rarely needed.
    """

    start: Any
    low: Any
    high: Any
    plane: Any
    rate: Any
    branch: Any
    head: Any


@dataclasses.dataclass(frozen=True)
class Sight:
    """What the keys of an item see.

    seen: (number of the warpgroup, place) -> which pairs its place allows, or None where all are
    seen. marked: (scores, number, slot) -> scores with -inf where what tokens carry hides a pair,
    or None. kept: (number, slot) -> which pairs dropout keeps, or None.
    """

    seen: Callable[[Any, Place], jax.Array] | None
    marked: Callable[[jax.Array, Any, Any], jax.Array] | None
    kept: Callable[[Any, Any], jax.Array] | None


def scratch(head_dim: int, away: int, stages: int, dtype: Any, marks: int, interpret: bool) -> list:
    """Shared memory and barriers of a block, in the order of `Memory`'s fields.

    marks: int32 vectors that go along with the queries.
    """
    home, tiles = (CONSUMERS, ROWS, head_dim), (stages, away, head_dim)
    width = min(head_dim, ROWS)
    return [
        shared_tile(home, dtype),
        shared_tile(home, dtype),
        shared_tile(tiles, dtype),
        shared_tile(tiles, dtype),
        plgpu.SMEM((2, stages, away), jnp.float32),
        plgpu.SMEM((max(1, marks) * stages + 1, away), jnp.int32),
        shared_tile((2 * away // ROWS, CONSUMERS, ROWS, ROWS), dtype, head_dim),
        shared_tile((CONSUMERS, ROWS, width), jnp.float32),
        shared_tile((CONSUMERS, ROWS, away), dtype) if interpret else None,
        plgpu.Barrier(num_arrivals=2 * CONSUMERS + 1),
        plgpu.Barrier(num_barriers=stages, num_arrivals=2 + marks),
        plgpu.Barrier(num_barriers=stages, num_arrivals=3),
        plgpu.Barrier(num_arrivals=CONSUMERS),
        plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        plgpu.Barrier(num_arrivals=CONSUMERS),
    ]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Shared memory of a block: k, v at home; rings of queries q, do, vectors.

    vectors: rings of lse and delta. integers: rings of marks, and a row of words: a ring of
    `Place`, ready with q; then of two items, ready with k: steps, and what else the kernel wants to
    know. (One array: each takes at least 1024 bytes.) ds: gradients of scores of two steps, in
    squares of 64. dq: of the queries, half a warpgroup. staging: None except under the interpreter.
    Barriers: what is ready, and what is free again; met: both warpgroups stored their gradients of
    scores (used by the interpreter only).
    """

    k: Any
    v: Any
    q: Any
    do: Any
    vectors: Any
    integers: Any
    ds: Any
    dq: Any
    staging: Any
    k_ready: Any
    q_ready: Any
    do_ready: Any
    k_free: Any
    q_free: Any
    do_free: Any
    met: Any

    @property
    def away(self) -> int:
        """Rows of a tile of queries."""
        return self.q.shape[1]

    @property
    def head_dim(self) -> int:
        """H, padded."""
        return self.k.shape[-1]

    @property
    def lse(self) -> Any:
        """Ring of log-sum-exps."""
        return self.vectors.at[0]

    @property
    def delta(self) -> Any:
        """Ring of delta."""
        return self.vectors.at[1]

    @property
    def interpret(self) -> bool:
        """Whether the interpreter runs it."""
        return self.staging is not None

    def slot(self, n: Any) -> Any:
        """Where in the rings tile n lies."""
        return lax.rem(n, jnp.int32(self.q.shape[0]))

    def bring_home(self, t: Any, sources: Callable[[int], tuple[Any, Any]], *words: Any) -> None:
        """Copies keys and values of item t, and leaves its words (the warpgroup that copies).

        sources: number of a warpgroup -> its keys and values. words: the steps first.
        """
        pl.when(t > 0)(lambda: plgpu.barrier_wait(self.k_free))
        for w in range(CONSUMERS):
            for source, target in zip(sources(w), (self.k, self.v), strict=True):
                plgpu.copy_gmem_to_smem(source, target.at[w], self.k_ready)
        store_words(self._words(self._item(t)), words, self.interpret)
        plgpu.barrier_arrive(self.k_ready)

    def bring(
        self, n: Any, place: Place, q: Any, marks: Sequence[Any], do: Any, lse: Any, delta: Any
    ) -> None:
        """Copies tile n of the queries and leaves its place (the warpgroup that copies)."""
        slot, reused = self.slot(n), n >= self.q.shape[0]
        pl.when(reused)(lambda: plgpu.barrier_wait(self.q_free.at[slot]))
        plgpu.copy_gmem_to_smem(q, self.q.at[slot], self.q_ready.at[slot])
        for i, source in enumerate(marks):
            plgpu.copy_gmem_to_smem(source, self.mark(slot, i), self.q_ready.at[slot])
        store_words(self._words(slot), place, self.interpret)
        plgpu.barrier_arrive(self.q_ready.at[slot])
        pl.when(reused)(lambda: plgpu.barrier_wait(self.do_free.at[slot]))
        for source, target in ((do, self.do), (lse, self.lse), (delta, self.delta)):
            plgpu.copy_gmem_to_smem(source, target.at[slot], self.do_ready.at[slot])

    def place(self, slot: Any) -> Place:
        """The place of a tile of queries."""
        words = self._words(slot)
        return Place(*(words[i] for i in range(len(Place._fields))))

    def mark(self, slot: Any, i: int) -> Any:
        """Mark i of a tile of queries."""
        return self.integers.at[slot + i * self.q.shape[0] if i else slot]

    def item(self, t: Any, i: Any) -> Any:
        """Word i of item t."""
        return self._words(self._item(t))[i]

    def _words(self, entry: Any) -> Any:
        return self.integers.at[self.integers.shape[0] - 1, pl.ds(entry * WORDS, WORDS)]

    def _item(self, t: Any) -> Any:
        return lax.rem(t, jnp.int32(2)) + self.q.shape[0]


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """One of the two warpgroups that compute.

    scale: of the scores, base 2. rate: of dropout. targets: by rate, what the gradient of the
    queries is added to, see `instructions.add_rows`.
    """

    number: Any
    memory: Memory
    scale: float
    rate: float
    targets: dict[int, Any]

    def run(self, t: Any, base: Any, sight: Sight) -> tuple[jax.Array, jax.Array, Any]:
        """Gradients (dk, without the scale, and dv) of item t, and the tiles that it and all before
        it visited, of which base were before it.
        """
        memory = self.memory
        plgpu.barrier_wait(memory.k_ready)
        total = base + memory.item(t, 0)

        def body(dk_acc: Any, dv_acc: Any) -> Any:
            step = functools.partial(self._step, sight, dk_acc, dv_acc)
            lax.fori_loop(base, total, step, None)
            return dk_acc[...], dv_acc[...]

        acc = plgpu.ACC((ROWS, memory.head_dim), jnp.float32)
        dk, dv = pl.run_scoped(body, acc, acc)
        plgpu.barrier_arrive(memory.k_free)
        return dk, dv, total

    def _step(self, sight: Sight, dk_acc: Any, dv_acc: Any, n: Any, _: None) -> None:
        """The step of tile n."""
        memory, slot = self.memory, self.memory.slot(n)
        plgpu.barrier_wait(memory.q_ready.at[slot])
        plgpu.barrier_wait(memory.do_ready.at[slot])
        add = functools.partial(self._add, sight, dk_acc, dv_acc, n, slot)
        if sight.seen is None:
            add(None)
        else:
            lax.cond(self._edge(n), lambda: add(sight.seen), lambda: add(None))

    def _add(self, sight: Sight, dk_acc: Any, dv_acc: Any, n: Any, slot: Any, masks: Any) -> None:
        """Adds what tile n gives to the gradients; masks: `Sight.seen`, None if all is seen."""
        memory, dtype = self.memory, self.memory.k.dtype
        shape = (ROWS, memory.away)
        me = recomputed(self.number, memory.interpret)
        share = 1.0 / (1.0 - self.rate)
        staging = None if memory.staging is None else memory.staging.at[me]

        def products(s_acc: Any, dp_acc: Any, dq_acc: Any) -> None:
            plgpu.wgmma(s_acc, memory.k.at[me], memory.q.at[slot].transpose((1, 0)))
            if masks is None:
                plgpu.wgmma(dp_acc, memory.v.at[me], memory.do.at[slot].transpose((1, 0)))
                s = value_while(s_acc, 1, memory.interpret)
            else:
                # Ahead of the next product, which leaves no registers for masks.
                s = value_while(s_acc, 0, memory.interpret)
                s = jnp.where(masks(me, memory.place(slot)), s, -jnp.inf)
                plgpu.wgmma(dp_acc, memory.v.at[me], memory.do.at[slot].transpose((1, 0)))
            lse = load(memory.lse.at[slot], COLUMN)
            s = s if sight.marked is None else sight.marked(s, me, slot)
            p = jnp.exp2(s * self.scale - lax.broadcast_in_dim(lse, shape, [1]))
            seen = None if sight.kept is None else sight.kept(me, slot)
            weight = p if seen is None else jnp.where(seen, p * share, 0.0)
            weight = weight.astype(dtype)
            # Loaded only now: a column vector takes as many registers as half a tile.
            delta = load(memory.delta.at[slot], COLUMN)
            dp = value_while(dp_acc, 0, memory.interpret)
            dp = dp if seen is None else jnp.where(seen, dp * share, 0.0)
            ds = (p * (dp - lax.broadcast_in_dim(delta, shape, [1]))).astype(dtype)
            self._store_scores(ds, n, me)
            add_product(dv_acc, weight, memory.do.at[slot], staging)
            meet(memory.met, CONSUMERS, memory.interpret)
            self._begin_queries(dq_acc, n, me)
            add_product(dk_acc, ds, memory.q.at[slot], staging)
            dq = value_while(dq_acc, 1, memory.interpret)
            plgpu.barrier_arrive(memory.do_free.at[slot])
            store_tile(memory.dq.at[me], dq, memory.interpret)
            see_stores(memory.interpret)
            self._send_queries(slot, me)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(memory.q_free.at[slot])

        scores, half = plgpu.ACC(shape, jnp.float32), self.memory.dq.shape[1:]
        pl.run_scoped(products, scores, scores, plgpu.ACC(half, jnp.float32))

    def _edge(self, n: Any) -> Any:
        """Whether some pair of tile n is hidden by its place."""
        place = self.memory.place(self.memory.slot(n))
        return (place.start < place.low) | (place.start > place.high)

    @property
    def _by_rows(self) -> bool:
        """Whether a warpgroup takes half the rows of the queries' gradient, or half its columns."""
        return self.memory.away == CONSUMERS * ROWS

    def _square(self, n: Any, i: Any) -> Any:
        """Where 64 queries of step n lie in `ds`: two steps take turns."""
        chunks = self.memory.away // ROWS
        return lax.rem(n, jnp.int32(2)) * chunks + i

    def _store_scores(self, ds: jax.Array, n: Any, me: Any) -> None:
        memory = self.memory
        for i in range(memory.away // ROWS):
            square = ds[:, i * ROWS : (i + 1) * ROWS]
            smem = memory.ds.at[self._square(n, i), me]
            store_transposed(smem, square, memory.interpret, memory.head_dim)

    def _begin_queries(self, acc: Any, n: Any, me: Any) -> None:
        memory = self.memory
        for w in range(CONSUMERS):
            if self._by_rows:
                left, right = memory.ds.at[self._square(n, me), w], memory.k.at[w]
            else:
                columns = pl.ds(pl.multiple_of(me * ROWS, ROWS), ROWS)
                left, right = memory.ds.at[self._square(n, 0), w], memory.k.at[w, :, columns]
            plgpu.wgmma(acc, left, right)

    def _send_queries(self, slot: Any, me: Any) -> None:
        memory, zero = self.memory, jnp.int32(0)
        row, column = (me * ROWS, zero) if self._by_rows else (zero, me * ROWS)
        place = memory.place(slot)
        at = (place.plane, place.start + row, column)
        add_rows(memory.dq.at[me], self.targets, place.rate, at, memory.interpret)
