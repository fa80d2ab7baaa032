"""Attention by name: the factories of the PyTorch libraries, and an account of each choice.

Three choices are kept apart: the variant (what is computed) is the user's alone; the implementation
(how) and the placement (where) never change the numbers beyond the error budget.
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from dilax._types import UnsupportedError, refuse, shown
from dilax.adaptive import AdaptiveAttention
from dilax.attention_fn import DilatedAttention, check_dtype, check_number
from dilax.block_lists import BlockLists, density
from dilax.checks import check_bool, check_index, check_qkv
from dilax.create_adaptive import (
    STANDARD,
    adaptive_attention,
    multihead_adaptive_attention,
    said,
)
from dilax.modules import MultiheadDilatedAttention
from dilax.names import KINDS, Kind, find_kind
from dilax.on_mesh import AttentionSharding
from dilax.order import TokenOrder
from dilax.pattern_config import PRESETS, SparsePatternConfig, as_pattern
from dilax.plan_table import block_plan_table, placement, plan_table
from dilax.router import Routing, budgets
from dilax.select import IMPLEMENTATIONS, check_implementation, device_of, unsupported
from dilax.sharded import Link, chunk_length, local_reasons, plan_of
from dilax.sharded_blocks import block_plan_of, block_reasons
from dilax.spec import Combine, DilatedSpec, HeadOffset, as_spec, branches_of, within

SEGMENT_LENGTHS = (2048, 4096, 8192)
DILATION_RATES = (1, 2, 4)


def _refuse_unknown(options: dict[str, Any], valid: Iterable[str]) -> None:
    """Refuse options that are not valid, naming those that are."""
    names = sorted({*valid} - {"self", "options"})
    for name, x in options.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise refuse(name, f"an option{hint}, one of {', '.join(names)}", x)


def _pattern(kind: str, row: Kind, need_speed: Any, pattern: Any, **fields: Any) -> Any:
    """The block pattern that a kind has, or that was asked for; None: no block-sparse attention."""
    check_bool("need_speed", need_speed)
    fields = {name: x for name, x in fields.items() if x is not None}
    asked = {**fields, **({"pattern": pattern} if pattern is not None else {})}
    default = row.pattern
    if row.preset is not None:
        for name, x in asked.items():
            raise refuse(name, f"None with kind {kind!r}, which has its own pattern", x)
        return PRESETS[row.preset]
    if default is None:
        if row.names[0] != "auto":
            for name, x in (asked | ({"need_speed": True} if need_speed else {})).items():
                other = "False" if name == "need_speed" else "None"
                raise refuse(name, f"{other} with kind {kind!r}: 'block_sparse' takes it", x)
        if not asked and not need_speed:
            return None
        default = "local_window"
    if pattern is not None:
        for name, x in fields.items():
            raise refuse(name, "None with a pattern, which says it", x)
        return as_pattern("pattern", pattern)
    if row.pattern not in (None, "local_window", fields.get("pattern_type", row.pattern)):
        wanted = f"None or {row.pattern!r} with kind {kind!r}"
        raise refuse("pattern_type", wanted, fields["pattern_type"])
    return SparsePatternConfig(**{"pattern_type": default, **fields}).pattern()


def _sharding(kind: str, row: Kind, ring_size: Any, **said: Any) -> AttentionSharding | None:
    """Where a kind lies on a mesh: what it says of axes, unless the call says it."""
    if not row.mesh:
        if ring_size is not None and (isinstance(ring_size, bool) or ring_size != 1):
            raise refuse("ring_size", f"None or 1 with kind {kind!r}: 'ring' takes it", ring_size)
        for name, x in said.items():
            if x is not None:
                raise refuse(name, f"None with kind {kind!r}: 'ring' takes it", x)
        return None
    said = {name: x for name, x in said.items() if x is not None}
    own: dict[str, Any] = {
        "axis_name": row.sequence,
        "batch_axis": row.batch,
        "method": row.method,
    } | said
    return AttentionSharding(
        sequence=own["axis_name"],
        batch=own["batch_axis"],
        heads=own.get("head_axis"),
        layout=own.get("layout", "contiguous"),
        method=own["method"],
        ring_size=ring_size,
        mesh=own.get("mesh"),
    )


def _implementation_of(row: Kind, implementation: Any, use_flash_attn: Any) -> str | None:
    """What to run: the named implementation, else that of use_flash_attn, else the kind's."""
    check_implementation(implementation)
    if use_flash_attn is None:
        return row.implementation if implementation is None else implementation
    check_bool("use_flash_attn", use_flash_attn)
    forced = "pallas" if use_flash_attn else "xla"
    if implementation not in (None, forced):
        wanted = f"None or {implementation == 'pallas'} with implementation={implementation!r}"
        raise refuse("use_flash_attn", wanted, use_flash_attn)
    return forced


