"""The command line: what it prints, what it writes, and how it refuses."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from dilax import cli, commands
from dilax._types import refuse
from dilax.commands import show

ROOT = Path(__file__).parent.parent
PNG = b"\x89PNG"


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of a command line."""
    try:
        status = cli.main(arguments)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_touches_no_device():
    """A platform that does not exist would be an error as soon as a device is asked for."""
    code = """
import sys
from dilax import cli
for arguments in (["--help"], *([name, "--help"] for name in cli.COMMANDS)):
    try:
        cli.main(arguments)
    except SystemExit as stop:
        assert not stop.code, (arguments, stop.code)
"""
    environ = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in cli.COMMANDS:
        assert f"usage: dilax {name}" in done.stdout


def test_overview_lists_every_command(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(f"  {name}" in out for name in cli.COMMANDS)
    modules = {info.name for info in pkgutil.iter_modules(commands.__path__)}
    assert modules == {*cli.COMMANDS, "output", "patterns"}
    assert run(capsys)[0] == 2


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    status, out, _ = run(capsys, name, "--help")
    assert status == 0
    assert f"usage: dilax {name}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shew"], "command: wanted one of train, generate,"),
        (["show", "--length", "0"], "length: wanted 1 to 65536 tokens, got 0"),
        (["show", "--dilation-rates", "1"], "dilation_rates: wanted as many as"),
        (["show", "--pattern", "learned"], "pattern: wanted a SparsePatternConfig"),
        (["show", "--block-size", "64"], "block_size: wanted no value without a pattern, got 64"),
        (["show", "--pattern", "local", "--combine", "heads"], "combine: wanted its default"),
        (
            ["show", "--pattern", "local", "--sparsity-ratio", "0.1"],
            "pattern: wanted one of local_window, ",
        ),
        (["show", "--combine", "sum"], "combine: wanted 'lse' or 'heads', got 'sum'"),
        (["explain", "--kind", "nothing"], "nothing"),
        (
            ["explain", "--kind", "ring", "--devices", "7"],
            "16384 tokens on 7 devices: wanted a multiple of 7",
        ),
        (
            ["explain", "--kind", "auto", "--devices", "2"],
            "devices: wanted 1 with kind 'auto': 'ring' takes a mesh",
        ),
        (
            ["explain", "--kind", "auto", "--mesh", "data=2"],
            "mesh: wanted None with kind 'auto': 'ring' takes it",
        ),
        (
            ["explain", "--kind", "block_sparse", "--window-size", "512"],
            "window_size: wanted no value without a pattern, got 512",
        ),
        (["explain", "--head-dim", "7"], "head dim"),
        (["bench", "--repeats", "0"], "repeats: wanted a positive int, got 0"),
        (["train", "--text", "/no/such/file"], "text: wanted"),
        (["train", "--steps", "0"], "steps: wanted a positive int, got 0"),
        (["train", "--num-heads", "5"], "embed_dim: wanted a multiple of num_heads=5"),
        (["generate", "--checkpoint-dir", "/no/such/folder"], "checkpoint_dir: wanted"),
        (["show", "--out", "/no/such/folder/a.png"], "out: wanted a file in a directory that"),
        (["show", "--out", "a.xyz"], "out: wanted a file name that ends in .png, got 'a.xyz'"),
        (["show", "--out", "t"], "out: wanted a file name that ends in .png, got 't'"),
        (["train", "--picture", "/no/such/folder/a.png"], "picture: wanted"),
        (["train", "--checkpoint-dir", __file__], "checkpoint_dir: wanted a directory that can"),
        (["train", "--seed", "9" * 20], "seed: wanted an int in [0, 2**32)"),
        (["train", "--param-dtype", "float64"], "param_dtype: wanted float64 only with"),
        (["bench", "--json", "/no/such/folder/a.json"], "json: wanted a file in a directory that"),
        (["bench", "--sparsity-ratio", "0.1"], "sparsity_ratio: wanted None without a pattern"),
        (["bench", "--head-dim", "7"], "head_dim: wanted a multiple of 8 up to 256, got 7"),
        (["bench", "--num-heads", "4", "--num-kv-heads", "3"], "num_kv_heads: wanted a divisor"),
        (["bench", "--num-kv-heads", "0"], "num_kv_heads: wanted a divisor of num_heads=8, got 0"),
    ],
)
def test_refusal_is_one_line(arguments, message, capsys):
    status, _, error = run(capsys, *arguments)
    assert status == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["show", "--length", "x"], ["show", "--lenght", "8"]])
