"""What `gpu_blocks.py` times: patterns, sizes and who takes part, by part of the run."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import block_peers as peers
from benchmarks.block_peers import DENSE, FLASH, FLEX, OURS, TOKAMAX, TWO, WINDOW, XLA
from pallas_kernels import block_schedule

HEADS = 16
SHORT, LONG, WIDTH = 32768, 131072, 4096
FRACTIONS = (0.1, 0.05, 0.02, 0.01, 0.25, 0.5, 1.0)
# Entries of 4 bytes: forward and transposed lists, each once as given and once as sorted.
LIST_BYTES = 16
SPARE = 64 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A pattern, its useful pairs of tokens a head, and who is timed on it."""

    name: str
    pattern: peers.Pattern
    T: int
    H: int
    pairs: float
    heads: int = HEADS
    width: int | None = None
    who: tuple[str, ...] = (OURS, FLEX)

    @property
    def kept(self) -> float:
        """Share of all pairs that is kept."""
        return self.pairs / self.T**2

    def bounds(self) -> tuple[float, float]:
        """MiB that forward, and forward with backward, may take: the bar of the kernels.

        Forward: inputs, out, lse, the lists and 64 MiB. With backward: the gradients more, and a
        float32 copy of each.
        """
        array = 2 * self.T * self.heads * self.H
        rows = self.pattern.columns.shape
        lists = LIST_BYTES * float(self.pattern.counts.sum()) * self.heads / rows[1]
        forward = 4 * array + 4 * self.T * self.heads + lists + SPARE
        return forward / 2**20, (forward + array + 3 * array + 3 * 2 * array) / 2**20


def of_blocks(name: str, pattern: Any, T: int, H: int, **options: Any) -> Case:
    """A case all of whose pairs count."""
    pairs = float(pattern.counts.sum()) * pattern.block_size**2 / pattern.columns.shape[1]
    return Case(name, pattern, T, H, pairs, **options)


def windows() -> list[Case]:
    """A long causal window."""
    pairs = float(LONG * WIDTH - WIDTH * (WIDTH - 1) / 2)
    name, pattern = f"causal window {WIDTH} T={LONG}", peers.window(LONG, WIDTH)
    who = (OURS, WINDOW, FLASH, TOKAMAX, FLEX)
    return [Case(name, pattern, LONG, H, pairs, width=WIDTH, who=who) for H in (128, 64)]


def long() -> list[Case]:
    """1 % of a long sequence against all of it."""
    pattern = peers.random_blocks(LONG // 128, 0.01)
    return [of_blocks(f"random 1% T={LONG}", pattern, LONG, 128, who=(OURS, DENSE, FLEX))]


def fractions() -> list[Case]:
    """From everything kept to 1 %; dense attention does not depend on it and is timed once."""
    found = []
    for H in (128, 64):
        for fraction in FRACTIONS:
            pattern = peers.random_blocks(SHORT // 128, fraction)
            who = (OURS, FLEX, DENSE) if fraction == FRACTIONS[0] else (OURS, FLEX)
            found.append(of_blocks(f"random {fraction:.0%}", pattern, SHORT, H, who=who))
    return found


def few_heads() -> list[Case]:
    """Few, long rows; and what their pairs cost in a random pattern."""
    pattern = peers.global_local(SHORT // 128, 1, 6)
    return [of_blocks("global_local 4 heads", pattern, SHORT, H, heads=4) for H in (128, 64)]


def orders() -> list[Case]:
    """The orders in which the tiles are visited."""
    named = {
        "random 10%": peers.random_blocks(SHORT // 128, 0.1),
        "causal random 10%": peers.random_blocks(SHORT // 128, 0.1, True),
    }
    orders = block_schedule.ORDERS
    return [of_blocks(f"order, {name}", p, SHORT, 128, who=orders) for name, p in named.items()]


def more() -> list[Case]:
    """Causal, one list per head, blocks of 64 and the XLA path."""
    rows, random = SHORT // 128, peers.random_blocks
    halves = random(SHORT // 64, 0.1, block_size=64)
    return [
        of_blocks("causal random 10%", random(rows, 0.1, True), SHORT, 128),
        of_blocks("random 10% block 64", halves, SHORT, 128),
        of_blocks("random 10% block 64", halves, SHORT, 64),
        of_blocks("random 10% per head", random(rows, 0.1, heads=HEADS), SHORT, 128),
        of_blocks("random 10% by XLA", random(rows, 0.1), SHORT, 128, who=(OURS, XLA)),
    ]


def two_passes() -> list[Case]:
    """The deterministic backward beside the fused one."""
    found = windows() + [c for c in fractions() if c.name == "random 10%"]
    return [dataclasses.replace(c, name=f"{c.name}, backward", who=(OURS, TWO)) for c in found]


PARTS: dict[str, Callable[[], list[Case]]] = {
    "windows": windows,
    "long": long,
    "fractions": fractions,
    "few_heads": few_heads,
    "orders": orders,
    "more": more,
    "two_passes": two_passes,
}


def inputs(c: Case) -> list[jax.Array]:
    """query, key, value and a cotangent."""
    keys = jax.random.split(jax.random.key(c.T + c.H), 4)
    return [jax.random.normal(key, (1, c.T, c.heads, c.H), jnp.bfloat16) for key in keys]


def functions(c: Case) -> dict[str, Callable]:
    """The JAX functions of a case, each of query, key and value."""
    every: dict[str, Callable] = {
        OURS: peers.ours(c.pattern),
        TWO: peers.ours(c.pattern, deterministic=True),
        XLA: peers.xla(c.pattern),
        DENSE: peers.cudnn(),
        WINDOW: peers.cudnn(c.width),
        FLASH: peers.flash3(c.width or 0),
        TOKAMAX: peers.tokamax(c.width or 0),
    }
    for order in block_schedule.ORDERS:
        every[order] = peers.ours(c.pattern, order, deterministic=True)
    return {who: every[who] for who in c.who if who in every}


def traces(f: Callable, c: Case) -> tuple[Any, Any]:
    """A function traced for a case: forward, and forward with backward."""
    x = jax.ShapeDtypeStruct((1, c.T, c.heads, c.H), jnp.bfloat16)
    both = jax.jit(lambda q, k, v, do: jax.vjp(f, q, k, v)[1](do))
    return jax.jit(f).trace(x, x, x), both.trace(x, x, x, x)
