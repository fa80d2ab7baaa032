"""A plan of block lists on one device: the ring of its keys, and the journeys of its queries."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sharding.block_plan import BlockCall, BlockHop, BlockPlan, QueryMoves
from sharding.local import Here, Local, positions
from sharding.mesh import AxisName
from sharding.messages import Messages
from sharding.ring import Keys

Marks = tuple[Any, Any]  # segment ids and positions of queries, or None


@dataclasses.dataclass(frozen=True)
class BlockRing:
    """A plan of block lists on this device; used as a `sharding.ring.Ring`.

    make: (columns, starts, counts, bands, longest row) -> the lists for the local attention.
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

    def _chunk(self, x: jax.Array, chunk: int) -> jax.Array:
        size = x.shape[1] // self.plan.token_starts.shape[1]
        return x[:, chunk * size : (chunk + 1) * size]

    def queries(self, x: jax.Array, chunk: int) -> jax.Array:
        """[B, n, ...] as [1, B, c, ...], of one chunk."""
        return self._chunk(x, chunk)[None]

    @property
    def own_marks(self) -> Marks:
        """Of this device's queries [B, n]."""
        return self.here.q_ids, self.here.q_positions

    def query_marks(self, chunk: int) -> Marks:
        """Theirs [1, B, c]."""
        return jax.tree.map(lambda x: self.queries(x, chunk), self.own_marks)

    def keys(self, key: jax.Array, value: jax.Array) -> tuple[Keys, ...]:
        """This device's keys, values and their marks, per chunk."""
        arrays = Keys(key, value, self.here.kv_ids, self.here.kv_positions)
        return tuple(
            jax.tree.map(lambda x, i=i: self.queries(x, i), arrays)
            for i in range(self.plan.token_starts.shape[1])
        )

    def send(self, hop: BlockHop, keys: tuple[Keys, ...]) -> tuple[Keys | None, ...]:
        """The rows that a hop brings, per chunk."""
        return tuple(
            None
            if rows is None
            else jax.tree.map(
                lambda x, rows=rows: self.messages.permute(
                    x[:, :, rows[0] : rows[1]], self.axis_name, hop.pairs
                ),
                chunk,
            )
            for rows, chunk in zip(hop.rows, keys, strict=True)
        )

    def give_back(self, hop: BlockHop, gradients: Any) -> Any:
        """Gradients of what a hop brought, at the device that it came from."""
        pairs = [(destination, source) for source, destination in hop.pairs]
        return jax.tree.map(lambda x: self.messages.permute(x, self.axis_name, pairs), gradients)

    def options(self, lists: tuple, starts: tuple, q: jax.Array, marks: Marks, keys: Keys) -> dict:
        """The local attention's, for arrays without the leading axis and their first positions."""
        q_ids, places = marks
        options = {
            **positions(places, keys.positions),
            "blocks": self.make(*lists),
            "is_causal": self.is_causal,
            "scale": self.scale,
            "q_start": starts[0],
            "k_start": starts[1],
            "dropout_rate": self.rate,
        }
        if self.local.hashes(self.here):
            options |= self.local.drops(self.here, q.shape[0], (0,))
        else:
            options["dropout_bits"] = self._bits(starts, q, places, keys)
        if q_ids is not None and keys.ids is not None:
            options |= {"q_segment_ids": q_ids, "kv_segment_ids": keys.ids}
        return options

    def _bits(self, starts: tuple, q: jax.Array, places: Any, keys: Keys) -> Any:
        if self.here.seed is None:
            return None
        q_start, k_start = starts
        B, n, N, _ = q.shape
        batch = (self.here.batch_index * B + jnp.arange(B)).reshape(B, 1, 1)
        head = (self.here.head_index * N + jnp.arange(N)).reshape(1, 1, N)
        row, column = (
            start + jnp.arange(count, dtype=jnp.int32)[None] if place is None else place
            for start, count, place in (
                (q_start, n, places),
                (k_start, keys.key.shape[1], keys.positions),
            )
        )
        rows = self.local.row_bits(self.here.seed, batch, head, row[..., None])
        return rows, self.local.column_bits(self.here.seed, column[None, ..., None], 0)

    def _arguments(self, hop: BlockHop, call: BlockCall, q, marks, arrived) -> tuple[tuple, dict]:
        me, starts = self.here.device, jnp.asarray(self.plan.token_starts, jnp.int32)
        keys = jax.tree.map(lambda x: x[0], arrived[call.key])
        rows = hop.rows[call.key]
        assert rows is not None  # somebody visits them
        first = starts[(me - hop.shift) % self.plan.devices, call.key] + rows[0]
        marks = jax.tree.map(lambda x: x[0], marks)
        lists = (*at_device(call, me), call.longest)
        options = self.options(lists, (starts[me, call.query], first), q[0], marks, keys)
        return (q[0], keys.key, keys.value), options

    def attend(self, hop: BlockHop, queries, marks, arrived, state: list) -> list:
        """`state` (per chunk None or (out, lse)), continued over the keys that a hop brought."""
        state = list(state)
        for call in hop.calls:
            asking = queries[call.query], marks[call.query]
            arrays, options = self._arguments(hop, call, *asking, arrived)
            old = state[call.query]
            carry = None if old is None else tuple(x[0] for x in old)
            new = self.local.forward(*arrays, carry=carry, **options)
            state[call.query] = tuple(x[None] for x in new)
        return state

    def gradients(self, hop: BlockHop, rows, arrived, dq: list) -> tuple[list, list]:
        """dq, continued, and per chunk the gradients (dk, dv) of what a hop brought."""
        dq, back = list(dq), {}
        for call in hop.calls:
            q, marks, *others = rows[call.query]
            arrays, options = self._arguments(hop, call, q, marks, arrived)
            gq, *new = self.local.backward(*arrays, *(x[0] for x in others), **options)
            dq[call.query] = _sum(dq[call.query], gq[None])
            before = back.get(call.key, (None, None))
            back[call.key] = tuple(_sum(x, y[None]) for x, y in zip(before, new, strict=True))
        return dq, [back.get(chunk) for chunk in range(len(arrived))]

    def add_queries(self, total: list, dq: list, dtype: Any) -> list:
        """Gradients of the queries, per chunk, with those of the lists added."""
        return [x if y is None else x + y[0] for x, y in zip(total, dq, strict=True)]

    def add_keys(self, total: list, dk: list, dtype: Any) -> list:
        """Gradients of the keys, or of the values, with those of the lists added."""
        return self.add_queries(total, dk, dtype)


