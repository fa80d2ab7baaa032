"""Training on a mesh and in several processes: the same numbers, no hang, no step lost."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from dilax import cli, data, distributed, on_mesh
from dilax._types import LostProcessError
from dilax.commands import show
from dilax.distributed import (
    Placement,
    lost_processes_named,
    parse_mesh,
    refused_by_all,
    start_processes,
)
from dilax.longnet_config import LongNetConfig
from dilax.train_config import TrainConfig
from dilax.training import train
from tests.compare import EXACT, error

MODEL = LongNetConfig(
    embed_dim=16,
    num_heads=2,
    num_layers=1,
    ffn_dim=24,
    segment_lengths=(16,),
    dilation_rates=(2,),
    vocab_size=data.VOCAB_SIZE,
    dropout=0.1,
    attention_dropout=0.1,
    param_dtype="float64",
)
STEPS = 40  # a process says one line for each tenth


@pytest.fixture(autouse=True)
def double():
    """float64 also in the threads of Orbax, which a context manager would not reach."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        lines = "".join(f"line {j} of file {i}: {'abc' * (j % 5)}\n" for j in range(12))
        (folder / f"{i}.txt").write_text(lines)
    return TrainConfig(
        model=MODEL,
        text=(str(folder),),
        sequence_length=32,
        batch_size=4,
        steps=STEPS,
        warmup_steps=2,
        validation_rows=2,
        checkpoint_every=10,
    )


@pytest.fixture(scope="module")
def alone(config):
    """The run on one device, in this process."""
    jax.config.update("jax_enable_x64", True)
    return train(config)


def arguments(config, *more):
    """The command line of a config."""
    model, line = dataclasses.asdict(config.model), ["train", "--text", *config.text]
    fields = dataclasses.asdict(config) | model
    for name in (
        *("embed_dim", "num_heads", "num_layers", "ffn_dim", "dropout", "attention_dropout"),
        *("param_dtype", "sequence_length", "batch_size", "steps", "warmup_steps"),
        *("validation_rows", "checkpoint_every"),
    ):
        line += [f"--{name.replace('_', '-')}", str(fields[name])]
    for name in ("segment_lengths", "dilation_rates"):
        line += [f"--{name.replace('_', '-')}", *map(str, model[name])]
    return [*line, *more]


