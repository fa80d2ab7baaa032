"""The search for tile sizes takes the fastest that is right, on a clock and a machine made up."""

import math
import os

import jax.numpy as jnp
import pytest

from dilax import tune
from dilax._types import UnsupportedError
from dilax.cli import main
from pallas_kernels import config

FIRST, SECOND, WRONG, SPILLING, BROKEN, NAN = config.candidates("forward", 128)[:6]
SECONDS = {FIRST: 3e-3, SECOND: 2e-3, WRONG: 1e-3, SPILLING: 1e-3, NAN: 1e-3}
ERRORS = {FIRST: 1.0, SECOND: 2.0, WRONG: 2.1, SPILLING: 1.0, NAN: math.nan}


def trials(most=64):
    timed = []

    def compile(kernel, tiles):
        assert kernel == "forward"
        if tiles == BROKEN:
            raise ValueError("exceeds available\nshared memory")
        return tiles

    def seconds(tiles):
        timed.append(tiles)
        return SECONDS[tiles]

    jobs = tune.Jobs(compile, lambda t: 80 if t == SPILLING else 0, ERRORS.get, seconds)
    order = [FIRST, WRONG, SPILLING, BROKEN, NAN, SECOND]
    return list(tune.search("forward", order, FIRST, jobs, most)), timed


def test_the_fastest_that_is_right_is_found():
    found, timed = trials()
    assert timed == [FIRST, SECOND]  # nothing else is worth a clock
    assert tune.best(found).tiles == SECOND
    reasons = {trial.tiles: trial.reason for trial in found}
    assert reasons[FIRST] is None
    assert reasons[WRONG] == "wrong: errs 2.1 times as much as the XLA path"
    assert reasons[SPILLING] == "spills 80 bytes"
    assert reasons[BROKEN] == "ValueError: exceeds available shared memory"
    assert reasons[NAN] == "wrong: errs nan times as much as the XLA path"
    assert tune.verdict("forward", found).endswith("1.500 times as fast as what runs today")
    lines = [trial.line() for trial in found]
    assert "2.000" in lines[-1]
    assert "runs today" in lines[0]
    assert len(found[0].HEADER) <= len(lines[0])


def test_what_runs_today_may_spill():
    jobs = tune.Jobs(lambda kernel, tiles: tiles, {1: 70, 2: 70, 3: 71}.get, lambda t: 1.0, float)
    reasons = [trial.reason for trial in tune.search("fused", [1, 2, 3], 1, jobs, 64)]
    assert reasons == [None, None, "spills 71 bytes"]


def test_more_spills_may_be_allowed():
    found, _ = trials(80)
    assert tune.best(found).tiles == SPILLING


def test_what_runs_today_may_be_the_fastest():
    jobs = tune.Jobs(lambda kernel, tiles: tiles, lambda t: None, lambda t: 1.0, SECONDS.get)
    found = list(tune.search("keys", [FIRST, SECOND], SECOND, jobs, 0))
    assert tune.verdict("keys", found) == "keys: what runs today is the fastest"
    assert tune.verdict("fused", found) == "fused: nothing to choose from"


@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_candidates_hold_what_runs_today(kernel):
    for head_dim in (64, 128):
        today = {
            "forward": config.forward_blocks(head_dim, 2, 2048, causal=True, marks=0),
            "fused": config.fused_blocks(head_dim),
            "queries": config.queries_blocks(head_dim, marks=0),
            "keys": config.keys_blocks(head_dim, marks=0),
        }
        assert today[kernel] in config.candidates(kernel, head_dim)


def test_what_the_assembler_prints_is_caught(capfd):
    with tune.assembler_output() as said:
        for stream, name, number in ((1, b"a", 8), (2, b"a", 24), (2, b"b", 32)):
            line = b"info: Function properties for %s_mosaic_gpu_kernel\n    48 bytes stack frame, "
            os.write(stream, line % name + b"%d bytes spill stores, 8 bytes spill loads\n" % number)
    assert [tune.spilled_bytes(said(), name) for name in ("a", "b", "c")] == [24, 32, None]
    assert capfd.readouterr() == ("", "")
    assert "MOSAIC_GPU_DUMP_PTXAS" not in os.environ


def test_deviations_are_of_the_largest_value():
    assert tune.deviations([jnp.array([1.0, 3.0])], [jnp.array([1.0, 4.0])]) == [0.25]


def test_a_machine_without_a_hopper_gpu_is_refused(capsys):
    with pytest.raises(UnsupportedError, match="Hopper"):
        list(tune.tune(tune.TuneConfig(length=256)))
    assert main(["tune", "--length", "256"]) == 2
    assert "Hopper" in capsys.readouterr().err
    for bad in (["--length", "0"], ["--dtype", "float32"], ["--kernels", "sideways"]):
        assert main(["tune", *bad]) == 2
        assert "wanted" in capsys.readouterr().err
