"""Instructions that Pallas has no name for, written in Mosaic: copies, barriers, sums of registers.

Each has a form for the interpreter, so that kernel bodies stay the same.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.compat import (
    ROW,
    TILE,
    add_to_global,
    aligned_rows,
    load,
    mgpu,
    mgpu_launch,
    mgpu_utils,
    pl,
    plgpu,
    shared_kind,
    store,
    tiling_of,
)
from pallas_kernels.config import ROWS

# A numbered hardware barrier that neither Mosaic, which counts from 0, nor the turns use.
MEETING = 14
# What llvm.getelementptr takes for an index that is a value.
DYNAMIC = -(1 << 31)


def take_view(number: Any, rates: Sequence[int], interpret: bool) -> None:
    """Makes tiles of arrays `[B, T / r, r, N, H]` come from and go to `[B, T / rate, rate, N, H]`.

    In all of the kernel that follows, whatever their static r; rate = rates[number], number an
    int32 scalar. The two differ in the descriptors of copies only: example, residue and head lie
    where they were. The interpreter's arrays have one view.
    """
    if interpret or len(rates) < 2:
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def emit(context: Any, view: Any) -> None:
        method, chosen = context._get_tma_desc, view.registers[()]

        def described(ref: Any, transforms: Any, *args: Any, **options: Any) -> Any:
            if mgpu_utils.ir.MemRefType(ref.type).rank != len("BTrNH"):
                return method(ref, transforms, *args, **options)

            def one(rate: int) -> Any:
                return method(ref, (_Viewed(rate), *transforms), *args, **options)

            return _one_of(context, one, rates, chosen)

        context._get_tma_desc = described

    emit(number)


def _one_of(
    context: Any, descriptor: Callable[[int], Any], rates: Sequence[int], number: Any
) -> Any:
    """The address of the descriptor of rates[number]; they lie one after the other."""
    begin, known = context.scratch.next_offset, [descriptor(rate) for rate in rates]
    made = context.scratch.next_offset - begin
    if made not in (0, len(rates) * mgpu_launch.TMA_DESCRIPTOR_BYTES):
        raise NotImplementedError(f"{len(rates)} copy descriptors took {made} bytes")
    llvm, ir = mgpu_utils.llvm, mgpu_utils.ir
    size = mgpu_utils.c(mgpu_launch.TMA_DESCRIPTOR_BYTES, number.type)
    return llvm.getelementptr(
        known[0].type,
        known[0],
        [mgpu_utils.arith.muli(number, size)],
        [DYNAMIC],
        ir.IntegerType.get_signless(8),
        llvm.GEPNoWrapFlags.none,
    )


def load_rows(ref: Any, at: tuple[Any, ...], stride: Any, interpret: bool) -> jax.Array:
    """Loads 64 rows of `[..., rows, stride]`; at: indices, the first row, the residue.

    stride: where it is traced, of a reference whose last two axes have other sizes, but as many
    elements.
    """
    *index, row, residue = at
    if interpret or isinstance(stride, int):
        return load(ref.at[(*index, pl.ds(row, ROWS), residue)], ROW)
    kind = plgpu.ShapeDtypeStruct((ROWS,), ref.dtype, ROW)
    count = len(index)

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), ROW, *(plgpu.Layout.WG_SPLAT,) * count), return_type=kind
    )
    def emit(_: Any, source: Any, places: Any, *index: Any) -> Any:
        values = [mgpu_utils.memref.load(source, i) for i in _elements(places, index)]
        return _row_array(values, values[0].type, places.is_signed if integer else None)

    integer = jnp.issubdtype(ref.dtype, jnp.integer)
    return emit(ref, _places(row, residue, stride), *index)


def store_rows(
    ref: Any, at: tuple[Any, ...], stride: Any, rows: jax.Array, interpret: bool
) -> None:
    """Stores 64 rows where `load_rows` takes them from."""
    *index, row, residue = at
    if interpret or isinstance(stride, int):
        store(ref.at[(*index, pl.ds(row, ROWS), residue)], rows)
        return

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), ROW, ROW, *(plgpu.Layout.WG_SPLAT,) * len(index))
    )
    def emit(_: Any, target: Any, array: Any, places: Any, *index: Any) -> None:
        registers = array.registers.flat
        for register, i in zip(registers, _elements(places, index), strict=True):
            mgpu_utils.memref.store(_element(register, 0), target, i)

    emit(ref, rows, _places(row, residue, stride), *index)


def _places(row: Any, residue: Any, stride: Any) -> jax.Array:
    iota = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW)
    return (iota + row) * stride + residue


def _elements(places: Any, index: Sequence[Any]) -> list[list[Any]]:
    """Indices of the elements that a thread holds: a row's place counts on from row 0."""
    arith, kind = mgpu_utils.arith, mgpu_utils.ir.IndexType.get()
    first = [arith.index_cast(kind, x.registers[()]) for x in index]
    first.append(mgpu_utils.c(0, kind))
    return [
        [*first, arith.index_cast(kind, _element(register, 0))]
        for register in places.registers.flat
    ]


