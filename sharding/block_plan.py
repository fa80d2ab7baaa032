"""Who sends which blocks of keys, or of queries, to whom: block lists of a sequence on a mesh.

Lists are static arrays over the whole sequence, in blocks of positions. Keys and values travel
straight from their owner to whoever visits them, in runs of blocks that somebody wants. Blocks of
queries that visit many devices (global ones) go to the keys instead, where that is less: out and
log-sum-exp come back. Hops that nobody wants do not happen.
"""

import dataclasses

import numpy as np

from sharding.cost import NVLINK, Link
from sharding.mesh import chunk_starts, chunks_of

# Unwanted bytes between two runs that travel along: what NVLink moves in the time of a message.
GAP_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class BlockCall:
    """One use of the local attention: a query chunk against the rows of a key chunk that are here.

    columns [P, b, n, size], starts and counts [P, b, n, rows], bands like columns or None: the
    lists of every device, row i in columns[starts[i] : starts[i] + counts[i]], counted from the
    first block that is here.
    """

    query: int
    key: int
    columns: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    bands: np.ndarray | None

    @property
    def longest(self) -> int:
        """The most entries of a row, on any device."""
        return int(self.counts.max())


@dataclasses.dataclass(frozen=True, eq=False)
class BlockHop:
    """One run of keys and values from the device `shift` places before, and who sees what of it.

    pairs: (source, destination). rows: per key chunk the tokens that are sent, or None. The first
    hop of a plan, with shift 0, is about the keys and values that are here.
    """

    shift: int
    pairs: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int] | None, ...]
    calls: tuple[BlockCall, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class QueryMoves:
    """Blocks of queries that visit the devices `shifts` places after their own.

    blocks, starts [P, m]: the place among the device's blocks, and first position, of each one that
    leaves a device; any others where it has fewer. pairs: of each shift. used [P, shifts, m]:
    whether one of a device sees anything there. calls: one per key chunk, its lists
    [P, shifts m, ...], each of one row, at the device that computes.
    """

    blocks: np.ndarray
    starts: np.ndarray
    shifts: tuple[int, ...]
    pairs: tuple[tuple[tuple[int, int], ...], ...]
    used: np.ndarray
    calls: tuple[BlockCall, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockPlan:
    """Who sends what to whom, and what that costs, as `sharding.plan.Plan`.

    key_messages: those of one hop.
    """

    devices: int
    length: int
    block_size: int
    layout: str
    causal: bool
    token_starts: np.ndarray
    hops: tuple[BlockHop, ...]
    moves: QueryMoves | None
    bytes: int
    messages: int
    key_messages: int
    balance: float
    compute: float
    exposed: float
    link: Link

    @property
    def seconds(self) -> float:
        """Expected seconds of a forward pass."""
        return self.compute + self.exposed


@dataclasses.dataclass(frozen=True)
class TokenCost:
    """Bytes of one token: its keys, values and marks; its queries and marks, and their results.

    pair: products and sums of one token's queries with one token's keys and values.
    marks: arrays of one number per token that go along: segment ids, positions.
    """

    keys: int
    queries: int
    pair: int
    marks: int = 0


def make_block_plan(
    columns: np.ndarray,
    counts: np.ndarray,
    bands: np.ndarray | None,
    *,
    length: int,
    devices: int,
    block_size: int,
    is_causal: bool,
    cost: TokenCost,
    layout: str = "contiguous",
    link: Link = NVLINK,
) -> BlockPlan:
    """A plan for lists: columns [size], row after row, counts [b, n, rows], and band numbers.

    Raises:
        ValueError: the devices' parts are not whole blocks; the message says what would be.

    Example:
        >>> columns, counts = np.zeros(8, np.int32), np.ones((1, 1, 8), np.int32)
        >>> plan = make_block_plan(columns, counts, None, length=64, devices=4, block_size=8,
        ...                        is_causal=False, cost=TokenCost(2, 4, 8))
        >>> [(hop.shift, hop.pairs, hop.rows) for hop in plan.hops][1]
        (1, ((0, 1),), ((0, 8),))
    """
    layout = layout if devices > 1 else "contiguous"
    step = devices * chunks_of(layout) * block_size
    if length % step:
        raise ValueError(
            f"sequence of {length} tokens on {devices} devices: wanted a multiple of {step} with"
            f" blocks of {block_size} and layout {layout!r}; pad it to {-(-length // step) * step}"
            " and mask the padding with segment ids 0"
        )
    if is_causal:  # blocks after the query's see nothing
        line = np.repeat(np.arange(counts.size), counts.reshape(-1))
        past = columns <= line % counts.shape[2]
        columns, bands = columns[past], None if bands is None else bands[past]
        counts = np.bincount(line[past], minlength=counts.size).reshape(counts.shape)
    starts = chunk_starts(length, devices, layout)
    lists = _Lists(columns, counts, bands, starts // block_size, length // step)
    costs = _Costs(cost, block_size)
    kept = min(_choices(lists), key=lambda moved: costs.of(lists, moved))
    hops = [_hop(lists, np.zeros_like(kept), 0, _whole(lists), block_size)]
    for shift, key, run in _runs(lists, kept, costs.gap):
        rows = tuple(run if i == key else None for i in range(chunks_of(layout)))
        hops.append(_hop(lists, kept, shift, rows, block_size))
    moves = _moves(lists, kept, block_size) if kept.any() else None
    messages = (len(hops) - 1) * (2 + cost.marks)
    messages += len(moves.shifts) * (3 + cost.marks) if moves else 0
    work = np.bincount(np.where(kept[lists.row], lists.source, lists.device), minlength=devices)
    share = lists.counts.shape[0] * lists.counts.shape[1]
    compute = float(work.max()) / share * block_size**2 * cost.pair / link.flops
    received = costs.of(lists, kept)[0]
    late = costs.seconds(hops, moves, link) + len(hops) * link.latency
    return BlockPlan(
        devices,
        length,
        block_size,
        layout,
        is_causal,
        starts,
        tuple(hops),
        moves,
        received,
        messages,
        2 + cost.marks,
        float(work.max() / max(work.mean(), 1e-9)),
        compute,
        # What travels hides behind the calls before its own.
        max(0.0, late - compute * (len(hops) - 1) / len(hops)) if messages else 0.0,
        link,
    )


class _Lists:
    """Lists, and for every entry its row, device, source device, chunk and place there."""

    def __init__(self, columns, counts, bands, starts, size):
        self.columns, self.counts, self.bands = columns, counts, bands
        self.starts, self.size = starts, size
        P, C = starts.shape
        blocks = counts.shape[2]
        owner, chunk = np.zeros(blocks, int), np.zeros(blocks, int)
        place = (starts[:, :, None] + np.arange(size)).reshape(-1)
        owner[place] = np.repeat(np.arange(P), C * size)
        chunk[place] = np.tile(np.repeat(np.arange(C), size), P)
        self.row = np.repeat(np.arange(counts.size) % blocks, counts.reshape(-1))
        self.device, self.source = owner[self.row], owner[columns]
        self.chunk = chunk[columns]
        self.local = columns - starts[self.source, self.chunk]
        self.owner, self.of_chunk = owner, chunk
        self.shift = (self.device - self.source) % P

    @property
    def devices(self) -> int:
        return len(self.starts)

    @property
    def blocks(self) -> int:
        return self.counts.shape[2]


def _choices(lists: _Lists) -> list[np.ndarray]:
    """bool [rows]: blocks of queries that move, by the number of devices they visit; none first."""
    foreign = lists.shift > 0
    visits = np.unique(lists.row[foreign] * lists.devices + lists.source[foreign])
    count = np.bincount(visits // lists.devices, minlength=lists.blocks)
    least = [1 << i for i in range(lists.devices.bit_length()) if 1 << i < lists.devices]
    return [np.zeros(lists.blocks, bool), *(count >= x for x in least)]


def _whole(lists: _Lists) -> tuple:
    return ((0, lists.size),) * lists.starts.shape[1]


def _runs(lists: _Lists, moved: np.ndarray, gap: int) -> list[tuple[int, int, tuple[int, int]]]:
    """(shift, key chunk, blocks from and to) of what somebody wants; gaps of `gap` go along."""
    P, C = lists.starts.shape
    wanted = np.zeros((P, C, lists.size), bool)
    stays = ~moved[lists.row]
    wanted[lists.shift[stays], lists.chunk[stays], lists.local[stays]] = True
    runs = []
    for shift in range(1, P):
        for key in range(C):
            blocks = np.flatnonzero(wanted[shift, key])
            parts = np.split(blocks, np.flatnonzero(np.diff(blocks) > gap + 1) + 1)
            runs += [(shift, key, (int(x[0]), int(x[-1]) + 1)) for x in parts if len(x)]
    return runs


@dataclasses.dataclass(frozen=True)
class _Costs:
    """What plans are compared by."""

    cost: TokenCost
    block_size: int

    @property
    def gap(self) -> int:
        """Blocks between two runs that make no message of their own."""
        return int(GAP_BYTES // (self.cost.keys * self.block_size))

    def of(self, lists: _Lists, moved: np.ndarray) -> tuple[int, int]:
        """Bytes that one device receives, and blocks of queries that move."""
        sent = sum(high - low for _, _, (low, high) in _runs(lists, moved, self.gap))
        most = np.bincount(lists.owner[moved], minlength=1).max()
        queries = len(_moved_shifts(lists, moved)) * int(most) * self.cost.queries
        return (sent * self.cost.keys + queries) * self.block_size, int(moved.sum())

    def seconds(self, hops: list[BlockHop], moves: QueryMoves | None, link: Link) -> float:
        """That the messages of a plan take, one after the other."""
        total = 0.0
        for hop in hops[1:]:
            sent = sum(high - low for low, high in filter(None, hop.rows))
            total += sent * self.cost.keys / link.slowest(hop.pairs)
        for pairs in moves.pairs if moves else ():
            sent = moves.blocks.shape[1] * self.block_size if moves else 0
            total += sent * self.cost.queries / link.slowest(pairs)
        return total


def _moved_shifts(lists: _Lists, moved: np.ndarray) -> np.ndarray:
    """How far behind their own device the queries that move visit."""
    away = (lists.source - lists.device) % lists.devices
    found = np.unique(away[moved[lists.row]])
    return found[found > 0]


def _call(lists: _Lists, rows: np.ndarray, base, size: int, mask, query: int, key: int):
    """The lists of rows [P, count] over `size` blocks from base [P]; mask [P, count]: which.

    They are [P, b, n, most entries of a list], so that a device takes its own.
    """
    begin = (np.cumsum(lists.counts).reshape(lists.counts.shape) - lists.counts)[:, :, rows]
    counts = np.moveaxis(lists.counts[:, :, rows] * mask, 2, 0)  # [P, b, n, count]
    line = np.repeat(np.arange(counts.size), counts.reshape(-1))
    first = np.moveaxis(begin, 2, 0).reshape(-1) - (np.cumsum(counts) - counts.reshape(-1))
    place = first[line] + np.arange(len(line))
    local = lists.columns[place] - base[line * len(rows) // counts.size]
    here = (local >= 0) & (local < size)
    if not here.any():
        return None
    line, place, local = line[here], place[here], local[here]
    counts = np.bincount(line, minlength=counts.size).reshape(counts.shape)
    starts, total = np.cumsum(counts, -1) - counts, counts.sum(-1)
    there = np.arange(total.max()) < total[..., None]

    def spread(x: np.ndarray) -> np.ndarray:
        result = np.zeros(there.shape, np.int32)
        result[there] = x
        return result

    bands = None if lists.bands is None else spread(lists.bands[place])
    starts, counts = (x.astype(np.int32) for x in (starts, counts))
    return BlockCall(query, key, spread(local), starts, counts, bands)


def _hop(lists: _Lists, moved: np.ndarray, shift: int, blocks: tuple, block_size: int) -> BlockHop:
    """One hop; blocks: per key chunk the run that is sent, or None."""
    P, C = lists.starts.shape
    source = (np.arange(P) - shift) % P
    calls, wants = [], np.zeros(P, bool)
    for key, run in enumerate(blocks):
        if run is None:
            continue
        base = lists.starts[source, key] + run[0]
        for query in range(C):
            rows = lists.starts[:, query, None] + np.arange(lists.size)
            call = _call(lists, rows, base, run[1] - run[0], ~moved[rows], query, key)
            if call is not None:
                calls.append(call)
                wants |= call.counts.any((1, 2, 3))
    pairs = [(int(source[d]), d) for d in range(P) if wants[d]] if shift else []
    rows = tuple(run and (run[0] * block_size, run[1] * block_size) for run in blocks)
    return BlockHop(shift, tuple(pairs), rows, tuple(calls))


def _moves(lists: _Lists, moved: np.ndarray, block_size: int) -> QueryMoves:
    """The journeys of the blocks of queries that move."""
    P, C = lists.starts.shape
    shifts = _moved_shifts(lists, moved)
    mine = [np.flatnonzero(moved & (lists.owner == d)) for d in range(P)]
    most = max(map(len, mine))
    rows = np.zeros((P, most), int)
    there = np.zeros((P, most), bool)
    for d, found in enumerate(mine):
        rows[d, : len(found)], there[d, : len(found)] = found, True
        rows[d, len(found) :] = found[0] if len(found) else lists.starts[d, 0]
    owner = (np.arange(P)[:, None] - shifts) % P
    visiting, mask = rows[owner].reshape(-1, 1), there[owner].reshape(-1, 1)
    here = np.repeat(lists.starts, len(visiting) // P, axis=0)
    found = (_call(lists, visiting, here[:, key], lists.size, mask, 0, key) for key in range(C))
    calls = [call for call in found if call is not None]
    seen = np.any([call.counts.any((1, 2, 3)) for call in calls], 0).reshape(P, len(shifts), most)
    # At home: the device `shift` places behind one says what its queries saw there.
    used = np.stack([seen[(np.arange(P) + s) % P, i] for i, s in enumerate(shifts)], 1)
    pairs = tuple(
        tuple((d, int((d + s) % P)) for d in range(P) if used[d, i].any())
        for i, s in enumerate(shifts)
    )

    def split(call: BlockCall) -> BlockCall:
        """Of [P items, ...] arrays [P, items, ...]."""
        names = ("columns", "starts", "counts", "bands")
        arrays = {name: getattr(call, name) for name in names}
        cut = {n: x.reshape(P, -1, *x.shape[1:]) for n, x in arrays.items() if x is not None}
        return dataclasses.replace(call, **cut)

    place = lists.of_chunk[rows] * lists.size + rows
    place -= lists.starts[np.arange(P)[:, None], lists.of_chunk[rows]]
    shifts = tuple(map(int, shifts))
    return QueryMoves(place, rows * block_size, shifts, pairs, used, tuple(map(split, calls)))
