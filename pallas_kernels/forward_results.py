"""How a warpgroup of the forward kernel leaves results, and continues what is there."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import TILE, aligned_rows, load_shared, pl, plgpu
from pallas_kernels.config import ROWS
from pallas_kernels.copies import piece
from pallas_kernels.forward_memory import Item
from pallas_kernels.instructions import load_rows, store_rows, store_tile

LOG2E = math.log2(math.e)
# (tile of a warpgroup, batch, head and residue) as it is known, or read again.
ReadItem = Callable[[], Item]


@dataclasses.dataclass(frozen=True)
class Results:
    """The rows of out and lse that are one warpgroup's.

    number: () -> of the warpgroup. running: () -> as `visits.running`. out, lse: references.
    tiles: shared memory that out leaves from, by warpgroup, in pieces of columns; ready: barriers
    of what is brought there. carry: whether some launch of the program continues results. rate: of
    dropout.
    """

    number: Callable[[], Any]
    running: Callable[[], Any]
    out: Any
    lse: Any
    tiles: Any
    ready: Any
    carry: bool
    rate: float
    interpret: bool

    def first_row(self, item: ReadItem) -> Any:
        """The first of this warpgroup's home rows."""
        return item().row + self.number() * ROWS

    def bring(self, item: ReadItem) -> None:
        """Brings what is there, if this continues it, to where the result will be left."""

        @pl.when(self.running()[1])
        def _() -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i, ref in enumerate(self._pieces(item)):
                target, ready = self.tiles.at[self.number(), i], self.ready.at[self.number()]
                plgpu.copy_gmem_to_smem(ref, target, ready)

    def load_old(self, item: ReadItem) -> Any:
        """The lse that is there. Late: ahead of what waits for products, but not of steps."""
        if not self.carry:
            return None
        stride = self.running()[0].stride
        return load_rows(self.lse, self._lse_at(item), stride, self.interpret)

    def finish(self, item: ReadItem, acc: Any, m: Any, mass: Any, old: Any) -> None:
        """Writes out and lse, given the sum, its maximum (base 2) and mass, and the lse before."""
        if self.rate:
            acc = acc * (1.0 / (1.0 - self.rate))
        for merges in (False, True):
            # Whether it continues is known at run time only in a series.
            pl.when(self.running()[1] == merges)(
                functools.partial(self._write, item, acc, m, mass, old if merges else None)
            )

    def _write(self, item: ReadItem, acc: Any, m: Any, mass: Any, old: Any) -> None:
        """Merges with what is there if its lse is given."""
        tiles = self.tiles.at[self.number()]
        if old is None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        else:
            plgpu.barrier_wait(self.ready.at[self.number()])
            old = old * LOG2E
            top = jnp.maximum(m, old)
            safe = jnp.where(top == -jnp.inf, 0.0, top)
            ours, theirs = jnp.exp2(m - safe), jnp.exp2(old - safe)
            m, mass = top, mass * ours + theirs
        inverse = jnp.where(mass > 0.0, 1.0 / mass, 0.0)
        width = tiles.shape[-1]
        for i in range(tiles.shape[0]):
            out = acc[:, i * width : (i + 1) * width]
            if old is not None:
                previous = load_shared(tiles.at[i], TILE).astype(jnp.float32)
                theirs_tile = lax.broadcast_in_dim(theirs, out.shape, [0])
                # What lies under an lse of -inf was never written and may be NaN.
                previous = jnp.where(theirs_tile > 0.0, previous * theirs_tile, 0.0)
                out = out * lax.broadcast_in_dim(ours, out.shape, [0]) + previous
            out = out * lax.broadcast_in_dim(inverse, out.shape, [0])
            store_tile(tiles.at[i], out.astype(tiles.dtype), self.interpret)
        plgpu.commit_smem()
        for i, ref in enumerate(self._pieces(item)):
            plgpu.copy_smem_to_gmem(tiles.at[i], ref)
        lse = jnp.where(mass > 0.0, (m + jnp.log2(mass)) * (1.0 / LOG2E), -jnp.inf)
        store_rows(self.lse, self._lse_at(item), self.running()[0].stride, lse, self.interpret)

    def _pieces(self, item: ReadItem) -> list[Any]:
        """This warpgroup's rows of out, by columns."""
        _, count, _, width = self.tiles.shape
        it = item()
        at = it.batch, aligned_rows(self.first_row(item), ROWS), it.residue, it.head
        return [self.out.at[(*at, piece(i * width, width))] for i in range(count)]

    def _lse_at(self, item: ReadItem) -> tuple[Any, ...]:
        """Where they begin in lse."""
        return item().batch, item().head, self.first_row(item), item().residue
