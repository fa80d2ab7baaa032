"""A sequence on a mesh axis: which positions lie on which device, and the way there and back.

Device d of P holds C chunks of T / (C P) consecutive positions each. "contiguous": one chunk, the
d-th. "zigzag": chunks d and 2P - 1 - d of 2P, so that under causality every device has the same
work (Zhu, ring-flash-attention, 2024).
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LAYOUTS = ("contiguous", "zigzag")
AxisName = str | tuple[str, ...]


def chunks_of(layout: str) -> int:
    """Chunks of consecutive positions that one device holds.

    Raises:
        ValueError: the layout is unknown.

    Example:
        >>> chunks_of("zigzag")
        2
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout: wanted one of {', '.join(LAYOUTS)}, got {layout!r}")
    return 1 + LAYOUTS.index(layout)


def chunk_length(length: int, devices: int, layout: str) -> int:
    """Positions in one chunk of a sequence of `length`.

    Raises:
        ValueError: the devices' chunks do not divide the sequence; the message says what would.

    Example:
        >>> chunk_length(32, 4, "zigzag")
        4
    """
    if devices < 1:
        raise ValueError(f"devices: wanted a positive number, got {devices}")
    parts = devices * chunks_of(layout)
    if length % parts:
        raise ValueError(
            f"sequence of {length} tokens on {devices} devices: wanted a multiple of {parts} with"
            f" layout {layout!r}; pad it to {-(-length // parts) * parts} and mask the padding with"
            " segment ids 0"
        )
    return length // parts


def chunk_starts(length: int, devices: int, layout: str) -> np.ndarray:
    """int64 [P, C]: the first position of every chunk of every device.

    Example:
        >>> chunk_starts(16, 2, "zigzag").tolist()
        [[0, 12], [4, 8]]
    """
    size = chunk_length(length, devices, layout)
    device = np.arange(devices)
    first = [device] if layout == "contiguous" else [device, 2 * devices - 1 - device]
    return np.stack(first, 1) * size


def positions(length: int, devices: int, layout: str) -> np.ndarray:
    """int32 [T]: the position of every row in the order in which the devices hold them.

    Example:
        >>> positions(8, 2, "zigzag").tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
    """
    starts = chunk_starts(length, devices, layout).reshape(-1, 1)
    size = chunk_length(length, devices, layout)
    return (starts + np.arange(size)).reshape(-1).astype(np.int32)


def to_layout(x: Any, devices: int, layout: str, axis: int = 1) -> Any:
    """x with its sequence axis in the order of a layout: data, labels, segment ids, positions.

    Example:
        >>> to_layout(np.arange(8), 2, "zigzag", axis=0).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]
    """
    return _chunkwise(x, devices, layout, axis, inverse=False)


def from_layout(x: Any, devices: int, layout: str, axis: int = 1) -> Any:
    """The inverse of `to_layout`.

    Example:
        >>> from_layout(np.array([0, 1, 6, 7, 2, 3, 4, 5]), 2, "zigzag", axis=0).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return _chunkwise(x, devices, layout, axis, inverse=True)


def _chunkwise(x: Any, devices: int, layout: str, axis: int, inverse: bool) -> Any:
    size = chunk_length(x.shape[axis], devices, layout)
    order = chunk_starts(x.shape[axis], devices, layout).reshape(-1) // size
    if layout == "contiguous":
        return x
    xp: Any = jnp if isinstance(x, jax.Array) else np
    cut = x.reshape(*x.shape[:axis], len(order), size, *x.shape[axis + 1 :])
    cut = xp.take(cut, np.argsort(order) if inverse else order, axis=axis)
    return cut.reshape(x.shape)


def axis_size(axis_name: AxisName) -> int:
    """Devices along one mesh axis or several, inside a shard_map."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    return math.prod(lax.axis_size(name) for name in names)


def local_positions(local_length: int, axis_name: AxisName, layout: str) -> jax.Array:
    """int32 [T / P]: the positions of this device's rows, inside a shard_map over axis_name."""
    devices = axis_size(axis_name)
    starts = chunk_starts(local_length * devices, devices, layout).astype(np.int32)
    size = local_length // starts.shape[1]
    mine = jnp.asarray(starts)[lax.axis_index(axis_name)]
    return (mine[:, None] + jnp.arange(size, dtype=jnp.int32)[None]).reshape(-1)


def aligned_groups(devices: int, size: int) -> list[list[int]]:
    """Runs of `size` consecutive devices, as collectives take them.

    Example:
        >>> aligned_groups(4, 2)
        [[0, 1], [2, 3]]
    """
    return [list(range(i, i + size)) for i in range(0, devices, size)]


def vary_like(x: jax.Array | None, others: Sequence[Any]) -> Any:
    """x made to vary over every manual axis that any of the others varies over.

    Done outside a custom_vjp: its transpose is the sum over those axes that a gradient needs.
    Where shard_map does not check what varies there is nothing to do.
    """
    if x is None:
        return None
    wanted = frozenset().union(*(varying_axes(y) for y in others if y is not None))
    missing = tuple(sorted(wanted - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def varying_axes(x: Any) -> frozenset[str]:
    """The manual axes over which x varies, where shard_map checks it; else empty."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)
