"""The inner loop of the fused backward kernels: steps over tiles of queries.

A step of two warpgroups, each with 64 rows of keys (FlashAttention-3, arXiv:2407.08608): scores
and probabilities of a tile of queries, transposed; what they give to the gradients of values and
keys, which stay in registers; then, of both warpgroups' gradients of scores, the gradient of the
queries: half by each, or all by a third warpgroup, so that the two never wait for each other.
No product runs from one step into the next, so a step with masks can be a branch of its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import (
    COLUMN,
    TILE,
    add_product,
    filled,
    from_start,
    load,
    pl,
    plgpu,
    value_while,
)
from pallas_kernels.config import CONSUMERS, ROWS, queries_apart
from pallas_kernels.gradient_memory import Memory, Place
from pallas_kernels.gradient_queries import Queries
from pallas_kernels.instructions import meet, recomputed, see_stores, store_transposed


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


@dataclasses.dataclass(frozen=True)
class Keys:
    """One of the two warpgroups that compute the gradients of keys and values.

    scale: of the scores, base 2. rate: of dropout. queries: whose gradient it gives half of, where
    no other warpgroup does.
    """

    number: Any
    memory: Memory
    scale: float
    rate: float
    queries: Queries

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
        if self._doublings and sight.kept is None:
            dv = dv * 2.0**-self._doublings
        return dk, dv, total

    def _step(self, sight: Sight, dk_acc: Any, dv_acc: Any, n: Any, _: None) -> None:
        """The step of tile n."""
        memory, slot = self.memory, self.memory.slot(n)
        plgpu.barrier_wait(memory.ready.at[slot])
        if queries_apart(memory.head_dim):
            stored = n >= memory.ds.shape[0]
            pl.when(stored)(lambda: plgpu.barrier_wait(memory.ds_free.at[slot]))
        add = self._one_by_one if queries_apart(memory.head_dim) else self._at_once
        add = functools.partial(add, sight, dk_acc, dv_acc, slot)
        if sight.seen is None:
            add(None)
            return

        if queries_apart(memory.head_dim):
            lax.cond(self._hidden(slot), lambda: self._nothing(slot), lambda: add(sight.seen))
        else:
            lax.cond(self._edge(slot), lambda: add(sight.seen), lambda: add(None))

    def _edge(self, slot: Any) -> Any:
        """Whether some pair of a tile is hidden by its place."""
        place = self.memory.place(slot)
        return (place.start < place.low) | (place.start > place.high)

    def _hidden(self, slot: Any) -> Any:
        """Whether this warpgroup's keys see nothing of a tile."""
        place = self.memory.place(slot)
        early, late = place.start <= place.early, place.start >= place.late
        return jnp.where(self.number == 0, late, early)

    def _nothing(self, slot: Any) -> None:
        """What a tile that is hidden gives."""
        memory = self.memory
        me, _ = self._me()
        zeros = filled((ROWS, memory.away), 0.0, memory.k.dtype, TILE)
        self._store_scores(zeros, me, slot)
        see_stores(memory.interpret)
        plgpu.barrier_arrive(memory.ds_ready.at[slot])
        self._end(slot)

    def _at_once(self, sight: Sight, dk_acc: Any, dv_acc: Any, slot: Any, masks: Any) -> None:
        """Adds what a tile gives to the gradients; masks: `Sight.seen`, None if all is seen.

        Both products of scores are begun together.
        """
        memory, dtype = self.memory, self.memory.k.dtype
        me, staging = self._me()
        shape = (ROWS, memory.away)

        def products(s_acc: Any, dp_acc: Any, dq_acc: Any) -> None:
            self._begin_scores(s_acc, me, slot)
            if masks is None:
                self._begin_gradient(dp_acc, me, slot)
                s = value_while(s_acc, 1, memory.interpret)
            else:
                # Ahead of the next product, which leaves no registers for masks.
                s = value_while(s_acc, 0, memory.interpret)
                s = jnp.where(masks(me, memory.place(slot)), s, -jnp.inf)
                self._begin_gradient(dp_acc, me, slot)
            p = self._probabilities(s, sight, me, slot)
            seen = None if sight.kept is None else sight.kept(me, slot)
            weight = self._dropped(p, seen).astype(dtype)
            # Loaded only now: a column vector takes as many registers as half a tile.
            delta = self._delta(slot)
            ds = (
                p * (self._dropped(value_while(dp_acc, 0, memory.interpret), seen) - delta)
            ).astype(dtype)
            self._store_scores(ds, me, slot)
            add_product(dv_acc, weight, memory.do.at[slot], staging)
            meet(memory.ds_ready.at[slot], CONSUMERS, memory.interpret)
            self.queries.begin(dq_acc, slot, me)
            add_product(dk_acc, ds, memory.q.at[slot], staging)
            dq = value_while(dq_acc, 1, memory.interpret)
            self.queries.send(dq, memory.place(slot), me)
            self._end(slot)

        scores, half = plgpu.ACC(shape, jnp.float32), memory.sum_shape
        pl.run_scoped(products, scores, scores, plgpu.ACC(half, jnp.float32))

    def _one_by_one(self, sight: Sight, dk_acc: Any, dv_acc: Any, slot: Any, masks: Any) -> None:
        """As `_at_once`; there are registers for one tile, beside 16 bits of another.

        Nothing runs beside the masks, so only they are in a branch: half the code to compile.
        """
        memory, dtype = self.memory, self.memory.k.dtype
        me, staging = self._me()
        shape = (ROWS, memory.away)

        def scores(acc: Any) -> jax.Array:
            self._begin_scores(acc, me, slot)
            return value_while(acc, 0, memory.interpret)

        s = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
        if masks is not None:
            s = lax.cond(
                self._edge(slot),
                lambda: jnp.where(masks(me, memory.place(slot)), s, -jnp.inf),
                lambda: s,
            )
        p = self._probabilities(s, sight, me, slot)
        if sight.kept is not None:
            # What is dropped by its sign: there are no registers for more.
            p = jnp.where(sight.kept(me, slot), p, -p)
        p = p.astype(dtype)

        def values(weight: jax.Array) -> None:
            add_product(dv_acc, weight, memory.do.at[slot], staging)

        def gradients(acc: Any, value: Callable[[], jax.Array]) -> None:
            self._begin_gradient(acc, me, slot)
            weight = None
            if sight.kept is None:
                values(p)
                dp, x = value(), self._single(p)
                ds = x * dp
            else:
                dp, x = value(), self._single(p)
                ds = jnp.abs(x) * (self._dropped(dp, x > 0) - self._delta(slot))
                weight = self._dropped(x, x > 0).astype(dtype)
            ds = ds.astype(dtype)
            self._store_scores(ds, me, slot)
            see_stores(memory.interpret)
            plgpu.barrier_arrive(memory.ds_ready.at[slot])
            if weight is not None:
                values(weight)
            add_product(dk_acc, ds, memory.q.at[slot], staging)
            self._end(slot)

        # Without dropout delta is subtracted from the beginning.
        start = -self._delta(slot) if sight.kept is None else None
        from_start(gradients, shape, start, memory.interpret)

    def _single(self, p: jax.Array) -> jax.Array:
        """Probabilities in float32, of those kept in 16 bits."""
        x = recomputed(p, self.memory.interpret).astype(jnp.float32)
        return x * 2.0**-self._doublings if self._doublings else x

    def _end(self, slot: Any) -> None:
        plgpu.wgmma_wait(0)
        plgpu.barrier_arrive(self.memory.free.at[slot])

    @property
    def _doublings(self) -> int:
        """How often probabilities are doubled where they are kept in 16 bits.

        Those of many keys lie below the normal numbers of float16; none is above 1.
        """
        narrow = queries_apart(self.memory.head_dim) and self.memory.k.dtype == jnp.float16
        return 15 if narrow else 0

    def _me(self) -> tuple[Any, Any]:
        """The number of the warpgroup and its staging memory, inside a step."""
        memory = self.memory
        me = recomputed(self.number, memory.interpret)
        return me, None if memory.staging is None else memory.staging.at[me]

    def _begin_scores(self, acc: Any, me: Any, slot: Any) -> None:
        plgpu.wgmma(acc, self.memory.k.at[me], self.memory.q.at[slot].transpose((1, 0)))

    def _begin_gradient(self, acc: Any, me: Any, slot: Any) -> None:
        plgpu.wgmma(acc, self.memory.v.at[me], self.memory.do.at[slot].transpose((1, 0)))

    def _probabilities(self, s: jax.Array, sight: Sight, me: Any, slot: Any) -> jax.Array:
        s = s if sight.marked is None else sight.marked(s, me, slot)
        lse = load(self.memory.lse.at[slot], COLUMN)
        lse = lse - self._doublings if self._doublings else lse
        return jnp.exp2(s * self.scale - lax.broadcast_in_dim(lse, s.shape, [1]))

    def _dropped(self, x: jax.Array, seen: Any) -> jax.Array:
        return x if seen is None else jnp.where(seen, x * (1.0 / (1.0 - self.rate)), 0.0)

    def _delta(self, slot: Any) -> jax.Array:
        delta = load(self.memory.delta.at[slot], COLUMN)
        return lax.broadcast_in_dim(delta, (ROWS, self.memory.away), [1])

    def _store_scores(self, ds: jax.Array, me: Any, slot: Any) -> None:
        memory = self.memory
        for i in range(memory.away // ROWS):
            square = ds[:, i * ROWS : (i + 1) * ROWS]
            smem = memory.ds.at[memory.square(slot, i), me]
            store_transposed(smem, square, memory.interpret, memory.head_dim)
