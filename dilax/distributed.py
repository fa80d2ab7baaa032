"""Training on many devices and processes: their start, the mesh, where arrays lie, lost peers.

A mesh has an axis "data" over the examples of a batch and an axis "sequence" over its tokens;
parameters are on every device. Every process computes the same batches and keeps its own part, so
the data of a step and the state of the data's order depend neither on the mesh nor on the number
of processes.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dilax._types import LostProcessError, refuse
from dilax.on_mesh import AttentionSharding, parse_axes

AXES = ("data", "sequence")
# After this many seconds without a sign of life a process counts as lost.
_HEARTBEAT = 10
_SHUTDOWN = 10


def parse_mesh(mesh: str) -> dict[str, int]:
    """Sizes of the axes, in the mesh's order; an axis that is not named has size 1.

    Raises:
        ValueError: the text is not axes and sizes.

    Example:
        >>> parse_mesh("data=2")
        {'data': 2, 'sequence': 1}
    """
    wanted = f"axes among {', '.join(AXES)} with sizes, such as data=2,sequence=2"
    sizes = parse_axes(mesh, wanted)
    if not sizes.keys() <= set(AXES):
        raise refuse("mesh", wanted, mesh)
    return {name: sizes.get(name, 1) for name in AXES}


def start_processes(
    coordinator: str | None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Join the processes of a run; to be called before jax touches a device.

    Args:
        coordinator: host:port of process 0, the same on every process; "auto" asks the cluster's
            own environment (Slurm, Open MPI, Kubernetes, Cloud TPU), which also knows the numbers;
            None: this process is alone.
        num_processes, process_id: how many there are, and which one this is, from 0.

    Raises:
        ValueError: an argument is wrong or missing, or the environment is no cluster's.
        LostProcessError: not all processes came within five minutes.
    """
    _check_processes(coordinator, num_processes, process_id)
    if coordinator is None:
        return
    try:
        jax.distributed.initialize(
            None if coordinator == "auto" else coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
        )
    except ValueError as error:
        wanted = "a cluster that jax.distributed knows around it"
        raise refuse("coordinator", wanted, f"{coordinator!r} ({error})") from error
    except jax.errors.JaxRuntimeError as error:
        raise LostProcessError(
            f"process {process_id} of {num_processes} could not join the run at {coordinator}: "
            f"{_first_line(error)}. Were all of them started, with the same coordinator?"
        ) from error


def _check_processes(coordinator: str | None, num_processes: Any, process_id: Any) -> None:
    numbers = {"num_processes": num_processes, "process_id": process_id}
    if coordinator is None or coordinator == "auto":
        for name, x in numbers.items():
            if x is not None:
                raise refuse(name, "a coordinator host:port beside it", x)
        return
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise refuse("coordinator", "host:port of process 0, or auto", coordinator)
    for name, x in numbers.items():
        if x is None:
            raise refuse(name, "an int beside a coordinator", x)
    if num_processes < 1:
        raise refuse("num_processes", "a positive int", num_processes)
    if not 0 <= process_id < num_processes:
        raise refuse("process_id", f"0 to {num_processes - 1}", process_id)


