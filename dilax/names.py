"""The names of the PyTorch libraries' variants, and what each is here: one table."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from dilax._types import refuse


@dataclasses.dataclass(frozen=True)
class Kind:
    """One row of the table of names: what a kind is and how this library composes it."""

    names: tuple[str, ...]  # short names, then class names
    what: str
    module: bool = False  # names a module with projections, not a function
    fused: bool = False  # as a module: fused projections and a LayerNorm before the last one
    implementation: str | None = None  # None: the fastest that takes the call
    order: str | None = None  # the kind of the token order
    pattern: str | None = None  # block-sparse: the type of the pattern, where options may say more
    preset: str | None = None  # block-sparse: the name of the pattern
    visiting_order: str = "longest_first"  # block-sparse: of the blocks of queries
    adaptive: bool = False  # a learned router chooses the blocks: it has parameters
    mesh: bool = False  # placed on a mesh by an AttentionSharding
    sequence: str | None = None  # the mesh axis of the tokens, if not said otherwise
    batch: str | None = None  # that of the examples
    method: str | None = None  # how rows move; None: as planned


def _preset(name: str) -> Kind:
    return Kind((name,), f"block-sparse attention, the preset {name!r}", preset=name)


KINDS = (
    Kind(("auto",), "dilated attention on the fastest implementation"),
    Kind(
        ("dilated", "standard", "DilatedAttention"),
        "dilated attention in XLA",
        implementation="xla",
    ),
    Kind(
        ("improved", "ImprovedDilatedAttention"),
        "dilated attention on the fastest implementation",
        fused=True,
    ),
    Kind(
        ("multihead_dilated", "MultiheadDilatedAttention"),
        "projections around dilated attention in XLA",
        module=True,
        implementation="xla",
    ),
    Kind(
        ("improved_multihead", "ImprovedMultiheadDilatedAttention"),
        "fused projections and a LayerNorm around dilated attention on the fastest implementation",
        module=True,
        fused=True,
    ),
    Kind(
        (
            "ring",
            "RingDilatedAttention",
            "RingDilatedAttentionHybrid",
            "RingDilatedAttentionTrue",
        ),
        "dilated attention placed on a sequence axis",
        mesh=True,
        sequence="sequence",
    ),
    Kind(
        ("ring_production", "RingDilatedAttentionProduction"),
        "another name for 'ring' (removed from its own library, where it was not a ring)",
        mesh=True,
        sequence="sequence",
    ),
    Kind(
        ("ring_multihead", "RingMultiheadDilatedAttentionHybrid"),
        "projections around 'ring'",
        module=True,
        mesh=True,
        sequence="sequence",
    ),
    Kind(
        ("block_sparse", "block_sparse_ring", "BlockSparseRingDilatedAttention"),
        "block-sparse attention, inside dilated branches if segments are given",
        pattern="local_window",
    ),
    Kind(
        ("BlockSparseOptimized", "BlockSparseTorchSparse"),
        "other names for 'block_sparse' (merged in or removed from their own library)",
        pattern="local_window",
    ),
    Kind(
        ("block_sparse_multihead", "BlockSparseRingMultiheadDilatedAttention"),
        "projections around 'block_sparse'",
        module=True,
        pattern="local_window",
    ),
    Kind(
        ("block_sparse_distributed", "BlockSparseRingDistributedDilatedAttention"),
        "'block_sparse' on a mesh of several hosts",
        pattern="local_window",
        mesh=True,
        sequence="sequence",
        batch="data",
    ),
    Kind(
        ("hierarchical", "BlockSparseHierarchical"),
        "block-sparse attention, bands that thin out with the distance",
        pattern="hierarchical",
    ),
    Kind(
        ("adaptive", "BlockSparseAdaptive"),
        "block-sparse attention whose blocks a learned router chooses",
        adaptive=True,
    ),
    Kind(
        ("distributed", "DistributedMultiheadDilatedAttention"),
        "projections and dilated attention under data and tensor parallel sharding",
        module=True,
        mesh=True,
        batch="data",
    ),
    Kind(
        ("ring_distributed", "RingDistributedDilatedAttention"),
        "'ring' times data parallelism over several processes",
        module=True,
        mesh=True,
        sequence="sequence",
        batch="data",
    ),
    Kind(
        ("hilbert_post_pattern", "BlockSparseRingDilatedAttentionHilbertPostPattern"),
        "'block_sparse' with Hilbert visiting order",
        pattern="dilated_sparse",
        visiting_order="hilbert",
    ),
    Kind(
        ("ring_hilbert", "RingDilatedAttentionHilbertOptimized"),
        "'ring' with Hilbert token order",
        order="hilbert",
        mesh=True,
        sequence="sequence",
    ),
    Kind(
        ("head_parallel", "HeadParallelDilatedAttentionOptimized"),
        "dilated attention with heads sharded by all-to-all",
        mesh=True,
        sequence="sequence",
        method="all_to_all",
    ),
    Kind(
        ("hilbert", "HilbertDilatedAttention"),
        "dilated attention on Hilbert-ordered tokens of a grid",
        order="hilbert",
    ),
    Kind(
        ("hilbert_pallas", "HilbertAttentionTritonFixed"),
        "'hilbert' on the Pallas kernel",
        order="hilbert",
        implementation="pallas",
    ),
    # "dilated" and "hierarchical" are kinds above: as a `pattern` they are presets, and so they are
    # to `create_block_sparse_attention`.
    *(_preset(name) for name in ("local", "global_local", "ultra_sparse")),
    *(
        dataclasses.replace(_preset(name), visiting_order="hilbert")
        for name in ("hilbert_standard", "hilbert_ultra")
    ),
    *(_preset(name) for name in ("fine_grained", "long_range", "hierarchical_ultra_sparse")),
    Kind(
        ("adaptive_standard",),
        "'adaptive' that keeps a tenth of the blocks of 128",
        adaptive=True,
        preset="adaptive_standard",
    ),
)

# Names that `dilax` will export: what a name will be is fixed, what it does is not there yet.
LATER_EXPORTS = ("from_gigapath",)


def missing(name: str, module: Any, available: Iterable[str]) -> AttributeError:
    """The error of a module that has no such attribute; names of later versions are said to be.

    Example:
        >>> import dilax
        >>> print(missing("from_gigapath", dilax, ["dilated_attention"]))
        dilax.from_gigapath: a known name, not available in this version; ...
        >>> print(missing("sparse", dilax, []))
        module 'dilax' has no attribute 'sparse'
    """
    if name in LATER_EXPORTS:
        said = f"{module.__name__}.{name}: a known name, not available in this version"
        text = f"{said}; available are {', '.join(available)}"
    else:
        text = f"module {module.__name__!r} has no attribute {name!r}"
    return AttributeError(text, name=name, obj=module)


def find_kind(kind: Any) -> Kind:
    """The row of the table that has this name.

    Raises:
        ValueError: the name is in no row.

    Example:
        >>> find_kind("ImprovedDilatedAttention").what
        'dilated attention on the fastest implementation'
    """
    valid = [name for row in KINDS for name in row.names]
    if not isinstance(kind, str):
        raise refuse("kind", f"one of {', '.join(valid)}", kind)
    for row in KINDS:
        if kind in row.names:
            return row
    raise refuse("kind", f"one of {', '.join(valid)}", kind)