def _order(kind: str, row: Kind, grid: Any, order: Any) -> TokenOrder | None:
    """The token order that a kind has, or that was asked for."""
    if row.order is None:
        if grid is not None:
            raise refuse("grid", f"None with kind {kind!r}: 'hilbert' takes it", grid)
        return order
    if order is not None:
        raise refuse("order", f"None with kind {kind!r}, which has its own", order)
    return TokenOrder(grid, row.order)


def _branches(row: Kind, segment_lengths: Any, dilation_rates: Any) -> tuple[Any, Any]:
    """Segments and rates; a block-sparse kind has none that are not given."""
    sparse = row.pattern is not None or row.preset is not None or row.adaptive
    if sparse and segment_lengths in (None, SEGMENT_LENGTHS) and dilation_rates is None:
        return None, None
    spec = _spec(segment_lengths, dilation_rates)
    return spec.segment_lengths, spec.dilation_rates


def _spec(segment_lengths: Any, dilation_rates: Any) -> DilatedSpec:
    """The spec; the default lengths bring their rates along."""
    if dilation_rates is None and segment_lengths is SEGMENT_LENGTHS:
        dilation_rates = DILATION_RATES
    return as_spec(segment_lengths, dilation_rates)


def create_dilated_attention(
    kind: str = "auto",
    segment_lengths: Any = SEGMENT_LENGTHS,
    dilation_rates: Any = None,
    *,
    dropout: float = 0.0,
    attention_scale: float | None = None,
    embed_dim: int | None = None,
    num_heads: int | None = None,
    bias: bool | None = None,
    add_bias_kv: bool = False,
    add_zero_attn: bool = False,
    layer_norm: bool = False,
    gamma_init: float | None = None,
    ring_size: int | None = None,
    use_flash_attn: bool | None = None,
    use_gradient_checkpointing: Any = False,
    sparsity_ratio: float | None = None,
    block_size: int | None = None,
    pattern_type: str | None = None,
    pattern: Any = None,
    need_speed: bool = False,
    implementation: str | None = None,
    grid: Any = None,
    order: TokenOrder | None = None,
    axis_name: Any = None,
    batch_axis: Any = None,
    head_axis: Any = None,
    layout: str | None = None,
    method: Any = None,
    mesh: Any = None,
    **options: Any,
) -> DilatedAttention | AdaptiveAttention:
    """A callable (query, key, value, ...) -> out of the named kind, with its options fixed.

    Args:
        kind: "auto", "dilated" or "standard", "improved", or the class name that a PyTorch library
            has for it. All compute the same; "dilated" runs in XLA, the others on the fastest
            implementation that takes the call. Block-sparse and adaptive kinds: see
            `create_block_sparse_attention`. "hilbert" does so along a Hilbert curve through
            `grid`, and "hilbert_pallas" in the Pallas kernel.
        segment_lengths, dilation_rates: sequences of ints, or one DilatedSpec in place of both;
            default (2048, 4096, 8192) and (1, 2, 4).
        dropout: a call then needs `dropout_key`, or `deterministic=True`.
        attention_scale: factor on the logits, None for 1 / sqrt(H).
        embed_dim, num_heads: if given, calls are checked against them.
        add_zero_attn: one key with logit 0 and value 0 that every query sees.
        use_flash_attn: True demands "pallas", False "xla", None leaves the choice to `kind`.
        use_gradient_checkpointing: as in `DilatedAttention`.
        ring_size: if given, must be the number of devices along axis_name.
        bias, add_bias_kv, layer_norm, gamma_init: refused when they ask for parameters, which only
            `create_multihead_dilated_attention` has (a call takes bias_k and bias_v).
        sparsity_ratio, block_size, pattern_type: of the `SparsePatternConfig` of a block-sparse
            kind, or pattern: a whole one, a pattern or the name of a preset. With "auto" they, or
            need_speed=True, ask for block-sparse attention inside the dilated branches.
        implementation: "xla", "pallas" or None.
        grid: sizes of the 2-D or 3-D grid that the tokens are, for the kinds "hilbert".
        order: a `TokenOrder`, for the other kinds.
        axis_name, batch_axis, head_axis, layout, method, mesh: for the kinds on a mesh ("ring",
            "ring_hilbert", "head_parallel"): the mesh axes of tokens (None: "sequence"), examples
            and heads, and the rest of an `AttentionSharding`.
        options: combine, head_offset, pad_mode, average_branches of `dilax.dilated_attention`.

    Raises:
        ValueError: a name or an option is wrong; the message says which and lists the valid ones.

    Source: the factories of the dilated-attention-pytorch libraries; LongNet (arXiv:2307.02486).

    Example:
        >>> create_dilated_attention("improved", [16, 32], [1, 2], dropout=0.1)
        DilatedAttention(segment_lengths=(16, 32), dilation_rates=(1, 2), dropout=0.1)
    """
    arguments = dict(locals())
    row = find_kind(kind)
    if row.adaptive:
        return adaptive_attention(kind, row, said(create_dilated_attention, arguments))
    if row.module:
        raise refuse("kind", "a function; create_multihead_dilated_attention makes modules", kind)
    pattern = _pattern(
        kind,
        row,
        need_speed,
        pattern,
        sparsity_ratio=sparsity_ratio,
        block_size=block_size,
        pattern_type=pattern_type,
    )
    for name, x in (("add_bias_kv", add_bias_kv), ("layer_norm", layer_norm)):
        check_bool(name, x)
    parameters = {"bias": bias, "gamma_init": gamma_init}
    parameters |= {"add_bias_kv": add_bias_kv or None, "layer_norm": layer_norm or None}
    for name, x in parameters.items():
        if x is not None:
            wanted = "its default: create_multihead_dilated_attention makes what has parameters"
            raise refuse(name, wanted, x)
    fields = inspect.signature(DilatedAttention).parameters
    own = inspect.signature(create_dilated_attention).parameters
    _refuse_unknown(options, {*own, *fields})
    return DilatedAttention(
        *_branches(row, segment_lengths, dilation_rates),
        dropout=dropout,
        attention_scale=attention_scale,
        embed_dim=embed_dim,
        num_heads=num_heads,
        add_zero_attn=add_zero_attn,
        use_gradient_checkpointing=use_gradient_checkpointing,
        implementation=_implementation_of(row, implementation, use_flash_attn),
        order=_order(kind, row, grid, order),
        pattern=pattern,
        visiting_order=options.pop("visiting_order", row.visiting_order),
        sharding=_sharding(
            kind,
            row,
            ring_size,
            axis_name=axis_name,
            batch_axis=batch_axis,
            head_axis=head_axis,
            layout=layout,
            method=method,
            mesh=mesh,
        ),
        **options,
    )


