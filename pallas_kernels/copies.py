"""Copies of tiles that lie in shared memory in one piece, from and to arrays of any size.

Mosaic copies a swizzled tile `[rows, columns]` as it describes its place, in blocks of 8 rows, so
that arrays must have whole ones. Where a row of the tile is one row of the swizzle the blocks lie
one after the other, and the tile is one box for the copy engine. That reads zeros past the last row
and the last column of an array and writes nothing there: arrays need no padding.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.compat import aligned_rows, mgpu_launch, mgpu_utils, plgpu

# Of a row of the widest swizzle.
ROW_BYTES = 128
# Heads of 16 bits of which such a row holds all.
WHOLE = ROW_BYTES // 2


def copies_boxes(head_dim: int, interpret: bool) -> bool:
    """Whether tiles of arrays with this head size are boxes. The interpreter's reads are exact."""
    return head_dim <= WHOLE and not interpret


def piece_columns(columns: int, dtype: Any, interpret: bool) -> int:
    """Columns of a result's tile that are one box, of 16 or 32 bits; else all.

    Example:
        >>> piece_columns(64, "float32", False), piece_columns(128, "float32", False)
        (32, 128)
    """
    if copies_boxes(columns, interpret):
        return min(columns, ROW_BYTES // jnp.dtype(dtype).itemsize)
    return columns


def piece(first: int, columns: int) -> Any:
    """The slice [first, first + columns) of an array's columns, of which it may have fewer."""
    # JAX refuses a slice past the end where it knows it, and Mosaic a start that is an array.
    start = jnp.int32(first)
    return aligned_rows(lax.optimization_barrier(start) if first else start, columns)


def copy_boxes(head_dim: int, interpret: bool) -> None:
    """Makes all copies that follow in the kernel take tiles as boxes, where they are.

    head_dim: columns of the kernel's tiles.
    """
    if not copies_boxes(head_dim, interpret):
        return

    @plgpu.inline_mgpu()
    def emit(context: Any) -> None:
        method = context.async_copy

        def copy(*, src_ref: Any, dst_ref: Any, gmem_transform: Any = (), **options: Any) -> None:
            match gmem_transform:
                case (mgpu_launch.TileTransform(),):
                    src_ref, dst_ref, gmem_transform = _box(src_ref), _box(dst_ref), ()
            method(src_ref=src_ref, dst_ref=dst_ref, gmem_transform=gmem_transform, **options)

        context.async_copy = copy

    emit()


def _box(ref: Any) -> Any:
    """`[rows / 8, 1, 8, columns]` in shared memory as `[rows, columns]`; others as they are."""
    kind = mgpu_utils.ir.MemRefType(ref.type)
    if not mgpu_utils.is_smem_ref(kind):
        return ref
    if kind.rank != 4 or kind.shape[1] != 1:
        raise NotImplementedError(f"a tile {tuple(kind.shape)} is no box")
    return mgpu_utils.memref_fold(ref, 0, 3)