def joined(line, port, count, number):
    """The command of one of the processes that train."""
    line = [*line, "--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count)]
    return ["-m", "dilax.cli", *line, "--process-id", str(number)]


def attending(line, port, count, number):
    """The command of one of the processes that compare attention."""
    return ["-m", "tests.attention_in_processes", *map(str, (port, count, number))]


@contextlib.contextmanager
def processes(cache, *lines, command=joined):
    """One process of two devices for each command line, joined by a coordinator; none survives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {name: x for name, x in os.environ.items() if "proxy" not in name.lower()}
    environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "JAX_ENABLE_X64": "1"}
    environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    started = []
    try:
        for i, line in enumerate(lines):
            line = [sys.executable, *command(line, port, len(lines), i)]
            options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
            started.append(subprocess.Popen(line, **options))
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def first_step(process):
    """Bits per byte of the first step said, within two minutes. Gloo may write into its line."""
    timer = threading.Timer(120, process.kill)
    timer.start()
    found = (re.search(r"step +\d+/\d+ +([\d.]+) bits", line) for line in process.stdout)
    bits = next((match.group(1) for match in found if match), "nan")
    timer.cancel()
    return float(bits)


def test_two_processes_are_one_device(config, alone, tmp_path):
    """Asked to stop, then resumed and one killed, then resumed on another mesh: one curve."""
    where = dataclasses.replace(config, checkpoint_dir=str(tmp_path / "run"))
    line = arguments(where, "--mesh", "data=2,sequence=2", "--checkpoint-dir", where.checkpoint_dir)

    with processes(tmp_path / "programs", line, line) as (speaker, silent):
        assert first_step(speaker) == pytest.approx(alone.bits_per_byte[0], abs=1e-3)
        silent.send_signal(signal.SIGTERM)
        out, err = speaker.communicate(timeout=60)
        assert "step" not in silent.communicate(timeout=60)[0]  # process 0 speaks for all
        assert (speaker.returncode, silent.returncode) == (130, 130), err
        stopped = int(re.search(r"interrupted after step (\d+)", out).group(1))
    assert 0 < stopped < STEPS

    line.append("--resume")
    with processes(tmp_path / "programs", line, line) as (speaker, victim):
        assert first_step(speaker) < 9
        victim.kill()
        _, err = speaker.communicate(timeout=30)
    assert speaker.returncode == 1, err
    assert "error: process 0 of 2 lost another process" in err
    assert f"resume to go on from the last checkpoint in {where.checkpoint_dir}" in err

    last = max(int(name) for name in os.listdir(where.checkpoint_dir) if name.isdigit())
    assert stopped <= last < STEPS
    ended = train(dataclasses.replace(where, mesh="data=4"), resume=True)
    assert ended.step == STEPS
    assert error(ended.bits_per_byte, alone.bits_per_byte[last:]) <= EXACT
    assert error(ended.validation_bits_per_byte, alone.validation_bits_per_byte) <= EXACT


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.mesh_table)])
def test_attention_in_processes_is_that_of_one_device(count, tmp_path):
    with processes(tmp_path, *[None] * count, command=attending) as each:
        for i, process in enumerate(each):
            out, err = process.communicate(timeout=120)
            assert f"process {i} of {count}" in out, err
            assert process.returncode == 0, err


def test_processes_that_disagree_say_so(config, tmp_path):
    # The second one would be refused on its own, and the first one not.
    lines = [arguments(config, "--mesh", "data=4", "--batch-size", x) for x in ("4", "3")]
    with processes(tmp_path, *lines) as both:
        for process in both:
            _, err = process.communicate(timeout=180)
            assert process.returncode == 2, err
            assert "error: batch_size: wanted the same on every process" in err


def test_what_one_process_refuses_all_do(monkeypatch):
    said = []
    monkeypatch.setattr(distributed, "any_process", lambda flag: said.append(flag) or True)
    with pytest.raises(ValueError, match=r"^text, checkpoint_dir: wanted right on every process"):
        with refused_by_all():
            pass
    with pytest.raises(ValueError, match=r"^x: wanted y"), refused_by_all():
        raise ValueError("x: wanted y")
    assert said == [False, True]


def test_a_mesh_is_one_device(config, alone, monkeypatch):
    attend, parts = on_mesh.sharded_dilated_attention, []

    def spy(query, *arrays, **options):
        parts.append(query.shape)
        return attend(query, *arrays, **options)

    monkeypatch.setattr(on_mesh, "sharded_dilated_attention", spy)
    other = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(other):  # the run has a mesh of its own
        found = train(dataclasses.replace(config, mesh="data=4,sequence=2"), on_step=stop_at(6))
    assert found.interrupted
    assert set(parts) == {(1, 16, 2, 8)}  # the attention ran on parts of examples and sequences
    assert error(found.bits_per_byte, alone.bits_per_byte[:6]) <= EXACT
    tokens = np.zeros((1, 5), np.int32)
    assert np.isfinite(found.model(tokens)).all()  # the model is one of this process alone


def stop_at(step):
    def on_step(progress):
        if progress.step == step:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("mesh", ["", "data", "data=0", "data=2,data=2", "model=2", "data=-1", 4])
def test_what_is_no_mesh_is_refused(mesh):
    with pytest.raises(ValueError, match=r"^mesh: wanted axes among data, sequence"):
        parse_mesh(mesh)


@pytest.mark.parametrize(
    ("mesh", "name"),
    [("data=16", "mesh"), ("data=8", "batch_size"), ("sequence=5", "sequence_length")],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, name, config):
    with pytest.raises(ValueError, match=rf"^{name}: wanted "):
        train(dataclasses.replace(config, mesh=mesh))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("localhost", 2, 0), "coordinator"),
        (("localhost:x", 2, 0), "coordinator"),
        (("localhost:1", None, 0), "num_processes"),
        (("localhost:1", 2, None), "process_id"),
        (("localhost:1", 0, 0), "num_processes"),
        (("localhost:1", 2, 2), "process_id"),
        ((None, 2, None), "num_processes"),
        (("auto", None, 1), "process_id"),
        (("auto", None, None), "coordinator"),
    ],
)
def test_wrong_processes_are_refused(arguments, name, monkeypatch):
    def no_cluster(*_, **options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    with pytest.raises(ValueError, match=rf"^{name}: wanted "):
        start_processes(*arguments)


def test_only_a_lost_process_is_called_one(monkeypatch):
    failure = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: connection closed")
    with pytest.raises(jax.errors.JaxRuntimeError), lost_processes_named("Start again."):
        raise failure
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(LostProcessError, match=r"Gloo.*Start again\."):
        with lost_processes_named("Start again."):
            raise failure
    for other in (ValueError("x: wanted y"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: a")):
        with pytest.raises(type(other), match=str(other)), lost_processes_named(""):
            raise other


def test_each_part_lies_on_its_device():
    placement = Placement.of("data=2,sequence=4", batch_size=2, sequence_length=8)
    x = np.arange(16).reshape(2, 8)
    placed = placement.batch({"tokens": x})["tokens"]
    assert placed.sharding.spec == jax.P("data", "sequence")
    for shard in placed.addressable_shards:
        assert shard.data.shape == (1, 2)
        np.testing.assert_array_equal(shard.data, x[shard.index])
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    explicit = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=kinds)
    assert Placement(explicit) == placement
    everywhere = placement.everywhere({"x": x, "key": jax.random.key(3)})
    assert everywhere["x"].is_fully_replicated
    assert (jax.random.key_data(everywhere["key"]) == jax.random.key_data(jax.random.key(3))).all()


def test_the_command_line_says_that_a_process_is_lost(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(
        show.Show, "run", lambda self: (_ for _ in ()).throw(LostProcessError("lost another"))
    )
    cli.main(["show"])
    assert left == [1]
    assert capsys.readouterr().err == "error: lost another\n"
