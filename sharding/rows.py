"""The rows that a head keeps, numbered by rank.

In a branch of segments of w at rate r, a head keeps positions s w + o + j r: one residue o of every
segment s. Its *rank* is s L + j with L = ceil(w / r). In ranks a dilated branch is an undilated one
with segments of L, whatever w, r, o and the first position are. Ranks that exist for some residues
only (where r does not divide w, or a chunk) are phantom rows, masked by `Rows.real`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

UNBOUNDED = 1 << 30  # a segment longer than any sequence: every pair lies in one


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The ranks of one branch over chunks of `chunk` positions."""

    segment: int
    rate: int
    chunk: int

    @property
    def length(self) -> int:
        """L: ranks in one segment."""
        return -(-self.segment // self.rate)

    def floor(self, position: Any) -> Any:
        """The rank at or before a position, the same for every residue.

        Example:
            >>> [Ranks(6, 2, 12).floor(p) for p in range(8)]
            [0, 0, 1, 1, 2, 2, 3, 3]
        """
        return position // self.segment * self.length + position % self.segment // self.rate

    def position(self, rank: Any, offset: Any) -> Any:
        """The position of a rank for the heads that keep `offset`."""
        return rank // self.length * self.segment + offset + rank % self.length * self.rate

    @property
    def exact(self) -> bool:
        """Whether no chunk has a phantom row."""
        return self.segment % self.rate == 0 and self.chunk % self.rate == 0

    def count(self, starts: np.ndarray) -> int:
        """Rows that hold the ranks of any one of the chunks with these first positions."""
        ranks = self.floor(starts + self.chunk - 1) - self.floor(starts) + 1
        return int(ranks.max())

    def real(self, rank: Any, offset: Any, start: Any) -> Any:
        """Whether a rank is a kept position of the chunk that begins at `start`."""
        place = offset + rank % self.length * self.rate
        index = rank // self.length * self.segment + place - start
        return (offset >= 0) & (place < self.segment) & (index >= 0) & (index < self.chunk)


def take(x: jax.Array, index: Any, heads: np.ndarray) -> jax.Array:
    """Rows index [S, L] of heads [S, h] of x [B, c, N, ...], as [S, B, L, h, ...].

    Out of range is clipped. Known, evenly spaced rows are read by strides.
    """
    stride = _stride(index, x.shape[1])
    if stride is not None:
        B, c, N, *rest = x.shape
        cut = x.reshape(B, c // stride, stride, N, *rest)
        rows = [_pick(cut[:, :, int(o)], h) for o, h in zip(index[:, 0], heads, strict=True)]
        return jnp.stack(rows)
    rows = x.at[:, jnp.asarray(index)[:, :, None], heads[:, None, :]].get(mode="clip")
    return jnp.swapaxes(rows, 0, 1)


def _pick(x: jax.Array, heads: np.ndarray) -> jax.Array:
    """Some heads of x [B, c, N, ...]; a slice where they follow each other."""
    first, end = int(heads[0]), int(heads[-1]) + 1
    if np.array_equal(heads, np.arange(first, end)):
        return x[:, :, first:end]
    return jnp.take(x, heads, axis=2)


def put(x: jax.Array, index: Any, real: Any, heads: np.ndarray, rows: jax.Array) -> jax.Array:
    """x [B, c, N, ...] with rows [S, B, L, h, ...] written where `take` reads, if `real` [S, L]."""
    stride = _stride(index, x.shape[1])
    if stride is None:
        return _at(x, index, real, heads).set(jnp.swapaxes(rows, 0, 1), mode="drop")
    kept, new = _spread(x.shape, index, heads, stride, rows)
    if kept.all():
        return new.reshape(x.shape)
    cut = x.reshape(new.shape[0], new.shape[1], stride, *x.shape[2:])
    return jnp.where(kept, new, cut).reshape(x.shape)


def add(x: jax.Array, index: Any, real: Any, heads: np.ndarray, rows: jax.Array) -> jax.Array:
    """x with rows added where `take` reads; slots may share a head. Arguments as `put`."""
    stride = _stride(index, x.shape[1])
    if stride is None:
        return _at(x, index, real, heads).add(jnp.swapaxes(rows, 0, 1), mode="drop")
    cut = x.reshape(x.shape[0], -1, stride, *x.shape[2:])
    for part in _rounds(heads):
        kept, new = _spread(x.shape, index[part], heads[part], stride, rows[part])
        cut = cut + jnp.where(kept, new, 0)
    return cut.reshape(x.shape)


def _rounds(heads: np.ndarray) -> list[np.ndarray]:
    """The slots in as few lists as there are slots that share a head, no head twice in a list."""
    seen: dict[int, int] = {}
    number = [seen.update({h: seen.get(h, -1) + 1}) or seen[h] for h in heads[:, 0].tolist()]
    return [np.flatnonzero(np.asarray(number) == i) for i in range(max(number) + 1)]


def _stride(index: Any, length: int) -> int | None:
    """The stride of rows that are known when tracing and evenly spaced over all of a chunk."""
    if not isinstance(index, np.ndarray) or length % index.shape[1]:
        return None
    stride = length // index.shape[1]
    even = np.array_equal(index - index[:, :1], np.arange(index.shape[1]) * stride + 0 * index)
    return stride if even and index.min() >= 0 and index[:, 0].max() < stride else None


def _spread(shape: tuple[int, ...], index: np.ndarray, heads: np.ndarray, stride: int, rows: Any):
    """Where rows go, bool [1, 1, stride, N, 1...], and they themselves as [B, L, 1, N, ...]."""
    N, ones = shape[2], (1,) * (len(shape) - 3)
    kept = np.zeros((stride, N), bool)
    kept[index[:, :1], heads] = True
    slots = np.zeros(N, int)
    slots[heads.reshape(-1)] = np.arange(heads.size)
    S, B, L, h, *rest = rows.shape
    new = jnp.moveaxis(rows, 0, 2).reshape(B, L, S * h, *rest)
    if not np.array_equal(slots, np.arange(S * h)):
        new = jnp.take(new, slots, axis=2)
    return kept.reshape(1, 1, stride, N, *ones), new[:, :, None]


def _at(x: jax.Array, index: Any, real: Any, heads: np.ndarray) -> Any:
    index = jnp.asarray(index) if real is None else jnp.where(real, index, x.shape[1])
    return x.at[:, index[:, :, None], heads[:, None, :]]
