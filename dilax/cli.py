"""The command line: it parses and prints; what it does lives in the modules it calls."""

import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dilax._types import LostProcessError, UnsupportedError, refuse

SUMMARIES = {
    "train": "train a LongNet language model on text, beside byte bigrams on the same files",
    "generate": "continue a text with a trained model",
    "explain": "say which implementation a call would run, and why not the others",
    "show": "draw which keys each query of each head sees",
    "bench": "time the implementations on this machine",
    "tune": "search the kernels' tile sizes on this machine's GPU",
}


def _check_output(name: str, path: Path | None, suffix: str | None = None) -> None:
    """Refuse a file that could not be written, before anything is computed."""
    if path is None:
        return
    if suffix is not None and path.suffix.lower() != suffix:
        raise refuse(name, f"a file name that ends in {suffix}", str(path))
    if path.is_dir() or not path.parent.is_dir():
        raise refuse(name, "a file in a directory that exists", str(path))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise refuse(name, "a file that may be written", str(path))


@dataclasses.dataclass(frozen=True)
class Show:
    """Draw which keys each query of each head sees, as a PNG picture."""

    segment_lengths: tuple[int, ...] = (8, 16, 32)
    """Segment length W of each branch, in tokens."""
    dilation_rates: tuple[int, ...] = (1, 2, 4)
    """Dilation rate R of each branch."""
    length: int = 32
    """Number of tokens, up to 65536."""
    num_heads: int = 4
    """Number of heads; of more than 16 the first 16 that differ are drawn."""
    combine: str = "lse"
    """lse: every head takes part in every branch; heads: each branch has heads of its own."""
    head_offset: str = "interleaved"
    """Which residue a head keeps: interleaved (the paper) or blocked (torchscale)."""
    causal: bool = False
    """A query sees no key after it."""
    pattern: str | None = None
    """Draw a block pattern instead: a preset (local, dilated, ...) or a pattern type."""
    sparsity_ratio: float | None = None
    """Of a pattern type: the share of admissible blocks kept."""
    block_size: int | None = None
    """Of a pattern type: tokens of a block, a multiple of 64."""
    window_size: int | None = None
    """Of a pattern type: tokens of the window, in place of a ratio."""
    global_tokens: int | None = None
    """Of global_local: tokens that everybody sees, in place of a ratio."""
    out: Path = Path("pattern.png")
    """The picture to write, a name that ends in .png."""

    def run(self) -> None:
        """Write the picture and say so."""
        _check_output("out", self.out, ".png")
        from dilax import plotting

        fields = ("sparsity_ratio", "block_size", "window_size", "global_tokens")
        given = {name: getattr(self, name) for name in fields if getattr(self, name) is not None}
        if self.pattern is not None:
            self._draw_blocks(given)
            return
        for name, x in given.items():
            raise refuse(name, "no value without a pattern", x)
        figure = plotting.draw_pattern(
            self.segment_lengths,
            self.dilation_rates,
            length=self.length,
            num_heads=self.num_heads,
            combine=self.combine,  # pyright: ignore[reportArgumentType]  checked there
            head_offset=self.head_offset,  # pyright: ignore[reportArgumentType]
            is_causal=self.causal,
        )
        figure.savefig(self.out)
        print(f"wrote {self.out}")

    def _draw_blocks(self, given: dict[str, Any]) -> None:
        from dilax import plotting
        from dilax.pattern_config import PATTERN_TYPES, SparsePatternConfig, as_pattern

        for name in ("segment_lengths", "dilation_rates", "combine", "head_offset"):
            x = getattr(self, name)
            if x != getattr(Show, name):
                raise refuse(name, "its default with a pattern", x)
        if given and self.pattern not in PATTERN_TYPES:
            raise refuse("pattern", f"one of {', '.join(PATTERN_TYPES)} with options", self.pattern)
        made = SparsePatternConfig(self.pattern or "", **given) if given else self.pattern
        made = as_pattern("pattern", made)
        sizes = {"num_heads": self.num_heads, "is_causal": self.causal}
        plotting.draw_blocks(made, length=self.length, **sizes).savefig(self.out)
        print(made.describe(self.length, is_causal=self.causal))
        print(f"wrote {self.out}")


