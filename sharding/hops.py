"""Which rows of which chunk a device wants of another, and the calls that use them."""

import dataclasses
from typing import Any

import numpy as np

from sharding.rows import UNBOUNDED


@dataclasses.dataclass(frozen=True)
class Call:
    """One use of the local attention: rows of a query chunk against rows of a key chunk.

    starts: ranks of the first query and key, or None: known only on the device.
    """

    query: int
    key: int
    q_rows: tuple[int, int]
    k_rows: tuple[int, int]
    starts: tuple[int, int] | None
    segment: int
    causal: bool


@dataclasses.dataclass(frozen=True)
class Hop:
    """Keys and values from the device `shift` places before in the group, and what to do with them.

    pairs: (source, destination) on the sequence axis. rows: per key chunk, the range that is sent.
    """

    shift: int
    pairs: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int] | None, ...]
    calls: tuple[Call, ...]


def need_of(first: np.ndarray, end: np.ndarray, length: int, causal: bool) -> np.ndarray:
    """bool [P, P]: whether a device's queries (rows) see keys of another (columns)."""
    need = np.zeros((len(first), len(first)), bool)
    for i in range(first.shape[1]):
        for j in range(first.shape[1]):
            need |= _sees(
                first[:, i, None],
                end[:, i, None],
                first[None, :, j],
                end[None, :, j],
                length,
                causal,
            )
    return need


def _sees(q: Any, q_end: Any, k: Any, k_end: Any, length: int, causal: bool) -> np.ndarray:
    """Whether ranks [q, q_end) see any of [k, k_end)."""
    same = np.minimum(q_end - 1, k_end - 1) // length >= np.maximum(q, k) // length
    return same & (k < q_end) if causal else same


def group_size(need: np.ndarray) -> int:
    """The smallest g such that devices see only those of their own g neighbours."""
    P = len(need)
    where = np.nonzero(need)
    return next(g for g in range(1, P + 1) if P % g == 0 and (where[0] // g == where[1] // g).all())


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """The ranks of every (virtual) device of a ring: first and end [V, C] of its chunks.

    length: of a segment. count: rows of a chunk. spread: devices that are one virtual device.
    """

    first: np.ndarray
    end: np.ndarray
    length: int
    causal: bool
    group: int
    count: int
    spread: int = 1

    def hops(self, shift: int) -> list[Hop]:
        """The hops from `shift` places before; none if nobody sees what they would bring.

        Devices after their source want the end of its rows, those before it the beginning: two
        hops where that is less than one.
        """
        V = len(self.first)
        whole, _ = self._hop(shift, np.ones(V, bool))
        if whole is None or shift == 0:
            return [] if whole is None else [whole]
        after = np.arange(V) % self.group >= shift
        parts = [self._hop(shift, only) for only in (after, ~after)]
        hops = [hop for hop, _ in parts if hop is not None]
        apart = len(hops) == 2 and all(alone for _, alone in parts)
        return hops if apart and sum(map(_sent, hops)) < _sent(whole) else [whole]

    def _hop(self, shift: int, only: np.ndarray) -> tuple[Hop | None, bool]:
        """One hop to the devices `only`, and whether the others see nothing of what it sends."""
        V, C = self.first.shape
        dst = np.arange(V)
        src = dst // self.group * self.group + (dst % self.group - shift) % self.group
        calls, rows = [], [None] * C
        needed = np.zeros(V, bool)
        bounds = {}
        for j in range(C):
            for i in range(C):
                q, k = (
                    (self.first[dst, i], self.end[dst, i]),
                    (self.first[src, j], self.end[src, j]),
                )
                bounds[i, j] = *q, *k
                sees = _sees(*q, *k, self.length, self.causal) & only
                if not sees.any():
                    continue
                needed |= sees
                call = _call(i, j, bounds[i, j], sees, self.length, self.causal, self.count)
                calls.append(call)
                old = rows[j] or call.k_rows
                rows[j] = (min(old[0], call.k_rows[0]), max(old[1], call.k_rows[1]))
        if not calls:
            return None, True
        seen = np.zeros(V, bool)
        for (_, j), (q, q_end, k, k_end) in bounds.items():
            if rows[j] is not None:
                part = k + rows[j][0], np.minimum(k + rows[j][1], k_end)
                seen |= _sees(q, q_end, *part, self.length, self.causal)
        found = zip(src[needed].tolist(), dst[needed].tolist(), strict=True)
        spread = range(self.spread)
        pairs = [(s * self.spread + i, d * self.spread + i) for s, d in found for i in spread]
        hop = Hop(shift, tuple(pairs) if shift else (), tuple(rows), tuple(calls))
        return hop, not (seen & ~only).any()


def _sent(hop: Hop) -> int:
    return sum(high - low for low, high in filter(None, hop.rows))


def _call(i, j, bounds, sees, length: int, causal: bool, count: int) -> Call:
    """The call for one pair of chunks, restricted to the rows that some device needs."""
    q, q_end, k, k_end = bounds
    low = np.maximum(q // length, k // length)
    high = np.minimum((q_end - 1) // length, (k_end - 1) // length)
    one = ((q // length == (q_end - 1) // length) & (k // length == (k_end - 1) // length))[sees]
    k_rows = _range(low * length - k, (high + 1) * length - k, sees, count)
    q_rows = _range(low * length - q, (high + 1) * length - q, sees, count)
    excluded = sees | (causal & (k >= q_end))  # by causality alone, or not at all
    segment = UNBOUNDED if one.all() and excluded.all() else length
    behind, phase = q - k, q % length
    starts = None
    if sees.all():
        whole = not causal or (k_end - 1 <= q).all()
        if segment == UNBOUNDED and whole:
            return Call(i, j, q_rows, k_rows, (0, 0), segment, False)
        if (behind == behind[0]).all() and (segment == UNBOUNDED or (phase == phase[0]).all()):
            base = min(q[0], k[0]) // length * length
            starts = (int(q[0] - base), int(k[0] - base))
    return Call(i, j, q_rows, k_rows, starts, segment, causal)


def _range(low: np.ndarray, high: np.ndarray, sees: np.ndarray, count: int) -> tuple[int, int]:
    a, b = np.clip(low[sees], 0, count).min(), np.clip(high[sees], 0, count).max()
    return int(a), int(b)


def gathered_calls(view: View) -> tuple[Call, ...]:
    """Every query chunk against every chunk number of the whole group."""
    first, end, length, group = view.first, view.end, view.length, view.group
    C, rows = first.shape[1], view.count
    k_first = np.repeat(first.reshape(-1, group, C).min(1), group, 0)
    calls = []
    for j in range(C):
        for i in range(C):
            k, k_end = k_first[:, j], k_first[:, j] + group * rows
            sees = _sees(first[:, i], end[:, i], k, k_end, length, view.causal)
            if sees.any():
                one = (k // length == (k_end - 1) // length).all()
                one &= (first[:, i] // length == (end[:, i] - 1) // length).all()
                segment = UNBOUNDED if one and sees.all() else length
                static = (0, 0) if segment == UNBOUNDED and not view.causal else None
                ranges = (0, rows), (0, group * rows)
                calls.append(Call(i, j, *ranges, static, segment, view.causal))
    return tuple(calls)
