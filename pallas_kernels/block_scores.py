"""One tile of scores over block lists: what of it is visible, and what dropout keeps."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import block_lists, block_schedule, visits
from pallas_kernels.block_schedule import Options
from pallas_kernels.compat import ROW, TILE, plgpu
from pallas_kernels.marks import Marks


def masked_scores(
    plan: block_schedule.Plan,
    s: jax.Array,
    entry: block_lists.Entry,
    row: Any,
    start: Any,
    shift: Any,
) -> jax.Array:
    """Scores `[home, away]` with -inf where the place of a pair hides it, if anything is hidden.

    row, start: first home and away row. Blocks that lie wholly inside cost only the question.
    """
    if not plan.masks:
        return s
    rows, columns = s.shape
    low, high = block_schedule.limits(plan, entry.band, shift)
    end = jnp.minimum(high + row, plan.away_rows - 1)
    edge = start + columns - 1 > end
    if plan.banded:
        edge |= start < low + row + rows - 1
    if plan.lanes > 1:
        edge |= entry.empty != 0

    def masked() -> jax.Array:
        limit = jnp.where(entry.empty != 0, 0, plan.away_rows) if plan.lanes > 1 else plan.away_rows
        return jnp.where(
            seen_pairs(plan, entry.band, row, start, s.shape, shift, limit), s, -jnp.inf
        )

    return lax.cond(edge, masked, lambda: s)


def first_entry(plan: block_schedule.Plan, s: jax.Array) -> jax.Array:
    """Scores with -inf beyond the first of the entries of a step."""
    away = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=TILE)
    return jnp.where(away < plan.block, s, -jnp.inf)


def seen_pairs(
    plan: block_schedule.Plan,
    band: Any,
    row: Any,
    start: Any,
    shape: tuple[int, int],
    shift: Any,
    limit: Any,
) -> jax.Array:
    """Which pairs (home, away) of a tile see each other by their place; limit: away rows."""
    away = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=TILE) + start
    seen = away < limit
    home = plgpu.broadcasted_iota(jnp.int32, (shape[0],), 0, layout=ROW) + row
    if plan.ragged_keys:
        seen &= lax.broadcast_in_dim(home, shape, [0]) < plan.home_rows
    if plan.banded:
        low, high = block_schedule.limits(plan, band, shift)
        seen &= away >= lax.broadcast_in_dim(home + low, shape, [0])
        seen &= away <= lax.broadcast_in_dim(home + high, shape, [0])
    return seen


def kept(
    plan: block_schedule.Plan,
    opt: Options,
    keep: Any,
    seed: Any,
    starts: Any,
    where: tuple[Any, Any, Any, Any],
    shape: tuple[int, int],
    marks: tuple[Marks, Marks],
) -> jax.Array:
    """Which pairs dropout keeps. where: (batch, query head, first home row, first away row).

    marks: of home and away.
    """
    batch, head, row, start = where
    home, away = (starts[1], starts[0]) if plan.transposed else (starts[0], starts[1])
    visit: Any = visits.Visit(
        first=0,
        steps=0,
        home_shift=home,
        away_shift=away,
        away_residue=0,
        limit=0,
        origin=0,
        rate=1,
        length=0,
        home_step=1,
    )
    launch_: Any = plan
    at = (batch, head, 0, row, start)
    seeds, places = (seed[0], seed[1]), opt.marks.places(*marks)
    return visits.kept(launch_, keep, opt.rate, seeds, visit, at, shape, places)
