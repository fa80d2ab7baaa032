"""Shared memory of the fused backward kernels, and what the warpgroup that copies leaves in it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pl, plgpu, shared_tile
from pallas_kernels.config import CONSUMERS, ROWS, queries_apart
from pallas_kernels.instructions import store_words

# Of a `Place`, or of an item.
WORDS = 16


class Place(NamedTuple):
    """Where a tile of queries lies: int32 scalars, which the warpgroup that copies leaves behind.

    start: its first row in its view. low, high: the first and last start of a tile that all rows of
    keys see whole. early, late: the last start of one that the second warpgroup's keys do not see
    at all, and the first that the first one's do not. plane: the row of the queries' gradient that
    row 0 of the view adds to. view: its number. branch, head: for what is rarely needed.
    """

    start: Any
    low: Any
    high: Any
    early: Any
    late: Any
    plane: Any
    view: Any
    branch: Any
    head: Any


def scratch(
    head_dim: int,
    away: int,
    stages: int,
    dtype: Any,
    marks: int,
    interpret: bool,
    columns: int,
) -> list:
    """Shared memory and barriers of a block, in the order of `Memory`'s fields.

    marks: int32 vectors that go along with the queries. columns: of the queries' gradient.
    """
    home, tiles = (CONSUMERS, ROWS, head_dim), (stages, away, head_dim)
    width, readers = min(columns, ROWS), CONSUMERS + queries_apart(head_dim)
    return [
        shared_tile(home, dtype),
        shared_tile(home, dtype),
        shared_tile(tiles, dtype),
        shared_tile(tiles, dtype),
        plgpu.SMEM((2, stages, away), jnp.float32),
        plgpu.SMEM((max(1, marks) * stages + 1, away), jnp.int32),
        shared_tile((stages * away // ROWS, CONSUMERS, ROWS, ROWS), dtype, head_dim),
        shared_tile((CONSUMERS, ROWS, width), jnp.float32),
        shared_tile((CONSUMERS, ROWS, away), dtype) if interpret else None,
        plgpu.Barrier(num_arrivals=2 * CONSUMERS + 1),
        plgpu.Barrier(num_barriers=stages, num_arrivals=5 + marks),
        plgpu.Barrier(num_barriers=stages, num_arrivals=CONSUMERS),
        plgpu.Barrier(num_arrivals=readers),
        plgpu.Barrier(num_barriers=stages, num_arrivals=readers),
        plgpu.Barrier(num_barriers=stages),
    ]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Shared memory of a block: k, v at home; rings of queries q, do, vectors.

    vectors: rings of lse and delta. integers: rings of marks, and a row of words: a ring of
    `Place`; then of two items, ready with k: steps, and what else the kernel wants to know. (One
    array: each takes at least 1024 bytes.) ds: ring of gradients of scores, in squares of 64. dq:
    of the queries, in two halves; columns past the last of H it may lack. staging: None except
    under the interpreter. Barriers: what is ready, and what is free again, of the items' (k) and
    the rings; ds_ready: both warpgroups stored their gradients of scores; ds_free: a third one has
    multiplied them.
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
    ready: Any
    ds_ready: Any
    k_free: Any
    free: Any
    ds_free: Any

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
    def sum_shape(self) -> tuple[int, int]:
        """Of the products that give half of the queries' gradient."""
        return ROWS, min(self.head_dim, ROWS)

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
        pl.when(reused)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        for source, target in ((q, self.q), (do, self.do), (lse, self.lse), (delta, self.delta)):
            plgpu.copy_gmem_to_smem(source, target.at[slot], self.ready.at[slot])
        for i, source in enumerate(marks):
            plgpu.copy_gmem_to_smem(source, self.mark(slot, i), self.ready.at[slot])
        store_words(self._words(slot), place, self.interpret)
        plgpu.barrier_arrive(self.ready.at[slot])

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

    def square(self, slot: Any, i: Any) -> Any:
        """Where 64 queries of a tile lie in `ds`."""
        return slot * (self.away // ROWS) + i

    def _words(self, entry: Any) -> Any:
        return self.integers.at[self.integers.shape[0] - 1, pl.ds(entry * WORDS, WORDS)]

    def _item(self, t: Any) -> Any:
        return lax.rem(t, jnp.int32(2)) + self.q.shape[0]
