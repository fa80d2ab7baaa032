"""Checkpoints of training runs, by Orbax: written atomically, the latest ones kept."""

import os
import pathlib
from typing import Any

import orbax.checkpoint as ocp
from flax import nnx

from dilax._types import refuse
from dilax.longnet import LongNetLM
from dilax.on_mesh import AttentionSharding
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

    def _read(self, step: int, items: Any) -> Any:
        try:
            return self.manager.restore(step, args=items)
        except Exception as error:  # Orbax has one for each kind of damage
            raise _damaged(self.directory, step, error) from error

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
        run = self._read(step, ocp.args.Composite(run=ocp.args.JsonRestore()))["run"]
        if not isinstance(run, dict) or not {"config", "data", "text"} <= run.keys():
            raise _damaged(self.directory, step, "no description of the run")
        return run

    def restore(self, step: int, **like: Any) -> Any:
        """The named items, "params" or "optimizer", as trees like those given."""
        items = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        return self._read(step, ocp.args.Composite(**items))


def _damaged(directory: pathlib.Path, step: int, why: Any) -> ValueError:
    reason = f"{type(why).__name__}: {why}" if isinstance(why, Exception) else str(why)
    reason = " ".join(reason.split())[:200]
    return refuse(
        "checkpoint_dir", f"an undamaged checkpoint of step {step} in {directory}", reason
    )


def check_directory(name: str, directory: str) -> None:
    """Refuse what neither is nor can become a directory to write checkpoints in."""
    path = pathlib.Path(directory).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise refuse(name, "a directory that can be written, or made", directory)


def load_model(checkpoint_dir: str, step: int | None = None) -> tuple[LongNetLM, TrainConfig]:
    """The model of a checkpoint directory that `train` wrote, and the run's config.

    Args:
        checkpoint_dir: as in the run's `TrainConfig`.
        step: which checkpoint; None: the latest.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
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


def new_model(config: TrainConfig, sharding: AttentionSharding | None = None) -> tuple:
    """Graph, parameters as nested dicts, and the rest of a freshly started model."""
    graphdef, params, rest = nnx.split(
        LongNetLM(config.model, sharding=sharding, rngs=nnx.Rngs(config.seed)), nnx.Param, ...
    )
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def merged(graphdef: Any, params: Any, rest: Any) -> LongNetLM:
    """The model of its three parts: graph, parameters and the rest of the state."""
    return nnx.merge(graphdef, nnx.State(params), nnx.State(rest))