def add_rows(
    smem: Any, refs: dict[int, Any], view: Any, at: tuple[Any, ...], interpret: bool
) -> None:
    """Adds a float32 shared tile to rows of global memory that lie `rate` apart (in any order).

    The warpgroup's threads meet before; each called `see_stores` after it stored its part.

    refs: by rate, `[B, N, T, H]`, all the same array; under the interpreter, which cannot add to
    strided rows of one array, arrays `[B, N, T / rate, rate, H]`. view: the number of one of them,
    may be traced. at: int32 scalars (plane, row of the view, column), plane = (b * N + n) * T +
    residue. Rows past the end are left out.
    """
    plane, row, column = at
    if interpret:
        for number, ref in enumerate(refs.values()):
            _, heads, rows, stride, _ = ref.shape
            length = jnp.int32(rows * stride)
            residue, rest = lax.rem(plane, length), lax.div(plane, length)
            example, head = lax.div(rest, jnp.int32(heads)), lax.rem(rest, jnp.int32(heads))
            rows, width = aligned_rows(row, smem.shape[0]), smem.shape[1]
            window = ref.at[example, head, rows, residue, pl.ds(column, width)]
            pl.when(view == number)(functools.partial(add_to_global, smem, window, True))
        return
    _add_rows(smem, next(iter(refs.values())), tuple(refs), jnp.int32(view), at)


def _add_rows(smem: Any, ref: Any, rates: Sequence[int], wanted: Any, at: tuple[Any, ...]) -> None:
    tiling, swizzle = tiling_of(smem.shape[-1], smem.dtype)
    kinds = (shared_kind(smem.shape[-1], smem.dtype), plgpu.RefType())

    @plgpu.inline_mgpu(arg_types=(*kinds, *(plgpu.Layout.WG_SPLAT,) * 4))
    def emit(context: Any, source: Any, target: Any, chosen: Any, *scalars: Any) -> None:
        arith, index = mgpu_utils.arith, mgpu_utils.ir.IndexType.get()
        plane, row, column = (arith.index_cast(index, x.registers[()]) for x in scalars)
        number = chosen.registers[()]
        thread = mgpu_utils.single_thread_predicate(mgpu_utils.ThreadSubset.WARPGROUP)
        rows, columns = (
            mgpu_utils.ds(i, n) for i, n in zip((row, column), smem.shape, strict=True)
        )

        def descriptor(original: Any, transforms: Any, *args: Any, **options: Any) -> Any:
            def one(rate: int) -> Any:
                strided = _Strided(rate, tuple(ref.shape))
                those = tuple(strided if isinstance(t, _Strided) else t for t in transforms)
                return original(those, *args, **options)

            return _one_of(context, one, rates, number)

        mgpu_utils.warpgroup_barrier()
        # One copy whose descriptor is chosen: each copy costs 100 to 300 cycles, even one whose
        # predicate is false.
        with _descriptors(context, descriptor):
            context.async_copy(
                src_ref=source,
                dst_ref=target,
                gmem_slice=(plane, mgpu_utils.c(0, index), rows, columns),
                gmem_transform=(
                    _Strided(rates[0], tuple(ref.shape)),
                    mgpu_launch.TileTransform(tiling),
                ),
                swizzle=swizzle,
                reduction_op="add",
                predicate=thread,
            )

    emit(smem, ref, wanted, *at)


