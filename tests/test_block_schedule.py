"""Block lists as the kernels read them: flat, transposed, split and scheduled."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import block_lists, block_schedule

pytestmark = pytest.mark.kernel

UNBOUNDED = ((block_schedule.UNBOUNDED,) * 2,)


@pytest.fixture(autouse=True)
def _broadcast():
    with jax.numpy_rank_promotion("allow"):
        yield


def pattern(mask, block_size, static=True, flat=False):
    """Lists of a mask `[b, n, rows, columns]`; flat: in no more room than they need."""
    counts, starts = mask.sum(-1).astype(np.int32), None
    columns = np.argsort(~mask, axis=-1, kind="stable")[..., : counts.max()].astype(np.int32)
    if flat:
        size = counts.sum(-1)
        columns = np.zeros((*size.shape, size.max()), np.int32)
        columns[np.arange(size.max()) < size[..., None]] = np.nonzero(mask)[-1]
        starts = (np.cumsum(counts, -1) - counts).astype(np.int32)
    arrays = columns, counts, starts
    if not static:
        arrays = jax.tree.map(jnp.asarray, arrays)
    return types.SimpleNamespace(
        columns=arrays[0],
        counts=arrays[1],
        starts=arrays[2],
        bands=((None, None),),
        band_index=None,
        block_size=block_size,
        longest=None,
    )


def visits(lists, group, rows, columns, unit, transposed):
    """How often a tile meets 64 away rows: `[b, n, member, query, key]` in units of 64 rows."""
    b, n, tiles = lists.counts.shape
    lanes = 2 if unit == 1 else 1
    found = np.zeros((b, n, group, rows * unit + 2, columns * unit + 2), int)
    for place in np.ndindex(b, n, tiles):
        begin, count = int(lists.begin[place]), int(lists.counts[place])
        entries = np.asarray(lists.entries)
        entries = entries[place[:2] if entries.shape[:2] == (b, n) else (0, 0)].reshape(-1, lanes)
        for pair in entries[begin : begin + count]:
            for half in range(2):
                entry = jax.tree.map(int, block_lists.decode(jnp.int32(pair[half % lanes])))
                if entry.empty:
                    continue
                home, away = 2 * place[2] + half, entry.block * unit + np.arange(unit)
                where = (away, home) if transposed else (home, away)
                found[(*place[:2], entry.member, *where)] += 1
    return found[..., : rows * unit, : columns * unit]


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(("block_size", "n"), [(64, 4), (128, 1), (256, 2)])
def test_every_listed_pair_is_visited_once_from_both_sides(block_size, n, static, flat):
    rows, columns, unit = 5, 7, block_size // 64
    mask = np.random.default_rng(n).random((2, n, rows, columns)) < 0.4
    mask[0, 0, 1:3] = False
    lists = pattern(mask, block_size, static, flat)
    wanted = np.repeat(np.repeat(mask, unit, 2), unit, 3).astype(int)
    tiles = [-(-x * block_size // 128) for x in (rows, columns)]
    queries = block_lists.for_queries(lists, tiles[0])
    found = visits(queries, 1, rows, columns, unit, False)
    np.testing.assert_array_equal(found[:, :, 0], wanted)
    keys = block_lists.for_keys(lists, tiles[1], 4, 2)
    found = visits(keys, 2, rows, columns, unit, True)
    members = wanted.reshape(2, 2, 2, *wanted.shape[2:]) if n == 4 else wanted[:, :, None]
    np.testing.assert_array_equal(found, np.broadcast_to(members, found.shape))


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("order", block_schedule.ORDERS)
def test_long_rows_are_split_and_every_entry_is_worked_on_once(order, static, monkeypatch):
    monkeypatch.setattr(block_schedule, "SHORTEST_SPLIT", 4)
    monkeypatch.setattr(block_schedule, "SHORTEST_TRACED_SPLIT", 4)
    mask = np.random.default_rng(0).random((1, 1, 40, 40)) < 0.1
    mask[..., 0, :] = mask[..., 7, :] = True
    lists = block_lists.for_queries(pattern(mask, 128, static), 40)
    plan = block_schedule.Plan(
        batch=1,
        heads=2,
        tiles=40,
        away=128,
        steps_per_entry=1,
        home_rows=5120,
        away_rows=5120,
        bands=UNBOUNDED,
        lanes=1,
        transposed=False,
        list_batch=1,
        list_heads=1,
    )
    work = block_schedule.work(plan, lists, ctas=16, head_bytes=1 << 20, group=1, order=order)
    items = np.concatenate([row[1 : 1 + row[0, 0]] for row in np.asarray(work.items)])
    done = np.zeros(80, int)
    np.add.at(done, items[:, 0], items[:, 2])
    np.testing.assert_array_equal(done, np.tile(mask[0, 0].sum(-1), 2))
    parts = items[items[:, 3] >= 0]
    assert sorted(parts[:, 3]) == list(range(len(parts)))
    np.testing.assert_array_equal(
        np.asarray(work.rows)[np.asarray(work.owners)[parts[:, 3]]], parts[:, 0]
    )
    assert {0, 7, 40, 47} <= set(parts[:, 0])
    assert items[:, 2].max() <= (mask.sum() * 2 // 16 + 1)
    if order == "longest_first" and static:
        load = [row[1 : 1 + row[0, 0], 2].sum() for row in work.items]
        assert max(load) <= 1.2 * np.mean(load)


@pytest.mark.parametrize(("away", "per_entry", "width"), [(128, 2, 1), (256, 1, 1), (256, 1, 2)])
def test_blocks_that_end_past_the_keys_are_masked(away, per_entry, width):
    """Keys past the end are zeros, which count unless they are masked."""
    plan = block_schedule.Plan(
        batch=1,
        heads=1,
        tiles=1,
        away=away,
        steps_per_entry=per_entry,
        width=width,
        home_rows=128,
        away_rows=0,
        bands=UNBOUNDED,
        lanes=1,
        transposed=False,
    )
    block = 128 if width == 2 else 256
    for rows in (128, 256, 384, 640, 768, 700):
        assert dataclasses.replace(plan, away_rows=rows).masks == (rows % block != 0), rows


def test_hilbert_visits_neighbours():
    x, y = (v.ravel() for v in np.mgrid[:16, :16])
    order = np.argsort(block_schedule._hilbert(np, x, y, 4))
    steps = np.abs(np.diff(x[order])) + np.abs(np.diff(y[order]))
    assert (steps == 1).all()
