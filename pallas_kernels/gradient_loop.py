"""The inner loop of the fused backward kernels: one warpgroup's steps over tiles of queries.

A step of two warpgroups, each with 64 rows of keys (FlashAttention-3, arXiv:2407.08608): scores
and probabilities of a tile of queries, transposed; what they give to the gradients of values and
keys, which stay in registers; then, across both warpgroups, the gradient of the queries. The scores
of the next step are begun before this one ends.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import (
    COLUMN,
    add_product,
    load,
    pl,
    plgpu,
    product,
    shared_tile,
    value_while,
)
from pallas_kernels.config import CONSUMERS, ROWS
from pallas_kernels.instructions import meet, recomputed, store_tile


@dataclasses.dataclass(frozen=True)
class Tile:
    """What is special about one tile of queries, for the warpgroup that asks.

    mask: scores and ids of the queries (or None) -> scores with -inf where nothing is seen. kept:
    () -> which pairs dropout keeps, or None without dropout. send: shared memory, first row, first
    column -> None: begins to add that part of the gradient of the queries to global memory.
    """

    mask: Callable[[jax.Array, Any], jax.Array]
    kept: Callable[[], jax.Array] | None
    send: Callable[[Any, Any, Any], None]


def scratch(head_dim: int, away: int, stages: int, dtype: Any, ids: bool, interpret: bool) -> list:
    """Shared memory of a block, in the order of `Warpgroup`'s fields k to staging, and barriers.

    The barriers are those of `Barriers`.
    """
    home, tiles = (CONSUMERS, ROWS, head_dim), (stages, away, head_dim)
    vectors = plgpu.SMEM((stages, away), jnp.float32)
    width = min(head_dim, ROWS)
    return [
        shared_tile(home, dtype),
        shared_tile(home, dtype),
        shared_tile(tiles, dtype),
        shared_tile(tiles, dtype),
        vectors,
        vectors,
        plgpu.SMEM((stages, away), jnp.int32) if ids else None,
        shared_tile((2 * away // ROWS, CONSUMERS, ROWS, ROWS), dtype, head_dim),
        shared_tile((CONSUMERS, ROWS, width), jnp.float32),
        shared_tile((CONSUMERS, ROWS, away), dtype) if interpret else None,
        plgpu.Barrier(num_barriers=CONSUMERS, num_arrivals=2),
        plgpu.Barrier(num_barriers=stages),
        plgpu.Barrier(num_barriers=stages, num_arrivals=4 if ids else 3),
        plgpu.Barrier(num_arrivals=CONSUMERS),
        plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        plgpu.Barrier(num_arrivals=CONSUMERS),
    ]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Shared memory of a block: k, v at home; rings of queries q, do, lse, delta, ids (or None).

    ds: gradients of scores of two steps, in squares of 64. dq: of the queries, half a warpgroup.
    staging: None except under the interpreter. Barriers: what is ready, and what is free again;
    met: both warpgroups stored their gradients of scores (used by the interpreter only).
    """

    k: Any
    v: Any
    q: Any
    do: Any
    lse: Any
    delta: Any
    ids: Any
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
    def interpret(self) -> bool:
        """Whether the interpreter runs it."""
        return self.staging is not None

    def slot(self, n: Any) -> Any:
        """Where in the rings tile n lies."""
        return lax.rem(n, jnp.int32(self.q.shape[0]))


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """One of the two warpgroups that compute. scale: of the scores, base 2. rate: of dropout."""

    number: Any
    memory: Memory
    scale: float
    rate: float

    def run(self, loop: Callable[[Any], Any], base: Any, total: Any) -> tuple[jax.Array, jax.Array]:
        """Gradients (dk, without the scale, and dv) over tiles base to total - 1.

        loop: called with a function (state, tile of a warpgroup's number) -> state and the first
        state; runs all steps and returns the last state. State is (n, scores of tile n).
        """
        memory = self.memory
        for w in range(CONSUMERS):
            plgpu.barrier_wait(memory.k_ready.at[w])

        def body(dk_acc: Any, dv_acc: Any) -> Any:
            pl.when(base < total)(lambda: plgpu.barrier_wait(memory.q_ready.at[memory.slot(base)]))
            queries = memory.q.at[memory.slot(base)].transpose((1, 0))
            shape = (ROWS, memory.away)
            s = product(memory.k.at[self.number], queries, shape, lambda: None)

            def step(state: Any, tile: Callable[[Any], Tile]) -> Any:
                return self._step(state, tile, total, dk_acc, dv_acc)

            loop(step, (base, s))
            return dk_acc[...], dv_acc[...]

        acc = plgpu.ACC((ROWS, memory.head_dim), jnp.float32)
        dk, dv = pl.run_scoped(body, acc, acc)
        plgpu.barrier_arrive(memory.k_free)
        return dk, dv

    def _step(self, state: Any, tile_of: Any, total: Any, dk_acc: Any, dv_acc: Any) -> Any:
        memory, dtype = self.memory, self.memory.k.dtype
        n, s = state
        slot, shape = memory.slot(n), (ROWS, memory.away)
        me = recomputed(self.number, memory.interpret)
        tile = tile_of(me)
        share = 1.0 / (1.0 - self.rate)
        staging = None if memory.staging is None else memory.staging.at[me]
        plgpu.barrier_wait(memory.do_ready.at[slot])

        def products(dp_acc: Any, dq_acc: Any, next_acc: Any) -> jax.Array:
            plgpu.wgmma(dp_acc, memory.v.at[me], memory.do.at[slot].transpose((1, 0)))
            lse = load(memory.lse.at[slot], COLUMN)
            ids = None if memory.ids is None else load(memory.ids.at[slot], COLUMN)
            scores = tile.mask(s, ids)
            p = jnp.exp2(scores * self.scale - lax.broadcast_in_dim(lse, shape, [1]))
            seen = None if tile.kept is None else tile.kept()
            weight = p if seen is None else jnp.where(seen, p * share, 0.0)
            add_product(dv_acc, weight.astype(dtype), memory.do.at[slot], staging)
            dp = value_while(dp_acc, 1, memory.interpret)
            # Loaded only now: a column vector takes as many registers as half a tile.
            delta = load(memory.delta.at[slot], COLUMN)
            dp = dp if seen is None else jnp.where(seen, dp * share, 0.0)
            ds = (p * (dp - lax.broadcast_in_dim(delta, shape, [1]))).astype(dtype)
            self._store_scores(ds, n, me)
            self._begin_queries(dq_acc, n, me)
            add_product(dk_acc, ds, memory.q.at[slot], staging)
            dq = value_while(dq_acc, 1, memory.interpret)
            plgpu.barrier_arrive(memory.do_free.at[slot])
            self._send_queries(dq, tile, me)
            following = memory.slot(n + 1)
            pl.when(n + 1 < total)(lambda: plgpu.barrier_wait(memory.q_ready.at[following]))
            # Past the last step these are scores of nothing, and not used.
            plgpu.wgmma(next_acc, memory.k.at[me], memory.q.at[following].transpose((1, 0)))
            scores = value_while(next_acc, 0, memory.interpret)
            plgpu.barrier_arrive(memory.q_free.at[slot])
            return scores

        scores, half = plgpu.ACC(shape, jnp.float32), self.memory.dq.shape[1:]
        queries = plgpu.ACC(half, jnp.float32)
        return n + 1, pl.run_scoped(products, scores, queries, scores)

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
            store_tile(smem, square, memory.interpret, memory.head_dim)
        meet(memory.met, CONSUMERS, memory.interpret)

    def _begin_queries(self, acc: Any, n: Any, me: Any) -> None:
        memory = self.memory
        for w in range(CONSUMERS):
            if self._by_rows:
                left, right = memory.ds.at[self._square(n, me), w], memory.k.at[w]
            else:
                columns = pl.ds(pl.multiple_of(me * ROWS, ROWS), ROWS)
                left, right = memory.ds.at[self._square(n, 0), w], memory.k.at[w, :, columns]
            plgpu.wgmma(acc, left.transpose((1, 0)), right)

    def _send_queries(self, dq: jax.Array, tile: Tile, me: Any) -> None:
        smem, zero = self.memory.dq.at[me], jnp.int32(0)
        store_tile(smem, dq, self.memory.interpret)
        plgpu.commit_smem()
        row, column = (me * ROWS, zero) if self._by_rows else (zero, me * ROWS)
        tile.send(smem, row, column)