@contextlib.contextmanager
def _descriptors(context: Any, chosen: Callable[..., Any]) -> Iterator[None]:
    """Copies inside take the descriptor that `chosen(original, transforms, ...)` gives."""
    method = context._get_tma_desc

    def described(ref: Any, transforms: Any, *args: Any, **options: Any) -> Any:
        def original(those: Any, *args: Any, **options: Any) -> Any:
            return method(ref, those, *args, **options)

        return chosen(original, transforms, *args, **options)

    context._get_tma_desc = described
    try:
        yield
    finally:
        context._get_tma_desc = method


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


@dataclasses.dataclass(frozen=True)
class _Viewed(mgpu_launch.MemRefTransform):
    """`[B, M, r, N, H]` as `[B, M x r / rate, rate, N, H]`, ahead of a descriptor's transforms."""

    rate: int

    def apply(self, ref: Any) -> Any:
        ir, kind = mgpu_utils.ir, mgpu_utils.ir.MemRefType(ref.type)
        sizes = list(self.transform_gmem_shape(kind.shape))
        strides = list(mgpu_utils.get_contiguous_strides(sizes))
        return mgpu_utils.memref.reinterpret_cast(
            ir.MemRefType.get(sizes, kind.element_type, None, kind.memory_space),
            ref,
            [],
            [],
            [],
            static_offsets=[0],
            static_sizes=sizes,
            static_strides=strides,
        )

    def transform_gmem_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        batch, rows, stride, *rest = shape
        return batch, rows * stride // self.rate, self.rate, *rest

    def transform_index(self, idx: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(idx)

    def transform_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape)

    def batch(self, leading_rank: int) -> Any:
        del leading_rank
        return self


def store_tile(smem: Any, tile: jax.Array, interpret: bool) -> None:
    """Stores registers to a shared tile; `see_stores` or `commit_smem` must follow."""
    if interpret:
        smem[...] = tile
        return
    columns = tile.shape[-1]
    _, swizzle = tiling_of(columns, tile.dtype)

    @plgpu.inline_mgpu(arg_types=(shared_kind(columns, tile.dtype), TILE))
    def emit(_: Any, target: Any, x: Any) -> None:
        x.store_tiled(target, swizzle=swizzle)

    emit(smem, tile)


def store_transposed(smem: Any, tile: jax.Array, interpret: bool, columns: int) -> None:
    """Stores registers `[64, 64]` of 16 bits, transposed, to a shared tile.

    `see_stores` or `meet` must follow. columns: as in `shared_tile`.
    """
    if interpret:
        smem[...] = tile.T
        return
    _, swizzle = tiling_of(columns, tile.dtype)

    @plgpu.inline_mgpu(arg_types=(shared_kind(columns, tile.dtype), TILE))
    def emit(_: Any, target: Any, x: Any) -> None:
        arith, i32 = mgpu_utils.arith, mgpu_utils.ir.IntegerType.get_signless(32)

        def const(value: int) -> Any:
            return mgpu_utils.c(value, i32)

        # Of a warp, 16 rows; of a store, two times two blocks of 8 x 8, of which a thread gives the
        # place of one row of 16 bytes.
        thread, chunks = mgpu_utils.thread_idx(), swizzle // 16
        row = arith.andi(thread, const(7))
        warp = arith.andi(arith.shrui(thread, const(5)), const(3))
        block = arith.andi(arith.shrui(thread, const(3)), const(1))
        block = arith.addi(arith.muli(warp, const(2)), block)
        second = arith.andi(arith.shrui(thread, const(4)), const(1))
        turned = arith.shrui(arith.muli(row, const(swizzle)), const(7))
        chunk = arith.xori(arith.andi(block, const(chunks - 1)), turned)
        tile_of = arith.divui(block, const(chunks))
        parts = ((second, 1024), (tile_of, 8 * swizzle), (row, swizzle), (chunk, 16))
        offset = functools.reduce(
            arith.addi, [arith.muli(value, const(factor)) for value, factor in parts]
        )
        base = mgpu_utils.llvm.ptrtoint(i32, mgpu_utils.memref_ptr(target))
        address = arith.addi(base, offset)
        # Registers [1, columns / 8, 1, 1, 2 rows, ...].
        halves = np.moveaxis(x.registers, 4, 0).reshape(2, -1)
        for i in range(0, halves.shape[1], 2):
            four = [mgpu_utils.bitcast(halves[h, i + j], i32) for j in range(2) for h in range(2)]
            mgpu_utils.inline_ptx(
                f"stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [$0+{1024 * i}],"
                " {$1, $2, $3, $4};",
                address,
                *four,
            )

    emit(smem, tile)


