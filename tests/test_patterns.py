"""Patterns: known counts, the meaning of a ratio, windows exact to the token, composition."""

import functools
import subprocess
import sys
import zlib

import jax
import numpy as np
import pytest

import dilax
from dilax.block_lists import admissible, density, partial_blocks, token_mask
from dilax.pattern_config import PRESETS, as_pattern
from dilax.patterns import (
    Causal,
    DilatedSparse,
    GlobalLocal,
    Hierarchical,
    LocalWindow,
    PerHead,
    Union,
)

pytestmark = pytest.mark.newest  # NumPy alone

RATIOS = {
    "local": lambda ratio: LocalWindow(ratio, block_size=4),
    "dilated": lambda ratio: DilatedSparse(ratio, dilation_rates=(3, 2), block_size=4),
    "global": lambda ratio: GlobalLocal(ratio, random_blocks=2, seed=5, block_size=4),
    "hierarchical": lambda ratio: Hierarchical(ratio, block_size=4),
}


def block_mask(lists, columns):
    """bool [n, rows, columns] of static lists."""
    mask = np.zeros((*lists.counts.shape[1:], columns), bool)
    kept = lists.kept()
    mask[kept.head, kept.row, kept.column] = True
    return mask


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", RATIOS)
def test_a_ratio_is_the_share_of_admissible_blocks(name, is_causal):
    for T, S, *starts in ((103, 103, 0, 0), (29, 103, 60, 3), (103, 50, 0, 0), (3, 3, 0, 0)):
        limit = admissible(T, S, 4, is_causal, *starts)
        kept = {}
        for ratio in (0.01, 0.1, 0.35, 1):
            lists = RATIOS[name](ratio).lists(
                T, S, is_causal=is_causal, q_start=starts[0], k_start=starts[1]
            )
            wanted = np.clip(np.floor(ratio * limit + 0.5), np.minimum(limit, 1), limit)
            assert (lists.counts[0, 0] == wanted).all()
            assert lists.bands == ((None, None),)
            mask = kept[ratio] = block_mask(lists, -(-S // 4))[0]
            assert not (mask & (np.arange(mask.shape[1]) >= limit[:, None])).any()
            if T == S:
                assert mask.diagonal().all()
        if name in ("local", "dilated", "hierarchical"):  # nested
            assert (kept[0.1] <= kept[0.35]).all()


def test_sliding_window_full_and_partial_blocks():
    for window, full, partly in ((1024, 420, 120), (1000, 363, 177)):
        lists = LocalWindow(window_size=window).lists(8192, is_causal=True)
        cut = partial_blocks(lists, 8192, 8192, is_causal=True)
        assert (int(lists.counts.sum()) - int(cut.sum()), int(cut.sum())) == (full, partly)


def test_bigbird_counts():
    for n, total in ((64, 622), (16, 142)):
        pattern = GlobalLocal(global_tokens=(64, 64), window_blocks=3, random_blocks=3,
                              block_size=64)  # fmt: skip
        counts = pattern.lists(64 * n).counts[0, 0].tolist()
        assert counts == [n, 7, *[8] * (n - 4), 7, n]
        assert sum(counts) == total


@pytest.mark.parametrize(
    ("near", "n", "total"), [(2, 64, 649), (2, 256, 3595), (4, 256, 6424), (4, 1024, 33820)]
)
def test_hierarchical_counts(near, n, total):
    lists = Hierarchical(near_blocks=near, block_size=64).lists(64 * n)
    assert int(lists.counts.sum()) == total


def test_hierarchical_levels_end_the_bands():
    mask = block_mask(Hierarchical(near_blocks=2, levels=1, block_size=4).lists(64), 16)[0]
    i, j = np.mgrid[:16, :16]
    distance = abs(i - j)
    assert (mask == ((distance < 2) | ((distance < 4) & (j % 2 == 0)))).all()


@pytest.mark.parametrize(
    ("window", "is_causal", "left", "right"),
    [(7, False, 3, 3), (8, False, 4, 4), (7, True, 6, 0), ((5, 2), False, 5, 2),
     ((5, 2), True, 5, 0),
     ((None, 1), False, 99, 1), ((0, 0), False, 0, 0), (1, True, 0, 0)],
)  # fmt: skip
def test_windows_are_exact_to_the_token(window, is_causal, left, right):
    for T, S, q_start, k_start in ((41, 41, 0, 0), (19, 41, 13, 2)):
        pattern = LocalWindow(window_size=window, block_size=4)
        lists = pattern.lists(T, S, is_causal=is_causal, q_start=q_start, k_start=k_start)
        distance = (q_start + np.arange(T))[:, None] - (k_start + np.arange(S))
        mask = np.asarray(token_mask(lists, T, S, q_start, k_start))[0, 0]
        if is_causal:
            mask = mask & (distance >= 0)
        assert (mask == ((distance <= left) & (distance >= -right))).all()


def test_global_tokens_are_rounded_up_to_blocks():
    mask = block_mask(GlobalLocal(global_tokens=5, window_blocks=1, block_size=4).lists(40), 10)[0]
    assert mask[:2].all()
    assert mask[:, :2].all()
    assert int(mask.sum()) == 2 * 10 + 2 * 8 + 8
    causal = GlobalLocal(global_tokens=5, window_blocks=1, block_size=4).lists(40, is_causal=True)
    assert causal.counts[0, 0].tolist() == [1, 2, *[3] * 8]


@pytest.mark.parametrize("is_causal", [False, True])
def test_later_queries_alone_keep_what_they_keep_among_all(is_causal):
    """Rows go by their positions, also those of global tokens and of random blocks."""
    patterns = [make(0.4) for make in RATIOS.values()]
    more = GlobalLocal(global_tokens=(5, 3), window_size=6, random_blocks=1, seed=2, block_size=4)
    for pattern in (*patterns, more, GlobalLocal(global_tokens=9, window_blocks=1, block_size=4)):
        whole = block_mask(pattern.lists(41, is_causal=is_causal), 11)[0]
        for start in (4, 16, 40):
            part = pattern.lists(41 - start, 41, is_causal=is_causal, q_start=start)
            assert (block_mask(part, 11)[0] == whole[start // 4 :]).all(), (pattern, start)
    beyond = GlobalLocal(global_tokens=4, window_blocks=1, block_size=4)
    for start in (18, 20):
        assert (beyond.lists(8, 20, is_causal=is_causal, q_start=start).counts == 2).all()


def test_dilated_rates_in_turn():
    pattern = DilatedSparse(window_size=7 * 4, dilation_rates=(2, 5), block_size=4)
    assert np.flatnonzero(block_mask(pattern.lists(160), 40)[0, 20]).tolist() == [
        15, 16, 18, 20, 22, 24, 25,
    ]  # fmt: skip
    fewer = DilatedSparse(window_size=5 * 4, dilation_rates=(2, 5), block_size=4)
    assert np.flatnonzero(block_mask(fewer.lists(160), 40)[0, 20]).tolist() == [15, 18, 20, 22, 25]
    near = DilatedSparse(0.3, dilation_rates=(1,), block_size=4)
    assert near.lists(160).rows() == LocalWindow(0.3, block_size=4).lists(160).rows()


def test_windows_of_whole_blocks():
    for is_causal, kept in ((False, [8, 9, 10, 11]), (True, [7, 8, 9, 10])):
        lists = LocalWindow(window_blocks=4, block_size=4).lists(80, is_causal=is_causal)
        assert np.flatnonzero(block_mask(lists, 20)[0, 10]).tolist() == kept


def test_a_quarter_of_the_budget_is_global():
    kept = block_mask(GlobalLocal(0.4, block_size=4).lists(80), 20)[0, 14]
    assert np.flatnonzero(kept).tolist() == [0, 1, 11, 12, 13, 14, 15, 16]
    drawn = block_mask(GlobalLocal(0.4, random_blocks=3, seed=1, block_size=4).lists(80), 20)[0, 14]
    assert drawn.sum() == 8
    assert drawn[[0, 1, 13, 14, 15]].all()
    assert (drawn != kept).any()


def tokens(pattern, T=48, is_causal=False):
    return np.asarray(token_mask(pattern.lists(T, is_causal=is_causal), T, T))[0, 0]


def test_union_and_intersection_are_those_of_the_tokens():
    a = LocalWindow(window_size=(9, 3), block_size=4)
    b = LocalWindow(window_size=(2, 14), block_size=4)
    c = GlobalLocal(global_tokens=4, window_size=11, random_blocks=1, block_size=4)
    for x, y in ((a, b), (b, c), (a, c)):
        assert (tokens(x | y) == (tokens(x) | tokens(y))).all()
        assert (tokens(x & y) == (tokens(x) & tokens(y))).all()
    assert hash(a | b) == hash(a | b)


def test_causal_masks_whatever_the_call_says():
    for name, make in RATIOS.items():
        pattern = make(0.4)
        seen = tokens(Causal(pattern))
        wanted = tokens(pattern, is_causal=True) & np.tri(48, dtype=bool)
        assert (seen == wanted).all(), name


def test_patterns_per_head():
    a, b = LocalWindow(0.2, block_size=4), DilatedSparse(0.3, dilation_rates=(3,), block_size=4)
    pattern = PerHead((a, b))
    for heads, kv_heads, n in ((6, 6, 6), (8, 4, 4), (6, 3, 6), (2, 1, 2)):
        mask = block_mask(pattern.lists(48, None, heads, kv_heads), 12)
        assert mask.shape[0] == n
        for i in range(n):
            assert (mask[i] == block_mask((a, b)[i * 2 // n].lists(48), 12)[0]).all()
    c = Hierarchical(near_blocks=1, block_size=4)
    mask = block_mask(PerHead((pattern, c)).lists(48, None, 4), 12)
    for found, wanted in zip(mask, (a, b, c, c), strict=True):
        assert (found == block_mask(wanted.lists(48), 12)[0]).all()
    assert pattern.density(48) == pytest.approx((a.density(48) + b.density(48)) / 2)
    both = (pattern | LocalWindow(1.0, block_size=4)).lists(48, None, 4)
    assert both.counts.min() == 12
    with pytest.raises(ValueError, match="2 patterns to divide the number of heads, got 3"):
        pattern.lists(48, None, 3)


def test_same_seed_same_pattern_in_every_process():
    program = """
import zlib
from dilax.patterns import GlobalLocal
pattern = GlobalLocal(global_tokens=1, window_blocks=1, random_blocks=4, seed=7, block_size=64)
print(zlib.crc32(pattern.lists(4096).columns.tobytes()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    here = [
        GlobalLocal(global_tokens=1, window_blocks=1, random_blocks=4, seed=seed, block_size=64)
        .lists(4096)
        .columns.tobytes()
        for seed in (7, 8)
    ]
    assert zlib.crc32(here[0]) == int(done.stdout)
    assert here[0] != here[1]


def test_config_means_the_patterns():
    config = functools.partial(dilax.SparsePatternConfig, block_size=64)
    for made, wanted in (
        (config(), LocalWindow(0.1, block_size=64)),
        (config(window_size=[128, 0]), LocalWindow(None, (128, 0), block_size=64)),
        (config("dilated_sparse", 0.2), DilatedSparse(0.2, block_size=64)),
        (
            config("dilated_sparse", window_size=512, dilation_rates=[2]),
            DilatedSparse(None, 512, (2,), 64),
        ),
        (config("hierarchical", window_size=200), Hierarchical(None, 4, block_size=64)),
        (
            config("global_local", global_tokens=65, random_blocks=2, seed=3),
            GlobalLocal(None, 65, 256, None, 2, 3, 64),
        ),
        (config("global_local", 0.2, random_blocks=1), GlobalLocal(0.2, random_blocks=1,
                                                                   block_size=64)),
    ):  # fmt: skip
        assert made.pattern() == wanted
        assert hash(made) == hash(dilax.SparsePatternConfig(**vars(made)))
    assert as_pattern("pattern", "hierarchical") is PRESETS["hierarchical"]
    assert as_pattern("pattern", "local_window") == LocalWindow(0.1)


def test_fields_may_be_numpy():
    """Their numbers are kept as Python's, so that a config has a hash."""
    made = dilax.SparsePatternConfig("local_window", block_size=np.array(64),
                                     window_size=np.array([3, 5]))  # fmt: skip
    assert made == dilax.SparsePatternConfig("local_window", None, 64, (3, 5))
    made = dilax.SparsePatternConfig(
        "dilated_sparse", np.float32(0.5), dilation_rates=np.arange(1, 3)
    )
    assert hash(made.pattern()) == hash(DilatedSparse(0.5, dilation_rates=(1, 2)))
    assert Hierarchical(near_blocks=np.int64(1), levels=np.int64(64)) == Hierarchical(None, 1, 64)
    for name in ("window_size", "dilation_rates", "random_blocks", "seed", "global_tokens"):
        for x in (np.array([1, 2, 3]), np.array([]), np.array(["a"]), np.array([[1, 2]])):
            with pytest.raises(ValueError, match=f"^{name}: wanted "):
                dilax.SparsePatternConfig("hierarchical", **{name: x})
    with pytest.raises(ValueError, match="window_size: wanted a value that is known when"):
        jax.jit(lambda x: dilax.SparsePatternConfig(window_size=x))(1)


def test_presets_have_the_density_they_are_shown_with():
    found = {
        name: [round(PRESETS[name].density(T, is_causal=True), 3) for T in (4096, 16384)]
        for name in PRESETS
    }
    assert found["local"] == [0.149, 0.039]
    assert found["ultra_sparse"] == [0.061, 0.016]
    assert found["hilbert_standard"] == pytest.approx([0.1, 0.1], abs=0.01)
    for name, (short, long) in found.items():
        assert 0 < long <= short < 0.5, name
    text = PRESETS["global_local"].describe(4096)
    lists = PRESETS["global_local"].lists(4096)
    assert f"density {density(lists, 4096, 4096):.4f} of" in text
    assert f"kept {int(lists.counts.sum())} blocks, 4 to 64 per row" in text


@pytest.mark.parametrize(
    ("match", "fields"),
    [
        ("sparsity_ratio: wanted .* in \\(0, 1\\], got 0", {"sparsity_ratio": 0}),
        ("sparsity_ratio: wanted .*, got 1.5", {"sparsity_ratio": 1.5}),
        ("sparsity_ratio: wanted .*, got nan", {"sparsity_ratio": float("nan")}),
        ("sparsity_ratio: wanted .*, got True", {"sparsity_ratio": True}),
        ("window_size: wanted None with a sparsity_ratio", {"sparsity_ratio": 0.1,
                                                            "window_size": 256}),
        ("global_tokens: wanted None with a spars", {"pattern_type": "global_local",
                                                     "sparsity_ratio": 0.1, "global_tokens": 1}),
        ("pattern_type: wanted 'local_window' or .*, got 'learned'", {"pattern_type": "learned"}),
        ("block_size: wanted 64 or a multiple of 128, got 192", {"block_size": 192}),
        ("block_size: wanted .*, got 0", {"block_size": 0}),
        ("window_size: wanted a positive int", {"window_size": 0}),
        ("window_size: wanted an int that is not", {"window_size": (-1, 3)}),
        ("window_size: wanted an int below", {"window_size": 2**70}),
        ("window_size: wanted an int or a pair", {"window_size": (1, 2, 3)}),
        ("global_tokens: wanted None with pattern_type", {"global_tokens": 64}),
        ("dilation_rates: wanted None with pattern_type", {"dilation_rates": (1, 2)}),
        ("random_blocks: wanted 0 with pattern_type", {"random_blocks": 1}),
        ("window_size: wanted a positive int", {"pattern_type": "hierarchical", "window_size": 0}),
        ("window_size: wanted None with a sp", {"pattern_type": "hierarchical", "window_size": 64,
                                                "sparsity_ratio": 0.2}),
        ("seed: wanted 0 without random_blocks", {"pattern_type": "global_local", "seed": 3}),
        ("dilation_rates: wanted a positive int", {"pattern_type": "dilated_sparse",
                                                  "dilation_rates": (0, 2)}),
    ],
)  # fmt: skip
def test_wrong_configs_are_refused(match, fields):
    with pytest.raises(ValueError, match=match):
        dilax.SparsePatternConfig(**fields)


def test_wrong_patterns_are_refused():
    for T in (0, -3, 1.5):
        with pytest.raises(ValueError, match=r"^T: wanted"):
            LocalWindow(0.5).lists(T)
    for name, x in (("num_heads", 0), ("num_kv_heads", -2), ("q_start", -5), ("k_start", 0.5),
                    ("is_causal", 1)):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: wanted"):
            LocalWindow(0.5).lists(8, **{name: x})
    with pytest.raises(ValueError, match="dilation_rates: wanted a sequence"):
        DilatedSparse(0.5, dilation_rates=3)
    far = Hierarchical(near_blocks=1, levels=100, block_size=4)
    assert (
        far.lists(64).counts == Hierarchical(near_blocks=1, block_size=4).lists(64).counts
    ).all()
    with pytest.raises(ValueError, match="a ratio, or window_size or window_blocks, got None"):
        LocalWindow()
    with pytest.raises(ValueError, match="window_blocks: wanted None with a window_size"):
        LocalWindow(window_size=4, window_blocks=2)
    with pytest.raises(ValueError, match="patterns: wanted one block_size"):
        Union((LocalWindow(0.1, block_size=64), LocalWindow(0.1, block_size=128)))
    with pytest.raises(ValueError, match=r"pattern: wanted a SparsePatternConfig.*got 'sparse'"):
        as_pattern("pattern", "sparse")
