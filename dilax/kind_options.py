"""What the options of a factory's call mean for a kind: pattern, placement, order, segments."""

import difflib
from collections.abc import Iterable
from typing import Any

from dilax._types import refuse
from dilax.checks import check_bool
from dilax.names import Kind
from dilax.on_mesh import AttentionSharding
from dilax.order import TokenOrder
from dilax.pattern_config import PRESETS, SparsePatternConfig, as_pattern
from dilax.patterns import Hierarchical
from dilax.select import check_implementation
from dilax.spec import DilatedSpec, as_spec

SEGMENT_LENGTHS = (2048, 4096, 8192)
DILATION_RATES = (1, 2, 4)


def refuse_unknown(options: dict[str, Any], valid: Iterable[str]) -> None:
    """Refuse options that are not valid, naming those that are."""
    names = sorted({*valid} - {"self", "options"})
    for name, x in options.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise refuse(name, f"an option{hint}, one of {', '.join(names)}", x)


def pattern_of(kind: str, row: Kind, need_speed: Any, pattern: Any, **fields: Any) -> Any:
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
        made = as_pattern("pattern", pattern)
        if default in row.names and not isinstance(made, Hierarchical):
            raise refuse("pattern", f"None or a hierarchical one with kind {kind!r}", pattern)
        return made
    if default in row.names:  # "hierarchical": the name of a type, and of its preset
        if not fields:
            return PRESETS[default]
        if fields.get("pattern_type", default) != default:
            wanted = f"None or {default!r} with kind {kind!r}"
            raise refuse("pattern_type", wanted, fields["pattern_type"])
    return SparsePatternConfig(**{"pattern_type": default, **fields}).pattern()


def sharding_of(kind: str, row: Kind, ring_size: Any, **said: Any) -> AttentionSharding | None:
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


def implementation_of(row: Kind, implementation: Any, use_flash_attn: Any) -> str | None:
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


def order_of(kind: str, row: Kind, grid: Any, order: Any) -> TokenOrder | None:
    """The token order that a kind has, or that was asked for."""
    if row.order is None:
        if grid is not None:
            raise refuse("grid", f"None with kind {kind!r}: 'hilbert' takes it", grid)
        return order
    if order is not None:
        raise refuse("order", f"None with kind {kind!r}, which has its own", order)
    return TokenOrder(grid, row.order)


def segments_of(row: Kind, segment_lengths: Any, dilation_rates: Any) -> tuple[Any, Any]:
    """Segments and rates; a block-sparse kind has none that are not given."""
    sparse = row.pattern is not None or row.preset is not None or row.adaptive
    default = segment_lengths is None or segment_lengths is SEGMENT_LENGTHS
    if sparse and default and dilation_rates is None:
        return None, None
    spec = _spec(segment_lengths, dilation_rates)
    return spec.segment_lengths, spec.dilation_rates


def _spec(segment_lengths: Any, dilation_rates: Any) -> DilatedSpec:
    """The spec; the default lengths bring their rates along."""
    if dilation_rates is None and segment_lengths is SEGMENT_LENGTHS:
        dilation_rates = DILATION_RATES
    return as_spec(segment_lengths, dilation_rates)
