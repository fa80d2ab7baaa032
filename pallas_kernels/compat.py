"""Every name that this package takes from `jax.experimental.pallas`, in one place.

The Mosaic GPU interface is experimental and its names move between JAX releases; the kernels
import them from here only. What differs between the real GPU and the interpreter (which cannot
take a matrix operand from registers) is also decided here, so that kernel bodies stay the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax._src import config as jax_config
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

ROW = plgpu.Layout.WGMMA.reduce(1)
COLUMN = plgpu.Layout.WGMMA.reduce(0)
TILE = plgpu.Layout.WGMMA
# A numbered hardware barrier that neither Mosaic, which counts from 0, nor the turns use.
MEETING = 14


def shared_tile(shape: Sequence[int], dtype: Any, columns: int | None = None) -> Any:
    """Shared memory for `[..., rows, columns]`, tiled and swizzled so that wgmma can read it.

    columns: tiled as if it had so many, because both factors of a product must be tiled alike.
    """
    kind = _shared_kind(shape[-1] if columns is None else columns, dtype)
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
        staging[...] = left
        plgpu.commit_smem()
        total[...] = total[...] + product(staging, right, total.shape, lambda: None)

    def value(self) -> jax.Array:
        """The sum once all products are in it."""
        if self.stand_in is not None:
            return self.stand_in[0][...]
        # The barrier keeps arithmetic on the registers behind the wait.
        return jax.lax.optimization_barrier(self.accumulator[...])

    def scale(self, factor: jax.Array) -> None:
        """Multiplies every row by its factor."""
        value = self.value()
        value = value * jax.lax.broadcast_in_dim(factor, value.shape, [0])
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


def value_while(acc: Any, running: int, interpret: bool) -> jax.Array:
    """An accumulator's value, while the last `running` products begun may still run."""
    if interpret:
        return acc[...]
    # The barrier keeps arithmetic on the registers behind the wait.
    return jax.lax.optimization_barrier(plgpu.wgmma_accumulator_load(acc, wait_n=running))


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


def add_rows(
    smem: Any, refs: dict[int, Any], rate: Any, at: tuple[Any, ...], interpret: bool
) -> None:
    """Adds a float32 shared tile to rows of global memory that lie `rate` apart (in any order).

    refs: by rate, `[B, N, T, H]`, all the same array; under the interpreter, which cannot add to
    strided rows of one array, arrays `[B, N, T / rate, rate, H]`. rate: which of them, may be
    traced. at: int32 scalars (plane, row of the view, column), with plane (b * N + n) * T + residue
    (under the interpreter a tuple: example, head, residue). Rows past the end are left out.
    """
    plane, row, column = at
    for one, ref in refs.items():
        if interpret:
            example, head, residue = plane
            rows, width = aligned_rows(row, smem.shape[0]), smem.shape[1]
            window = ref.at[example, head, rows, residue, pl.ds(column, width)]
            pl.when(rate == one)(functools.partial(add_to_global, smem, window, True))
        else:
            _add_rows(smem, ref, one, jnp.int32(rate), at)


def _add_rows(smem: Any, ref: Any, rate: int, wanted: Any, at: tuple[Any, ...]) -> None:
    tiling, swizzle = _tiling(smem.shape[-1], smem.dtype)
    kinds = (_shared_kind(smem.shape[-1], smem.dtype), plgpu.RefType())

    @plgpu.inline_mgpu(arg_types=(*kinds, *(plgpu.Layout.WG_SPLAT,) * 4))
    def emit(context: Any, source: Any, target: Any, chosen: Any, *scalars: Any) -> None:
        arith, index = mgpu_utils.arith, mgpu_utils.ir.IndexType.get()
        plane, row, column = (arith.index_cast(index, x.registers[()]) for x in scalars)
        number = chosen.registers[()]
        same = arith.cmpi(arith.CmpIPredicate.eq, number, mgpu_utils.c(rate, number.type))
        thread = mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARPGROUP)
        rows, columns = (
            mgpu_utils.ds(i, n) for i, n in zip((row, column), smem.shape, strict=True)
        )
        # A predicate, not a branch: accumulators in flight do not survive many of those.
        context.async_copy(
            src_ref=source,
            dst_ref=target,
            gmem_slice=(plane, mgpu_utils.c(0, index), rows, columns),
            gmem_transform=(_Strided(rate, tuple(ref.shape)), mgpu_launch.TileTransform(tiling)),
            swizzle=swizzle,
            reduction_op="add",
            predicate=arith.andi(thread, same),
        )

    emit(smem, ref, wanted, *at)


