"""An account of each choice of a call: what it computes, how, where, and why nothing else.

Three choices are kept apart: the variant (what is computed) is the user's alone; the implementation
(how) and the placement (where) never change the numbers beyond the error budget.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dilax._types import UnsupportedError, refuse, shown
from dilax.attention import refuse_layout_of_order
from dilax.block_lists import BlockLists, density
from dilax.checks import (
    check_bool,
    check_dtype,
    check_index,
    check_number,
    check_qkv,
    check_ratio,
)
from dilax.create_adaptive import STANDARD
from dilax.kind_options import SEGMENT_LENGTHS, implementation_of, pattern_of, segments_of
from dilax.mesh_plan import placed_call, sharding_on
from dilax.names import Kind, find_kind
from dilax.router import Routing, budgets
from dilax.select import IMPLEMENTATIONS, check_block_size, device_of, unsupported
from dilax.spec import Combine, HeadOffset, as_spec, branches_of


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a call computes, how and where, and why every other candidate was passed over.

    passed_over has (choice, candidate, reason), with choice "variant", "implementation" or
    "placement". `str` makes a table of it. plan: with several devices, who sends how much.
    """

    kind: str
    variant: str
    implementation: str
    placement: str
    device_kind: str
    passed_over: tuple[tuple[str, str, str], ...]
    plan: str | None = None

    def __str__(self) -> str:
        rows = []
        for choice in ("variant", "implementation", "placement"):
            rows.append((choice, getattr(self, choice), "chosen"))
            rows += [("", name, why) for what, name, why in self.passed_over if what == choice]
        first, second = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = [f"{a:{first}}  {b:{second}}  {c}" for a, b, c in rows]
        plan = [] if self.plan is None else ["", self.plan]
        return "\n".join([f"kind {self.kind!r} on {self.device_kind}", *lines, *plan])