def _train() -> Any:
    from dilax.training import TrainConfig

    @dataclasses.dataclass(frozen=True)
    class Train:
        """Train a LongNet language model on text, beside byte bigrams on the same files."""

        config: TrainConfig
        resume: bool = False
        """Go on from the latest checkpoint in --checkpoint-dir."""
        picture: Path | None = None
        """Draw the training curve into this PNG file."""
        coordinator: str | None = None
        """With several processes: host:port of process 0, or auto for the cluster's own."""
        num_processes: int | None = None
        """With a coordinator: how many processes there are."""
        process_id: int | None = None
        """With a coordinator: which process this is, from 0."""

        def run(self) -> int:
            from dilax.distributed import start_processes

            start_processes(self.coordinator, self.num_processes, self.process_id)
            return _run_train(self.config, self.resume, self.picture)

    return Train


def _run_train(config: Any, resume: bool, picture: Path | None) -> int:
    _check_output("picture", picture, ".png")
    import jax
    import rich
    from rich.table import Table

    from dilax.training import train

    if jax.process_index() > 0:  # process 0 speaks for all
        return 130 if train(config, resume=resume).interrupted else 0
    model = config.model
    branches = zip(model.segment_lengths, model.dilation_rates, strict=True)
    print(
        f"{', '.join(config.text) if config.text else 'the standard library of this Python'}: "
        f"{config.steps} steps of {config.batch_size} x {config.sequence_length} bytes, "
        f"{model.num_layers} layers of {model.embed_dim}, dilated attention "
        f"{', '.join(f'{w}/{r}' for w, r in branches)}, on {jax.devices()[0].device_kind}"
        + ("" if config.mesh is None else f", mesh {config.mesh}"),
        flush=True,
    )
    with _progress(config.steps) as on_step:
        result = train(config, resume=resume, on_step=on_step)
    if result.skipped_files:
        print(f"files left out of the text because they are not UTF-8: {result.skipped_files}")
    bigrams, ours = result.bigram_bits_per_byte, result.validation_bits_per_byte
    if bigrams is None or ours is None:  # interrupted
        print(f"interrupted after step {result.step}", end="")
        print(f": --resume goes on from {result.checkpoint}" if result.checkpoint else "")
        return 130
    covered, held_out = result.validation_bytes
    part = "all" if covered == held_out else f"{covered:,} of the"
    table = Table(f"on {part} {held_out:,} held-out bytes", "bits per byte")
    table.columns[1].justify = "right"
    table.add_row("byte bigrams", f"{bigrams:.3f}")
    table.add_row("this model", f"{ours:.3f}")
    rich.print(table)
    print(f"{result.tokens:,} bytes in {result.seconds:.0f} s")
    if picture is not None:
        from dilax import plotting

        first = result.step - len(result.bits_per_byte) + 1
        steps = range(first, result.step + 1)
        levels = {"byte bigrams, held out": bigrams, "this model, held out": ours}
        curves = {"training": (steps, result.bits_per_byte)}
        plotting.draw_training(curves, levels).savefig(picture)
        print(f"wrote {picture}")
    return 0


