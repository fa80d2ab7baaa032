"""Attention by name: the factories of the PyTorch libraries."""

import inspect
from typing import Any, cast

from flax import nnx

from dilax._types import refuse
from dilax.adaptive import AdaptiveAttention
from dilax.attention import DilatedAttention
from dilax.checks import check_bool, check_index
from dilax.create_adaptive import (
    adaptive_attention,
    multihead_adaptive_attention,
    said,
)
from dilax.kind_options import (
    SEGMENT_LENGTHS,
    implementation_of,
    order_of,
    pattern_of,
    refuse_unknown,
    segments_of,
    sharding_of,
)
from dilax.modules import MultiheadDilatedAttention
from dilax.names import KINDS, find_kind
from dilax.order import TokenOrder
from dilax.pattern_config import PRESETS


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
    pattern = pattern_of(
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
    refuse_unknown(options, {*own, *fields})
    return DilatedAttention(
        *segments_of(row, segment_lengths, dilation_rates),
        dropout=dropout,
        attention_scale=attention_scale,
        embed_dim=embed_dim,
        num_heads=num_heads,
        add_zero_attn=add_zero_attn,
        use_gradient_checkpointing=use_gradient_checkpointing,
        implementation=implementation_of(row, implementation, use_flash_attn),
        order=order_of(kind, row, grid, order),
        pattern=pattern,
        visiting_order=options.pop("visiting_order", row.visiting_order),
        sharding=sharding_of(
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
        >>> import jax
        >>> layer = create_multihead_dilated_attention("improved", 64, 4, [16, 32], [1, 2])
        >>> jax.jit(layer)(jax.numpy.ones((1, 40, 64))).shape
        (1, 40, 64)
    """
    arguments = dict(locals())
    row = find_kind(kind)
    if row.adaptive:
        given = said(create_multihead_dilated_attention, arguments)
        given = {name: x for name, x in given.items() if name not in ("embed_dim", "num_heads")}
        return multihead_adaptive_attention(kind, row, embed_dim, num_heads, given)
    pattern = pattern_of(
        kind,
        row,
        need_speed,
        pattern,
        sparsity_ratio=sparsity_ratio,
        block_size=block_size,
        pattern_type=pattern_type,
    )
    own = inspect.signature(create_multihead_dilated_attention).parameters
    refuse_unknown(
        options, {*own, *inspect.signature(MultiheadDilatedAttention.__init__).parameters}
    )
    return MultiheadDilatedAttention(
        embed_dim,
        num_heads,
        *segments_of(row, segment_lengths, dilation_rates),
        fused_qkv=row.fused if fused_qkv is None else fused_qkv,
        layer_norm=row.fused if layer_norm is None else layer_norm,
        implementation=implementation_of(row, implementation, use_flash_attn),
        order=order_of(kind, row, grid, order),
        pattern=pattern,
        visiting_order=options.pop("visiting_order", row.visiting_order),
        sharding=sharding_of(
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
        kind: "block_sparse" (also "block_sparse_ring"), "hilbert_post_pattern", a preset ("local",
            "dilated", "global_local", "ultra_sparse", "hilbert_standard", "hilbert_ultra",
            "fine_grained", "long_range", "hierarchical_ultra_sparse"), "hierarchical", the preset
            of that name, or with options such as sparsity_ratio a `SparsePatternConfig` of that
            type, "block_sparse_multihead", a module, or "adaptive" and its preset
            "adaptive_standard", an `AdaptiveAttention` with a router that learns.
        segment_lengths, dilation_rates: None, or dilated branches inside which the pattern acts.
        sparse_config: the pattern: a `SparsePatternConfig`, a pattern or the name of a preset.
        embed_dim, num_heads: sizes; a module and a router need them.
        options: those of `create_dilated_attention`, or of `create_multihead_dilated_attention` for
            a module; among them sparsity_ratio, block_size, pattern_type in place of sparse_config.

    Raises:
        ValueError: a name or an option is wrong; the message says which and lists the valid ones.

    Source: the factories of the dilated-attention-pytorch libraries.

    Example:
        >>> import jax
        >>> attention = create_block_sparse_attention(sparsity_ratio=0.25, block_size=64)
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 300, 4, 16))
        >>> jax.jit(attention, static_argnames="is_causal")(q, k, v, is_causal=True).shape
        (1, 300, 4, 16)
    """
    row = find_kind(kind)
    if row.pattern is None and row.preset is None and kind in PRESETS:  # "dilated" is both
        if sparse_config is not None:
            raise refuse("sparse_config", f"None with kind {kind!r}, a preset", sparse_config)
        kind, row, sparse_config = "block_sparse", find_kind("block_sparse"), PRESETS[kind]
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
