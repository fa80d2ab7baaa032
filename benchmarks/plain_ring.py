"""A plain ring of the same attention, to compare with: all keys and values go to every device.

What a branch keeps is cut out where they arrive; the calls of the local attention are those of the
library's ring, so that only the messages differ.
"""

import dataclasses
from typing import Any

import jax

from sharding.attention import Setup, first_arrival, local_forward, ring_forward, rings_of
from sharding.hops import Hop
from sharding.ring import Keys, Ring


@dataclasses.dataclass(frozen=True)
class PlainRing(Ring):
    """A ring that takes its rows from whole keys and values. whole: (key, value) by shift."""

    whole: Any

    def send(self, hop: Hop, keys: tuple[Keys, ...]) -> tuple[Keys | None, ...]:
        """The rows that a hop is about, out of everything that came from there."""
        source = (self.here.device - hop.shift) % self.plan.devices
        there = dataclasses.replace(self, here=self.here._replace(device=source))
        found = there.keys(*self.whole[hop.shift])
        return tuple(
            rows and jax.tree.map(lambda x, rows=rows: x[:, :, rows[0] : rows[1]], chunk)
            for rows, chunk in zip(hop.rows, found, strict=True)
        )


def attend_plainly(setup: Setup, query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
    """(out, lse) as `sharding.attention.attend`, of a contiguous layout without masks."""
    devices = setup.plan.devices
    rings, here = rings_of(setup, (None, None, None))

    def turned(x: jax.Array, shift: int) -> jax.Array:
        pairs = [(i, (i + shift) % devices) for i in range(devices)]
        return setup.messages.permute(x, setup.axis_name, pairs)

    whole = {s: (turned(key, s), turned(value, s)) for s in range(1, devices)}
    whole, query = setup.local.after(whole, query)
    running = [local_forward(setup, here, query, key, value)]
    for ring in rings:
        fields = {f.name: getattr(ring, f.name) for f in dataclasses.fields(ring)}
        plain = PlainRing(**fields, whole=whole)
        own = plain.keys(key, value)
        running = ring_forward(plain, query, own, first_arrival(plain, own), running)
    return running[0]