def test_unparsable_arguments_are_exit_status_2(arguments, capsys):
    status, _, error = run(capsys, *arguments)
    assert status == 2
    assert arguments[1] in error


@pytest.mark.parametrize(
    ("error", "status"), [(refuse("x", "y", 1), 2), (KeyboardInterrupt(), 130)]
)
def test_expected_errors_have_a_status(error, status, monkeypatch, capsys):
    monkeypatch.setattr(show.Show, "run", lambda self: (_ for _ in ()).throw(error))
    assert run(capsys, "show")[0] == status


@pytest.mark.parametrize("error", [ValueError("a defect"), ModuleNotFoundError(name="dilax.x")])
def test_a_defect_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr(show.Show, "run", lambda self: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        cli.main(["show"])


def test_a_missing_extra_is_named(monkeypatch, capsys):
    error = ModuleNotFoundError(name="matplotlib")
    monkeypatch.setattr(show.Show, "run", lambda self: (_ for _ in ()).throw(error))
    status, _, message = run(capsys, "show")
    assert status == 2
    assert "dilax-attention[train]" in message


def test_show_writes_a_picture(tmp_path, capsys):
    path = tmp_path / "pattern.png"
    options = ["--segment-lengths", "4", "8", "--dilation-rates", "1", "2", "--length", "9"]
    status, out, _ = run(capsys, "show", *options, "--num-heads", "2", "--out", str(path))
    assert status == 0
    assert str(path) in out
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("pattern", "options", "said"),
    [
        (
            "global_local",
            "--global-tokens 64 100 --random-blocks 3 --seed 2 --window-size 129 --block-size 64",
            "GlobalLocal(global_tokens=(64, 100), window_size=129, random_blocks=3, seed=2, block",
        ),
        ("local_window", "--window-size None 200", "LocalWindow(window_size=(None, 200))"),
        (
            "dilated_sparse , local_window|hierarchical",
            "--sparsity-ratio 0.2 --causal",
            "PerHead(patterns=(DilatedSparse(sparsity_ratio=0.2), Union(patterns=(Local",
        ),
        ("dilated_sparse", "--dilation-rates 1 3", "sparsity_ratio=0.1, dilation_rates=(1, 3))"),
        ("hilbert_standard & local", "", "Intersection(patterns=(DilatedSparse(sparsity_ratio=0.1"),
    ],
)
def test_show_draws_block_patterns(pattern, options, said, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        show.plotting, "draw_blocks", lambda made, **_: drawn.append(made) or Figure()
    )
    path = tmp_path / "blocks.png"
    where = ["--length", "512", "--out", str(path), *options.split()]
    status, out, _ = run(capsys, "show", "--pattern", pattern, *where)
    assert status == 0
    assert said in out
    assert said in str(drawn[0])
    assert "of the admissible blocks" in out
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize("kind", ["block_sparse", "local", "adaptive", "hierarchical_ultra_sparse"])
def test_explain_block_sparse_kinds(kind, capsys):
    """They have no branches unless some are given."""
    status, out, _ = run(capsys, "explain", "--kind", kind, "--device-kind", "NVIDIA H100")
    assert status == 0
    assert "every (1, 2, 4)" not in out


def test_explain_takes_a_mesh_and_a_pattern(capsys):
    """Two levels of the tokens, each with its speed, and an axis of the examples."""
    mesh = ["--mesh", "data=2,host=2,device=4", "--axis-name", "host,device", "--batch", "2"]
    pattern = ["--pattern", "local_window", "--window-size", "512", "--block-size", "64"]
    speeds = ["--gigabytes-per-second", "25", "300"]
    kind = ["--kind", "block_sparse_distributed"]
    status, out, _ = run(capsys, "explain", *kind, *mesh, *pattern, *speeds)
    assert status == 0
    assert "2 along the examples, 8 devices along the tokens, contiguous: ring of 2 hops" in out
    assert "window_size=512" in out
    assert "at 300 GB/s among 4 neighbours and 25 GB/s beyond" in out


@pytest.mark.parametrize("where", [["--devices", "8"], ["--mesh", "sequence=8"]])
def test_explain_of_several_devices_is_a_ring(where, capsys):
    status, out, _ = run(capsys, "explain", *where)
    assert status == 0
    assert "kind 'ring'" in out
    assert "each of 8 devices" in out


