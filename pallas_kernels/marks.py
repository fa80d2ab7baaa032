"""What tokens carry into the kernels: segment ids, and positions of their own."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import load, plgpu


class Marks(NamedTuple):
    """Registers of some rows: int32 vectors, None where a call has no such mark."""

    ids: Any
    positions: Any


@dataclasses.dataclass(frozen=True)
class Kinds:
    """Which marks a call has, ids before positions.

    causal: a key is seen from its own position on. (Causality by the place in the array is not
    among the marks: it says which tiles are visited.)
    """

    ids: bool = False
    positions: bool = False
    causal: bool = False

    @property
    def count(self) -> int:
        """Vectors that go along with each side."""
        return self.ids + self.positions

    @property
    def named(self) -> str:
        """Them in words, to follow others."""
        return " and segment ids" * self.ids + " and positions" * self.positions

    def take(self, refs: Any) -> list[Any]:
        """The references of one side, from an iterator over those of a kernel."""
        return [next(refs) for _ in range(self.count)]

    def load(self, source: Callable[[int], Any], layout: Any) -> Marks:
        """Marks in registers; source: number of the mark -> reference."""
        found = [load(source(i), layout) for i in range(self.count)]
        return Marks(found[0] if self.ids else None, found[-1] if self.positions else None)

    def of_rows(self, refs: Sequence[Any], where: tuple[Any, ...], layout: Any) -> Marks:
        """Marks of rows of the references; where: the place of the rows in each."""
        return self.load(lambda i: refs[i].at[where], layout)

    def read(self, refs: Sequence[Any], read: Callable[[Any], jax.Array]) -> Marks:
        """Marks of rows that `read` takes from each of the references."""
        found = [read(ref) for ref in refs]
        return Marks(found[0] if self.ids else None, found[-1] if self.positions else None)

    def rings(self, *shape: int) -> Any:
        """Shared memory for the marks of away rows `[..., stages, away]`, None for no marks.

        One array, since each takes at least 1024 bytes.
        """
        *lanes, stages, away = shape
        return plgpu.SMEM((*lanes, stages * self.count, away), jnp.int32) if self.count else None

    def of_slot(self, ring: Any, slot: Any, layout: Any) -> Marks:
        """Marks of a place in the rings, which lie one behind the other in one array."""
        return self.load(lambda i: self._place(ring, slot, i), layout)

    def _place(self, ring: Any, slot: Any, i: int) -> Any:
        return ring.at[slot + i * (ring.shape[0] // self.count) if i else slot]

    def bring(
        self, refs: Sequence[Any], where: tuple[Any, ...], ring: Any, slot: Any, ready: Any
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

    def places(self, home: Marks, away: Marks) -> tuple[jax.Array, jax.Array] | None:
        """The positions by which dropout knows a pair, None: those of its rows."""
        return (home.positions, away.positions) if self.positions else None


def same_ids(s: jax.Array, home: jax.Array, away: jax.Array) -> jax.Array:
    """Scores with -inf where ids `[home]` and `[away]` differ or are 0."""
    a = lax.broadcast_in_dim(home, s.shape, [0])
    c = lax.broadcast_in_dim(away, s.shape, [1])
    return jnp.where((a == c) & (a != 0), s, -jnp.inf)


def not_later(s: jax.Array, home: jax.Array, away: jax.Array, transposed: bool) -> jax.Array:
    """Scores with -inf where the key's position comes after the query's."""
    a = lax.broadcast_in_dim(home, s.shape, [0])
    c = lax.broadcast_in_dim(away, s.shape, [1])
    return jnp.where(a <= c if transposed else c <= a, s, -jnp.inf)


def kinds_of(is_causal: bool, rate: float, ids: Any, positions: Any) -> Kinds:
    """Which marks a call has; rate: of dropout; ids, positions: of its queries, or None."""
    # Positions say which keys come later and which pairs are dropped, and nothing else.
    ordered = positions is not None
    return Kinds(ids is not None, ordered and bool(is_causal or rate), ordered and bool(is_causal))


def marks_of(
    kinds: Kinds, batch: int, ids: tuple[Any, Any], positions: tuple[Any, Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The marks of queries and of keys, `[batch, rows]`, where keys' None means the queries'."""
    used = [ids] if kinds.ids else []
    if kinds.positions:
        used.append(
            tuple(x if x is None else jnp.broadcast_to(x, (batch, x.shape[1])) for x in positions)
        )
    return tuple(q for q, _ in used), tuple(q if k is None else k for q, k in used)
