"""Block lists: built from masks, cut, turned into token masks, refused when wrong; their size."""

import dataclasses
import functools
import math
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilax import block_loop
from dilax.block_lists import (
    BlockLists,
    admissible,
    check_lists,
    density,
    from_mask,
    token_mask,
    window,
)
from dilax.patterns import GlobalLocal, LocalWindow, PerHead
from pallas_kernels import block_lists

MASK = np.random.default_rng(3).random((2, 3, 5, 7)) < 0.4
MASK[0, 0, 2] = False  # an empty row
MASK[1, 2, :, 4] = False  # a column that nobody visits


def padded(lists):
    """The same lists in arrays with an axis for the rows, which have room for the longest."""
    kept, size = lists.kept(), int(lists.counts.max())
    slot = np.concatenate([np.arange(x) for x in lists.counts.reshape(-1)])
    columns, band = np.zeros((2, *lists.counts.shape, size), np.int32)
    where = kept.batch, kept.head, kept.row, slot
    columns[where], band[where] = kept.column, 0 if kept.band is None else kept.band
    band = None if kept.band is None else band
    return BlockLists(columns, lists.counts, lists.bands, band, lists.block_size)


def test_mask_to_lists_and_back():
    lists = from_mask(MASK, 4)
    back = np.asarray(token_mask(lists, 20, 28))
    assert lists.rows() == padded(lists).rows()
    assert lists.rows()[1][0] == [np.flatnonzero(row).tolist() for row in MASK[1, 0]]
    assert (np.asarray(token_mask(padded(lists), 20, 28)) == back).all()
    assert (back == MASK.repeat(4, -2).repeat(4, -1)).all()
    assert lists.counts[0, 0, 2] == 0
    assert lists.is_static
    assert not jax.jit(lambda x: jnp.array(x.is_static))(lists)
    assert (np.asarray(token_mask(lists, 18, 25)) == back[..., :18, :25]).all()


def test_lists_are_cut_and_joined_like_arrays():
    """Every array of lists begins with the axes of examples and heads."""
    index = np.arange(MASK.size).reshape(MASK.shape) % 2
    lists = from_mask(MASK, 4, ((None, None), (3, 0)), index)
    whole = np.asarray(token_mask(lists, 20, 28))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    dense = functools.partial(token_mask, T=20, S=28)
    spec = jax.sharding.PartitionSpec("data")

    def of_each(lists):
        """One example after the other, by a scan."""
        parts = jax.tree.map(lambda x: x.reshape(2, 1, *x.shape[1:]), lists)
        return jax.lax.scan(lambda _, x: (None, dense(x)[0]), None, parts)[1]

    found = {
        "one example": (lambda x: dense(jax.tree.map(lambda y: y[1:], x)), whole[1:]),
        "one head": (lambda x: dense(jax.tree.map(lambda y: y[:, 2:], x)), whole[:, 2:]),
        "other order": (lambda x: dense(jax.tree.map(lambda y: y[::-1], x)), whole[::-1]),
        "joined": (
            lambda x: dense(jax.tree.map(lambda *y: jnp.concatenate(y), x, x)),
            np.concatenate([whole, whole]),
        ),
        "scanned": (of_each, whole),
        "on a mesh": (
            lambda x: jax.shard_map(dense, mesh=mesh, in_specs=spec, out_specs=spec)(x),
            whole,
        ),
    }
    together = jax.jit(lambda x: {name: function(x) for name, (function, _) in found.items()})
    for name, result in together(lists).items():
        assert (np.asarray(result) == found[name][1]).all(), name


def test_window_cuts_rows_and_columns():
    mask = MASK.copy()
    mask[..., :3] = False  # so that one window loses nothing
    index = np.arange(mask.size).reshape(mask.shape) % 2
    bands = ((None, None), (3, 0))
    lists = from_mask(mask, 4, bands, index)
    for row, rows, column, columns in ((0, 5, 3, 4), (1, 3, 4, 2), (0, 5, 0, 7)):
        cut = window(lists, row, rows, column, columns)
        assert cut.columns[cut.valid].tolist() == cut.kept().column.tolist()
        wanted = mask[..., row : row + rows, column : column + columns]
        tokens = [
            np.asarray(token_mask(x, 4 * rows, 4 * columns, 4 * row, 4 * column))
            for x in (
                cut,
                jax.jit(lambda x, at=(row, rows, column, columns): window(x, *at))(padded(lists)),
                from_mask(wanted, 4, bands, index[..., row : row + rows, column:][..., :columns]),
            )
        ]
        assert (tokens[0] == tokens[2]).all()
        assert (tokens[1] == tokens[2]).all()


def test_bands_are_token_masks():
    bands = ((None, None), (3, None), (None, 0))
    index = np.where(np.tri(4, dtype=bool), 1, 2) * ~np.eye(4, dtype=bool)
    lists = from_mask(np.ones((4, 4), bool), 4, bands, index)
    q, k = 5 + np.arange(15)[:, None], 2 + np.arange(14)
    per_token = index.repeat(4, 0).repeat(4, 1)[:15, :14]
    wanted = np.select([per_token == 1, per_token == 2], [q - k <= 3, q - k >= 0], True)
    assert (np.asarray(token_mask(lists, 15, 14, 5, 2))[0, 0] == wanted).all()


