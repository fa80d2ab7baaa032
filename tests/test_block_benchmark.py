"""The benchmark of block-sparse kernels: its float64 results, its tables, bars and plot."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks import block_cases, block_errors, block_report
from benchmarks.block_peers import DENSE, FLEX, OURS, XLA
from benchmarks.block_timing import Row


def test_exact_head_is_what_the_xla_path_rounds():
    rows = []
    for c in block_errors.cases(T=512, heads=1)[1:]:
        compiled = {XLA: jax.jit(block_errors.functions(c)[XLA])}
        block_errors.measure(c, compiled, rows.append)
        assert 1e-4 < rows[-1].error < 1e-2
        assert rows[-1].note.count("e-0") == len(block_errors.NAMES)


def test_table_bars_and_plot(tmp_path):
    rows = []
    (c,) = block_cases.long()
    bounds = dict(zip(("forward_bound", "both_bound"), c.bounds(), strict=True))
    for name, kept, who, ms in (
        ("random 10%", 0.1, OURS, 1.5),
        ("random 10%", 0.1, FLEX, 2.4),
        ("random 10%", 0.1, DENSE, 13.5),
        ("random 1%", 0.01, OURS, 0.2),
    ):
        rows.append(Row(name, who, 128, kept, ms, 4 * ms, 500.0, 400.0, 1e-3))
    rows[0] = dataclasses.replace(rows[0], forward_memory=600.0, both_memory=1e4, **bounds)
    rows.append(Row("random 5%", OURS, 64, 0.05, note="ValueError: no"))
    report = {"head": "a card", "checks": [], "failed": ["Missing: plot: no time"]}
    text = block_report.markdown(report | {"rows": [dataclasses.asdict(r) for r in rows]})
    assert "| random 10% H=128 forward: over FlexAttention | 1.45 | 1.60 |" in text
    assert "| random 10% H=128 both: over dense | 8 | 9.00 |" in text
    assert f"both: peak MiB (at most) | {bounds['both_bound']:.0f} | 10000 |" in text
    assert "| random 5% | 64 | dilax |  |  |  |  |  | ValueError: no |" in text
    assert text.endswith("Missing: plot: no time\n")
    pytest.importorskip("matplotlib")
    block_report.plot([dataclasses.asdict(r) for r in rows], tmp_path / "blocks.png")
    from matplotlib.image import imread

    image = imread(tmp_path / "blocks.png")
    # Lines in matplotlib's first color are there: the measured points of dilax.
    blue = np.abs(image[..., :3] - [0x1F / 255, 0x77 / 255, 0xB4 / 255]).max(-1) < 0.02
    assert blue.sum() > 300
