"""Checkpoints of training runs, by Orbax: written atomically, the latest ones kept."""

import pathlib
from typing import Any

import orbax.checkpoint as ocp
from flax import nnx

from dilax._types import refuse
from dilax.longnet import LongNetLM
from dilax.train_config import TrainConfig


class Checkpoints:
    """The checkpoints of one run: parameters, optimizer state, and what the run reads and is.

    Args:
        directory: of the run.
        keep: how many are kept, the latest ones; None: only to read, the directory exists.
    """

    def __init__(self, directory: str, keep: int | None = None):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=keep is not None
        )
        self.directory = pathlib.Path(directory).absolute()
        self.manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, params: Any, optimizer_state: Any, run: dict[str, Any]) -> None:
        """Write a checkpoint, unless the latest one is of this step."""
        if self.manager.latest_step() != step:
            args = ocp.args
            items = args.Composite(
                params=args.StandardSave(params),
                optimizer=args.StandardSave(optimizer_state),
                run=args.JsonSave(run),
            )
            self.manager.save(step, args=items)

    def run(self, step: int) -> dict[str, Any]:
        """What `save` was given as `run`."""
        return self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))[
            "run"
        ]

    def restore(self, step: int, **like: Any) -> Any:
        """The named items, "params" or "optimizer", as trees like those given."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        return self.manager.restore(step, args=ocp.args.Composite(**items))


def load_model(checkpoint_dir: str, step: int | None = None) -> tuple[LongNetLM, TrainConfig]:
    """The model of a checkpoint directory that `train` wrote, and the run's config.

    Args:
        checkpoint_dir: as in the run's `TrainConfig`.
        step: which checkpoint; None: the latest.

    Raises:
        ValueError: there is no such checkpoint.
    """
    if not pathlib.Path(checkpoint_dir).is_dir():
        raise refuse("checkpoint_dir", "a directory with checkpoints", str(checkpoint_dir))
    checkpoints = Checkpoints(checkpoint_dir)
    steps = checkpoints.manager.all_steps()
    if not steps:
        raise refuse("checkpoint_dir", "a directory with checkpoints", str(checkpoint_dir))
    if step is not None and step not in steps:
        raise refuse("step", f"one of {sorted(steps)}", step)
    step = max(steps) if step is None else step
    config = TrainConfig.from_dict(checkpoints.run(step)["config"])
    graphdef, params, rest = new_model(config)
    params = checkpoints.restore(step, params=params).params
    return merged(graphdef, params, rest), config


def new_model(config: TrainConfig) -> tuple[Any, Any, Any]:
    """Graph, parameters as nested dicts, and the rest of a freshly started model."""
    graphdef, params, rest = nnx.split(
        LongNetLM(config.model, rngs=nnx.Rngs(config.seed)), nnx.Param, ...
    )
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def merged(graphdef: Any, params: Any, rest: Any) -> LongNetLM:
    """The model of its three parts: graph, parameters and the rest of the state."""
    return nnx.merge(graphdef, nnx.State(params), nnx.State(rest))