def create_multihead_dilated_attention(
    kind: str = "auto",
    embed_dim: int = 768,
    num_heads: int = 12,
    segment_lengths: Any = SEGMENT_LENGTHS,
    dilation_rates: Any = None,
    *,
    fused_qkv: bool | None = None,
    layer_norm: bool | None = None,
    ring_size: int | None = None,
    use_flash_attn: bool | None = None,
    sparsity_ratio: float | None = None,
    block_size: int | None = None,
    pattern_type: str | None = None,
    pattern: Any = None,
    need_speed: bool = False,
    implementation: str | None = None,
    grid: Any = None,
    order: TokenOrder | None = None,
    axis_name: Any = None,
    batch_axis: Any = None,
    head_axis: Any = None,
    layout: str | None = None,
    method: Any = None,
    mesh: Any = None,
    rngs: nnx.Rngs | None = None,
    **options: Any,
) -> MultiheadDilatedAttention:
    """A `MultiheadDilatedAttention` of the named kind.

    Args:
        kind: "auto", "multihead_dilated" (also "dilated", "standard"), "improved_multihead" (also
            "improved"), or the class name that a PyTorch library has for it. "improved_multihead"
            has fused projections and a LayerNorm before the output projection; "multihead_dilated"
            runs in XLA, the others on the fastest implementation that takes the call.
        embed_dim, num_heads, segment_lengths, dilation_rates: as in `MultiheadDilatedAttention`;
            default segments and rates are (2048, 4096, 8192) and (1, 2, 4).
        fused_qkv, layer_norm: None for what the kind says.
        ring_size, use_flash_attn, sparsity_ratio, block_size, pattern_type, pattern, need_speed,
            implementation, grid, order, axis_name, batch_axis, head_axis, layout, method, mesh: as
            in `create_dilated_attention`. Kinds on a mesh: also "ring_multihead", "distributed"
            (examples over "data") and "ring_distributed".
        rngs: None for nnx.Rngs(0).
        options: every other option of `MultiheadDilatedAttention`.

    Raises:
        ValueError: a name or an option is wrong; the message says which and lists the valid ones.

    Source: the factories of the dilated-attention-pytorch libraries; LongNet (arXiv:2307.02486).

    Example:
        >>> layer = create_multihead_dilated_attention("improved", 64, 4, [16, 32], [1, 2])
        >>> layer(jax.numpy.ones((1, 40, 64))).shape
        (1, 40, 64)
    """
    arguments = dict(locals())
    row = find_kind(kind)
    if row.adaptive:
        given = said(create_multihead_dilated_attention, arguments)
        given = {name: x for name, x in given.items() if name not in ("embed_dim", "num_heads")}
        return multihead_adaptive_attention(kind, row, embed_dim, num_heads, given)
    pattern = _pattern(
        kind,
        row,
        need_speed,
        pattern,
        sparsity_ratio=sparsity_ratio,
        block_size=block_size,
        pattern_type=pattern_type,
    )
    own = inspect.signature(create_multihead_dilated_attention).parameters
    _refuse_unknown(
        options, {*own, *inspect.signature(MultiheadDilatedAttention.__init__).parameters}
    )
    return MultiheadDilatedAttention(
        embed_dim,
        num_heads,
        *_branches(row, segment_lengths, dilation_rates),
        fused_qkv=row.fused if fused_qkv is None else fused_qkv,
        layer_norm=row.fused if layer_norm is None else layer_norm,
        implementation=_implementation_of(row, implementation, use_flash_attn),
        order=_order(kind, row, grid, order),
        pattern=pattern,
        visiting_order=options.pop("visiting_order", row.visiting_order),
        sharding=_sharding(
            kind,
            row,
            ring_size,
            axis_name=axis_name,
            batch_axis=batch_axis,
            head_axis=head_axis,
            layout=layout,
            method=method,
            mesh=mesh,
        ),
        rngs=nnx.Rngs(0) if rngs is None else rngs,
        **options,
    )


