"""The GPU benchmark at its edges: tables and bars of given rows, budgets, failures, tiny sizes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu, gpu_checks, gpu_lab, gpu_table, gpu_torch, turns
from benchmarks.gpu_table import OURS, Row

TINY = gpu_lab.Shape("tiny", ((32, 2),), 32, 16, True, "float32")


def rows(slower=1.0):
    found = [
        Row("dense full H=128 T=16384", "cudnn", 3.4, 13.6, 640.0, 560.0),
        Row("dense full H=128 T=16384", OURS, 3.4, 13.8, 640.0, 558.0),
        Row("LongNet full H=128 T=32768", OURS, 1.0, 4.0, 639.0 / slower, 559.0 / slower),
        Row("LongNet full H=128 T=32768", f"{OURS}, checked", error=1e-3, ratio=1.5 * slower),
        Row("GigaPath H=48 T=10000", OURS, 0.4 * slower, 1.0 * slower),
        Row("GigaPath H=48 T=10000", "torchscale arithmetic", 4.0, 9.7),
        Row("LongNet full H=64 T=32768, both", f"{OURS}, peak", memory_mib=99 * slower),
        Row("LongNet full H=128 T=32768", f"{OURS}, first call", first_s=4.0 * slower),
        Row("sweep H=64 T=4096", OURS, 0.1, memory_mib=4.0),
        Row("sweep H=64 T=8192", OURS, 0.2, 0.6, memory_mib=8.0, both_memory_mib=24.0),
    ]
    found[6].bound_mib = 100.0
    return found


def test_bars_hold_or_are_missed():
    held = {name: holds for name, _, _, holds in gpu_table.verdicts(rows())}
    missed = {name: holds for name, _, _, holds in gpu_table.verdicts(rows(2.0))}
    assert len(held) == 9
    assert all(held.values()), held
    unlike = [name for name in held if missed[name]]
    # Dense rows are the same in both.
    assert unlike == [name for name in held if name.startswith("dense")], missed


def test_rows_are_written_as_they_come_and_failures_make_the_status(tmp_path, capsys, monkeypatch):
    left = []
    monkeypatch.setattr(gpu_lab.os, "_exit", left.append)
    lab = gpu_lab.Lab(tmp_path, 900.0, "a card")

    def fail():
        raise RuntimeError("no such thing")

    steps = [
        gpu_lab.Step(f"row {i}", (), lambda row=row: lab.add(row)) for i, row in enumerate(rows())
    ]
    lab.part("bars", [*steps[:1], gpu_lab.Step("broken", (), fail), *steps[1:]])
    lab.budget = 0.0
    lab.part("late", steps[:1])
    lab.end()
    assert left == [1]
    table = (tmp_path / "table.md").read_text()
    assert "failed: broken: RuntimeError: no such thing" in table
    assert "left out, the budget is spent: row 0" in table
    assert gpu_table.read_rows(tmp_path / "table.json") == rows()
    assert (tmp_path / "time.png").stat().st_size > 1000
    assert "holds" in table
    assert "FAILED broken" in capsys.readouterr().out


def test_programs_err_as_little_as_the_xla_path(tmp_path):
    lab = gpu_lab.Lab(tmp_path, 900.0, "a card")
    lab.part("check", [gpu.checked(lab, TINY, "xla"), gpu.measured(lab, TINY, "xla")])
    checked, timed = lab.rows
    assert lab.failed == []
    assert checked.ratio == 1.0
    assert 0 < (checked.error or 0) < 1e-5
    assert (timed.forward or 0) > 0
    assert (timed.both or 0) > 0
    array = 4 * 32 * gpu_lab.HEADS * 16 / 2**20
    assert (timed.memory_mib or 0) >= array
    assert (timed.both_memory_mib or 0) >= 3 * array


def test_a_peer_that_fails_leaves_the_others_their_rows(tmp_path):
    lab = gpu_lab.Lab(tmp_path, 900.0, "a card")
    lab.part("bars", [gpu.compete(lab, "group", [(TINY, "no_such_peer"), (TINY, "xla")])])
    (row,) = lab.rows
    assert row.who == "xla"
    assert 0 < (row.forward or 0) < (row.both or 0)
    (failed,) = lab.failed
    assert failed.startswith("tiny, no_such_peer: ModuleNotFoundError")


def test_a_peer_that_is_missing_has_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.peers, "installed", lambda who: False)
    lab = gpu_lab.Lab(tmp_path, 900.0, "a card")
    names = []
    for step in gpu.bars(lab):
        if not step.programs:
            names.append(step.name)
            step.run()
    assert len(names) == 10  # two peers in four calls, tokamax's tiles in two
    assert [f"{row.case}, {row.who}" for row in lab.rows] == names
    assert all("no package" in row.note and row.forward is None for row in lab.rows)


def test_the_sweep_has_both_directions(tmp_path):
    steps = gpu.sweep(gpu_lab.Lab(tmp_path, 900.0, "a card"))
    programs = dict.fromkeys(p for step in steps for p in step.programs)
    for work in ("forward", "both"):
        lengths = [p.shape.T for p in programs if p.who == OURS and p.work == work]
        assert lengths == [1 << power for power in range(12, 21)]
        dense = [p.shape.T for p in programs if p.who == "cudnn" and p.work == work]
        assert dense == [T for T in lengths if T <= gpu.DENSE_SWEEP]


def test_every_result_that_is_timed_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.peers, "installed", lambda who: True)
    lab = gpu_lab.Lab(tmp_path, 900.0, "a card")
    parts = (gpu.bars, gpu.errors, gpu.composed, gpu.giga, gpu.sweep)
    steps = [step for part in parts for step in part(lab)]
    # Steps that are timed take programs that fail.
    timed = {f"{p.shape.name}, {p.who}" for step in steps if not step.alone for p in step.programs}
    timed |= {f"{rival.shape.name}, {rival.who}" for step in steps for rival in step.rivals}
    assert {name.partition(", ")[2] for name in timed} >= {gpu_torch.DENSE, *gpu_torch.TORCHSCALE}
    checked = {step.name.rpartition(", ")[0] for step in steps if step.alone and step.programs}
    assert timed == checked


def broken(kind):
    """The attention of the XLA path, made wrong."""

    def make(who, shape):
        right = gpu.peers.xla(shape.lists, shape.causal, shape.dtype)
        if kind == "out":
            return lambda q, k, v: right(q, k, v) + 1.0
        factor = {"gradient": 1.1, "nan": float("nan")}[kind]
        return lambda q, k, v: right(q, k, v - factor * (v - jax.lax.stop_gradient(v)))

    return make


@pytest.mark.parametrize("kind", ["out", "gradient", "nan"])
def test_a_peer_with_wrong_results_fails(kind, tmp_path, monkeypatch):
    attention, wrong = gpu.peers.attention, broken(kind)
    monkeypatch.setattr(
        gpu.peers,
        "attention",
        lambda who, shape: (wrong if who == "wrong" else attention)(who, shape),
    )
    lab = gpu_lab.Lab(tmp_path, 900.0, "a card")
    who = f"{TINY.name}, wrong"
    lab.part("errors", [gpu.compared(lab, TINY, "wrong", "xla float64")])
    assert [name.partition(": ")[0] for name in lab.failed] == [who]
    lab.part("errors", [gpu.checked(lab, TINY, "wrong")])
    assert [name.partition(": ")[0] for name in lab.failed] == [who] * 2
    lab.part("errors", [gpu.compared(lab, TINY, "xla", "xla float64")])
    assert len(lab.failed) == 2
    assert [row.who for row in lab.rows] == ["wrong, compared", "wrong, checked", "xla, compared"]


BRANCHES = gpu_lab.Shape("branches", ((32, 1), (64, 2), (128, 4)), 128, 16, True, "float32")


def test_the_composed_path_keeps_its_weights_fixed(tmp_path, monkeypatch):
    """As torchscale does: out is the exact one, but not the gradients of q and k."""
    attend = jax.nn.dot_product_attention

    def on_cpu(*args, implementation, **options):
        return attend(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    lab = gpu_lab.Lab(tmp_path, 900.0, "a card")
    who = "composed cudnn"
    lab.part("composed", [gpu.compared(lab, BRANCHES, who, "float64 with fixed weights")])
    (row,) = lab.rows
    assert lab.failed == []
    assert 0 < (row.error or 0) < 1e-5
    found, exact = (
        gpu_lab.Program(BRANCHES, name, "all").compiled()(*BRANCHES.inputs())
        for name in (who, "xla float64")
    )
    out, dq, dk, dv = gpu_lab.deviation(found, exact)
    assert max(out, dv) < 1e-5
    assert min(dq, dk) > 0.05


def test_results_of_torch_are_compared(tmp_path, monkeypatch):
    """torch is not here: in its place, what it should give, and that with a wrong gradient."""
    peer = "torchscale in float64"
    right = gpu_lab.Program(BRANCHES, peer, "all").compiled()(*BRANCHES.inputs())
    lab = gpu_lab.Lab(tmp_path, 900.0, "a card")
    for factor in (1.0, 1.1):
        given = [*right[:3], factor * right[3]]
        monkeypatch.setattr(gpu_torch, "outcome", lambda make, arrays, given=given: given)
        lab.part("gigapath", gpu_torch.torchscale_compared(lab, BRANCHES))
    assert [row.error for row in lab.rows] == pytest.approx([0.0, 0.0, 0.1, 0.1])
    assert len(lab.failed) == len(gpu_torch.TORCHSCALE)
    for failed, who in zip(lab.failed, gpu_torch.TORCHSCALE, strict=True):
        assert failed.startswith(f"branches, {who}: differs from {peer}")


def test_a_wrong_row_is_noticed(tmp_path):
    shape = dataclasses.replace(BRANCHES, causal=False)
    lab = gpu_lab.Lab(tmp_path, 900.0, "a card")
    lab.part("sweep", [gpu.rows_compared(lab, shape, "xla")])
    (row,) = lab.rows
    assert lab.failed == []
    assert 0 < (row.error or 0) < 1e-5
    arrays = shape.inputs()
    out, dq, *_ = gpu_lab.Program(shape, "xla", "all").compiled()(*arrays)
    # Rows of many sampled ones: one wrong row shows, in out or in dq.
    count = 1024
    assert np.max(gpu_lab.rows_deviation(shape, arrays, out, dq, count)) < 1e-5
    for bad in ((out.at[0, 77].multiply(1.1), dq), (out, dq.at[0, 77].set(jnp.nan))):
        assert not np.max(gpu_lab.rows_deviation(shape, arrays, *bad, count)) < 0.05


def test_slow_functions_have_fewer_turns(monkeypatch):
    now, calls = [0.0], {"slow": 0, "fast": 0}

    def run(name, seconds):
        def call():
            calls[name] += 1
            now[0] += seconds

        return call, lambda _: None

    monkeypatch.setattr(turns.time, "perf_counter", lambda: now[0])
    found = turns.in_turns({"slow": run("slow", 2.0), "fast": run("fast", 0.5)})
    assert found == {"slow": 2.0, "fast": 0.5}
    assert calls == {"slow": 4, "fast": 7}  # two of each are not counted


def test_repeats_compare_bits():
    x = jax.numpy.asarray([1.0, -0.0], "bfloat16")
    assert gpu._same_bits((x,), (x,))
    assert not gpu._same_bits((x,), (abs(x),))


def test_bounds_count_every_array():
    shape = gpu_lab.Shape("a call", (), 1024, 64)
    elements = 1024 * gpu_lab.HEADS * 64
    limits = gpu_checks.bounds(shape)
    assert limits["forward"] == (8 * elements + 4 * 1024 * gpu_lab.HEADS) / 2**20 + 64
    assert limits["both"] == limits["forward"] + 20 * elements / 2**20


def test_shapes_travel_as_json():
    assert gpu_checks.shape_of(json.dumps(dataclasses.asdict(TINY))) == TINY
