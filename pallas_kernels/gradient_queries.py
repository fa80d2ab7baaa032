"""The gradient of the queries in the fused backward kernels: its products, and how it leaves."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import pl, plgpu, value_while
from pallas_kernels.config import CONSUMERS, ROWS, queries_apart
from pallas_kernels.gradient_memory import Memory, Place
from pallas_kernels.instructions import add_rows, see_stores, store_tile


@dataclasses.dataclass(frozen=True)
class Queries:
    """The gradient of a tile of queries, in two halves.

    Where a warpgroup of its own computes it (`run`), halves of the columns, else of the rows.
    targets: by rate, what it is added to, see `instructions.add_rows`.
    """

    memory: Memory
    targets: dict[int, Any]

    def run(self, t: Any, base: Any) -> Any:
        """Sends what item t gives; arguments as of `Keys.run`, the total as there."""
        memory = self.memory
        plgpu.barrier_wait(memory.k_ready)
        total = base + memory.item(t, 0)
        lax.fori_loop(base, total, self._step, None)
        plgpu.barrier_arrive(memory.k_free)
        return total

    def begin(self, acc: Any, slot: Any, half: Any) -> None:
        """Begins the products of a half, of the gradients of scores in a slot."""
        memory = self.memory
        for w in range(CONSUMERS):
            if queries_apart(memory.head_dim):
                columns = pl.ds(half * ROWS, ROWS)
                left, right = memory.ds.at[memory.square(slot, 0), w], memory.k.at[w, :, columns]
            else:
                left, right = memory.ds.at[memory.square(slot, half), w], memory.k.at[w]
            plgpu.wgmma(acc, left, right)

    def send(self, dq: jax.Array, place: Place, half: Any) -> None:
        """Sends a half from registers; what its part of `Memory.dq` held must have left."""
        memory, zero = self.memory, jnp.int32(0)
        store_tile(memory.dq.at[half], dq[:, : memory.dq.shape[-1]], memory.interpret)
        see_stores(memory.interpret)
        other = jnp.int32(half * ROWS)
        row, column = (zero, other) if queries_apart(memory.head_dim) else (other, zero)
        at = (place.plane, place.start + row, column)
        add_rows(memory.dq.at[half], self.targets, place.view, at, memory.interpret)

    def _step(self, n: Any, _: None) -> None:
        memory, slot = self.memory, self.memory.slot(n)
        plgpu.barrier_wait(memory.ready.at[slot])
        place = memory.place(slot)
        # Of the rings it needs no more: the next tile may come before these products are done.
        plgpu.barrier_arrive(memory.free.at[slot])
        plgpu.barrier_wait(memory.ds_ready.at[slot])
        for half in range(CONSUMERS):

            def product(acc: Any, half: int = half) -> jax.Array:
                self.begin(acc, slot, half)
                return value_while(acc, 0, memory.interpret)

            dq = pl.run_scoped(product, plgpu.ACC(memory.sum_shape, jnp.float32))
            if half == CONSUMERS - 1:
                plgpu.barrier_arrive(memory.ds_free.at[slot])
            # This half has left, of the step before.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            self.send(dq, place, half)