def create_block_sparse_attention(
    kind: str = "block_sparse",
    segment_lengths: Any = None,
    dilation_rates: Any = None,
    *,
    sparse_config: Any = None,
    embed_dim: int | None = None,
    num_heads: int | None = None,
    **options: Any,
) -> DilatedAttention | MultiheadDilatedAttention | AdaptiveAttention:
    """Block-sparse attention of the named kind, a function, or a module if the kind is one.

    Args:
        kind: "block_sparse" (also "block_sparse_ring"), "hierarchical", "hilbert_post_pattern", a
            preset ("local", "global_local", "ultra_sparse", "hilbert_standard", "hilbert_ultra",
            "fine_grained", "long_range"), "block_sparse_multihead", a module, or "adaptive" and its
            preset "adaptive_standard", an `AdaptiveAttention` with a router that learns.
        segment_lengths, dilation_rates: None, or dilated branches inside which the pattern acts.
        sparse_config: the pattern: a `SparsePatternConfig`, a pattern or the name of a preset.
        embed_dim, num_heads: sizes; a module and a router need them.
        options: those of `create_dilated_attention`, or of `create_multihead_dilated_attention` for
            a module; among them sparsity_ratio, block_size, pattern_type in place of sparse_config.

    Raises:
        ValueError: a name or an option is wrong; the message says which and lists the valid ones.

    Source: the factories of the dilated-attention-pytorch libraries.

    Example:
        >>> attention = create_block_sparse_attention(sparsity_ratio=0.25, block_size=64)
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 300, 4, 16))
        >>> attention(q, k, v, is_causal=True).shape
        (1, 300, 4, 16)
    """
    row = find_kind(kind)
    if row.adaptive:
        given = {"segment_lengths": segment_lengths, "dilation_rates": dilation_rates}
        given |= {"sparse_config": sparse_config, "embed_dim": embed_dim, "num_heads": num_heads}
        given = {name: x for name, x in given.items() if x is not None}
        return adaptive_attention(kind, row, given | options)
    if row.pattern is None and row.preset is None:
        rows = [x for x in KINDS if x.pattern or x.preset or x.adaptive]
        names = [name for x in rows for name in x.names]
        raise refuse("kind", f"one of {', '.join(names)}", kind)
    if sparse_config is not None:
        if options.get("pattern") is not None:
            raise refuse("pattern", "None with a sparse_config", options["pattern"])
        options["pattern"] = sparse_config
    branches = (segment_lengths, dilation_rates)
    if not row.module:
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads}
        return create_dilated_attention(kind, *branches, **sizes, **options)
    for name, x in (("embed_dim", embed_dim), ("num_heads", num_heads)):
        if x is None:
            raise refuse(name, f"a positive int with kind {kind!r}, a module", x)
    return create_multihead_dilated_attention(
        kind, cast(int, embed_dim), cast(int, num_heads), *branches, **options
    )


