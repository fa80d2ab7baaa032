"""What a plan costs: bytes on the wire, expected seconds of messages and of attention."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from sharding.heads import Slots
from sharding.rows import Ranks

TILE = 128  # rows that a kernel works on at once, even if fewer exist


@dataclasses.dataclass(frozen=True)
class Link:
    """What a message and a product cost. Defaults: NVLink as measured by ppermute, one H100.

    bandwidth: bytes per second that a device receives. latency: seconds per message.
    flops: products and sums per second of the attention.
    memory: bytes that gathered keys and values may take.
    levels: where speeds differ, (devices of a host, bandwidth from beyond it), inner ones first:
    runs of so many devices along the axis of the sequence are near each other.

    Example:
        >>> two = Link(bandwidth=300.0, levels=((4, 50.0),))
        >>> two.slowest([(0, 3)]), two.slowest([(0, 1), (3, 4)])
        (300.0, 50.0)
        >>> two.gather(8) == 3 / 300 + 4 / 50
        True
    """

    bandwidth: float = 340e9
    latency: float = 15e-6
    flops: float = 550e12
    memory: float = 2**30
    levels: tuple[tuple[int, float], ...] = ()

    def slowest(self, pairs: Iterable[tuple[int, int]]) -> float:
        """Bandwidth of the slowest of the messages (source, destination) of one hop."""
        found = [self.bandwidth]
        for size, bandwidth in self.levels:
            if any(source // size != destination // size for source, destination in pairs):
                found.append(bandwidth)
        return min(found)

    def gather(self, group: int) -> float:
        """Seconds for a byte from each other device of `group` consecutive ones."""
        sizes = [1, *(size for size, _ in self.levels), group]
        speeds = [self.bandwidth, *(bandwidth for _, bandwidth in self.levels)]
        reached = [min(size, group) for size in sizes]
        return sum((b - a) / v for a, b, v in zip(reached, reached[1:], speeds, strict=False))


NVLINK = Link()


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of one device's call; heads are those on one device of the heads' axis.

    ids, positions: whether the tokens have segment ids, and positions of their own.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int
    stats_itemsize: int = 4
    ids: bool = False
    positions: bool = False


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes that one rank of one chunk costs on the wire."""

    sizes: Sizes
    slots: Slots
    masked: bool

    @property
    def marks(self) -> int:
        """Numbers that go along with each key: its segment id, its position."""
        return self.masked + self.sizes.positions

    @property
    def key_messages(self) -> int:
        return 2 + self.marks

    def _marks(self) -> int:
        return 4 * self.sizes.batch * len(self.slots.queries) * self.marks

    def keys(self, spread: int) -> int:
        """Keys and values, dealt out among `spread` devices."""
        one = self.slots.rows * self.sizes.batch * 2 * self.sizes.head_dim * self.sizes.itemsize
        return one // spread + self._marks() // (1 if self.slots.uniform else spread)

    def dealt(self, spread: int) -> int:
        """All-to-all of queries, keys and values, and of out and lse back."""
        queries = self.slots.queries.size * self.sizes.batch
        there = 2 * self.sizes.head_dim * self.sizes.itemsize
        there = queries * (there + self.sizes.stats_itemsize) + self.keys(1) - self._marks()
        marks = 2 * self._marks() * (spread if self.slots.uniform else 1)
        return (there + marks) * (spread - 1) // spread


def compute_of(
    work: np.ndarray, rows: np.ndarray, slots: Slots, spread: int, sizes: Sizes, link: Link
) -> tuple[float, float]:
    """Expected seconds of the busiest device, and its work over the mean.

    work [V]: visible pairs of each (virtual) device and head; rows: of its chunks.
    """
    rows = np.maximum(rows, 1)
    filled = (np.maximum(rows, TILE) / rows).mean()
    heads = slots.queries.size / spread * sizes.batch
    seconds = 4.0 * work.max() * heads * sizes.head_dim * filled / link.flops
    return float(seconds), float(work.max() / max(work.mean(), 1e-9))


def pairs_before(x: np.ndarray, ranks: Ranks, total: int, causal: bool) -> np.ndarray:
    """Visible pairs of all queries before rank x, of `total` ranks."""
    length = ranks.length
    x = x.astype(float)
    whole, rest = np.floor(x / length), x % length
    if causal:
        return whole * length * (length + 1) / 2 + rest * (rest + 1) / 2
    last = total - whole * length
    return whole * length * length + rest * np.minimum(length, last)
