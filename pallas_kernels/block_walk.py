"""The way of the warpgroup that copies through the items of its block, over block lists."""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels import block_lists, block_schedule
from pallas_kernels.compat import aligned_rows


def walk(plan: block_schedule.Plan, items: Any, entries: Any, cta: Any, visit: Any) -> None:
    """The producer's way through a block's items: `visit(t, item, carry, loop)`.

    What comes next is read from memory ahead of its use: the item after the next one, the first
    entry of the next item, and the next entry of this one, so that copies never wait for it.
    """
    count = items[cta, 0, 0]

    def first_entry(item: block_schedule.Item) -> Any:
        batch, head, _ = block_schedule.place(plan, item.code)
        at = jnp.minimum(item.begin, entries.shape[-1] // plan.together - 1)
        where = block_schedule.list_place(plan, batch, head)
        return block_schedule.load_entries(plan, entries, where, at)

    def one(t: Any, state: Any) -> Any:
        carry, item, following, current = state
        later = block_schedule.item(items, cta, t + 2, count)
        upcoming = first_entry(following)
        batch, head, _ = block_schedule.place(plan, item.code)
        where = block_schedule.list_place(plan, batch, head)
        last = item.begin + lax.div(item.steps - 1, jnp.int32(plan.steps_per_entry))

        def loop(step: Any, fill: Any) -> Any:
            """Runs `step(j, entries, fill)` for the steps of the item; the new fill."""

            def body(j: Any, state: Any) -> Any:
                fill, entry = state
                index, _ = block_schedule.entry_of(plan, j + 1)
                at = jnp.minimum(item.begin + index, last)
                ahead = block_schedule.load_entries(plan, entries, where, at)
                return step(j, entry, fill), ahead

            return lax.fori_loop(0, item.steps, body, (fill, current))[0]

        return visit(t, item, carry, loop), following, later, upcoming

    start = block_schedule.item(items, cta, 0, count)
    second = block_schedule.item(items, cta, 1, count)
    zero = (jnp.int32(0), jnp.int32(0))
    lax.fori_loop(0, count, one, (zero, start, second, first_entry(start)))


def away_rows(plan: block_schedule.Plan, packed: tuple[Any, ...], j: Any) -> list[Any]:
    """The away rows of step j of an item, for each lane, or entry of the step."""
    _, inside = block_schedule.entry_of(plan, j)
    starts = [block_lists.decode(entry).block * plan.block + inside for entry in packed]
    return [aligned_rows(start, plan.away // plan.width) for start in starts]
