"""Where tiles of keys lie: what the copying warpgroup leaves in shared memory for the others."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from pallas_kernels import schedule
from pallas_kernels.compat import pl, plgpu
from pallas_kernels.config import ROWS
from pallas_kernels.instructions import store_words
from pallas_kernels.visits import Visit, row_bounds, running_visit, unmasked

# Of a `Place`.
WORDS = 16


class Place(NamedTuple):
    """Where a tile of keys lies, for a tile of queries: int32 scalars.

    start: its first row in its view. edges: bit w says whether some pair of warpgroup w is hidden
    by its place. halves: bit w says whether warpgroup w sees nothing of the second half of the last
    tile that the branch visits. branch: its number in the launch; home_shift, away_shift, limit,
    origin: as in `visits.Visit`; count: rows of a segment, where there are gaps.
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


@dataclasses.dataclass(frozen=True)
class Places:
    """A ring of places, twice as long as that of the tiles.

    The place of a tile may be read until the next tile's keys are released: no sooner does the
    tile come whose place takes its words.
    """

    words: Any
    interpret: bool

    def leave(self, n: Any, place: Place) -> None:
        """Leaves the place of tile n; an arrival at the barrier of its keys must follow."""
        store_words(self._at(n), place, self.interpret)

    def read(self, n: Any, field: str) -> Any:
        """A field of the place of tile n."""
        return self._at(n)[Place._fields.index(field)]

    def visit(self, launch: schedule.Launch, n: Any) -> Visit:
        """The visit that tile n belongs to, without what only concerns copies."""
        fields = {name: self.read(n, name) for name in ("home_shift", "away_shift", "limit")}
        origin, branch = self.read(n, "origin"), self.read(n, "branch")
        count = self.read(n, "count") if launch.gaps else None
        return running_visit(launch, branch, count, origin=origin, **fields)

    def _at(self, n: Any) -> Any:
        entry = lax.rem(n, jnp.int32(self.words.shape[0] // WORDS))
        return self.words.at[pl.ds(entry * WORDS, WORDS)]


def ring(stages: int) -> Any:
    """Shared memory of `Places.words`."""
    return plgpu.SMEM((2 * stages * WORDS,), jnp.int32)


def places_of(launch: schedule.Launch, v: Visit, branch: Any, row: Any, consumers: int) -> Any:
    """(first row of a tile of keys -> its place) for a visit by queries from `row` on."""
    groups = range(consumers)
    bounds = [unmasked(launch, v, row + w * ROWS, ROWS) for w in groups]
    middle = v.first + (v.steps - 1) * launch.block_away + launch.block_away // 2
    ends = [row_bounds(launch, v.length, v.home_row(row + (w + 1) * ROWS - 1))[1] for w in groups]
    halves = _bits([(v.steps > 1) & (end - v.away_shift <= middle) for end in ends])
    count = v.length[1] if launch.gaps else 0
    rest = (v.home_shift, v.away_shift, v.limit, v.origin, count)

    def place(start: Any) -> Place:
        edges = _bits([(start < low) | (start > high) for low, high in bounds])
        return Place(start, edges, halves, branch, *rest)

    return place


def _bits(values: Sequence[Any]) -> Any:
    return sum(jnp.where(value, 1 << i, 0) for i, value in enumerate(values))