def explain(
    kind: str = "auto",
    *,
    seq_len: int,
    num_heads: int = 12,
    head_dim: int = 64,
    dtype: Any = "float32",
    segment_lengths: Any = SEGMENT_LENGTHS,
    dilation_rates: Any = None,
    num_kv_heads: int | None = None,
    kv_seq_len: int | None = None,
    batch: int = 1,
    combine: Combine = "lse",
    head_offset: HeadOffset = "interleaved",
    is_causal: bool = False,
    packed: bool = False,
    dropout: float = 0.0,
    implementation: str | None = None,
    use_flash_attn: bool | None = None,
    pattern: Any = None,
    device_kind: str | None = None,
    sparsity_ratio: float | None = None,
    block_size: int | None = None,
    pattern_type: str | None = None,
    devices: int = 1,
    mesh: Any = None,
    axis_name: Any = None,
    batch_axis: Any = None,
    head_axis: Any = None,
    layout: str | None = None,
    method: Any = None,
    ring_size: int | None = None,
    gigabytes_per_second: Any = None,
) -> Decision:
    """What a call of these sizes would run, and why not something else. Computes nothing.

    Args:
        kind: as in `create_dilated_attention` and `create_multihead_dilated_attention`.
        seq_len, kv_seq_len, num_heads, num_kv_heads, head_dim, batch, dtype: T, S (None: T), N, K
            (None: N), H, B and the dtype of query, key and value.
        segment_lengths, dilation_rates, combine, head_offset, is_causal, dropout, implementation:
            as in `dilax.dilated_attention`.
        packed: the call has segment ids or a key padding mask.
        use_flash_attn, pattern, sparsity_ratio, block_size, pattern_type: as in
            `create_dilated_attention`.
        device_kind: `jax.Device.device_kind` of another device, such as "NVIDIA H100 80GB HBM3";
            None for the default device of this process.
        mesh: for kinds on a mesh: a jax.sharding.Mesh, or axes with sizes, as "data=2,sequence=4"
            or {"host": 2, "device": 4}; then the decision has a plan.
        devices: in place of a mesh, of which only the axis of the tokens counts.
        axis_name, batch_axis, head_axis, layout, method, ring_size: as in
            `create_dilated_attention`; batch and num_heads are those of all devices.
        gigabytes_per_second: what a device receives, for the expected times of the plan: one
            number, or one for each axis of axis_name, the outermost first. None: 340 inside a host
            (the last axis), 50 between hosts.

    Raises:
        ValueError: an argument is wrong; the message says which, what was wanted and what came.
        UnsupportedError: the call would raise it: a named implementation cannot take it.

    Example:
        >>> print(explain("dilated", seq_len=4096, device_kind="cpu").implementation)
        xla
    """
    row = find_kind(kind)
    check_bool("packed", packed)
    if device_kind is not None and not isinstance(device_kind, str):
        raise refuse("device_kind", "None or the device_kind of a jax.Device", device_kind)
    arrays, options = _abstract_call(
        (batch, seq_len, seq_len if kv_seq_len is None else kv_seq_len),
        (num_heads, num_heads if num_kv_heads is None else num_kv_heads, head_dim),
        dtype,
        packed,
    )
    check_bool("is_causal", is_causal)
    check_number("dropout", dropout, 0.0, 1.0, "a Python number in [0, 1)")
    if row.adaptive and pattern is not None:
        raise refuse("pattern", f"None with kind {kind!r}, whose router finds one", pattern)
    fields = {"sparsity_ratio": sparsity_ratio, "block_size": block_size}
    fields |= {"pattern_type": pattern_type}
    router = dict(STANDARD)
    for name, x in fields.items() if row.adaptive else ():
        if x is not None and (name not in STANDARD or row.preset is not None):
            wanted = f"None with kind {kind!r}"
            why = "has its own" if name in STANDARD else "finds blocks by a router"
            raise refuse(name, f"{wanted}, which {why}", x)
        router |= {} if x is None else {name: x}
    made = None if row.adaptive else pattern_of(kind, row, False, pattern, **fields)
    segments, rates = segments_of(row, segment_lengths, dilation_rates)
    if row.adaptive and segments is not None:
        wanted = (
            f"None with kind {kind!r}: a segment is a call of its own, explain one by its"
            " length (with dropout XLA runs)"
        )
        raise refuse("segment_lengths", wanted, segment_lengths)
    variant = "block_sparse_attention" if segments is None else "dilated_attention"
    if segments is not None:
        options["branches"] = branches_of(as_spec(segments, rates), num_heads, combine, head_offset)
        variant += f", {segments} every {rates}"
    if row.adaptive:
        options["blocks"], ratio = _routed(arrays, is_causal, **router), router["sparsity_ratio"]
        variant += f", the blocks that a router finds, {ratio:.0%} of them"
    if made is not None:
        variant += f", {made}"
        if segments is None:
            heads = (num_heads, num_heads if num_kv_heads is None else num_kv_heads)
            S = seq_len if kv_seq_len is None else kv_seq_len
            options["blocks"] = made.lists(seq_len, S, *heads, is_causal=is_causal)
            kept = density(options["blocks"], seq_len, S, is_causal)
            variant += f", {kept:.1%} of the admissible blocks"
        else:
            options["blocks"] = None  # inside branches no kernel takes any
    options |= {
        "is_causal": is_causal,
        "dropout_rate": float(dropout),
        "dropout_seed": jax.ShapeDtypeStruct((2,), jnp.uint32) if dropout else None,
    }
    ordered = row.order is not None and bool(is_causal or dropout)
    if ordered:
        options["q_positions"] = jax.ShapeDtypeStruct((batch, seq_len), jnp.int32)
    named = implementation_of(row, implementation, use_flash_attn)
    if row.adaptive or made is not None:
        check_block_size(named, router["block_size"] if made is None else made.block_size)
    axes = {"axis_name": axis_name, "batch_axis": batch_axis, "head_axis": head_axis}
    axes |= {"layout": layout, "method": method}
    sharding = sharding_on(kind, row, devices, mesh, ring_size, **axes)
    reasons_of: Any = functools.partial(unsupported, device_kind=device_kind, **options)
    placed = None
    if sharding is not None:
        if row.order is not None:
            refuse_layout_of_order(sharding)
        if made is not None and segments is not None:
            raise refuse("segment_lengths", "None with a pattern on a mesh", segment_lengths)
        placed = placed_call(
            sharding,
            made,
            arrays,
            options,
            ordered=ordered,
            gigabytes_per_second=gigabytes_per_second,
            device_kind=device_kind,
        )
        reasons_of = placed.reasons_of
    elif gigabytes_per_second is not None:
        raise refuse("gigabytes_per_second", "None on one device", gigabytes_per_second)
    taken, over = _implementations(kind, row, named, arrays, reasons_of)
    if made is None and not row.adaptive:
        over += [("variant", "block_sparse", "changes the result: never chosen unasked")]
    if placed is None:
        why = "one device: nothing to place (see mesh)"
        over += [("placement", name, why) for name in ("ring", "head_parallel")]
    else:
        over += placed.passed_over
    return Decision(
        kind=kind,
        variant=variant + (f" in {row.order} order" if row.order else ""),
        implementation=taken,
        placement="where the inputs lie" if placed is None else placed.placement,
        device_kind=device_of(None).device_kind if device_kind is None else device_kind,
        passed_over=tuple(over),
        plan=None if placed is None else placed.table,
    )


