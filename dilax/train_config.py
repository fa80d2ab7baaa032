"""What decides a training run: the config, and the model that `dilax train` trains."""

import dataclasses
import json
import math
import pathlib
from typing import Any

from dilax import data
from dilax._types import refuse
from dilax.checks import check_index, check_number, check_positive
from dilax.distributed import parse_mesh
from dilax.longnet_config import LongNetConfig

# The fields that may change between the parts of one run: they do not change the numbers.
_FREE = ("mesh", "checkpoint_dir", "checkpoint_every", "keep_checkpoints", "validate_every")


def default_model() -> LongNetConfig:
    """The model of `dilax train`: small enough to learn something in two minutes on two cores.

    At this budget more steps teach more than more parameters do.

    Example:
        >>> default_model().segment_lengths
        (64, 512, 4096)
    """
    return LongNetConfig(
        embed_dim=96,
        num_heads=4,
        num_layers=2,
        ffn_dim=256,
        segment_lengths=(64, 512, 4096),
        dilation_rates=(1, 8, 64),
        vocab_size=data.VOCAB_SIZE,
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what a training run computes; frozen, hashable, validated.

    Args:
        model: the language model, with the vocabulary of `dilax.data`.
        text: files and directories to train on; None: the standard library's own source files.
        sequence_length, batch_size: T and B of a step.
        steps: number of steps of the whole run.
        learning_rate: the highest one, after warmup_steps of a linear rise; then it falls along a
            cosine to final_learning_rate at the last step.
        weight_decay: of AdamW, on matrices only (no norms, no biases).
        beta1, beta2: of AdamW.
        clip_norm: gradients are scaled down to this global norm.
        seed: of weights, data order and dropout.
        validation_fraction: share of files that is held out.
        validation_rows: how many packed sequences of the held-out files are evaluated; None: all.
        validate_every: steps between evaluations; None: only at the end.
        mesh: axes and sizes, such as "data=2,sequence=2": examples of a batch and tokens of a
            sequence over the devices of all processes; None: one device.
        checkpoint_dir: None for no checkpoints; several processes need one that all of them see.
        checkpoint_every: steps between checkpoints; None: only at the end or when interrupted.
        keep_checkpoints: how many are kept, the latest ones.

    Raises:
        ValueError: a field is wrong; the message says which, what was wanted and what came.

    Source: AdamW, weight decay and clipping after LongNet (arXiv:2307.02486), table 3; its numbers
    (learning rate 6e-4, beta2 0.98, clip 2, 750 steps of warm-up) are for long runs.

    Example:
        >>> TrainConfig(steps=10, warmup_steps=2).sequence_length
        4096
    """

    model: LongNetConfig = dataclasses.field(default_factory=default_model)
    text: tuple[str, ...] | None = None
    sequence_length: int = 4096
    batch_size: int = 1
    steps: int = 320
    learning_rate: float = 0.01
    final_learning_rate: float = 1e-4
    warmup_steps: int = 15
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    seed: int = 0
    validation_fraction: float = 0.1
    validation_rows: int | None = 16
    validate_every: int | None = None
    mesh: str | None = None
    checkpoint_dir: str | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2

    def __post_init__(self):
        if not isinstance(self.model, LongNetConfig):
            raise refuse("model", "a LongNetConfig", self.model)
        if self.model.vocab_size is None or self.model.vocab_size < data.VOCAB_SIZE:
            wanted = f"at least {data.VOCAB_SIZE}, the tokens of dilax.data"
            raise refuse("model.vocab_size", wanted, self.model.vocab_size)
        if self.text is not None:
            if isinstance(self.text, str | pathlib.Path) or not self.text:
                raise refuse("text", "None or a sequence of paths", self.text)
            object.__setattr__(self, "text", tuple(str(path) for path in self.text))
        for name in ("sequence_length", "batch_size", "steps", "keep_checkpoints"):
            _check_count(name, getattr(self, name))
        for name in ("validation_rows", "validate_every", "checkpoint_every"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name in ("learning_rate", "clip_norm"):
            check_positive(name, getattr(self, name))
        for name in ("final_learning_rate", "weight_decay"):
            x = getattr(self, name)
            check_number(name, x, 0, math.inf, "a Python number that is not negative")
        for name in ("beta1", "beta2"):
            check_number(name, getattr(self, name), 0, 1, "a Python number in [0, 1)")
        check_positive("validation_fraction", self.validation_fraction)
        check_number("validation_fraction", self.validation_fraction, 0, 1, "less than 1")
        if check_index("seed", self.seed) >= 2**32:
            raise refuse("seed", "an int in [0, 2**32)", self.seed)
        if check_index("warmup_steps", self.warmup_steps) >= self.steps:
            raise refuse("warmup_steps", f"less than steps={self.steps}", self.warmup_steps)
        if self.mesh is not None:
            parse_mesh(self.mesh)
        if self.checkpoint_dir is not None:
            object.__setattr__(self, "checkpoint_dir", str(self.checkpoint_dir))

    def computed(self) -> "TrainConfig":
        """The config without the fields that do not change the numbers.

        Example:
            >>> TrainConfig(checkpoint_dir="run").computed() == TrainConfig()
            True
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: defaults[name] for name in _FREE})

    def to_dict(self) -> dict[str, Any]:
        """The config as JSON-able dicts and lists; `from_dict` is the inverse."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TrainConfig":
        """The config of which `fields` is the `to_dict`.

        Example:
            >>> TrainConfig.from_dict(TrainConfig(seed=3).to_dict()).seed
            3
        """
        return cls(**{**fields, "model": LongNetConfig(**fields["model"])})


def _check_count(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, int) or x < 1:
        raise refuse(name, "a positive int", x)