def choose_implementation(seq_len: int, num_gpus: int = 1, need_speed: bool = False) -> str:
    """The kind to give to `create_multihead_dilated_attention`, as the PyTorch library's function.

    There long sequences get a block-sparse, ring or distributed kind. Here only need_speed, which
    allows another result, gives "block_sparse"; otherwise it is "improved", for any length on one
    device, and "ring_multihead" on several.

    Raises:
        ValueError: an argument is wrong, or asks for speed on several devices.

    Example:
        >>> choose_implementation(1_000_000)
        'improved'
    """
    for name, x in (("seq_len", seq_len), ("num_gpus", num_gpus)):
        if check_index(name, x) == 0:
            raise refuse(name, "a positive int", x)
    check_bool("need_speed", need_speed)
    if need_speed and num_gpus > 1:
        raise refuse("need_speed", "False with several devices: kinds on a mesh are exact", True)
    if num_gpus > 1:
        return "ring_multihead"
    return "block_sparse" if need_speed else "improved"


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
    devices: int = 1,
    layout: str = "contiguous",
    method: Any = None,
    gigabytes_per_second: float = 340.0,
) -> Decision:
    """What a call of these sizes would run, and why not something else. Computes nothing.

    Args:
        kind: as in `create_dilated_attention` and `create_multihead_dilated_attention`.
        seq_len, kv_seq_len, num_heads, num_kv_heads, head_dim, batch, dtype: T, S (None: T), N, K
            (None: N), H, B and the dtype of query, key and value.
        segment_lengths, dilation_rates, combine, head_offset, is_causal, dropout, implementation:
            as in `dilax.dilated_attention`.
        packed: the call has segment ids or a key padding mask.
        use_flash_attn, pattern: as in `create_dilated_attention`.
        device_kind: `jax.Device.device_kind` of another device, such as "NVIDIA H100 80GB HBM3";
            None for the default device of this process.
        devices: along the mesh axis of the tokens; with several the decision has a plan.
        layout, method: as in `dilax.sharded_dilated_attention`.
        gigabytes_per_second: what a device receives, for the expected times of the plan.

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
    made = None if row.adaptive else _pattern(kind, row, False, pattern)
    segments, rates = _branches(row, segment_lengths, dilation_rates)
    variant = "block_sparse_attention" if segments is None else "dilated_attention"
    if segments is not None:
        options["branches"] = branches_of(as_spec(segments, rates), num_heads, combine, head_offset)
        variant += f", {segments} every {rates}"
    if row.adaptive:
        options["blocks"] = _routed(arrays, is_causal)
        variant += f", the blocks that a router finds, {STANDARD['sparsity_ratio']:.0%} of them"
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
    if row.order is not None and (is_causal or dropout):
        options["q_positions"] = jax.ShapeDtypeStruct((batch, seq_len), jnp.int32)
    named = _implementation_of(row, implementation, use_flash_attn)
    plan = table = None
    if check_index("devices", devices) == 0:
        raise refuse("devices", "a positive int", devices)
    check_number("gigabytes_per_second", gigabytes_per_second, 1e-6, 1e12, "a positive number")
    reasons_of: Any = functools.partial(unsupported, device_kind=device_kind, **options)
    if devices > 1:
        if row.adaptive or (made is not None and segments is not None):
            raise refuse("devices", "1 with a router, or a pattern inside branches", devices)
        where = {"devices": devices, "layout": layout, "is_causal": is_causal, "packed": packed}
        where |= {"link": Link(bandwidth=gigabytes_per_second * 1e9)}
        if made is None:
            where["method"] = row.method if method is None else method
        elif method is not None:
            raise refuse("method", "None with a block pattern", method)
        plan, table, reasons_of = _placed(made, arrays, options, where, device_kind)
    taken, over = _implementations(kind, row, named, arrays, reasons_of)
    if made is None and not row.adaptive:
        over += [("variant", "block_sparse", "changes the result: never chosen unasked")]
    if devices == 1:
        why = "one device: nothing to place (see devices)"
        over += [("placement", name, why) for name in ("ring", "head_parallel")]
    return Decision(
        kind=kind,
        variant=variant + (f" in {row.order} order" if row.order else ""),
        implementation=taken,
        placement="where the inputs lie" if plan is None else placement(plan),
        device_kind=device_of(None).device_kind if device_kind is None else device_kind,
        passed_over=tuple(over),
        plan=table,
    )


def _placed(pattern: Any, arrays: tuple, options: dict, where: dict, device_kind: str | None):
    """The plan of a call on a mesh, as text, and the reasons against an implementation there."""
    (B, T, N, H), K = arrays[0].shape, arrays[1].shape[2]
    if T != arrays[1].shape[1]:
        raise refuse("kv_seq_len", f"None or {T} with several devices", arrays[1].shape[1])
    devices, rate = where["devices"], options["dropout_rate"]
    part = chunk_length(T, devices, "contiguous")
    q, k, v = (jax.ShapeDtypeStruct((B, part, *x.shape[2:]), x.dtype) for x in arrays)
    ids = (None, None)
    if where["packed"]:
        ids = (jax.ShapeDtypeStruct((B, part), jnp.int32),) * 2
    if pattern is None:
        branches = tuple(within(branch, T) for branch in options["branches"])
        plan: Any = plan_of(branches, (B, T, N, K, H), arrays[0].dtype, **where)

        def reasons_of(name: str, *_: Any) -> tuple[str, ...]:
            if name == "xla":
                return ()
            return local_reasons(name, q, k, v, plan, H**-0.5, ids, rate, device_kind)

        return plan, plan_table(plan), reasons_of
    plan, make = block_plan_of(pattern, q, k, **where)

    def block_reasons_of(name: str, *_: Any) -> tuple[str, ...]:
        if name == "xla":
            return ()
        return block_reasons(name, q, k, v, plan, make, ids[0], H**-0.5, rate, device_kind)

    return plan, block_plan_table(plan), block_reasons_of


def _routed(arrays: tuple, is_causal: bool) -> BlockLists:
    """Lists of the shapes that the preset's router gives, without any contents."""
    query, key = arrays[:2]
    routing = Routing(STANDARD["sparsity_ratio"], STANDARD["block_size"], "first", is_causal)
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