@dataclasses.dataclass(frozen=True)
class _Strided(mgpu_launch.MemRefTransform):
    """`[B, N, T, H]` as `[B x N x T, 1, T / rate, H]` for one copy of rows that lie `rate` apart.

    The first axis steps by one row, so that example, head and residue are one index. A slice is
    given in these axes.
    """

    rate: int
    shape: tuple[int, ...]

    def apply(self, ref: Any) -> Any:
        _, _, _, head = self.shape
        ir, sizes = mgpu_utils.ir, list(self.transform_gmem_shape(self.shape))
        strides = [head, head, self.rate * head, 1]
        kind = ir.MemRefType(ref.type)
        layout = ir.StridedLayoutAttr.get(0, strides)
        return mgpu_utils.memref.reinterpret_cast(
            ir.MemRefType.get(sizes, kind.element_type, layout, kind.memory_space),
            ref,
            [],
            [],
            [],
            static_offsets=[0],
            static_sizes=sizes,
            static_strides=strides,
        )

    def transform_gmem_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        del shape
        batch, heads, length, head = self.shape
        return batch * heads * length, 1, length // self.rate, head

    def transform_index(self, idx: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(idx)

    def transform_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def batch(self, leading_rank: int) -> Any:
        del leading_rank
        return self


def _tiling(columns: int, dtype: Any) -> tuple[tuple[int, int], int]:
    """(tile, swizzle) of `shared_tile`."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(columns * bits)
    return (8, swizzle * 8 // bits), swizzle


def _shared_kind(columns: int, dtype: Any) -> Any:
    tiling, swizzle = _tiling(columns, dtype)
    return plgpu.RefType((plgpu.TilingTransform(tiling), plgpu.SwizzleTransform(swizzle)))


def store_tile(smem: Any, tile: jax.Array, interpret: bool, columns: int | None = None) -> None:
    """Stores registers to a shared tile without waiting; `meet` or `commit_smem` must follow.

    columns: as in `shared_tile`.
    """
    if interpret:
        smem[...] = tile
        return
    columns = tile.shape[-1] if columns is None else columns
    _, swizzle = _tiling(columns, tile.dtype)

    @plgpu.inline_mgpu(arg_types=(_shared_kind(columns, tile.dtype), TILE))
    def emit(_: Any, target: Any, x: Any) -> None:
        x.store_tiled(target, swizzle=swizzle)

    emit(smem, tile)


def recomputed(x: jax.Array, interpret: bool) -> jax.Array:
    """The int32 scalar x, in a way that what follows from it is not kept in registers over a loop.

    The compiler moves what does not change in a loop ahead of it; addresses of shared tiles are
    many, cheap to compute, and spill to memory if they are kept.
    """
    if interpret:
        return x
    kind = plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,), return_type=kind)
    def emit(_: Any, number: Any) -> Any:
        value = mgpu_utils.inline_ptx(
            "mov.b32 $0, $1;",
            number.registers[()],
            result_types=number.mlir_dtype,
            has_side_effects=True,
        )
        return mgpu.FragmentedArray.splat(value, (), is_signed=True)

    return emit(x)


def meet(barrier: Any, warpgroups: int, interpret: bool) -> None:
    """The warpgroups wait for each other; what they stored is then seen by matrix products.

    Copies that a thread began have then read their shared memory. barrier: for the interpreter,
    which has no numbered barriers.
    """
    if interpret:
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)
        return

    @plgpu.inline_mgpu()
    def emit(_: Any) -> None:
        mgpu_utils.inline_ptx(
            "cp.async.bulk.wait_group.read 0; fence.proxy.async.shared::cta;"
            f" bar.sync {MEETING}, {warpgroups * 128};"
        )

    emit()


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


def partial_sums(x: jax.Array, interpret: bool) -> jax.Array:
    """Row sums of x `[rows, columns]` in which each thread has summed only what it holds.

    They can be added, and scaled by rows; `total_sums` makes sums of them. That saves the exchange
    between threads in every step of a loop. (The interpreter has whole rows, and sums them.)
    """
    if interpret:
        return x.sum(axis=1)
    rows = plgpu.ShapeDtypeStruct(x.shape[:1], x.dtype, ROW)

    @plgpu.inline_mgpu(arg_types=(TILE,), return_type=rows)
    def emit(_: Any, tile: Any) -> Any:
        add, halves = mgpu_utils.arith.addf, []
        # Registers [1, columns / 8, 1, 1, 2 rows, ...], each a pair of columns.
        for pairs in np.moveaxis(tile.registers, 4, 0).reshape(2, -1):
            chains = [functools.reduce(add, pairs[i::4]) for i in range(4)]
            pair = add(add(*chains[:2]), add(*chains[2:]))
            halves.append(add(_element(pair, 0), _element(pair, 1)))
        return _row_array(halves, tile.mlir_dtype)

    return emit(x)


def total_sums(x: jax.Array, interpret: bool) -> jax.Array:
    """The sums of `partial_sums`: adds up what the four threads of a row hold."""
    if interpret:
        return x

    @plgpu.inline_mgpu(arg_types=(ROW,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, ROW))
    def emit(_: Any, rows: Any) -> Any:
        totals = []
        for register in rows.registers.flat:
            total = _element(register, 0)
            for distance in (1, 2):
                other = mgpu_utils.shfl_bfly(total, distance)
                total = mgpu_utils.arith.addf(total, other)
            totals.append(total)
        return _row_array(totals, rows.mlir_dtype)

    return emit(x)


def _element(register: Any, i: int) -> Any:
    position = mgpu_utils.ir.DenseI64ArrayAttr.get([i])
    return mgpu_utils.vector.extract(register, dynamic_position=[], static_position=position)


def _row_array(values: Sequence[Any], dtype: Any) -> Any:
    vector = mgpu_utils.ir.VectorType.get((1,), dtype)
    registers = np.empty((1, 1, len(values), 1, 1), dtype=object)
    for i, value in enumerate(values):
        registers[0, 0, i, 0, 0] = mgpu_utils.vector.broadcast(vector, value)
    return mgpu.FragmentedArray(
        _registers=registers, _layout=mgpu.WGMMA_ROW_LAYOUT, _is_signed=None
    )


def pin(x: jax.Array, interpret: bool) -> None:
    """Keeps the arithmetic that x comes from ahead of the waits that follow.

    x: a tile or row array, all >= 0. The assembler moves a wait for running products up, in front
    of arithmetic that was meant to overlap with them, but not across an instruction with a side
    effect: here the arrival at a barrier that nobody uses, if the bits of x are a negative NaN's,
    which no arithmetic gives.
    """
    if interpret:
        return

    @plgpu.inline_mgpu(arg_types=(ROW if x.ndim == 1 else TILE,))
    def emit(_: Any, array: Any) -> None:
        int32 = mgpu_utils.ir.IntegerType.get_signless(32)
        bits = [mgpu_utils.bitcast(register, int32) for register in array.registers.flat]
        union = functools.reduce(mgpu_utils.arith.ori, bits)
        mgpu_utils.inline_ptx(
            "{ .reg .pred p; setp.eq.b32 p, $0, 0xffffdead; @p bar.arrive 15, 256; }", union
        )

    emit(x)


def interpreting() -> bool:
    """Whether kernels traced now run under Pallas's GPU interpreter."""
    return jax_config.pallas_tpu_interpret_mode_context_manager.value is not None
