"""What the copying warpgroup of the forward kernel leaves in shared memory for the others."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels import schedule
from pallas_kernels.compat import pl, plgpu
from pallas_kernels.config import ROWS
from pallas_kernels.instructions import store_words
from pallas_kernels.visits import Visit, row_bounds, running_visit, segmented, unmasked

# Of an `Item` or a `Place`, or of the launch.
WORDS = 16
# Where they are: of two items, of the launch, of so many places, a power of two.
LAUNCH, PLACES, RING = 2, 3, 8


class Item(NamedTuple):
    """A tile of queries: int32 scalars.

    steps: tiles of keys that it visits. batch, head; row: its first home row; residue: of those in
    the home array.
    """

    steps: Any
    batch: Any
    head: Any
    row: Any
    residue: Any


class Place(NamedTuple):
    """Where a tile of keys lies, for a tile of queries: int32 scalars.

    start: its first row in its view. edges: bit w says whether some pair of warpgroup w is hidden
    by its place. halves: bit w says whether warpgroup w sees nothing of the second half of the last
    tile that the branch visits. branch: its number in the launch; home_shift, away_shift, limit,
    origin, segment: as in `visits.Visit`; count: rows of a segment, where there are gaps.
    """

    start: Any
    edges: Any
    halves: Any
    branch: Any
    home_shift: Any
    away_shift: Any
    limit: Any
    origin: Any
    count: Any
    segment: Any


def scratch(stages: int, consumers: int) -> list[Any]:
    """Shared memory and barriers of `Memory`, in the order of its fields."""
    if stages >= RING:
        raise ValueError(f"stages: wanted less than {RING}, got {stages}")
    return [
        plgpu.SMEM(((PLACES + RING) * WORDS,), jnp.int32),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=2, num_arrivals=consumers),
    ]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Two items, and a ring of places that is longer than that of the tiles of keys.

    So the place of a tile may be read until the next tile's keys are released: no sooner does the
    tile come whose place takes its words. (One array: each takes at least 1024 bytes.)
    """

    words: Any
    ready: Any
    free: Any
    interpret: bool

    @property
    def launch(self) -> Any:
        """The words of the launch, see `schedule.words`; there as soon as an item is."""
        return self._words(LAUNCH)

    def bring_launch(self, words: Sequence[Any]) -> None:
        """Leaves the words of the launch (the warpgroup that copies)."""
        store_words(self.launch, words, self.interpret)

    def bring_item(self, t: Any, item: Item) -> None:
        """Leaves item t (the warpgroup that copies)."""
        slot = self._item(t)
        pl.when(t > 1)(lambda: plgpu.barrier_wait(self.free.at[slot]))
        store_words(self._words(slot), item, self.interpret)
        plgpu.barrier_arrive(self.ready.at[slot])

    def await_item(self, t: Any) -> None:
        """Waits until item t may be read."""
        plgpu.barrier_wait(self.ready.at[self._item(t)])

    def item(self, t: Any) -> Item:
        """Item t."""
        words = self._words(self._item(t))
        return Item(*(words[i] for i in range(len(Item._fields))))

    def release_item(self, t: Any) -> None:
        """Says that this warpgroup reads item t no more."""
        plgpu.barrier_arrive(self.free.at[self._item(t)])

    def leave(self, n: Any, place: Place, ready: Any) -> None:
        """Leaves the place of tile n (the warpgroup that copies); ready: of its keys."""
        store_words(self._place(n), place, self.interpret)
        plgpu.barrier_arrive(ready)

    def place(self, n: Any, field: str) -> Any:
        """A field of the place of tile n."""
        return self._place(n)[Place._fields.index(field)]

    def visit(self, launch: schedule.Launch, n: Any) -> Visit:
        """The visit that tile n belongs to, without what only concerns copies."""
        names = ("home_shift", "away_shift", "limit", "origin", "segment")
        count = self.place(n, "count") if launch.gaps else None
        fields = {name: self.place(n, name) for name in names[: 4 + bool(launch.series)]}
        return running_visit(launch, self.place(n, "branch"), count, **fields)

    def _item(self, t: Any) -> Any:
        return lax.rem(t, jnp.int32(2))

    def _place(self, n: Any) -> Any:
        return self._words((n & (RING - 1)) + PLACES)

    def _words(self, entry: Any) -> Any:
        return self.words.at[pl.ds(entry * WORDS, WORDS)]


def places_of(launch: schedule.Launch, v: Visit, branch: Any, row: Any, consumers: int) -> Any:
    """(first row of a tile of keys -> its place) for a visit by queries from `row` on."""
    groups = range(consumers)
    v = segmented(launch, v, row)
    bounds = [unmasked(launch, v, row + w * ROWS, ROWS) for w in groups]
    middle = v.first + (v.steps - 1) * launch.block_away + launch.block_away // 2
    ends = [row_bounds(launch, v, v.home_row(row + (w + 1) * ROWS - 1))[1] for w in groups]
    halves = _bits([(v.steps > 1) & (end - v.away_shift <= middle) for end in ends])
    count = v.length[1] if launch.gaps else 0
    segment = v.segment if launch.series else 0
    rest = (v.home_shift, v.away_shift, v.limit, v.origin, count, segment)

    def place(start: Any) -> Place:
        edges = _bits([(start < low) | (start > high) for low, high in bounds])
        return Place(start, edges, halves, branch, *rest)

    return place


def _bits(values: Sequence[Any]) -> Any:
    return sum(jnp.where(value, 1 << i, 0) for i, value in enumerate(values))
