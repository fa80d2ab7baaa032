"""Every name that this package takes from `jax.experimental.pallas`, in one place.

The Mosaic GPU interface is experimental and its names move between JAX releases; the kernels
import them from here only. What differs between the real GPU and the interpreter (which cannot
take a matrix operand from registers) is also decided here, so that kernel bodies stay the same.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax._src import config as jax_config
from jax._src.pallas.mosaic_gpu import primitives as mgpu_primitives
from jax.experimental.mosaic.gpu import core as mgpu_core
from jax.experimental.mosaic.gpu import fragmented_array as mgpu
from jax.experimental.mosaic.gpu import launch_context as mgpu_launch
from jax.experimental.mosaic.gpu import utils as mgpu_utils

# Lowering by lanes takes half the time of Mosaic's other way, which infers layouts, and gives the
# same instructions in the loops.
PARAMETERS = plgpu.CompilerParams(
    approx_math=True, lowering_semantics=mgpu_core.LoweringSemantics.Lane
)
# It asks ptxas for its version, in a process of its own, at each branch of a kernel. Once will do.
if (assembler := getattr(mgpu.mgpu_lib, "_mosaic_gpu_ext", None)) is not None:
    assembler._get_ptxas_isa_version = functools.cache(assembler._get_ptxas_isa_version)


def _finalize_size(scratch: Any, original: Callable[[Any], None]) -> None:
    """Makes the kernel's argument of copy descriptors an array of words, not of bytes.

    The same bytes lie there. But the host's code handles each element by itself, and compiling that
    took most of the time: with 15 descriptors of 128 bytes 8 of 13 seconds.
    """
    if not scratch.next_offset or scratch.next_offset % 8:
        return original(scratch)
    alloc, load, _ = scratch._find_alloc_load_and_device_ptr()
    original(scratch)
    word = mgpu_utils.ir.IntegerType.get_signless(64)
    words = mgpu_launch.llvm.ArrayType.get(word, scratch.next_offset // 8)
    alloc.elem_type = mgpu_utils.ir.TypeAttr.get(words)
    load.result.set_type(words)


by_bytes = mgpu_launch.Scratch.finalize_size
setattr(  # noqa: B010  its own signature lacks what is bound here
    mgpu_launch.Scratch,
    "finalize_size",
    functools.partialmethod(_finalize_size, original=by_bytes),
)

# The module that makes instructions of a product (its package has a function of that name), and
# what lowers one, among the rules of others.
instructions_of_products = importlib.import_module("jax.experimental.mosaic.gpu.wgmma")
product_primitive = mgpu_primitives.wgmma_p
lowering_rules = mgpu_primitives.lowering.mosaic_lowering_rules[
    mgpu_primitives.gpu_core.LANExWG_SEMANTICS
]

ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)
TILE = plgpu.Layout.WGMMA


def shared_tile(shape: Sequence[int], dtype: Any, columns: int | None = None) -> Any:
    """Shared memory for `[..., rows, columns]`, tiled and swizzled so that wgmma can read it.

    columns: tiled as if it had so many, because both factors of a product must be tiled alike.
    """
    kind = shared_kind(shape[-1] if columns is None else columns, dtype)
    return plgpu.SMEM(tuple(shape), dtype, transforms=kind.transforms)


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


class Sum:
    """A sum of matrix products, in the registers of one warpgroup.

    `stand_in` is None on a GPU. The interpreter can neither change an accumulator nor multiply
    from registers; there it is shared memory: float32 of the sum's shape, and of left's shape.
    """

    def __init__(self, accumulator: Any, stand_in: tuple[Any, Any] | None):
        self.accumulator, self.stand_in = accumulator, stand_in

    def add(self, left: jax.Array, right: Any) -> None:
        """Begins to add `left @ right`, left from registers and right from shared memory."""
        if self.stand_in is None:
            plgpu.wgmma(self.accumulator, left, right)
            return
        total, staging = self.stand_in
        staging = staging.at[:, pl.ds(0, left.shape[1])]
        staging[...] = left
        plgpu.commit_smem()
        total[...] = total[...] + product(staging, right, total.shape, lambda: None)

    def value(self) -> jax.Array:
        """The sum once all products are in it."""
        if self.stand_in is not None:
            return self.stand_in[0][...]
        # The barrier keeps arithmetic on the registers behind the wait.
        return jax.lax.optimization_barrier(self.accumulator[...])

    def set(self, value: jax.Array) -> None:
        """Replaces the sum, once all products are in it."""
        if self.stand_in is None:
            self.accumulator[...] = value
        else:
            self.stand_in[0][...] = value


def with_sum(
    body: Callable[[Sum], Any], shape: tuple[int, int], stand_in: tuple[Any, Any] | None
) -> Any:
    """Runs `body` with a `Sum` that is zero."""
    if stand_in is None:
        accumulator = plgpu.ACC(shape, jnp.float32)
        return pl.run_scoped(lambda acc: body(Sum(acc, None)), accumulator)
    stand_in[0][...] = jnp.zeros(shape, jnp.float32)
    return body(Sum(None, stand_in))


def product_first(left: Any, right: Any, shape: tuple[int, int], begin_more: Any) -> jax.Array:
    """`left @ right` from shared memory, while one product begun by `begin_more` still runs."""

    def body(acc: Any) -> jax.Array:
        plgpu.wgmma(acc, left, right)
        begin_more()
        return value_while(acc, 1, False)

    return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))


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
    reductions: bool = True,
) -> list[jax.Array]:
    """Runs a persistent kernel of `ctas` blocks of `threads` warpgroups.

    body: called with the references of operands, inplace arrays, outputs and scratch, in order.
    inplace: arrays that the kernel updates; their new values come first in the result.
    reductions: whether shared memory is set aside for sums and maxima of registers.
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
        compiler_params=dataclasses.replace(
            PARAMETERS, reduction_scratch_bytes=2048 if reductions else 0
        ),
        name=name,
    )

    def run(operands: Sequence[jax.Array], inplace: Sequence[jax.Array]) -> list[jax.Array]:
        # A rule for examples traces it once more, outside of what its caller set.
        with jax.enable_x64(False):
            refs = [jax.new_ref(x, memory_space=plgpu.GMEM) for x in inplace]
            created = kernel(*operands, *refs)
            return [*(jax.freeze(r) for r in refs), *created]

    if jax.__version_info__ < (0, 12):  # it cannot map scratch memory: one call after the other
        return jax.custom_batching.sequential_vmap(run)(list(operands), list(inplace))
    # To transformations one operation: an array that the kernel updates may be a constant, but
    # then the reference to it must be neither shared by examples nor kept for the backward pass.
    whole = jax.custom_batching.custom_vmap(run)

    @whole.def_vmap
    def _(size: int, mapped: Any, operands: Any, inplace: Any) -> Any:
        axes = [0 if one else None for one in mapped[0]]
        inplace = [
            x if one else jax.lax.broadcast(x, (size,))
            for x, one in zip(inplace, mapped[1], strict=True)
        ]
        results = jax.vmap(run, in_axes=(axes, 0), axis_size=size)(operands, inplace)
        return results, [True] * len(results)

    return whole(list(operands), list(inplace))


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


