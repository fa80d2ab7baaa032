"""`dilax train`."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import rich
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dilax import plotting
from dilax.commands.output import check_output
from dilax.distributed import start_processes
from dilax.training import TrainConfig, train


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
        """Train, say how it went, and give the exit status."""
        start_processes(self.coordinator, self.num_processes, self.process_id)
        return _run(self.config, self.resume, self.picture)


def _run(config: TrainConfig, resume: bool, picture: Path | None) -> int:
    check_output("picture", picture, ".png")
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
