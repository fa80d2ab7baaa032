"""Which heads of a device read the same rows of a branch.

A *slot* is one kv head with one residue: what travels. Query heads of a slot share its rows. With
`uniform` residues nothing is rearranged and all heads are one slot; otherwise slots are stacked
like examples, since each has its own rows.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding.messages import Messages

Branch = tuple[int, int, int, tuple[int, ...]]  # segment length, rate, first head, offsets


def offset_table(branch: Branch, num_heads: int) -> np.ndarray:
    """int [N]: the residue that every query head keeps, -1 for one that takes no part.

    Example:
        >>> offset_table((8, 2, 1, (0, 1)), 4).tolist()
        [-1, 0, 1, -1]
    """
    _, _, first, offsets = branch
    table = np.full(num_heads, -1)
    table[first : first + len(offsets)] = offsets
    return table


@dataclasses.dataclass(frozen=True)
class Slots:
    """How the local query heads of a branch are grouped.

    queries [S, h]: local query heads of each slot. keys [S, k]: its local kv heads (k = 1 unless
    uniform). offsets [P_h, S]: the residue of each slot, for every index along the heads' axis.
    """

    queries: np.ndarray
    keys: np.ndarray
    offsets: np.ndarray

    @property
    def uniform(self) -> bool:
        """One slot of all heads."""
        return len(self.queries) == 1

    @property
    def static(self) -> bool:
        """Whether residues are the same for every index along the heads' axis."""
        return bool((self.offsets == self.offsets[:1]).all())

    @property
    def rows(self) -> int:
        """Key rows that travel per rank: slots, or kv heads where there is one slot."""
        return self.keys.size

    def offset(self, head_index: Any) -> Any:
        """[S, 1]: the residues on this device; numpy if known when tracing."""
        if self.static:
            return self.offsets[0][:, None]
        return jnp.asarray(self.offsets, jnp.int32)[head_index][:, None]

    def divides(self, parts: int) -> bool:
        """Whether an all-to-all can deal the slots out to this many devices."""
        if self.uniform:
            return self.keys.shape[1] % parts == 0
        return len(self.queries) % parts == 0


def slots_of(branch: Branch, num_heads: int, num_kv_heads: int, head_parts: int) -> Slots:
    """The slots of a branch for `num_heads` query heads in all, cut into head_parts.

    num_kv_heads: kv heads that one device of the heads' axis holds.

    Example:
        >>> slots_of((8, 2, 0, (0, 1, 0, 1)), 4, 2, 1).queries.tolist()
        [[0], [1], [2], [3]]
    """
    table = offset_table(branch, num_heads).reshape(head_parts, -1)
    local = np.arange(table.shape[1])
    share = len(local) // num_kv_heads
    here = np.flatnonzero((table >= 0).any(0))
    if not len(here):
        return Slots(here.reshape(0, 1), here.reshape(0, 1), np.zeros((head_parts, 0), int))
    same = (table[:, here] == table[:, here[:1]]).all()
    kv = np.unique(here // share)
    if same and len(here) == len(kv) * share:
        return Slots(here[None], kv[None], table[:, here[:1]])
    if same and len(here) % len(kv) == 0:
        counts = np.bincount(here // share)[kv]
        if (counts == counts[0]).all():
            return Slots(here[None], kv[None], table[:, here[:1]])
    # Heads of one kv head with the same residues everywhere read the same rows.
    groups: dict[tuple, list[int]] = {}
    for head in here.tolist():
        groups.setdefault((head // share, *table[:, head].tolist()), []).append(head)
    sizes = {len(heads) for heads in groups.values()}
    lists = list(groups.values()) if len(sizes) == 1 else [[head] for head in here.tolist()]
    queries = np.array(lists)
    return Slots(queries, queries[:, :1] // share, table[:, queries[:, 0]])


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The devices that deal rows out among each other, or gather them.

    reverse: their rows follow each other in descending order of devices.
    """

    messages: Messages
    axis_name: Any
    groups: list[list[int]]
    reverse: bool

    def deal(self, x: jax.Array, slots: Slots) -> jax.Array:
        """All-to-all of rows [S, B, L, h, ...]: fewer slots (or heads) of everybody's rows."""
        if slots.uniform and x.ndim == 3:  # segment ids are the same for all heads
            return self.gather(x)
        heads = 3 if slots.uniform else 0
        return self._turn(self.messages.all_to_all(x, self.axis_name, heads, 2, self.groups))

    def collect(self, x: jax.Array, slots: Slots) -> jax.Array:
        """The inverse of `deal` for arrays with heads."""
        heads = 3 if slots.uniform else 0
        return self.messages.all_to_all(self._turn(x), self.axis_name, 2, heads, self.groups)

    def gather(self, x: jax.Array) -> jax.Array:
        """All slots and everybody's rows: [S, B, L, ...] -> [S, B, g L, ...]."""
        return self._turn(self.messages.all_gather(x, self.axis_name, 2, self.groups))

    def reduce(self, x: jax.Array) -> jax.Array:
        """The transpose of `gather`."""
        return self.messages.reduce_scatter(self._turn(x), self.axis_name, 2, self.groups)

    def _turn(self, x: jax.Array) -> jax.Array:
        """The devices' pieces of axis 2 in reverse order, if asked."""
        if not self.reverse:
            return x
        parts = len(self.groups[0])
        cut = x.reshape(*x.shape[:2], parts, x.shape[2] // parts, *x.shape[3:])
        return jnp.flip(cut, 2).reshape(x.shape)
