"""Training of LongNet language models: one optax step, Orbax checkpoints, exact resume.

Every random choice of step i comes from (seed, i), the order of the data from (seed, state of the
data iterator); both are in the checkpoint, so that an interrupted and resumed run computes the
same numbers, bit for bit, as one that was not interrupted.
"""

import contextlib
import dataclasses
import math
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dilax import data
from dilax._types import refuse
from dilax.checkpoints import Checkpoints, check_directory, load_model, merged, new_model
from dilax.checks import check_bool
from dilax.corpus import load_corpus
from dilax.distributed import (
    Placement,
    agreed,
    any_process,
    lost_processes_named,
    refused_by_all,
)
from dilax.longnet import LongNetLM
from dilax.steps import evaluate, evaluate_on, loss_sums, make_optimizer, schedule_of, train_step
from dilax.train_config import TrainConfig, default_model

__all__ = [
    "Progress",
    "TrainConfig",
    "TrainResult",
    "default_model",
    "evaluate",
    "load_model",
    "loss_sums",
    "make_optimizer",
    "train",
]


@dataclasses.dataclass(frozen=True)
class Progress:
    """What `train` tells its callback after every step.

    Args:
        step, steps: steps done so far, and in all.
        bits_per_byte: of this step's batch, before its update.
        learning_rate: of this step.
        tokens: predicted so far in this call of `train`.
        tokens_per_second: since the first step, without compilation.
        validation_bits_per_byte: of the held-out files, if this step evaluated them.
    """

    step: int
    steps: int
    bits_per_byte: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    validation_bits_per_byte: float | None = None


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a call of `train` did.

    Args:
        model: the trained model.
        step: steps done, in all calls together.
        bits_per_byte: of every step of this call.
        validation_bits_per_byte, bigram_bits_per_byte: of the model and of byte bigrams counted on
            the files trained on, both on the same held-out tokens; None if interrupted.
        tokens: predicted in this call.
        seconds: wall time of this call.
        checkpoint: directory of the last checkpoint's run, None without checkpoints.
        interrupted: whether a signal or a KeyboardInterrupt ended it before the last step.
        validation_bytes: how many held-out bytes the comparison covers, and how many there are.
        skipped_files: files in directories of text that are not UTF-8 and so were left out.
    """

    model: LongNetLM
    step: int
    bits_per_byte: tuple[float, ...]
    validation_bits_per_byte: float | None
    bigram_bits_per_byte: float | None
    tokens: int
    seconds: float
    checkpoint: str | None
    interrupted: bool
    validation_bytes: tuple[int, int] = (0, 0)
    skipped_files: int = 0


class _Run:
    """The state of one call of `train`."""

    def __init__(self, config: TrainConfig, resume: bool):
        self.config = config
        # Before anything that one process might refuse and another not.
        fields = config.to_dict()
        model = {f"model.{name}": x for name, x in fields.pop("model").items()}
        agreed(**fields, **model, resume=resume)
        self.placement = Placement.of(
            config.mesh, batch_size=config.batch_size, sequence_length=config.sequence_length
        )
        with refused_by_all():
            self._read_text()
        self.checkpoints, latest = None, None
        if config.checkpoint_dir is not None:
            self.checkpoints = Checkpoints(config.checkpoint_dir, config.keep_checkpoints)
            latest = self.checkpoints.manager.latest_step()
        agreed(text=self.corpus.fingerprint, latest_checkpoint=latest)
        if resume and latest is None:
            raise refuse("resume", "a checkpoint_dir with checkpoints", config.checkpoint_dir)
        if not resume and latest is not None:
            wanted = "a directory without checkpoints, or resume=True"
            raise refuse("checkpoint_dir", wanted, config.checkpoint_dir)
        saved = None
        if self.checkpoints is not None and latest is not None:
            saved = self.checkpoints.run(latest)
            self._check_same(saved)
        self.graphdef, params, rest = new_model(config, self.placement.attention)
        optimizer_state = make_optimizer(config).init(params)
        started = self.placement.everywhere((params, optimizer_state, rest))
        self.params, self.optimizer_state, self.rest = started
        self.step = 0
        if self.checkpoints is not None and latest is not None and saved is not None:
            trees = self.checkpoints.restore(
                latest, params=self.params, optimizer=self.optimizer_state
            )
            self.params, self.optimizer_state = trees.params, trees.optimizer
            self.batches.set_state(saved["data"])
            self.step = latest

    def _read_text(self) -> None:
        config = self.config
        if config.checkpoint_dir is not None:
            check_directory("checkpoint_dir", config.checkpoint_dir)
            here = pathlib.Path(config.checkpoint_dir).resolve()
            if any(pathlib.Path(path).resolve() == here for path in config.text or ()):
                wanted = "a directory other than those of text"
                raise refuse("checkpoint_dir", wanted, config.checkpoint_dir)
        self.corpus = load_corpus(
            config.text,
            validation_fraction=float(config.validation_fraction),
            exclude=config.checkpoint_dir,
        )
        self.batches = data.training_batches(
            self.corpus.train,
            sequence_length=config.sequence_length,
            batch_size=config.batch_size,
            seed=config.seed,
        )

    def _check_same(self, saved: dict[str, Any]) -> None:
        """Refuse to resume a run of another config or of another text."""
        then = TrainConfig.from_dict(saved["config"]).computed().to_dict()
        now = self.config.computed().to_dict()
        unlike = [name for name in now if now[name] != then[name]]
        if unlike:
            was = ", ".join(f"{name}={then[name]!r}" for name in unlike)
            now = ", ".join(f"{name}={now[name]!r}" for name in unlike)
            raise refuse("config", f"the checkpoint's ({was}) when resuming", now)
        if saved["text"] != self.corpus.fingerprint:
            raise refuse("text", "the files of the checkpoint, unchanged, when resuming", "others")

    def save(self) -> None:
        if self.checkpoints is not None:
            run = {
                "config": self.config.to_dict(),
                "data": self.batches.get_state(),
                "text": self.corpus.fingerprint,
            }
            self.checkpoints.save(self.step, self.params, self.optimizer_state, run)

    def advance(self) -> tuple[float, int]:
        """One step; the mean loss in bits and the number of predicted tokens."""
        batch = self.placement.batch(data.shifted(next(self.batches)))
        with self.placement.around():
            self.params, self.optimizer_state, (total, number) = train_step(
                self.config.computed(),
                self.placement,
                self.graphdef,
                self.params,
                self.optimizer_state,
                self.rest,
                batch,
                self.step,
            )
        bits = float(total) / max(int(number), 1) / math.log(2)
        if not math.isfinite(bits):
            raise _diverged(f"the loss of step {self.step + 1}", bits, self.config)
        self.step += 1
        return bits, int(number)

    def model(self) -> LongNetLM:
        return merged(self.graphdef, self.params, self.rest)

    def model_here(self) -> LongNetLM:
        """The model as one of this process alone, on one device."""
        model = nnx.eval_shape(lambda: LongNetLM(self.config.model, rngs=nnx.Rngs(0)))
        return merged(nnx.graphdef(model), *self.placement.local((self.params, self.rest)))

    def evaluation(self) -> float:
        return evaluate_on(self.model(), self.held_out(), self.placement)

    def held_out(self) -> Iterator[data.Batch]:
        return data.validation_batches(
            self.corpus.validation,
            sequence_length=self.config.sequence_length,
            batch_size=self.config.batch_size,
            max_rows=self.config.validation_rows,
        )


def _diverged(what: str, bits: float, config: TrainConfig) -> FloatingPointError:
    return FloatingPointError(
        f"training diverged: {what} is {bits} (learning_rate {config.learning_rate:g})"
    )


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that a step in flight ends first.

    Only the main thread may set handlers; in another one the event is never set.
    """
    stop = threading.Event()
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _interrupts_stop(stop: threading.Event) -> Iterator[None]:
    """A KeyboardInterrupt of the callback is a request to stop, which all processes must hear."""
    try:
        yield
    except KeyboardInterrupt:
        stop.set()


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    on_step: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train a language model, or go on training one.

    SIGINT (Ctrl-C), SIGTERM and a KeyboardInterrupt of the callback end the run after the step in
    flight, with a checkpoint if there is a checkpoint_dir; the result says so. With several
    processes (`dilax.distributed.start_processes`) all of them call this, and a request to stop
    that reaches one stops all.

    Args:
        config: see `TrainConfig`.
        resume: go on from the latest checkpoint in config.checkpoint_dir; the losses are those of
            a run that was not interrupted, bit for bit on a CPU.
        on_step: called after every step, in process 0.

    Raises:
        ValueError: the text is too short, resuming without a checkpoint or with another config or
            text, or a checkpoint_dir that has checkpoints without `resume`.
        FloatingPointError: the loss is not finite.
        LostProcessError: another process of the run ended.
    """
    if not isinstance(config, TrainConfig):
        raise refuse("config", "a TrainConfig", config)
    check_bool("resume", resume)
    again = "Start all processes again"
    if config.checkpoint_dir is not None:
        again += f", with resume to go on from the last checkpoint in {config.checkpoint_dir}"
    with lost_processes_named(f"{again}."):
        return _train(config, resume, on_step)


def _train(config: TrainConfig, resume: bool, on_step: Callable[[Progress], None] | None):
    begin = time.perf_counter()
    run = _Run(config, resume)
    with _stop_requests() as stop:
        bits, tokens, validation = _train_loop(run, stop, on_step)
        run.save()
    finished = run.step == config.steps
    bigram, covered = None, 0
    if finished:
        covered = data.predicted_bytes(run.held_out())
        if validation is None:
            validation = run.evaluation()
        if not math.isfinite(validation):
            raise _diverged("the loss on the held-out files", validation, config)
        bigram = data.bigram_bits_per_byte(data.bigram_counts(run.corpus.train), run.held_out())
    return TrainResult(
        model=run.model_here(),
        step=run.step,
        bits_per_byte=tuple(bits),
        validation_bits_per_byte=validation if finished else None,
        bigram_bits_per_byte=bigram,
        tokens=tokens,
        seconds=time.perf_counter() - begin,
        checkpoint=config.checkpoint_dir,
        interrupted=not finished,
        validation_bytes=(covered, run.corpus.num_bytes[1]),
        skipped_files=run.corpus.skipped,
    )


def _train_loop(run: _Run, stop: threading.Event, on_step: Callable[[Progress], None] | None):
    """Steps until the last one or a request to stop: bits of each, tokens, last evaluation."""
    config, schedule = run.config, schedule_of(run.config)
    bits, tokens, counted, validation, start = [], 0, 0, None, time.perf_counter()
    while run.step < config.steps and not any_process(stop.is_set()):
        rate = jnp.asarray(schedule(run.step)).item()
        loss, number = run.advance()
        bits.append(loss)
        tokens += number
        if len(bits) == 1:
            start = time.perf_counter()  # the first step compiles
        else:
            counted += number
        seconds = time.perf_counter() - start
        validation = None
        if config.validate_every and run.step % config.validate_every == 0:
            validation = run.evaluation()
        if config.checkpoint_every and run.step % config.checkpoint_every == 0:
            run.save()
        if on_step is not None and jax.process_index() == 0:
            speed = counted / seconds if counted else 0.0
            with _interrupts_stop(stop):
                on_step(Progress(run.step, config.steps, loss, rate, tokens, speed, validation))
    return bits, tokens, validation
