"""Every name that this package takes from `jax.experimental.pallas`, in one place.

The Mosaic GPU interface is experimental and its names move between JAX releases; the kernels
import them from here only. What differs between the real GPU and the interpreter (which cannot
take a matrix operand from registers) is also decided here, so that kernel bodies stay the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src import config as jax_config
from jax.experimental.mosaic.gpu import utils as mgpu_utils

ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)
TILE = plgpu.Layout.WGMMA


def shared_tile(shape: Sequence[int], dtype: Any) -> Any:
    """Shared memory for `[..., rows, columns]`, tiled and swizzled so that wgmma can read it."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    tiling = plgpu.TilingTransform((8, swizzle * 8 // bits))
    return plgpu.SMEM(tuple(shape), dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def filled(shape: Sequence[int], value: float, dtype: Any, layout: Any) -> jax.Array:
    """A constant register array of the given layout."""
    return plgpu.layout_cast(jnp.full(tuple(shape), value, dtype), layout)


def load(ref: Any, layout: Any) -> jax.Array:
    """Loads a reference (global or shared memory) into registers of the given layout."""
    return plgpu.load(ref, layout=layout, optimized=False)


def load_shared(ref: Any, layout: Any) -> jax.Array:
    """Loads a shared-memory reference with the widest accesses its tiling allows."""
    return plgpu.load(ref, layout=layout)


def product(left: Any, right: Any, shape: tuple[int, int], issued: Callable[[], None]) -> jax.Array:
    """`left @ right` from shared memory; `issued` runs once the wgmma has been issued."""

    def body(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, left, right)
        issued()
        return acc[...]

    return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))


def accumulate(
    acc: jax.Array,
    left: jax.Array,
    right: Any,
    staging: Any,
    issued: Callable[[], None] = lambda: None,
) -> jax.Array:
    """`acc + left @ right` with `left` in registers and `right` in shared memory.

    `staging` is None on a GPU. Under the interpreter it is shared memory of left's shape, because
    there a wgmma takes both operands from shared memory and cannot start from an old value.
    """
    if staging is None:

        def body(acc_ref: Any) -> None:
            plgpu.wgmma(acc_ref, left, right)
            issued()

        return pl.run_state(body)(plgpu.ACC.init(acc))
    staging[...] = left
    plgpu.commit_smem()
    return acc + product(staging, right, acc.shape, issued)


def launch(
    body: Callable[..., None],
    operands: Sequence[jax.Array],
    out_types: Sequence[Any],
    scratch: Sequence[Any],
    *,
    ctas: int,
    threads: int,
    name: str,
    inplace: Sequence[jax.Array] = (),
) -> list[jax.Array]:
    """Runs a persistent kernel of `ctas` blocks of `threads` warpgroups.

    body: called with the references of operands, inplace arrays, outputs and scratch, in order.
    inplace: arrays that the kernel updates; their new values come first in the result.
    Returns the new inplace arrays followed by the outputs.
    """
    mesh = plgpu.Mesh(
        grid=(ctas,), grid_names=("cta",), num_threads=threads, thread_name="wg", kernel_name=name
    )

    def with_scratch(*refs: Any) -> None:
        pl.run_scoped(lambda *s: body(*refs, *s), *scratch, collective_axes="wg")

    kernel = pl.kernel(
        with_scratch,
        out_type=tuple(out_types),
        mesh=mesh,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        name=name,
    )
    refs = [jax.new_ref(x, memory_space=plgpu.GMEM) for x in inplace]
    created = kernel(*operands, *refs)
    return [*(jax.freeze(r) for r in refs), *created]


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which an array varies inside a shard_map that checks it; else empty."""
    if not isinstance(x, jax.Array):
        return frozenset()
    aval = jax.typeof(x)
    manual = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(aval, "vma", ()) if manual is None else manual.varying)


def store(ref: Any, value: jax.Array) -> None:
    """Stores registers to a strided slice of global memory, element by element if need be."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def aligned_rows(start: jax.Array, size: int) -> Any:
    """The slice [start, start + size), with start known to be a multiple of 8."""
    return pl.ds(pl.multiple_of(start, 8), size)


def add_product(acc: Any, left: jax.Array, right: Any, staging: Any) -> None:
    """`acc += left @ right` for an accumulator reference; `left` registers, `right` shared.

    The product may still be running on return: read `acc` or call `plgpu.wgmma_wait` to be sure.
    `staging` as in `accumulate`.
    """
    if staging is None:
        plgpu.wgmma(acc, left, right)
        return
    staging[...] = left
    plgpu.commit_smem()
    plgpu.wgmma(acc, staging, right)
    plgpu.wgmma_wait(0)


def add_to_global(smem: Any, ref: Any, interpret: bool) -> None:
    """Adds a shared-memory tile to global memory (a TMA reduction; the order is not fixed).

    The interpreter has no reductions; there the addition is a plain load and store, right as long
    as one thread at a time adds to a place.
    """
    if interpret:
        ref[...] = ref[...] + smem[...]
    else:
        plgpu.copy_smem_to_gmem(smem, ref, reduction_op="add")


def named_barrier(operation: str, barrier: int | jax.Array, threads: int) -> None:
    """`bar.arrive` or `bar.sync` on a numbered hardware barrier (cheaper than an mbarrier)."""
    if isinstance(barrier, int):

        @plgpu.inline_mgpu()
        def fixed(_: Any) -> None:
            mgpu_utils.inline_ptx(f"bar.{operation} {barrier}, {threads};")

        fixed()
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def chosen(_: Any, number: Any) -> None:
        mgpu_utils.inline_ptx(f"bar.{operation} $0, {threads};", number.registers[()])

    chosen(barrier)


def interpreting() -> bool:
    """Whether kernels traced now run under Pallas's GPU interpreter."""
    return jax_config.pallas_tpu_interpret_mode_context_manager.value is not None
