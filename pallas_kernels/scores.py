"""One tile of scores: what of it is visible, and its step of the online softmax."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import schedule, visits
from pallas_kernels.compat import ROW, TILE, plgpu
from pallas_kernels.config import ROWS


def softmax(s: jax.Array, m: jax.Array, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One online softmax step in base 2: (p, new row maximum, factor for what was summed)."""
    top = jnp.maximum(m, s.max(axis=1) * scale)
    # A row that has seen nothing yet has maximum -inf; its exponents must not become NaN.
    safe = jnp.where(top == -jnp.inf, 0.0, top)
    return exponentials(s, safe, scale), top, jnp.exp2(m - safe)


def exponentials(s: jax.Array, m: jax.Array, scale: float) -> jax.Array:
    """2 to the scores times scale, of each row less m."""
    return jnp.exp2(s * scale - lax.broadcast_in_dim(m, s.shape, [0]))


@dataclasses.dataclass(frozen=True)
class Rows:
    """A warpgroup's rows of queries, as one branch sees them.

    row: the first one. dilated: the dilated row of each, `[ROWS]`. low, high: the away rows that
    all of them see. end: of those that any of them sees, without gaps.
    """

    row: Any
    dilated: jax.Array
    low: Any
    high: Any
    end: Any


def rows_of(plan: schedule.Launch, v: visits.Visit, row: Any) -> Rows:
    """The warpgroup's rows from home row `row` on."""
    iota = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
    first = row * v.home_step + v.home_shift
    _, high = visits.row_bounds(plan, v.length, first)
    low, end = visits.row_bounds(plan, v.length, first + (ROWS - 1) * v.home_step)
    return Rows(row, (iota + row) * v.home_step + v.home_shift, low, high, end)


def mask_scores(plan: schedule.Launch, v: visits.Visit, rows: Rows, start: Any, s: Any) -> Any:
    """Scores with -inf where the place of a pair hides it; `start` is the first away row."""
    width = s.shape[1]

    def masked() -> jax.Array:
        columns = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=TILE)
        columns = columns + (start + v.away_shift)
        seen = visits.visible(plan, v.length, rows.dilated, columns, v.limit + v.away_shift)
        return jnp.where(seen, s, -jnp.inf)

    first = start + v.away_shift
    edge = (first < rows.low) | (first + width > rows.high) | (start + width > v.limit)
    return lax.cond(edge, masked, lambda: s) if schedule.hides(plan) else s
