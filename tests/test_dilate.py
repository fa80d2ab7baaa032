"""Where the rows of a branch lie: dilate and scatter undo each other, pieces cover everything."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dilax.dilate import Rows, dilate, pieces, scatter
from dilax.spec import Branch


@st.composite
def filled_rows(draw):
    """Rows of an array, the number of segments, and the length of the array."""
    segments = draw(st.integers(1, 3))
    index = draw(st.integers(0, 9)) if segments == 1 else 0
    rows = Rows(draw(st.integers(0, 4)), index, draw(st.integers(1, 9)), draw(st.integers(1, 6)))
    return rows, segments, rows.first + segments * rows.length + draw(st.integers(0, 3))


@settings(max_examples=25)
@given(filled_rows(), st.integers(1, 4), st.data())
def test_scatter_undoes_dilate(drawn, heads, data):
    rows, segments, T = drawn
    offsets = tuple(data.draw(st.integers(0, rows.rate - 1)) for _ in range(heads))
    x = np.arange(1, 2 * T * heads * 2 + 1, dtype=np.float32).reshape(2, T, heads, 2)

    y = dilate(jnp.asarray(x), rows, segments, tuple(enumerate(offsets)))
    assert y.shape == (2, segments, heads, rows.steps, 2)
    for n, offset in enumerate(offsets):
        assert (np.asarray(y[:, :, n] != 0).all(-1) == rows.real(offset)).all()

    back = np.asarray(scatter(y, rows, offsets, -5))
    index = (rows.index + np.arange(segments * rows.length) % rows.length) % rows.rate
    kept = (index[:, None] == np.array(offsets))[None, ..., None]
    taken = x[:, rows.first : rows.first + segments * rows.length]
    assert (back == np.where(kept, taken, -5)).all()
    again = dilate(jnp.asarray(back), Rows(0, *rows[1:]), segments, tuple(enumerate(offsets)))
    assert (np.asarray(again) == np.asarray(y)).all()


@settings(max_examples=300)
@given(
    W=st.integers(1, 12),
    R=st.integers(1, 15),
    T=st.integers(1, 30),
    S=st.integers(1, 30),
    q_start=st.integers(0, 30),
    k_start=st.integers(0, 30),
    equal=st.booleans(),
)
def test_pieces_cover_every_pair_of_a_segment_once(W, R, T, S, q_start, k_start, equal):
    if equal:
        S, k_start = T, q_start
    count = np.zeros((T, S), int)
    for piece in pieces(Branch(W, R, 0, (0,)), T, S, q_start, k_start):
        queries, keys = piece.queries, piece.keys
        assert (queries.rate, keys.rate) == (R, R)
        for m in range(piece.segments):
            where = [
                np.arange(rows.length) + rows.first + m * rows.length for rows in (queries, keys)
            ]
            for start, rows, place in zip((q_start, k_start), (queries, keys), where, strict=True):
                assert ((start + place) // W == piece.first_segment + m).all()
                assert ((start + place) % W == rows.index + np.arange(rows.length)).all()
            assert 0 <= where[0][0] <= where[0][-1] < T
            assert 0 <= where[1][0] <= where[1][-1] < S
            count[np.ix_(*where)] += 1
    segment = [(start + np.arange(n)) // W for start, n in ((q_start, T), (k_start, S))]
    assert (count == (segment[0][:, None] == segment[1])).all()


@given(W=st.integers(1, 12), R=st.integers(1, 15), T=st.integers(1, 100))
def test_self_attention_has_at_most_two_pieces(W, R, T):
    """Whole segments together and the short last one: what compiles must not grow with T."""
    found = list(pieces(Branch(W, R, 0, (0,)), T, T, 0, 0))
    assert len(found) == (T >= W) + (T % W > 0)
    assert all(piece.queries == piece.keys for piece in found)


@given(filled_rows(), st.data())
def test_real_rows_are_those_that_exist(drawn, data):
    rows, _, _ = drawn
    offset = data.draw(st.integers(0, rows.rate - 1))
    indices = range(rows.index, rows.index + rows.length)
    base = rows.index // rows.rate * rows.rate
    wanted = [base + i * rows.rate + offset in indices for i in range(rows.steps)]
    assert rows.real(offset).tolist() == wanted
    assert sum(wanted) == sum(i % rows.rate == offset for i in indices)
