"""The pictures show what the definition says."""

import io

import numpy as np
import pytest

from dilax import plotting
from dilax.block_lists import partial_blocks
from dilax.patterns import Hierarchical, LocalWindow, PerHead


def defined(segment_lengths, dilation_rates, length, num_heads, combine, head_offset, is_causal):
    """Who sees whom, one pair at a time, from the definition."""
    branches = list(zip(segment_lengths, dilation_rates, strict=True))
    seen = np.zeros((len(branches), num_heads, length, length), bool)
    groups = np.array_split(np.arange(num_heads), len(branches))
    for i, (w, r) in enumerate(branches):
        for n in range(num_heads):
            if combine == "heads":
                if n not in groups[i]:
                    continue
                offset = i % r
            else:
                offset = n % r if head_offset == "interleaved" else n // -(-num_heads // r)
            for p in range(length):
                for s in range(length):
                    kept = p % w % r == offset and s % w % r == offset
                    seen[i, n, p, s] = kept and p // w == s // w and (s <= p or not is_causal)
    return seen


@pytest.mark.parametrize(
    ("branches", "options", "length", "num_heads"),
    [
        (((4, 8, 16), (1, 2, 4)), {}, 19, 3),
        (((4, 8), (1, 3)), {"is_causal": True}, 8, 4),
        (((5, 7), (2, 4)), {"head_offset": "blocked"}, 19, 3),
        (((4, 8), (1, 2)), {"combine": "heads", "is_causal": True}, 19, 3),
        (((4, 8), (2, 2)), {"combine": "heads"}, 8, 4),
    ],
)
def test_pattern_is_the_definition(branches, options, length, num_heads):
    everything = {"combine": "lse", "head_offset": "interleaved", "is_causal": False} | options
    seen = plotting.pattern(*branches, length=length, num_heads=num_heads, **options)
    np.testing.assert_array_equal(seen, defined(*branches, length, num_heads, **everything))


def test_more_tokens_than_one_head_dim_holds():
    seen = plotting.pattern([64, 300], [1, 5], length=301, num_heads=1)
    expected = defined([64, 300], [1, 5], 301, 1, "lse", "interleaved", False)
    np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize(("combine", "num_heads"), [("lse", 1), ("lse", 7), ("heads", 3)])
def test_one_panel_per_head_and_one_for_all(combine, num_heads):
    figure = plotting.draw_pattern([4, 8], [1, 2], length=9, num_heads=num_heads, combine=combine)
    titles = [panel.get_title() for panel in figure.axes]
    assert titles[:-1] == [f"head {n}" for n in range(num_heads)]
    assert titles[-1].startswith("all heads")
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    shared = ["2 branches"] if combine == "lse" else []
    assert legend == ["segment 4, rate 1", "segment 8, rate 2", *shared]
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")


def test_a_cell_of_a_long_pattern_is_seen_where_any_pair_is():
    options = {"combine": "lse", "head_offset": "interleaved", "is_causal": True}
    branches, length, cell = ((16, 128, 999), (1, 8, 20)), 1000, 7
    exact = plotting.pattern(*branches, length=length, num_heads=3, is_causal=True)
    spec = plotting.DilatedSpec(*branches)
    seen, awake = plotting._cells(spec, length, 3, cell, options)
    padded = np.pad(exact, ((0, 0), (0, 0), (0, 1), (0, 1)))
    pooled = padded.reshape(3, 3, 143, cell, 143, cell).any(axis=(3, 5))
    np.testing.assert_array_equal(seen, pooled)
    np.testing.assert_array_equal(awake, exact.any(axis=(0, 3)))


def test_more_heads_than_panels_are_counted_and_said():
    figure = plotting.draw_pattern([8, 300], [1, 20], length=300, num_heads=40)
    titles = [panel.get_title() for panel in figure.axes]
    assert titles[:-1] == [f"head {n}" for n in range(16)]
    said = figure.get_suptitle()
    assert "16 of 40 heads" in said
    assert "any of 2 queries sees any of 2 keys" in said


@pytest.mark.parametrize("branches", [1, 5, 7, 20])
def test_all_colours_differ(branches):
    assert len(set(plotting._colours(branches))) == 2 * branches - 1


def test_queries_that_see_nothing_are_counted():
    figure = plotting.draw_pattern([8], [4], length=16, num_heads=3)
    assert "4 queries see nothing" in figure.axes[-1].get_title()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length: wanted"),
        ({"length": 65537}, "length: wanted"),
        ({"num_heads": 0}, "num_heads: wanted"),
        ({"combine": "heads", "num_heads": 1}, "combine: wanted"),
        ({"head_offset": "other"}, "head_offset: wanted"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plotting.draw_pattern([4, 8], [1, 2], **{"length": 8, "num_heads": 2, **options})


def test_training_curves_and_levels():
    curves = {"training": (range(1, 4), (8.0, 5.0, 4.0)), "held out": ((3,), (4.5,))}
    figure = plotting.draw_training(curves, {"byte bigrams": 3.5})
    (panel,) = figure.axes
    assert len(panel.get_lines()) == 3
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["training", "held out", "byte bigrams: 3.500"]


def test_blocks_are_those_of_the_lists():
    made = PerHead((LocalWindow(window_size=150, block_size=64), Hierarchical(0.3, block_size=64)))
    figure = plotting.draw_blocks(made, length=1000, num_heads=4, is_causal=True)
    lists = made.lists(1000, num_heads=4, is_causal=True)
    cut = np.zeros((4, 16, 16), bool)
    kept = lists.kept()
    cut[kept.head, kept.row, kept.column] = partial_blocks(lists, 1000, 1000, is_causal=True)
    assert len(figure.axes) == 2
    for panel, n in zip(figure.axes, (0, 2), strict=True):
        cells = np.asarray(panel.images[0].get_array())
        assert (cells[np.triu_indices(16, 1)] == 1).all()
        for i in range(16):
            shown = np.flatnonzero(cells[i] >= 2)
            assert shown.tolist() == lists.rows()[0][n][i]
            assert (cells[i, shown] == 2 + cut[n, i, shown]).all()
    assert f"{made.density(1000, is_causal=True):.1%} kept" in figure.get_suptitle()
    with pytest.raises(ValueError, match="pattern: wanted 2 patterns to divide"):
        plotting.draw_blocks(made, length=1000, num_heads=3)