@contextlib.contextmanager
def lost_processes_named(advice: str) -> Iterator[None]:
    """Turn the failure of a collective into a LostProcessError that says what to do.

    Example:
        >>> with lost_processes_named("start again"):
        ...     pass
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        text = _first_line(error)
        ours = isinstance(error, ValueError) and "UNAVAILABLE" not in text
        if jax.process_count() == 1 or ours or "RESOURCE_EXHAUSTED" in text:
            raise
        raise LostProcessError(
            f"process {jax.process_index()} of {jax.process_count()} lost another process: it has "
            f"ended or cannot be reached ({text}). {advice}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a run lie: on the devices of a mesh, or (None) on the default device.

    Explicit axes of the mesh count as Auto ones: a run places its own arrays, and XLA the rest.

    Example:
        >>> Placement(None).batch({"tokens": np.zeros((2, 8))})["tokens"].shape
        (2, 8)
    """

    mesh: jax.sharding.Mesh | None

    def __post_init__(self):
        if self.mesh is not None and set(self.mesh.axis_types) != {jax.sharding.AxisType.Auto}:
            auto = (jax.sharding.AxisType.Auto,) * len(self.mesh.axis_names)
            mesh = jax.sharding.Mesh(self.mesh.devices, self.mesh.axis_names, axis_types=auto)
            object.__setattr__(self, "mesh", mesh)

    def around(self) -> contextlib.AbstractContextManager[Any]:
        """Its mesh around a call, in place of another one of `jax.set_mesh`."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @classmethod
    def of(cls, mesh: str | None, *, batch_size: int, sequence_length: int) -> "Placement":
        """The placement of a run with such batches.

        Raises:
            ValueError: the mesh does not fit the devices, the batch or the sequence.
        """
        if mesh is None:
            if jax.process_count() > 1:
                raise refuse("mesh", "one such as data=2 with several processes", None)
            return cls(None)
        sizes = parse_mesh(mesh)
        count, available = sizes["data"] * sizes["sequence"], jax.device_count()
        if count > available or (jax.process_count() > 1 and count != available):
            where = f"the {available} devices of {jax.process_count()} processes"
            raise refuse("mesh", f"axes whose product is {where}", mesh)
        for name, axis, x in (
            ("batch_size", "data", batch_size),
            ("sequence_length", "sequence", sequence_length),
        ):
            if x % sizes[axis]:
                raise refuse(name, f"a multiple of the mesh's {axis}={sizes[axis]}", x)
        axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
        devices = jax.devices()[:count]
        return cls(jax.make_mesh(tuple(sizes.values()), AXES, axis_types, devices=devices))

    def batch(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """A batch, arrays [B, T], split over both axes; each process places its own part."""
        if self.mesh is None:
            return batch
        return {name: self._put(x, jax.P(*AXES)) for name, x in batch.items()}

    def everywhere(self, tree: Any) -> Any:
        """A tree of arrays on all devices, the same on all of them."""
        if self.mesh is None:
            return tree
        return jax.tree.map(self._put_everywhere, tree)

    def _put_everywhere(self, x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            wrap = functools.partial(jax.random.wrap_key_data, impl=jax.random.key_impl(x))
            return jax.jit(wrap)(self._put_everywhere(jax.random.key_data(x)))
        return self._put(np.asarray(x), jax.P())

    def _put(self, x: np.ndarray, spec: jax.P) -> jax.Array:
        assert self.mesh is not None
        sharding = jax.NamedSharding(self.mesh, spec)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def kept_everywhere(self, tree: Any) -> Any:
        """Inside jit: the tree, its arrays on all devices."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, jax.NamedSharding(self.mesh, jax.P()))

    @property
    def attention(self) -> AttentionSharding | None:
        """Where the attention's arrays lie."""
        if self.mesh is None:
            return None
        return AttentionSharding(sequence="sequence", batch="data", mesh=self.mesh)

    def local(self, tree: Any) -> Any:
        """A tree that is everywhere as arrays of this process alone."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x: x.addressable_data(0), tree)


def agreed(**values: Any) -> None:
    """Check that JSON-able values are the same on all processes.

    Raises:
        ValueError: they are not; on every process, naming the first that differs.

    Example:
        >>> agreed(config={"steps": 3})
    """
    if jax.process_count() == 1:
        return
    texts = {name: json.dumps(x, sort_keys=True) for name, x in values.items()}
    digests = [hashlib.sha256(text.encode()).digest() for text in texts.values()]
    mine = np.frombuffer(b"".join(digests), np.uint8).reshape(len(texts), -1)
    theirs = np.asarray(multihost_utils.process_allgather(mine))
    for i, (name, text) in enumerate(texts.items()):
        unlike = [p for p in range(len(theirs)) if not np.array_equal(theirs[p, i], theirs[0, i])]
        if unlike:
            got = f"another in process {unlike[0]} than in process 0 (here: {text[:200]})"
            raise refuse(name, "the same on every process", got)


def any_process(flag: bool) -> bool:
    """Is the flag set on any process? The same answer on all of them.

    Example:
        >>> any_process(True)
        True
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


@contextlib.contextmanager
def refused_by_all() -> Iterator[None]:
    """What one process refuses all do, so that none waits for it.

    Example:
        >>> with refused_by_all():
        ...     pass
    """
    found: ValueError | None = None
    try:
        yield
    except ValueError as error:
        found = error
    if any_process(found is not None):
        what = "text, checkpoint_dir"
        raise found or refuse(what, "right on every process", "an error on another, which says it")