@pytest.mark.parametrize("starts", [(0, 0), (7, 2), (2, 7), (40, 3), (3, 40)])
def test_admissible_blocks_hold_a_visible_pair(starts):
    T, S, size = 21, 18, 4
    q, k = (start + np.arange(n) for start, n in zip(starts, (T, S), strict=True))
    seen = np.pad(q[:, None] >= k, [(0, -T % size), (0, -S % size)])
    blocks = seen.reshape(6, size, 5, size).any((1, 3))
    assert admissible(T, S, size, True, *starts).tolist() == blocks.sum(1).tolist()
    assert density(from_mask(blocks, size), T, S, True, *starts) == float(blocks.any())


def test_wrong_lists_are_refused():
    good = from_mask(np.tri(3, dtype=bool), 64)
    wide = padded(good)
    for lists in (good, wide):
        check_lists(lists, 3, 3, (1, 2), (1, 4))

    def wrong(match, rows=3, number=3, batch=None, heads=None, lists=good, **changes):
        with pytest.raises(ValueError, match=match):
            check_lists(dataclasses.replace(lists, **changes), rows, number, batch, heads)

    for lists in (good, wide):
        column = lists.columns
        wrong(r"blocks.columns: wanted columns from 0 to 1, got 2", number=2, lists=lists)
        wrong(
            r"blocks.columns: wanted columns from 0 to 2, got -5",
            columns=np.where(column == 2, -5, column),
            lists=lists,
        )
        wrong("ascending order", columns=column[..., ::-1].copy(), lists=lists)
        wrong("ascending order", columns=np.zeros_like(column), lists=lists)
        wrong("4 rows", rows=4, lists=lists)
        wrong("int32", columns=column.astype(np.int64), lists=lists)
        wrong("band_index: wanted int32", band_index=np.zeros(9, np.int32), lists=lists)
        wrong("band numbers from 0 to 0", band_index=np.ones_like(column), lists=lists)
    wrong(r"counts: wanted counts from 0 to the capacity 3", counts=good.counts + 1, lists=wide)
    wrong(r"counts: wanted counts from 0 to the capacity 2", longest=2)
    wrong("blocks.longest: wanted an int, with starts", longest=3, lists=wide)
    wrong(r"blocks.starts: wanted rows one after the other, .* in 6", counts=good.counts + 1)
    wrong(r"blocks.starts: wanted rows one after the other", starts=good.starts - 1)
    wrong(r"blocks.starts: wanted int32 \[b, n, rows\] with 3 rows", starts=good.starts[0])
    wrong("axis 0 of size 2", batch=(2,))
    wrong("axis 1 of size 4 or 8", heads=(4, 8))
    wrong("block_size", block_size=0)
    wrong("the whole block, first", bands=((4, None),))
    wrong("pairs", bands=((None, None), 4))
    with pytest.raises(ValueError, match="mask: wanted a boolean array"):
        from_mask(np.ones((3, 3)), 64)
    with pytest.raises(ValueError, match=r"^mask: wanted an array that is known"):
        jax.eval_shape(lambda x: from_mask(x, 64), jnp.ones((3, 3), bool))
    for index in (np.zeros((2, 3), int), np.zeros((3, 3))):
        with pytest.raises(ValueError, match=r"^band_index: wanted ints of the mask's shape"):
            from_mask(np.ones((3, 3), bool), 64, ((None, None), (3, 0)), index)
    known = jax.tree.map(jnp.asarray, good)
    with pytest.raises(ValueError, match="columns from 0 to 1"):
        check_lists(known, 3, 2)
    jax.eval_shape(lambda traced: check_lists(traced, 3, 2), known)  # contents are not known
    assert isinstance(known, BlockLists)


@pytest.mark.parametrize("block_size", [64, 128])
def test_memory_follows_the_kept_blocks(block_size):
    """Some rows are as long as there are rows: nothing has room for the longest in every row."""
    size = {"block_size": block_size}
    some = GlobalLocal(global_tokens=(2, 2), window_size=3 * block_size, random_blocks=2, **size)
    pattern, rows = PerHead((some, *[LocalWindow(window_blocks=3, **size)] * 3)), 1536
    tracemalloc.start()
    lists = pattern.lists(rows * block_size, num_heads=4)
    check_lists(lists, rows, rows)
    tiles = rows * block_size // 128
    queries = block_lists.for_queries(lists, tiles)
    keys = block_lists.for_keys(lists, tiles, 4, 4)
    operands = block_loop.visits(lists, np.arange(4), 0, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kept = int(lists.counts.sum())
    assert kept < 10 * math.prod(lists.counts.shape)
    fullest = int(lists.counts.sum(-1).max())
    for arrays, entries in ((lists, 4 * fullest), (operands[:4], kept)):
        assert sum(x.nbytes for x in jax.tree.leaves(arrays)) < 16 * entries
    lanes = 128 // block_size  # each of which has room for the longer list of the two
    for found in (queries, keys):
        assert found.entries.nbytes < 4 * kept * 1.3 * lanes
    assert peak < 200 * kept