@contextlib.contextmanager
def _progress(steps: int) -> Iterator[Callable[[Any], None]]:
    """A callback for `train`: a bar on a terminal, else a line for each tenth of the way."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    def said(p: Any) -> str:
        text = f"{p.bits_per_byte:6.3f} bits per byte {p.tokens_per_second:9,.0f} tokens/s"
        if p.validation_bits_per_byte is not None:
            text += f"  held out {p.validation_bits_per_byte:.3f}"
        return text

    console = Console()
    if not console.is_terminal:
        tenth = max(1, steps // 10)

        def line(p: Any) -> None:
            last = p.validation_bits_per_byte is not None or p.step == steps
            if p.step == 1 or p.step % tenth == 0 or last:
                print(f"step {p.step:>6}/{steps} {said(p)}", flush=True)

        yield line
        return
    said_now = TextColumn("{task.fields[said]}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), said_now)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=steps, said="the first step compiles")
        yield lambda p: bar.update(task, completed=p.step, said=said(p))


@dataclasses.dataclass(frozen=True)
class Generate:
    """Continue a text with a model that `dilax train --checkpoint-dir` trained."""

    checkpoint_dir: str
    """What dilax train was given."""
    prompt: str = ""
    """The beginning of the text."""
    max_new_tokens: int = 256
    """How many bytes at most."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most probable byte every time."""
    top_k: int | None = None
    """Sample among the k most probable bytes only."""
    seed: int = 0
    """Of the random choices."""
    step: int | None = None
    """Which checkpoint; None for the latest."""

    def run(self) -> None:
        """Print the prompt and what follows."""
        from dilax.generate import generate
        from dilax.training import load_model

        model, _ = load_model(self.checkpoint_dir, self.step)
        prompt = os.fsencode(self.prompt)  # any bytes may come from a shell
        text = generate(
            model,
            prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            seed=self.seed,
        )
        coding = sys.stdout.encoding or "utf-8"
        shown = (prompt + text).decode(errors="replace")
        print(shown.encode(coding, errors="replace").decode(coding))


def _generate() -> Any:
    return Generate


@dataclasses.dataclass(frozen=True)
class Explain:
    """Say what a call would run, and why not something else. Computes nothing."""

    kind: str = "auto"
    """Any name that create_dilated_attention knows."""
    seq_len: int = 16384
    """T, queries."""
    kv_seq_len: int | None = None
    """S, keys; None for T."""
    batch: int = 1
    """B."""
    num_heads: int = 12
    """N, query heads."""
    num_kv_heads: int | None = None
    """K, key and value heads; None for N."""
    head_dim: int = 64
    """H."""
    dtype: str = "bfloat16"
    """Of queries, keys and values."""
    segment_lengths: tuple[int, ...] | None = None
    """Segment length W of each branch, in tokens; None for those of the kind."""
    dilation_rates: tuple[int, ...] | None = None
    """Dilation rate R of each branch; None for those of the kind."""
    combine: str = "lse"
    """lse: every head takes part in every branch; heads: each branch has heads of its own."""
    head_offset: str = "interleaved"
    """Which residue a head keeps: interleaved (the paper) or blocked (torchscale)."""
    is_causal: bool = False
    """A query sees no key after it."""
    packed: bool = False
    """The call has segment ids or a key padding mask."""
    dropout: float = 0.0
    """Share of attention probabilities dropped."""
    implementation: str | None = None
    """Name one instead of leaving the choice to the library."""
    device_kind: str | None = None
    """Of another machine, such as "NVIDIA H100 80GB HBM3"; None for this one."""
    devices: int = 1
    """Along the mesh axis of the tokens; with several a plan says who sends how much."""
    layout: str = "contiguous"
    """Which tokens a device holds: contiguous, or zigzag, which balances causal work."""
    method: str | None = None
    """How rows move: ring, all_to_all, all_gather or hybrid; None for the fastest expected."""
    gigabytes_per_second: float = 340.0
    """What a device receives, for the expected times of the plan."""

    def run(self) -> None:
        """Print the decision."""
        from dilax.decision import explain

        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("segment_lengths", "dilation_rates"):
            if fields[name] is None:
                del fields[name]
        print(explain(**fields))


def _explain() -> Any:
    return Explain


def _show() -> Any:
    return Show


def _bench() -> Any:
    from dilax.bench import BenchConfig

    @dataclasses.dataclass(frozen=True)
    class Bench(BenchConfig):
        """Time the implementations on this machine, beside dense attention."""

        json: Path | None = None
        """Also write the table to this file, as JSON."""

        def run(self) -> None:
            _run_bench(self, self.json)

    return Bench


