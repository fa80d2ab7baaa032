"""The inner loop of the forward kernels: one warpgroup's online softmax over tiles of keys."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import (
    ROW,
    TILE,
    Sum,
    filled,
    pl,
    plgpu,
    product,
    product_first,
    with_sum,
)
from pallas_kernels.config import ROWS
from pallas_kernels.instructions import above, named_barrier, partial_sums, pin, total_sums
from pallas_kernels.scores import exponentials, softmax

# First of the numbered hardware barriers of the turns; Mosaic's own allocation starts from 0.
TURN = 8
# In place of the maximum of a row that has seen nothing.
LEAST = float(jnp.finfo(jnp.float32).min)
# What a thread's probabilities of a row may add up to before its maximum is looked for again.
MOST = 256.0


@dataclasses.dataclass(frozen=True)
class Tile:
    """What is special about one tile of scores.

    mask: scores and marks of the keys -> scores with -inf where nothing is seen. drop:
    probabilities and marks of the keys -> those that dropout leaves.
    """

    mask: Callable[[jax.Array, Any], jax.Array]
    drop: Callable[[jax.Array, Any], jax.Array]


# Number of a tile whose keys are there -> what is special about it.
TileAt = Callable[[Any], Tile]


@dataclasses.dataclass(frozen=True)
class Warpgroup:
    """One of the warpgroups that compute, with what it shares with the one that copies.

    number, consumers: which of how many. scale: of the scores, base 2. overlap: its softmax runs
    while its last product of probabilities and values does, at the price of registers. lazy: it
    keeps a row's maximum until probabilities get large, which saves to look for it in each tile
    but holds scores and probabilities at once. q: its queries; k, v: rings of tiles. marks: place
    in the rings -> what masks want to know of each key, in registers. ready, free: barriers of
    (q, k, v).
    stand_in: shared memory for `compat.with_sum` under the interpreter, else None.
    """

    number: Any
    consumers: int
    scale: float
    overlap: bool
    lazy: bool
    q: Any
    k: Any
    v: Any
    marks: Callable[[Any], Any]
    ready: tuple[Any, Any, Any]
    free: tuple[Any, Any, Any]
    stand_in: tuple[Any, Any] | None

    @property
    def interpret(self) -> bool:
        """Whether the interpreter runs it."""
        return self.stand_in is not None

    def slot(self, n: Any) -> Any:
        """Where in the rings tile n lies."""
        return lax.rem(n, jnp.int32(self.k.shape[0]))

    # The warpgroups take turns to give the tensor cores work, so that while one's products run the
    # others do their softmax. Turns are passed on numbered barriers, which the interpreter does not
    # have.
    def pass_turn(self) -> None:
        """Lets the next warpgroup use the tensor cores."""
        if not self.interpret:
            following = lax.rem(self.number + 1, jnp.int32(self.consumers))
            named_barrier("arrive", TURN + following, 2 * 128)

    def await_turn(self) -> None:
        """Waits until the tensor cores are this warpgroup's."""
        if not self.interpret:
            named_barrier("sync", TURN + self.number, 2 * 128)

    def begin(self) -> None:
        """Before all tiles: the first turn is the first warpgroup's."""
        pl.when(self.number == self.consumers - 1)(self.pass_turn)

    def end(self) -> None:
        """After all tiles: takes back the turn that nobody uses."""
        pl.when(self.number == 0)(self.await_turn)

    def _scores(self, n: Any, begin_more: Any = None) -> Any:
        left, right = self.q, self.k.at[self.slot(n)].transpose((1, 0))
        shape = (ROWS, self.k.shape[1])
        if begin_more is None:
            return product(left, right, shape, self.pass_turn)
        return product_first(left, right, shape, begin_more)

    def _weigh(self, s: Any, m: Any, n: Any, tile: Tile) -> Any:
        """Probabilities of the tile in slot n: (p, p for the product, maximum, factor)."""
        marks = self.marks(self.slot(n))
        plgpu.barrier_arrive(self.free[1].at[self.slot(n)])
        p, m, alpha = softmax(tile.mask(s, marks), m, self.scale)
        return p, tile.drop(p, marks), m, alpha

    def _weigh_lazily(self, s: Any, m: Any, mass: Any, n: Any, acc: Sum, tile: Tile) -> Any:
        """Weighs the tile in slot n with the old maximum if that is good enough: (p, m, mass).

        (Flash attention 4's rescaling with a threshold, without looking for the maximum at all.)
        """
        marks = self.marks(self.slot(n))
        plgpu.barrier_arrive(self.free[1].at[self.slot(n)])
        s = tile.mask(s, marks)
        # Of a row that has seen nothing yet: infinite where it sees something, else 0.
        p = exponentials(s, jnp.maximum(m, LEAST), self.scale)
        sums = partial_sums(p, self.interpret)
        p, sums = lax.optimization_barrier((p, sums))
        risen = above(sums, MOST, self.interpret)
        pin(sums, self.interpret)
        total = acc.value()
        if self.overlap:
            plgpu.barrier_arrive(self.free[2].at[self.slot(n - 1)])

        def again() -> Any:
            p, top, alpha = softmax(s, m, self.scale)
            added = mass * alpha + partial_sums(p, self.interpret)
            return weights(p), top, added, _scaled(total, alpha)

        def same() -> Any:
            return weights(p), m, mass + sums, total

        def weights(p: jax.Array) -> jax.Array:
            return tile.drop(p, marks).astype(self.q.dtype)

        p16, m, mass, total = lax.cond(risen, again, same)
        acc.set(total)
        return p16, m, mass

    def first(self, base: Any, total: Any, tile_at: TileAt) -> Any:
        """The state after the first tile of base to total - 1: weighed, not yet added."""
        plgpu.barrier_wait(self.ready[0])
        plgpu.barrier_wait(self.ready[1].at[self.slot(base)])
        tile = tile_at(base)
        self.await_turn()
        s = self._scores(base)
        pl.when(base + 1 == total)(lambda: plgpu.barrier_arrive(self.free[0]))
        nothing = filled((ROWS,), -jnp.inf, jnp.float32, ROW)
        p, dropped, m, _ = self._weigh(s, nothing, base, tile)
        return dropped.astype(self.q.dtype), m, partial_sums(p, self.interpret)

    def step(self, acc: Sum, total: Any, tile_at: TileAt, n: Any, state: Any) -> Any:
        """The state after tile n, weighed; adds the one before."""
        p16, m, mass = state
        plgpu.barrier_wait(self.ready[1].at[self.slot(n)])
        tile = tile_at(n)
        plgpu.barrier_wait(self.ready[2].at[self.slot(n - 1)])
        self.await_turn()

        def add_last() -> None:
            acc.add(p16, self.v.at[self.slot(n - 1)])

        def begin_more() -> None:
            add_last()
            self.pass_turn()

        if self.overlap:
            # The softmax runs while the sum does.
            s = self._scores(n, begin_more)
        else:
            add_last()
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(self.free[2].at[self.slot(n - 1)])
            s = self._scores(n)
        # The next tile's queries arrive while this one finishes.
        pl.when(n + 1 == total)(lambda: plgpu.barrier_arrive(self.free[0]))
        if self.lazy:
            return self._weigh_lazily(s, m, mass, n, acc, tile)
        p, dropped, m, alpha = self._weigh(s, m, n, tile)
        mass = mass * alpha + partial_sums(p, self.interpret)
        dropped, m, mass, alpha = lax.optimization_barrier((dropped, m, mass, alpha))
        if self.overlap:
            pin(mass, self.interpret)
        acc.set(_scaled(acc.value(), alpha))
        if self.overlap:
            plgpu.barrier_arrive(self.free[2].at[self.slot(n - 1)])
        return dropped.astype(self.q.dtype), m, mass

    def last(self, acc: Sum, n: Any, state: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(sum, maximum, mass) once the last tile, n - 1, is added."""
        p16, m, mass = state
        plgpu.barrier_wait(self.ready[2].at[self.slot(n - 1)])
        self.await_turn()
        acc.add(p16, self.v.at[self.slot(n - 1)])
        self.pass_turn()
        result = acc.value()
        plgpu.barrier_arrive(self.free[2].at[self.slot(n - 1)])
        return result, m, total_sums(mass, self.interpret)

    def last_half(
        self, acc: Sum, tile_at: TileAt, n: Any, state: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """As `step` and `last`, of a tile n of whose second half nothing is seen; overlaps."""
        p16, m, mass = state
        slot, before, half = self.slot(n), self.slot(n - 1), self.k.shape[1] // 2
        plgpu.barrier_wait(self.ready[1].at[slot])
        tile = tile_at(n)
        plgpu.barrier_wait(self.ready[2].at[before])
        self.await_turn()

        def begin_more() -> None:
            acc.add(p16, self.v.at[before])
            self.pass_turn()

        keys = self.k.at[slot, pl.ds(0, half)].transpose((1, 0))
        s = product_first(self.q, keys, (ROWS, half), begin_more)
        plgpu.barrier_arrive(self.free[0])
        plgpu.barrier_arrive(self.free[1].at[slot])
        p, m, alpha = softmax(tile.mask(s, None), m, self.scale)
        mass = mass * alpha + partial_sums(p, self.interpret)
        p, m, mass, alpha = lax.optimization_barrier((p, m, mass, alpha))
        pin(mass, self.interpret)
        acc.set(_scaled(acc.value(), alpha))
        plgpu.barrier_arrive(self.free[2].at[before])
        plgpu.barrier_wait(self.ready[2].at[slot])
        self.await_turn()
        acc.add(p.astype(self.q.dtype), self.v.at[slot, pl.ds(0, half)])
        self.pass_turn()
        result = acc.value()
        plgpu.barrier_arrive(self.free[2].at[slot])
        return result, m, total_sums(mass, self.interpret)

    def with_sum(self, body: Callable[[Sum], Any]) -> Any:
        """Runs `body` with a sum that is zero."""
        return with_sum(body, (ROWS, self.q.shape[-1]), self.stand_in)


def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """x with every row multiplied by its factor."""
    return x * lax.broadcast_in_dim(factor, x.shape, [0])


def nothing_seen(head_dim: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(sum, maximum, mass) over no tiles."""
    return (
        filled((ROWS, head_dim), 0.0, jnp.float32, TILE),
        filled((ROWS,), -jnp.inf, jnp.float32, ROW),
        filled((ROWS,), 0.0, jnp.float32, ROW),
    )
