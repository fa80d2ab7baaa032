"""Where the rows of a branch lie: segments, residues, and their exact inverse.

A branch cuts positions into segments of W and lets a head keep one residue modulo R of each. A
`Piece` is a run of M equal segments of one branch, cut so that queries and keys fill every one of
them the same way: whole segments make one piece, a short first or last segment makes a piece of
its own. So nothing is ever padded to a whole segment, only to a multiple of R.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dilax.spec import Branch


class Rows(NamedTuple):
    """The rows of one array that take part in a piece.

    Row `first` of the array has index `index` in its segment; `length` rows of each of M segments
    that follow each other. After dilation each residue has L = steps rows, the first at the
    multiple of R at or before `index`.
    """

    first: int
    index: int
    length: int
    rate: int

    @property
    def lead(self) -> int:
        return self.index % self.rate

    @property
    def steps(self) -> int:
        return -(-(self.lead + self.length) // self.rate)

    def real(self, offset: int) -> np.ndarray:
        """bool [L]: which dilated rows of a residue exist (the others are padding)."""
        place = np.arange(self.steps) * self.rate + offset
        return (place >= self.lead) & (place < self.lead + self.length)

    def places(self, offset: int, segments: int) -> np.ndarray:
        """int [M, L]: which rows of the array those of a residue are, -1 where there is none."""
        place = self.first - self.lead + np.arange(self.steps) * self.rate + offset
        place = place + self.length * np.arange(segments)[:, None]
        return np.where(self.real(offset), place, -1)


class Piece(NamedTuple):
    """M segments of a branch, all filled alike by queries and by keys."""

    segments: int
    first_segment: int
    queries: Rows
    keys: Rows


def pieces(branch: Branch, T: int, S: int, q_start: int, k_start: int) -> Iterator[Piece]:
    """The pieces of a branch over queries q_start..q_start+T-1 and keys k_start..k_start+S-1.

    Segments without a query or without a key are in no piece.

    Example:
        >>> [piece.segments for piece in pieces(Branch(8, 2, 0, (0, 1)), 20, 20, 0, 0)]
        [2, 1]
    """
    w, r = branch.segment_length, branch.dilation_rate
    first = max(q_start, k_start) // w
    last = min(q_start + T - 1, k_start + S - 1) // w

    def rows(start: int, count: int, segment: int) -> Rows:
        begin, end = max(start, segment * w), min(start + count, (segment + 1) * w)
        return Rows(begin - start, begin - segment * w, end - begin, r)

    def piece(segment: int, segments: int) -> Piece:
        return Piece(segments, segment, rows(q_start, T, segment), rows(k_start, S, segment))

    ends = {start // w for start in (q_start, k_start)}
    ends |= {(start + count - 1) // w for start, count in ((q_start, T), (k_start, S))}
    cut = first
    for segment in sorted(s for s in ends if first <= s <= last):
        single = piece(segment, 1)
        if single.queries.length == single.keys.length == w:
            continue  # a whole segment after all: part of the run around it
        if cut < segment:
            yield piece(cut, segment - cut)
        yield single
        cut = segment + 1
    if cut <= last:
        yield piece(cut, last + 1 - cut)


def dilate(x: jax.Array, rows: Rows, segments: int, slots: tuple[tuple[int, int], ...]):
    """Rows of x [B, T, heads, ...] as [B, M, slots, L, ...]; a slot is (head, residue).

    Padding rows are 0.

    Example:
        >>> x = jnp.arange(8).reshape(1, 8, 1)
        >>> dilate(x, Rows(0, 0, 4, 2), 2, ((0, 1),))[0, :, 0].tolist()
        [[1, 3], [5, 7]]
    """
    B, rest = x.shape[0], x.shape[3:]
    heads = {head for head, _ in slots}
    first, end = min(heads), max(heads) + 1
    x = x[:, rows.first : rows.first + segments * rows.length, first:end]
    x = x.reshape(B, segments, rows.length, end - first, *rest)
    if rows.rate == 1 and [s[0] for s in slots] == list(range(first, end)):
        return jnp.swapaxes(x, 2, 3)
    after = rows.steps * rows.rate - rows.lead - rows.length
    x = jnp.pad(x, [(0, 0), (0, 0), (rows.lead, after)] + [(0, 0)] * (x.ndim - 3))
    x = x.reshape(B, segments, rows.steps, rows.rate, end - first, *rest)
    return jnp.stack([x[:, :, :, offset, head - first] for head, offset in slots], axis=2)


def scatter(y: jax.Array, rows: Rows, offsets: tuple[int, ...], fill: float) -> jax.Array:
    """The inverse of `dilate`: y [B, M, heads, L, ...] back in [B, M * length, heads, ...].

    Positions that a head does not keep get `fill`; padding rows are dropped.

    Example:
        >>> y = jnp.array([[1, 3], [5, 7]]).reshape(1, 2, 1, 2)
        >>> scatter(y, Rows(0, 0, 4, 2), (1,), 0)[0, :, 0].tolist()
        [0, 1, 0, 3, 0, 5, 0, 7]
    """
    B, M, heads, L, *rest = y.shape
    y = jnp.swapaxes(y, 2, 3)
    if rows.rate > 1:
        kept = np.arange(rows.rate)[:, None] == np.asarray(offsets)
        kept = kept.reshape(rows.rate, heads, *[1] * len(rest))
        y = jnp.where(kept, y[:, :, :, None], jnp.asarray(fill, y.dtype))
        y = y.reshape(B, M, L * rows.rate, heads, *rest)
        y = y[:, :, rows.lead : rows.lead + rows.length]
    return y.reshape(B, M * rows.length, heads, *rest)