def value_while(acc: Any, running: int, interpret: bool) -> jax.Array:
    """An accumulator's value, while the last `running` products begun may still run."""
    if interpret:
        return acc[...]
    # The barrier keeps arithmetic on the registers behind the wait.
    return jax.lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=running))


def from_start(
    body: Callable[[Any, Callable[[], jax.Array]], None],
    shape: tuple[int, ...],
    start: jax.Array | None,
    interpret: bool,
) -> None:
    """Runs `body(accumulator, value)` with a float32 accumulator that starts from `start`, or 0.

    value: () -> what it holds when no product runs any more. The interpreter's accumulators start
    from 0; there the start is added to what it holds.
    """

    def run(acc: Any) -> None:
        def value() -> jax.Array:
            held = value_while(acc, 0, interpret)
            return held + start if interpret and start is not None else held

        body(acc, value)

    if interpret or start is None:
        pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))
    else:
        pl.run_state(run)(plgpu.ACC.init(start))


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

    The interpreter has no reductions; there the addition is a load and a copy, right as long as one
    thread at a time adds to a place.
    """
    if interpret:
        smem[...] = smem[...] + ref[...]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(smem, ref)
    else:
        plgpu.copy_smem_to_gmem(smem, ref, reduction_op="add")


def tiling_of(columns: int, dtype: Any) -> tuple[tuple[int, int], int]:
    """(tile, swizzle) of `shared_tile`."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(columns * bits)
    return (8, swizzle * 8 // bits), swizzle


def shared_kind(columns: int, dtype: Any) -> Any:
    """How Mosaic code takes a reference to a `shared_tile`."""
    tiling, swizzle = tiling_of(columns, dtype)
    return plgpu.RefType((plgpu.TilingTransform(tiling), plgpu.SwizzleTransform(swizzle)))


def interpreting() -> bool:
    """Whether kernels traced now run under Pallas's GPU interpreter."""
    return jax_config.pallas_tpu_interpret_mode_context_manager.value is not None