def test_explain_gives_reasons(capsys):
    status, out, _ = run(capsys, "explain", "--device-kind", "cpu")
    assert status == 0
    assert "xla" in out
    assert "pallas" in out


def test_bench_writes_its_table(tmp_path, capsys):
    path = tmp_path / "bench.json"
    sizes = ["--lengths", "24", "--num-heads", "2", "--head-dim", "8", "--repeats", "1"]
    branches = ["--segment-lengths", "8", "24", "--dilation-rates", "1", "2"]
    blocks = ("--pattern", "local_window", "--sparsity-ratio", "0.5")
    status, out, _ = run(capsys, "bench", *sizes, *branches, *blocks, "--json", str(path))
    assert status == 0
    assert "tokens/s" in out
    table = json.loads(path.read_text())
    assert table["settings"]["lengths"] == [24]
    done = {(row["name"], row["work"]) for row in table["rows"] if row["seconds"]}
    for name in ("dilated, xla", "blocks, xla", "dense, jax.nn"):
        assert {(name, "forward"), (name, "forward+backward")} <= done


def test_bench_leaves_out_what_does_not_fit():
    from dilax import bench

    config = bench.BenchConfig(lengths=(1 << 20,))
    contestants = dict(bench._contestants(config, 1 << 20))
    assert contestants["dense, jax.nn"] == "its logits need 32768.0 GiB"


def test_bench_times_float64_where_it_says_so(monkeypatch):
    from dilax import bench

    timed = []

    def seconds(job, repeats):
        timed.append(str(job().dtype))
        return 1.0

    monkeypatch.setattr(bench, "median", seconds)
    sizes = {"num_heads": 2, "head_dim": 8, "backward": False, "dtype": "float64"}
    list(bench.measure(bench.BenchConfig((16,), (8, 16), (1, 2), **sizes)))
    assert timed
    assert set(timed) == {"float64"}


def test_training_that_diverges_is_one_line(monkeypatch, capsys):
    error = FloatingPointError("training diverged: the loss of step 2 is nan")
    monkeypatch.setattr(show.Show, "run", lambda self: (_ for _ in ()).throw(error))
    assert run(capsys, "show") == (1, "", f"error: {error}\n")


@pytest.mark.slow
def test_train_resume_generate(tmp_path, capsys):
    text, runs = tmp_path / "text", tmp_path / "run"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    model = ["--embed-dim", "32", "--num-heads", "2", "--num-layers", "1", "--ffn-dim", "32"]
    branches = ["--segment-lengths", "16", "64", "--dilation-rates", "1", "4"]
    sizes = ["--sequence-length", "64", "--steps", "4", "--warmup-steps", "1"]
    where = ["--text", str(text), "--checkpoint-dir", str(runs)]
    picture = tmp_path / "curve.png"
    train = ["train", *where, *sizes, *model, *branches]
    status, out, _ = run(capsys, *train, "--picture", str(picture))
    assert status == 0
    assert "held-out bytes" in out
    assert "byte bigrams" in out
    assert "this model" in out
    assert "step      4/4" in out
    assert picture.read_bytes().startswith(PNG)

    status, _, error = run(capsys, *train)
    assert status == 2
    assert error.startswith("error: checkpoint_dir: wanted")
    assert run(capsys, *train, "--resume")[0] == 0

    status, out, _ = run(
        capsys,
        "generate",
        "--checkpoint-dir",
        str(runs),
        "--prompt",
        "the",
        "--max-new-tokens",
        "4",
    )
    assert status == 0
    assert out.startswith("the")

    generate = ["generate", "--checkpoint-dir", str(runs), "--max-new-tokens", "1"]
    status, out, _ = run(capsys, *generate, "--prompt", os.fsdecode(b"a\xff"))
    assert status == 0
    assert out.startswith("a\N{REPLACEMENT CHARACTER}")
    status, _, error = run(capsys, *generate, "--seed", "9" * 20)
    assert (status, error[:13]) == (2, "error: seed: ")

    for file in runs.rglob("params/**/*"):
        if file.is_file():
            file.write_bytes(b"")
    status, _, error = run(capsys, *generate)
    assert status == 2
    assert error.startswith("error: checkpoint_dir: wanted an undamaged checkpoint of step 4")
    assert error.count("\n") == 1