def _routed(arrays: tuple, is_causal: bool, sparsity_ratio: Any, block_size: Any) -> BlockLists:
    """Lists of the shapes that a router gives, without any contents."""
    query, key = arrays[:2]
    check_ratio(sparsity_ratio)
    if check_index("block_size", block_size) == 0:
        raise refuse("block_size", "a positive int", block_size)
    routing = Routing(sparsity_ratio, block_size, "first", is_causal)
    kept = budgets(query.shape[1], key.shape[1], routing)
    counts = (query.shape[0], key.shape[2], len(kept))
    columns = jax.ShapeDtypeStruct((*counts, int(kept.max())), jnp.int32)
    counts = jax.ShapeDtypeStruct(counts, jnp.int32)
    return BlockLists(columns, counts, block_size=routing.block_size)


def _abstract_call(lengths, heads, dtype, packed: bool) -> tuple[tuple, dict[str, Any]]:
    """query, key and value of these sizes, and the primitive's options that follow from them."""
    sizes = zip(
        ("batch", "seq_len", "kv_seq_len", "num_heads", "num_kv_heads", "head_dim"),
        (*lengths, *heads),
        strict=True,
    )
    for name, x in sizes:
        if check_index(name, x) == 0:
            raise refuse(name, "a positive int", x)
    (B, T, S), (N, K, H) = lengths, heads
    dtype = check_dtype("dtype", dtype)
    query = jax.ShapeDtypeStruct((B, T, N, H), dtype)
    key = value = jax.ShapeDtypeStruct((B, S, K, H), dtype)
    check_qkv(query, key, value)
    q_ids, kv_ids = (
        jax.ShapeDtypeStruct((B, length), jnp.int32) if packed else None for length in (T, S)
    )
    options = {"scale": H**-0.5, "q_segment_ids": q_ids, "kv_segment_ids": kv_ids}
    return (query, key, value), options | {"q_start": 0, "k_start": 0, "carry": None}


def _implementations(
    kind: str, row: Kind, named: str | None, arrays: tuple, reasons_of: Callable
) -> tuple[str, list[tuple[str, str, str]]]:
    """The implementation that runs, and what was passed over."""
    reasons, over, taken = {}, [], None
    for name in IMPLEMENTATIONS:
        if named not in (None, name):
            by_kind = named == row.implementation
            who = f"kind {kind!r} runs" if by_kind else "the call names"
            over.append(("implementation", name, f"{who} {named!r}"))
            continue
        if taken is not None:
            over.append(("implementation", name, f"{taken!r} comes first and takes the call"))
            continue
        reasons[name] = reasons_of(name, *arrays)
        if not reasons[name]:
            taken = name
        over += [("implementation", name, why) for why in reasons[name]]
    if taken is None:
        raise UnsupportedError(f"query {shown(arrays[0])}, key {shown(arrays[1])}", reasons)
    return taken, over
