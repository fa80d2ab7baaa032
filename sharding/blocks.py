"""Block lists of a sequence on a mesh: hops and rows that nobody wants are not sent.

Lists are static arrays over the whole sequence, in `contiguous` layout; each device's part of them
for each hop is made here, on the host.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding.local import Here, Local
from sharding.mesh import AxisName
from sharding.messages import Messages
from sharding.ring import Keys


@dataclasses.dataclass(frozen=True, eq=False)
class BlockHop:
    """Keys and values from the device `shift` places before, and what each device sees of them.

    pairs: (source, destination). rows: per chunk (there is one) the tokens that are sent.
    columns [P, b, n, rows, capacity], counts [P, b, n, rows], bands like columns or None: the lists
    of every device, columns counted from the first block sent.
    """

    shift: int
    pairs: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int], ...]
    columns: np.ndarray
    counts: np.ndarray
    bands: np.ndarray | None


@dataclasses.dataclass(frozen=True, eq=False)
class BlockPlan:
    """Who sends which blocks of keys to whom, and what that costs, as `sharding.plan.Plan`."""

    devices: int
    length: int
    block_size: int
    layout: str
    token_starts: np.ndarray
    hops: tuple[BlockHop, ...]
    bytes: int
    messages: int
    balance: float


def make_block_plan(
    columns: np.ndarray,
    counts: np.ndarray,
    bands: np.ndarray | None,
    *,
    length: int,
    devices: int,
    block_size: int,
    is_causal: bool,
    row_bytes: int,
    arrays: int = 2,
) -> BlockPlan:
    """A plan for lists columns [b, n, rows, capacity], counts [b, n, rows] and their band numbers.

    row_bytes: of the keys, values and ids of one token. arrays: how many of these there are.

    Raises:
        ValueError: the devices' parts are not whole blocks; the message says what would be.

    Example:
        >>> columns, counts = np.zeros((1, 1, 8, 1), np.int32), np.ones((1, 1, 8), np.int32)
        >>> plan = make_block_plan(columns, counts, None, length=64, devices=4, block_size=8,
        ...                        is_causal=False, row_bytes=2)
        >>> [(hop.shift, hop.pairs, hop.rows) for hop in plan.hops][1]
        (1, ((0, 1),), ((0, 8),))
    """
    if length % (devices * block_size):
        step = devices * block_size
        raise ValueError(
            f"sequence of {length} tokens on {devices} devices: wanted a multiple of {step} with"
            f" blocks of {block_size}; pad it to {-(-length // step) * step} and mask the padding"
            " with segment ids 0"
        )
    size = length // devices // block_size
    valid = np.arange(columns.shape[-1]) < counts[..., None]
    if is_causal:  # blocks after the query's see nothing
        valid &= columns <= np.arange(columns.shape[2])[:, None]
    found = (_hop(columns, valid, bands, devices, size, shift) for shift in range(devices))
    hops = [hop for hop in found if hop is not None]
    if not hops or hops[0].shift:  # what is here comes first, even if nobody wants it
        hops.insert(0, _nothing(columns, devices, size, bands))
    hops = [
        dataclasses.replace(h, rows=((h.rows[0][0] * block_size, h.rows[0][1] * block_size),))
        for h in hops
    ]
    moved = sum(hop.rows[0][1] - hop.rows[0][0] for hop in hops[1:]) * row_bytes
    work = valid.sum((0, 1, 3)).reshape(devices, -1).sum(1)
    return BlockPlan(
        devices,
        length,
        block_size,
        "contiguous",
        np.arange(devices)[:, None] * (length // devices),
        tuple(hops),
        moved,
        arrays * (len(hops) - 1),
        float(work.max() / max(work.mean(), 1e-9)),
    )


def _hop(columns, valid, bands, devices: int, size: int, shift: int) -> BlockHop | None:
    b, n, _, capacity = columns.shape

    def split(x: np.ndarray) -> np.ndarray:
        return np.moveaxis(x.reshape(b, n, devices, size, capacity), 2, 0)

    device = np.arange(devices)
    source = (device - shift) % devices
    local = split(columns) - (source * size).reshape(-1, 1, 1, 1, 1)
    here = split(valid) & (local >= 0) & (local < size)
    wants = here.any((1, 2, 3, 4))
    if not wants.any():
        return None
    low, high = int(local[here].min()), int(local[here].max()) + 1
    if shift == 0:
        low, high = 0, size
    counts = here.sum(-1).astype(np.int32)
    most = max(1, int(counts.max()))
    order = np.argsort(~here, axis=-1, kind="stable")[..., :most]
    kept = np.arange(most) < counts[..., None]

    def pick(x: np.ndarray) -> np.ndarray:
        return np.where(kept, np.take_along_axis(x, order, -1), 0).astype(np.int32)

    pairs = tuple((int(source[d]), int(d)) for d in device if wants[d]) if shift else ()
    numbers = None if bands is None else pick(split(bands))
    return BlockHop(shift, pairs, ((low, high),), pick(local - low), counts, numbers)


def _nothing(columns, devices: int, size: int, bands) -> BlockHop:
    shape = (devices, *columns.shape[:2], size, 1)
    zero = np.zeros(shape, np.int32)
    return BlockHop(
        0, (), ((0, size),), zero, np.zeros(shape[:-1], np.int32), None if bands is None else zero
    )


@dataclasses.dataclass(frozen=True)
class BlockRing:
    """A plan of block lists on this device; used as a `sharding.ring.Ring`.

    make: (columns, counts, bands) -> the lists as the local attention takes them.
    """

    local: Local
    plan: BlockPlan
    make: Callable[..., Any]
    axis_name: AxisName | None
    is_causal: bool
    scale: float
    rate: float
    messages: Messages
    here: Here

    @property
    def branch(self) -> BlockPlan:
        """The plan, which has the hops."""
        return self.plan

    @property
    def direct(self) -> bool:
        """Rows are used where they lie."""
        return True

    @property
    def name(self) -> str:
        """For profiles."""
        return f"blocks_{self.plan.block_size}"

    def queries(self, x: jax.Array, chunk: int) -> jax.Array:
        """[B, n, ...] as [1, B, n, ...]."""
        return x[None]

    def query_ids(self, chunk: int) -> jax.Array | None:
        """Segment ids [1, B, n]."""
        return None if self.here.q_ids is None else self.here.q_ids[None]

    def keys(self, key: jax.Array, value: jax.Array) -> tuple[Keys, ...]:
        """This device's keys, values and ids."""
        ids = None if self.here.kv_ids is None else self.here.kv_ids[None]
        return (Keys(key[None], value[None], ids),)

    def send(self, hop: BlockHop, keys: tuple[Keys, ...]) -> tuple[Keys, ...]:
        """The rows that a hop brings."""
        low, high = hop.rows[0]
        return jax.tree.map(
            lambda x: self.messages.permute(x[:, :, low:high], self.axis_name, hop.pairs), keys
        )

    def give_back(self, hop: BlockHop, gradients: Any) -> Any:
        """Gradients of what a hop brought, at the device that it came from."""
        pairs = [(destination, source) for source, destination in hop.pairs]
        return jax.tree.map(lambda x: self.messages.permute(x, self.axis_name, pairs), gradients)

    def _options(self, hop: BlockHop, q: jax.Array, ids: Any, keys: Keys) -> dict:
        me, n = self.here.device, q.shape[2]
        q_start = jnp.asarray(me * n, jnp.int32)
        source = (me - hop.shift) % self.plan.devices
        k_start = jnp.asarray(source * n + hop.rows[0][0], jnp.int32)
        lists = (hop.columns, hop.counts, hop.bands)
        options = {
            "blocks": self.make(*(None if x is None else jnp.asarray(x)[me] for x in lists)),
            "is_causal": self.is_causal,
            "scale": self.scale,
            "q_start": q_start,
            "k_start": k_start,
            "dropout_rate": self.rate,
            "dropout_bits": self._bits(q_start, k_start, q, keys),
        }
        if ids is not None and keys.ids is not None:
            options |= {"q_segment_ids": ids[0], "kv_segment_ids": keys.ids[0]}
        return options

    def _bits(self, q_start: Any, k_start: Any, q: jax.Array, keys: Keys) -> Any:
        if self.here.seed is None:
            return None
        _, B, n, N, _ = q.shape
        batch = (self.here.batch_index * B + jnp.arange(B)).reshape(B, 1, 1)
        head = (self.here.head_index * N + jnp.arange(N)).reshape(1, 1, N)
        row = (q_start + jnp.arange(n, dtype=jnp.int32)).reshape(1, n, 1)
        column = k_start + jnp.arange(keys.key.shape[2], dtype=jnp.int32)
        columns = self.local.column_bits(self.here.seed, column.reshape(1, 1, -1, 1), 0)
        return self.local.row_bits(self.here.seed, batch, head, row), columns

    def attend(self, hop: BlockHop, queries, ids, arrived, state: list) -> list:
        """`state`, continued over the keys that a hop brought."""
        (q,), (keys,), (old,) = queries, arrived, state
        carry = None if old is None else tuple(x[0] for x in old)
        options = self._options(hop, q, ids[0], keys)
        new = self.local.forward(q[0], keys.key[0], keys.value[0], carry=carry, **options)
        return [tuple(x[None] for x in new)]

    def gradients(self, hop: BlockHop, rows, arrived, dq: list) -> tuple[list, list]:
        """dq, continued, and the gradients of what a hop brought."""
        ((q, ids, *others),), (keys,) = rows, arrived
        options = self._options(hop, q, ids, keys)
        arrays = (q[0], keys.key[0], keys.value[0], *(x[0] for x in others))
        gq, gk, gv = (x[None] for x in self.local.backward(*arrays, **options))
        return [gq if dq[0] is None else dq[0] + gq], [(gk, gv)]

    def add_queries(self, total: list, dq: list, dtype: Any) -> list:
        """Gradients of the queries with those of the lists added."""
        return [total[0] + dq[0][0]]

    def add_keys(self, total: list, dk: list, dtype: Any) -> list:
        """Gradients of the keys, or of the values, with those of the lists added."""
        return [total[0] + dk[0][0]]