def _run_bench(config: Any, path: Path | None) -> None:
    _check_output("json", path)
    from dilax import bench

    machine = bench.machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    header = f"{'length':>9}  {'attention':<18}{'work':<18}{'ms':>12}{'tokens/s':>14}"
    print(header, "-" * len(header), sep="\n")
    rows = []
    for row in bench.measure(config):
        rows.append(row)
        named = f"{row.length:>9}  {row.name:<18}{row.work:<18}"
        if row.seconds is None:
            print(f"{named}  not run: {row.reason}")
        else:
            print(f"{named}{row.seconds * 1e3:>12,.2f}{row.tokens_per_second:>14,.0f}", flush=True)
    if path is not None:
        settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(bench.BenchConfig)}
        table = {
            "machine": machine,
            "settings": settings,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        path.write_text(json.dumps(table, indent=2) + "\n")
        print(f"wrote {path}")


def _tune() -> Any:
    from dilax.tune import TuneConfig

    @dataclasses.dataclass(frozen=True)
    class Tune(TuneConfig):
        """Search the tile sizes of the kernels on this machine's GPU, and check each."""

        def run(self) -> None:
            _run_tune(self)

    return Tune


def _run_tune(config: Any) -> None:
    from dilax import tune

    trials: list[Any] = []
    for trial in tune.tune(config):
        if not trials:
            print(trial.HEADER, "-" * len(trial.HEADER), sep="\n")
        trials.append(trial)
        print(trial.line(), flush=True)
    for kernel in config.kernels:
        print(tune.verdict(kernel, trials))


# Each imports what its command needs and no other does, and returns a dataclass with a `run`.
COMMANDS: dict[str, Callable[[], Any]] = {
    "train": _train,
    "generate": _generate,
    "explain": _explain,
    "show": _show,
    "bench": _bench,
    "tune": _tune,
}


def parse(arguments: Sequence[str]) -> Any:
    """The command that the arguments ask for, with its settings: call its `run`.

    Raises:
        SystemExit: the arguments are wrong, or ask for help.

    Example:
        >>> parse(["show", "--length", "64"]).length
        64
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"dilax-attention {version('dilax-attention')}")
        raise SystemExit(0)
    name = arguments[0]
    if name not in COMMANDS:
        raise SystemExit(_failure(f"command: wanted one of {', '.join(COMMANDS)}, got {name!r}"))
    import tyro

    command = tyro.conf.OmitArgPrefixes[COMMANDS[name]()]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(command, prog=f"dilax {name}", args=list(arguments[1:]))
    except SystemExit as stop:
        # A config that refuses its fields does so inside tyro, which draws a box around that.
        cause: BaseException | None = stop
        while cause is not None and not _is_refusal(cause):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        print(said.getvalue(), end="", file=sys.stderr)
        raise


def _is_refusal(error: BaseException) -> bool:
    """Is it one of our messages, and not a defect?"""
    return isinstance(error, ValueError) and ": wanted " in str(error)


def _overview() -> str:
    lines = [f"  {name:<10}{SUMMARIES[name]}" for name in COMMANDS]
    return "\n".join(
        [
            "usage: dilax COMMAND [OPTIONS]",
            "",
            *lines,
            "",
            "dilax COMMAND --help lists the options.",
        ]
    )


def _failure(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def _lost(error: LostProcessError) -> int:
    """Say so and go at once: an orderly end would wait for the lost process."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; an argument that the library refuses is one line and exit status 2.

    Example:
        >>> main(["show", "--length", "0"])
        2
    """
    try:
        return parse(sys.argv[1:] if arguments is None else arguments).run() or 0
    except UnsupportedError as error:
        return _failure(str(error))
    except ValueError as error:
        if not _is_refusal(error):
            raise
        return _failure(str(error))
    except LostProcessError as error:
        return _lost(error)
    except FloatingPointError as error:  # of `train`, which says what happened
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in ("grain", "matplotlib", "optax", "orbax", "rich", "tyro"):
            raise
        return _failure(f"{error.name}: wanted it installed (dilax-attention[train]), got nothing")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
