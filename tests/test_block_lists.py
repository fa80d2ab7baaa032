"""Block lists: built from masks, transposed, turned into token masks, refused when wrong."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilax.block_lists import (
    BlockLists,
    admissible,
    check_lists,
    density,
    from_mask,
    token_mask,
    transpose,
    window,
)

MASK = np.random.default_rng(3).random((2, 3, 5, 7)) < 0.4
MASK[0, 0, 2] = False  # an empty row
MASK[1, 2, :, 4] = False  # a column that nobody visits


def brute_force(mask):
    """Rows of each column of one [rows, columns] mask."""
    return [np.flatnonzero(column).tolist() for column in mask.T]


def listed(flat, i, j):
    starts = np.asarray(flat.starts)[i, j]
    return [np.asarray(flat.rows)[i, j, a:b].tolist() for a, b in itertools.pairwise(starts)]


def test_mask_to_lists_and_back():
    lists = from_mask(MASK, 4)
    back = np.asarray(token_mask(lists, 20, 28))
    assert (back == MASK.repeat(4, -2).repeat(4, -1)).all()
    assert lists.counts[0, 0, 2] == 0
    assert lists.is_static
    assert not jax.jit(lambda x: jnp.array(x.is_static))(lists)
    assert (np.asarray(token_mask(lists, 18, 25)) == back[..., :18, :25]).all()


def test_window_cuts_rows_and_columns():
    mask = MASK.copy()
    mask[..., :3] = False  # so that one window loses nothing
    index = np.arange(mask.size).reshape(mask.shape) % 2
    bands = ((None, None), (3, 0))
    lists = from_mask(mask, 4, bands, index)
    for row, rows, column, columns in ((0, 5, 3, 4), (1, 3, 4, 2), (0, 5, 0, 7)):
        wanted = mask[..., row : row + rows, column : column + columns]
        tokens = [
            np.asarray(token_mask(x, 4 * rows, 4 * columns, 4 * row, 4 * column))
            for x in (
                window(lists, row, rows, column, columns),
                jax.jit(lambda x, at=(row, rows, column, columns): window(x, *at))(lists),
                from_mask(wanted, 4, bands, index[..., row : row + rows, column:][..., :columns]),
            )
        ]
        assert (tokens[0] == tokens[2]).all()
        assert (tokens[1] == tokens[2]).all()


def test_transpose_static_and_traced():
    lists = from_mask(MASK, 4)
    static = transpose(lists, 7)
    traced = jax.jit(lambda x: transpose(x, 7))(lists)
    assert isinstance(static.rows, np.ndarray)
    assert static.rows.shape[-1] == MASK.sum((-2, -1)).max()
    assert traced.rows.shape[-1] == 5 * lists.capacity
    for i, j in np.ndindex(2, 3):
        assert listed(static, i, j) == listed(traced, i, j) == brute_force(MASK[i, j])


def test_bands_are_token_masks_and_are_transposed_along():
    bands = ((None, None), (3, None), (None, 0))
    index = np.where(np.tri(4, dtype=bool), 1, 2) * ~np.eye(4, dtype=bool)
    lists = from_mask(np.ones((4, 4), bool), 4, bands, index)
    q, k = 5 + np.arange(15)[:, None], 2 + np.arange(14)
    per_token = index.repeat(4, 0).repeat(4, 1)[:15, :14]
    wanted = np.select([per_token == 1, per_token == 2], [q - k <= 3, q - k >= 0], True)
    assert (np.asarray(token_mask(lists, 15, 14, 5, 2))[0, 0] == wanted).all()
    assert transpose(lists, 4).band_index[0, 0].tolist() == index.T.reshape(-1).tolist()


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
    check_lists(good, 3, 3, (1, 2), (1, 4))

    def wrong(match, rows=3, number=3, batch=None, heads=None, **changes):
        with pytest.raises(ValueError, match=match):
            check_lists(dataclasses.replace(good, **changes), rows, number, batch, heads)

    column = good.columns
    wrong(r"blocks.columns: wanted columns from 0 to 1, got 2", number=2)
    wrong(
        r"blocks.columns: wanted columns from 0 to 2, got -5",
        columns=np.where(column == 2, -5, column),
    )
    wrong("ascending order", columns=column[..., ::-1].copy())
    wrong("ascending order", columns=np.zeros_like(column))
    wrong("4 rows", rows=4)
    wrong("int32", columns=column.astype(np.int64))
    wrong(r"blocks.counts: wanted counts from 0 to the capacity 3", counts=good.counts + 1)
    wrong("axis 0 of size 2", batch=(2,))
    wrong("axis 1 of size 4 or 8", heads=(4, 8))
    wrong("block_size", block_size=0)
    wrong("the whole block, first", bands=((4, None),))
    wrong("pairs", bands=((None, None), 4))
    wrong("band numbers from 0 to 0", band_index=np.ones_like(column))
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
