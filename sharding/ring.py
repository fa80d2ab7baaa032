"""One branch whose rows move: select the kept rows, move keys and values, attend, put back.

Arrays of selected rows are [S, B, L, h, H]: slots, examples, ranks, heads of a slot. Chunks stay
apart, since their ranks do not follow each other. Every hop fetches keys and values straight from
their owner; their gradients go straight back, in float32, and are added up there.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.heads import Neighbours
from sharding.hops import Call, Hop
from sharding.local import Here, Local, empty, positions
from sharding.mesh import AxisName, aligned_groups
from sharding.messages import Messages
from sharding.plan import BranchPlan, Plan
from sharding.rows import add, put, take


class Keys(NamedTuple):
    """What travels: keys and values [S, B, L, k, H]; segment ids and positions [S, B, L]."""

    key: jax.Array
    value: jax.Array
    ids: jax.Array | None
    positions: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Ring:
    """One branch of a plan on this device; is_causal: of the whole call."""

    local: Local
    plan: Plan
    branch: BranchPlan
    is_causal: bool
    axis_name: AxisName | None
    scale: float
    rate: float
    messages: Messages
    here: Here

    @property
    def name(self) -> str:
        """For profiles."""
        branch = self.branch
        return f"{branch.method}_{branch.ranks.segment}_{branch.ranks.rate}"

    # --- which rows -----------------------------------------------------------------------------

    def _offset(self) -> Any:
        return self.branch.slots.offset(self.here.head_index)

    @functools.cached_property
    def _selections(self) -> list[tuple[Any, Any]]:
        return [self._select(chunk) for chunk in range(self._chunks)]

    def selection(self, chunk: int) -> tuple[Any, Any]:
        """Index [S, L] of the kept rows in a chunk, and which exist: None if all do."""
        return self._selections[chunk]

    def _select(self, chunk: int) -> tuple[Any, Any]:
        ranks, offset = self.branch.ranks, self._offset()
        if ranks.exact:
            steps = np.arange(self.branch.rows)[None] * ranks.rate
            index = (
                offset + steps if isinstance(offset, np.ndarray) else offset + jnp.asarray(steps)
            )
            if (self.branch.slots.offsets >= 0).all():
                return index, None
            return index, jnp.broadcast_to(offset >= 0, index.shape)
        start = jnp.asarray(self.plan.token_starts[:, chunk], jnp.int32)[self.here.device]
        rank = ranks.floor(start) + jnp.arange(self.branch.rows, dtype=jnp.int32)[None]
        index = ranks.position(rank, offset) - start
        return index, ranks.real(rank, offset, start)

    def _ids(self, ids: jax.Array | None, index: Any, real: Any, chunk: int) -> jax.Array | None:
        """int32 [S, B, L]: the ids of selected rows, 0 where there is none."""
        if not self.branch.masked:
            return None
        S, L = index.shape
        if ids is None:
            return jnp.broadcast_to(jnp.asarray(real, jnp.int32)[:, None], (S, self._batch, L))
        found = self._positions(ids, index, chunk)
        return found if real is None else jnp.where(real[:, None], found, 0)

    def _positions(self, x: Any, index: Any, chunk: int) -> Any:
        """int32 [S, B, L]: x [B, n] of selected rows; None of None."""
        if x is None:
            return None
        one = np.zeros((len(index), 1), int)
        return take(self._chunk(x, chunk)[:, :, None], index, one)[..., 0]

    @property
    def _batch(self) -> int:
        return self.plan.sizes.batch

    @property
    def _chunks(self) -> int:
        return self.plan.token_starts.shape[1]

    def _chunk(self, x: jax.Array, chunk: int) -> jax.Array:
        size = x.shape[1] // self._chunks
        return x if self._chunks == 1 else x[:, chunk * size : (chunk + 1) * size]

    # --- all-to-all and gather ------------------------------------------------------------------

    def _neighbours(self, chunk: int, size: int) -> Neighbours:
        groups = aligned_groups(self.plan.devices, size)
        return Neighbours(self.messages, self.axis_name, groups, chunk == 1)

    def _deal(self, x: Any, chunk: int) -> Any:
        if x is None or self.branch.spread == 1:
            return x
        return self._neighbours(chunk, self.branch.spread).deal(x, self.branch.slots)

    def _collect(self, x: jax.Array, chunk: int) -> jax.Array:
        return self._neighbours(chunk, self.branch.spread).collect(x, self.branch.slots)

    def queries(self, x: jax.Array, chunk: int) -> jax.Array:
        """The kept rows of an array [B, n, N, ...] of queries, dealt out."""
        index, _ = self.selection(chunk)
        return self._deal(take(self._chunk(x, chunk), index, self.branch.slots.queries), chunk)

    def query_marks(self, chunk: int) -> tuple[jax.Array | None, jax.Array | None]:
        """Their segment ids and positions."""
        index, real = self.selection(chunk)
        ids = self._ids(self.here.q_ids, index, real, chunk)
        place = self._positions(self.here.q_positions, index, chunk)
        return self._deal(ids, chunk), self._deal(place, chunk)

    def keys(self, key: jax.Array, value: jax.Array) -> tuple[Keys, ...]:
        """The kept rows of this device's keys and values, per chunk, dealt out or gathered."""
        chunks = []
        for chunk in range(self._chunks):
            index, real = self.selection(chunk)
            ids = self._ids(self.here.kv_ids, index, real, chunk)
            k, v = (
                take(self._chunk(x, chunk), index, self.branch.slots.keys) for x in (key, value)
            )
            found = Keys(k, v, ids, self._positions(self.here.kv_positions, index, chunk))
            if self.branch.method == "all_gather":
                found = jax.tree.map(self._neighbours(chunk, self.branch.group).gather, found)
            chunks.append(jax.tree.map(lambda x, chunk=chunk: self._deal(x, chunk), found))
        return tuple(chunks)

    # --- messages -------------------------------------------------------------------------------

    def send(self, hop: Hop, keys: tuple[Keys, ...]) -> tuple[Keys | None, ...]:
        """The rows that a hop brings, per chunk."""
        return tuple(
            None
            if rows is None
            else jax.tree.map(
                lambda x, rows=rows: self.messages.permute(
                    _cut(x, rows), self.axis_name, hop.pairs
                ),
                chunk,
            )
            for rows, chunk in zip(hop.rows, keys, strict=True)
        )

    def give_back(self, hop: Hop, gradients: Any) -> Any:
        """Gradients of what a hop brought, at the device that it came from."""
        pairs = [(destination, source) for source, destination in hop.pairs]
        return jax.tree.map(lambda x: self.messages.permute(x, self.axis_name, pairs), gradients)

    # --- calls of the local attention -----------------------------------------------------------

    def _starts(self, hop: Hop) -> tuple[jax.Array, jax.Array]:
        """Ranks [C] at which this device's and the arrived chunks begin."""
        branch = self.branch
        starts = jnp.asarray(branch.starts, jnp.int32)
        me, size = self.here.device // branch.spread, branch.group // branch.spread
        if branch.method == "all_gather":
            first = branch.starts.reshape(-1, size, self._chunks).min(1)
            return starts[me], jnp.asarray(first, jnp.int32)[me // size]
        base = me // size * size
        return starts[me], starts[base + (me - base - hop.shift) % size]

    def _options(self, hop: Hop, call: Call, h: int, places: tuple[Any, Any]) -> dict:
        """The local attention's, for h heads; places: positions [S, B, L] of both, or None."""
        own, other = self._starts(hop)
        (q_low, q_high), (k_low, k_high) = call.q_rows, call.k_rows
        drops: dict[str, Any] = {"dropout_bits": None}
        if self.local.hashes(self.here):
            drops = self.local.drops(self.here, self._batch, (self.branch.number,))
        elif self.here.seed is not None:
            q_rank = own[call.query] + jnp.arange(q_low, q_high, dtype=jnp.int32)
            k_rank = other[call.key] + jnp.arange(k_low, k_high, dtype=jnp.int32)
            drops = {"dropout_bits": self._bits((q_rank, k_rank), places)}
        if call.starts is not None and not self.local.hashes(self.here):
            q_start, k_start = call.starts[0] + q_low, call.starts[1] + k_low
        else:
            q_start, k_start = own[call.query] + q_low, other[call.key] + k_low
        return {
            **positions(*(x if x is None else _flat(x) for x in places)),
            **drops,
            "branches": ((call.segment, 1, 0, (0,) * h),),
            "is_causal": self.is_causal if places[0] is not None else call.causal,
            "scale": self.scale,
            "q_start": q_start,
            "k_start": k_start,
            "dropout_rate": self.rate,
        }

    def _bits(self, rank: tuple, places: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
        """The dropout hash of rows [S B, L, h] and columns [1, S B, L, 1], by true positions.

        rank: of rows and columns; places: their positions [S, B, L], or None: those of the ranks.
        """
        slots, ranks, spread = self.branch.slots, self.branch.ranks, self.branch.spread
        offset, queries = jnp.asarray(self._offset()), jnp.asarray(slots.queries)
        if spread > 1:
            part = self.here.device % spread
            if slots.uniform:
                queries = _part(queries, 1, part, spread)
            else:
                offset, queries = (_part(x, 0, part, spread) for x in (offset, queries))
        S, h = queries.shape
        head = self.here.head_index * self.plan.sizes.num_heads + queries.reshape(S, 1, 1, h)
        batch = (self.here.batch_index * self._batch + jnp.arange(self._batch)).reshape(1, -1, 1, 1)
        q_place, k_place = (
            (ranks.position(x[None], offset)[:, None] if place is None else place)[..., None]
            for x, place in zip(rank, places, strict=True)
        )
        rows = self.local.row_bits(self.here.seed, batch, head, q_place)
        columns = self.local.column_bits(self.here.seed, k_place, self.branch.number)
        columns = jnp.broadcast_to(columns, (S, self._batch, *columns.shape[2:]))
        return _flat(rows), _flat(columns)[None]

    def _arguments(self, hop: Hop, call: Call, q, marks, arrived: Keys, sent) -> tuple[tuple, dict]:
        """What one call takes: q, k, v and options; marks: of the queries."""
        k_rows = (call.k_rows[0] - sent[0], call.k_rows[1] - sent[0])
        k = jax.tree.map(lambda x: _cut(x, k_rows), arrived)
        q, q_ids, place = jax.tree.map(lambda x: _cut(x, call.q_rows), (q, *marks))
        options = self._options(hop, call, q.shape[3], (place, k.positions))
        if q_ids is not None:
            options["q_segment_ids"] = _flat(q_ids)
            options["kv_segment_ids"] = _flat(k.ids)
        return (_flat(q), _flat(k.key), _flat(k.value)), options

    def _sent(self, hop: Hop, call: Call, chunk: Keys) -> tuple[int, int]:
        """The range of a key chunk's rows that is here."""
        return (hop.shift and hop.rows[call.key]) or (0, chunk.key.shape[2])

    def attend(self, hop: Hop, queries, marks, arrived, state: list) -> list:
        """`state` (per chunk None or (out, lse)), continued over the keys that a hop brought."""
        state = list(state)
        for call in hop.calls:
            chunk = arrived[call.key]
            sent = self._sent(hop, call, chunk)
            q = queries[call.query]
            arrays, options = self._arguments(hop, call, q, marks[call.query], chunk, sent)
            old = state[call.query]
            whole = call.q_rows == (0, q.shape[2])
            if not whole and old is None:
                old = empty(q)
            carry = None
            if old is not None:
                carry = tuple(_flat(_cut(x, call.q_rows)) for x in old)
            new = self.local.forward(*arrays, **options, carry=carry)
            new = tuple(x.reshape(*q.shape[:2], *x.shape[1:]) for x in new)
            if not whole:
                new = _write(old, call.q_rows, new)
            state[call.query] = new
        return state

    def gradients(self, hop: Hop, rows, arrived, dq: list) -> tuple[list, list]:
        """dq, continued, and per chunk the gradients (dk, dv) of what a hop brought.

        rows: per chunk (q, marks, d_out, lse, delta).
        """
        dq, back = list(dq), {}
        for call in hop.calls:
            q, marks, *others = rows[call.query]
            chunk = arrived[call.key]
            sent = self._sent(hop, call, chunk)
            arrays, options = self._arguments(hop, call, q, marks, chunk, sent)
            others = [_flat(_cut(x, call.q_rows)) for x in others]
            gq, gk, gv = self.local.backward(*arrays, *others, **options)
            gq = gq.reshape(*q.shape[:2], *gq.shape[1:])
            dq[call.query] = _grow(dq[call.query], gq, call.q_rows, q.shape[2])
            before = back.get(call.key, (None, None))
            low = call.k_rows[0] - sent[0]
            place = (low, low + gk.shape[1]), sent[1] - sent[0]
            gk, gv = (x.reshape(*chunk.key.shape[:2], *x.shape[1:]) for x in (gk, gv))
            back[call.key] = (_grow(before[0], gk, *place), _grow(before[1], gv, *place))
        return dq, [back.get(chunk) for chunk in range(len(arrived))]

    # --- the whole branch -----------------------------------------------------------------------

    @property
    def direct(self) -> bool:
        """Whether the kept rows are all rows of all heads, where they lie."""
        return self.branch.direct(self.plan.sizes.num_heads)

    def merge(self, running: list, state: list, query: jax.Array) -> list:
        """The running (out, lse) of each chunk, None if nothing is there, with the state added."""
        result, dtype = [], query.dtype
        for chunk, (old, new) in enumerate(zip(running, state, strict=True)):
            if new is None:
                result.append(old)
                continue
            old = empty(self._chunk(query, chunk)) if old is None else old
            if self.branch.spread > 1:
                out = self._collect(new[0].astype(dtype), chunk)
                lse = self._collect(new[1], chunk)
                new = (out.astype(lse.dtype), lse)
            index, real = self.selection(chunk)
            queries = self.branch.slots.queries
            part = tuple(take(x, index, queries) for x in old)
            merged = self.local.merge(part, new)
            result.append(
                tuple(put(x, index, real, queries, y) for x, y in zip(old, merged, strict=True))
            )
        return result

    def add_queries(self, total: list, dq: list, dtype: Any) -> list:
        """Gradients of queries [B, c, N, H] of each chunk with this branch's added."""
        queries = self.branch.slots.queries
        return [
            self._add(t, g, i, queries, dtype)
            for i, (t, g) in enumerate(zip(total, dq, strict=True))
        ]

    def add_keys(self, total: list, dk: list, dtype: Any) -> list:
        """Gradients of keys or values [B, c, K, H] of each chunk with this branch's added."""
        keys, result = self.branch.slots.keys, []
        for chunk, (t, g) in enumerate(zip(total, dk, strict=True)):
            if g is not None and self.branch.method == "all_gather":
                g = self._neighbours(chunk, self.branch.group).reduce(g)
            result.append(self._add(t, g, chunk, keys, dtype))
        return result

    def _add(self, total, g, chunk: int, which: np.ndarray, dtype: Any) -> Any:
        if g is None:
            return total
        if self.branch.spread > 1:
            g = self._collect(g.astype(dtype), chunk).astype(g.dtype)
        index, real = self.selection(chunk)
        return add(total, index, real, which, g)


def _cut(x: jax.Array, rows: tuple[int, int]) -> jax.Array:
    return x if rows == (0, x.shape[2]) else x[:, :, rows[0] : rows[1]]


def _flat(x: jax.Array) -> jax.Array:
    """[S, B, ...] -> [S B, ...]."""
    return x.reshape(-1, *x.shape[2:])


def _part(x: jax.Array, axis: int, index: Any, parts: int) -> jax.Array:
    size = x.shape[axis] // parts
    return lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _write(old: Any, rows: tuple[int, int], new: Any) -> tuple:
    return tuple(x.at[:, :, rows[0] : rows[1]].set(y) for x, y in zip(old, new, strict=True))


def _grow(total: Any, new: jax.Array, rows: tuple[int, int], length: int) -> jax.Array:
    """total with `new` added to some of its rows; None is 0."""
    if rows == (0, length):
        return new if total is None else total + new
    if total is None:
        after = [(0, 0)] * new.ndim
        after[2] = (rows[0], length - rows[1])
        return jnp.pad(new, after)
    return total.at[:, :, rows[0] : rows[1]].add(new)