def store_words(ref: Any, words: Sequence[Any], interpret: bool) -> None:
    """Stores int32 scalars to shared memory, from its beginning, without waiting.

    An arrival at a barrier must follow: it shows them to those who wait there.
    """
    words = [jnp.int32(word) for word in words]
    if interpret:
        for i, word in enumerate(words):
            ref[i] = word
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *(plgpu.Layout.WG_SPLAT,) * len(words)))
    def emit(_: Any, target: Any, *scalars: Any) -> None:
        index = mgpu_utils.ir.IndexType.get()
        for i, scalar in enumerate(scalars):
            mgpu_utils.memref.store(scalar.registers[()], target, [mgpu_utils.c(i, index)])

    emit(ref, *words)


def see_stores(interpret: bool) -> None:
    """What this thread stored to shared memory is seen by copies after the next `add_rows`."""
    if interpret:
        plgpu.commit_smem()
        return

    @plgpu.inline_mgpu()
    def emit(_: Any) -> None:
        mgpu_utils.inline_ptx("fence.proxy.async.shared::cta;")

    emit()


def recomputed(x: jax.Array, interpret: bool) -> jax.Array:
    """x, an int32 scalar or a tile of 16 bits, so that what follows is computed here, not earlier.

    The compiler moves what does not change in a loop ahead of it, and conversions ahead of waits.
    Addresses of shared tiles are many, a tile in 32 bits is twice as large, and both spill to
    memory if they are kept.
    """
    if interpret:
        return x
    layout = TILE if x.ndim else plgpu.Layout.WG_SPLAT
    kind = plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout)

    @plgpu.inline_mgpu(arg_types=(layout,), return_type=kind)
    def emit(_: Any, array: Any) -> Any:
        int32 = mgpu_utils.ir.IntegerType.get_signless(32)
        registers = np.empty_like(array.registers)
        for i, register in np.ndenumerate(array.registers):
            same = mgpu_utils.inline_ptx(
                "mov.b32 $0, $1;",
                mgpu_utils.bitcast(register, int32),
                result_types=int32,
                has_side_effects=True,
            )
            registers[i] = mgpu_utils.bitcast(same, register.type)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=array.layout, _is_signed=array.is_signed
        )

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


def above(sums: jax.Array, limit: float, interpret: bool) -> jax.Array:
    """Whether a warp has `partial_sums`, all >= 0, above a limit, or that are no numbers.

    The warps of a warpgroup may differ, so no matrix product, and no wait for one, may depend on
    it. (The interpreter has no warps.)
    """
    if interpret:
        return jnp.any(~(sums <= limit))
    kind = plgpu.ShapeDtypeStruct((), jnp.int32, plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(ROW,), return_type=kind)
    def emit(_: Any, rows: Any) -> Any:
        int32 = mgpu_utils.ir.IntegerType.get_signless(32)
        total = functools.reduce(
            mgpu_utils.arith.addf, [_element(register, 0) for register in rows.registers.flat]
        )
        bound = np.float32(limit).view(np.uint32)
        found = mgpu_utils.inline_ptx(
            f"{{ .reg .pred p; setp.gtu.f32 p, $1, 0f{bound:08X};"
            " vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }",
            total,
            result_types=int32,
            has_side_effects=True,
        )
        return mgpu.FragmentedArray.splat(found, (), is_signed=True)

    return emit(sums) != 0


def _element(register: Any, i: int) -> Any:
    position = mgpu_utils.ir.DenseI64ArrayAttr.get([i])
    return mgpu_utils.vector.extract(register, dynamic_position=[], static_position=position)


def _row_array(values: Sequence[Any], dtype: Any, is_signed: bool | None = None) -> Any:
    vector = mgpu_utils.ir.VectorType.get((1,), dtype)
    registers = np.empty((1, 1, len(values), 1, 1), dtype=object)
    for i, value in enumerate(values):
        registers[0, 0, i, 0, 0] = mgpu_utils.vector.broadcast(vector, value)
    return mgpu.FragmentedArray(
        _registers=registers, _layout=mgpu.WGMMA_ROW_LAYOUT, _is_signed=is_signed
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