def at_device(call: BlockCall, device: Any) -> tuple:
    """The lists of a call on one device."""
    lists = call.columns, call.starts, call.counts, call.bands
    return tuple(None if x is None else jnp.asarray(x)[device] for x in lists)


def _sum(total: jax.Array | None, new: jax.Array) -> jax.Array:
    return new if total is None else total + new


@dataclasses.dataclass(frozen=True)
class Travellers:
    """The blocks of queries of a plan that move, on this device.

    Items are blocks that arrived: for every shift, each of the m blocks of the device there.
    """

    ring: BlockRing
    moves: QueryMoves

    def send(self, x: jax.Array) -> jax.Array:
        """Items [shifts m, B, block, ...] of rows [B, n, ...]."""
        size = self.ring.plan.block_size
        blocks = x.reshape(x.shape[0], -1, size, *x.shape[2:])
        mine = jnp.asarray(self.moves.blocks)[self.ring.here.device]
        rows = jnp.moveaxis(jnp.take(blocks, mine, axis=1), 1, 0)
        sent = (
            self.ring.messages.permute(rows, self.ring.axis_name, pairs)
            for pairs in self.moves.pairs
        )
        return jnp.concatenate(list(sent))

    def _home(self, items: jax.Array, absent: float) -> list[jax.Array]:
        """Per shift, what came of this device's blocks [m, ...]; absent where nothing did."""
        used = jnp.asarray(self.moves.used)[self.ring.here.device]
        found = []
        for i, pairs in enumerate(self.moves.pairs):
            back = [(destination, source) for source, destination in pairs]
            rows = jnp.split(items, len(self.moves.pairs))[i]
            rows = self.ring.messages.permute(rows, self.ring.axis_name, back)
            there = used[i].reshape(-1, *(1,) * (rows.ndim - 1))
            found.append(jnp.where(there, rows, absent))
        return found

    def _items(self) -> tuple[jax.Array, tuple]:
        """First positions of the items, and their lists for every call."""
        ring, me = self.ring, self.ring.here.device
        owners = (me - jnp.asarray(self.moves.shifts)) % ring.plan.devices
        starts = jnp.asarray(self.moves.starts, jnp.int32)[owners].reshape(-1)
        return starts, tuple(at_device(call, me) for call in self.moves.calls)

    def _calls(self, start: Any, lists: tuple, q: jax.Array, marks: Marks, own: tuple[Keys, ...]):
        """(arrays, options, key chunk) of the calls of one item."""
        first = jnp.asarray(self.ring.plan.token_starts, jnp.int32)[self.ring.here.device]
        for call, one in zip(self.moves.calls, lists, strict=True):
            keys = jax.tree.map(lambda x: x[0], own[call.key])
            one = (*one, call.longest)
            options = self.ring.options(one, (start, first[call.key]), q, marks, keys)
            yield (q, keys.key, keys.value), options, call.key

    def attend(self, query: jax.Array, own: tuple[Keys, ...]) -> list[tuple]:
        """Per shift (out, lse) [m, B, block, ...] of this device's blocks that move."""
        marks = jax.tree.map(self.send, self.ring.own_marks)

        def one(item: Any) -> Any:
            start, lists, q, marks = item
            state = None
            for arrays, options, _ in self._calls(start, lists, q, marks, own):
                state = self.ring.local.forward(*arrays, carry=state, **options)
            return tuple(state or ())

        out, lse = lax.map(one, (*self._items(), self.send(query), marks))
        return list(zip(self._home(out, 0.0), self._home(lse, -jnp.inf), strict=True))

    def merge(self, running: list, parts: list[tuple]) -> list:
        """The running (out, lse) of each chunk with what came back added."""

        def one(i: Any, whole: tuple) -> tuple:
            found = (tuple(x[i] for x in part) for part in parts)
            new = self.ring.local.merge(tuple(self._at(x, i) for x in whole), *found)
            return tuple(self._with(x, y, i) for x, y in zip(whole, new, strict=True))

        whole = tuple(jnp.concatenate(x, 1) for x in zip(*running, strict=True))
        whole = lax.fori_loop(0, self.moves.blocks.shape[1], one, whole)
        return list(zip(*(jnp.split(x, len(running), axis=1) for x in whole), strict=True))

    def gradients(self, rows: tuple, own: tuple[Keys, ...], totals: list) -> list:
        """Totals [dq, dk, dv], each per chunk, with those of the blocks that move added.

        rows: (query, d_out, lse, delta) of this device.
        """
        totals, rows = self.ring.local.after(totals, rows)
        marks = jax.tree.map(self.send, self.ring.own_marks)

        def one(sums: Any, item: Any) -> Any:
            start, lists, marks, q, *others = item
            dq, sums = None, [list(x) for x in sums]
            for arrays, options, chunk in self._calls(start, lists, q, marks, own):
                gq, *new = self.ring.local.backward(*arrays, *others, **options)
                dq = _sum(dq, gq)
                for i, g in enumerate(new):
                    sums[i][chunk] = sums[i][chunk] + g
            return sums, dq

        items = (*self._items(), marks, *map(self.send, rows))
        (dk, dv), dq = lax.scan(one, [list(x) for x in totals[1:]], items)
        parts = self._home(dq, 0.0)

        def add(i: Any, total: jax.Array) -> jax.Array:
            return self._with(total, sum((part[i] for part in parts), self._at(total, i)), i)

        total = jnp.concatenate(totals[0], 1)
        total = lax.fori_loop(0, self.moves.blocks.shape[1], add, total)
        return [jnp.split(total, len(totals[0]), axis=1), dk, dv]

    def _first(self, i: Any) -> Any:
        return jnp.asarray(self.moves.blocks)[self.ring.here.device, i] * self.ring.plan.block_size

    def _at(self, x: jax.Array, i: Any) -> jax.Array:
        """Rows [B, block, ...] of the i-th block that moves."""
        return lax.dynamic_slice_in_dim(x, self._first(i), self.ring.plan.block_size, 1)

    def _with(self, x: jax.Array, rows: jax.Array, i: Any) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, rows, self._first(i), 1)
