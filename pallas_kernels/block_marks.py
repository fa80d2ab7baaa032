"""What tokens carry into the kernels over block lists: segment ids, and positions of their own."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import load, plgpu
from pallas_kernels.scores import same_ids


class Marks(NamedTuple):
    """Registers of some rows: int32 vectors, None where a call has no such mark."""

    ids: Any
    positions: Any


@dataclasses.dataclass(frozen=True)
class Kinds:
    """Which marks a call has, ids before positions.

    causal: a key is seen from its own position on. (Causality by the place in the array is a band.)
    """

    ids: bool
    positions: bool = False
    causal: bool = False

    @property
    def count(self) -> int:
        """Vectors that go along with each side."""
        return self.ids + self.positions

    def take(self, refs: Any) -> list[Any]:
        """The references of one side, from an iterator over those of a kernel."""
        return [next(refs) for _ in range(self.count)]

    def load(self, source: Callable[[int], Any], layout: Any) -> Marks:
        """Marks in registers; source: number of the mark -> reference."""
        found = [load(source(i), layout) for i in range(self.count)]
        return Marks(found[0] if self.ids else None, found[-1] if self.positions else None)

    def of_rows(self, refs: Sequence[Any], where: tuple[Any, Any], layout: Any) -> Marks:
        """Marks of rows of the references `[B, rows]`; where: (batch, slice)."""
        return self.load(lambda i: refs[i].at[where], layout)

    def of_slot(self, ring: Any, slot: Any, layout: Any) -> Marks:
        """Marks of a place in the rings, which lie one behind the other in one array."""
        return self.load(lambda i: self._place(ring, slot, i), layout)

    def _place(self, ring: Any, slot: Any, i: int) -> Any:
        return ring.at[slot + i * (ring.shape[0] // self.count) if i else slot]

    def bring(
        self, refs: Sequence[Any], where: tuple[Any, Any], ring: Any, slot: Any, ready: Any
    ) -> None:
        """Copies marks of rows to a place in the rings, which `of_slot` reads."""
        for i, ref in enumerate(refs):
            plgpu.copy_gmem_to_smem(ref.at[where], self._place(ring, slot, i), ready)

    def hide(self, s: jax.Array, home: Marks, away: Marks, transposed: bool) -> jax.Array:
        """Scores `[home, away]` with -inf where marks hide a pair; transposed: home are keys."""
        if self.ids:
            s = same_ids(s, home.ids, away.ids)
        if self.causal:
            s = not_later(s, home.positions, away.positions, transposed)
        return s


def not_later(s: jax.Array, home: jax.Array, away: jax.Array, transposed: bool) -> jax.Array:
    """Scores with -inf where the key's position comes after the query's."""
    a = lax.broadcast_in_dim(home, s.shape, [0])
    c = lax.broadcast_in_dim(away, s.shape, [1])
    return jnp.where(a <= c if transposed else c <= a, s, -jnp.inf)
