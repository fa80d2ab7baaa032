"""Adaptive attention by name: the kinds whose router has parameters of its own."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from dilax._types import refuse
from dilax.adaptive import AdaptiveAttention
from dilax.checks import check_bool, check_index
from dilax.modules import MultiheadDilatedAttention
from dilax.names import Kind

STANDARD = {"sparsity_ratio": 0.1, "block_size": 128}  # of the preset adaptive_standard
_SIZES = ("self", "num_heads", "head_dim")
_FIELDS = {*inspect.signature(AdaptiveAttention.__init__).parameters}.difference(_SIZES)
_SHARED = ("num_kv_heads", "param_dtype")  # with the module around it
_OUTSIDE = "use_gradient_checkpointing"  # there of the projections too
# What a router cannot be combined with, and why.
_WHY = {
    "its router finds the blocks": "pattern sparse_config pattern_type need_speed visiting_order",
    "padding that acts as keys lies in no block": "pad_mode",
    "a row may keep any block, so the tokens lie on one device (examples may lie on several)": (
        "sharding axis_name batch_axis head_axis layout method mesh ring_size"
    ),
    "say `order`, a TokenOrder of the grid": "grid",
}
_OUTER = inspect.signature(MultiheadDilatedAttention.__init__).parameters


def said(function: Callable, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a factory's call that are not its defaults, its options among them.

    Example:
        >>> def factory(kind, size=1, **options): ...
        >>> said(factory, {"kind": "adaptive", "size": 1, "options": {"colour": 2}})
        {'colour': 2}
    """
    parameters = inspect.signature(function).parameters
    named = {name: x for name, x in arguments.items() if name not in ("kind", "options")}
    named = {name: x for name, x in named.items() if x is not parameters[name].default}
    return named | dict(arguments["options"])


def adaptive_attention(kind: str, row: Kind, options: dict[str, Any]) -> AdaptiveAttention:
    """The `AdaptiveAttention` of a kind, of embed_dim and num_heads and its own options.

    Example:
        >>> from dilax.names import find_kind
        >>> sizes = {"embed_dim": 64, "num_heads": 4}
        >>> adaptive_attention("adaptive", find_kind("adaptive"), sizes).head_dim
        16
    """
    options = dict(options)
    embed_dim, num_heads = (options.pop(name, None) for name in ("embed_dim", "num_heads"))
    for name, x in (("embed_dim", embed_dim), ("num_heads", num_heads)):
        if x is None or check_index(name, x) == 0:
            raise refuse(name, f"a positive int with kind {kind!r}, whose router has parameters", x)
    if embed_dim % num_heads:
        raise refuse("embed_dim", f"a multiple of num_heads={num_heads}", embed_dim)
    _flash(options)
    if row.preset is not None:
        for name in STANDARD:
            if name in options:
                wanted = f"None with kind {kind!r}, which has its own"
                raise refuse(name, wanted, options[name])
        options |= STANDARD
    _refuse_others(kind, options, _FIELDS)
    return AdaptiveAttention(num_heads, embed_dim // num_heads, **options)


def multihead_adaptive_attention(
    kind: str, row: Kind, embed_dim: int, num_heads: int, options: dict[str, Any]
) -> MultiheadDilatedAttention:
    """Projections around the `AdaptiveAttention` of a kind.

    Example:
        >>> from dilax.names import find_kind
        >>> row = find_kind("adaptive")
        >>> type(multihead_adaptive_attention("adaptive", row, 64, 4, {}).attention).__name__
        'AdaptiveAttention'
    """
    options = dict(options)
    _flash(options)
    _refuse_others(kind, options, {*_OUTER, *_FIELDS} - {"self"})
    inner = {name: x for name, x in options.items() if name in _FIELDS - {_OUTSIDE}}
    sizes = {"embed_dim": embed_dim, "num_heads": num_heads}
    router = adaptive_attention(kind, row, sizes | inner)
    options = {name: x for name, x in options.items() if name not in inner or name in _SHARED}
    options = {"rngs": nnx.Rngs(0)} | options
    return MultiheadDilatedAttention(embed_dim, num_heads, None, pattern=router, **options)


def _flash(options: dict[str, Any]) -> None:
    """use_flash_attn as an implementation."""
    if "use_flash_attn" in options:
        flash = options.pop("use_flash_attn")
        check_bool("use_flash_attn", flash)
        wanted = "pallas" if flash else "xla"
        if options.setdefault("implementation", wanted) != wanted:
            other = f"None with implementation={options['implementation']!r}"
            raise refuse("use_flash_attn", other, flash)


def _default(name: str) -> Any:
    return _OUTER[name].default if name in _OUTER else False


def _refuse_others(kind: str, options: dict[str, Any], valid: Any) -> None:
    """Refuse what a router does not take, with the reason; leaves out what says its default."""
    for name, x in list(options.items()):
        why = [reason for reason, names in _WHY.items() if name in names.split()]
        alone = name == "ring_size" and x == 1 and not isinstance(x, bool)  # of one device
        if why and (alone or x is None or (isinstance(x, str | bool) and x == _default(name))):
            del options[name]
            continue
        if why:
            raise refuse(name, f"its default with kind {kind!r}: {why[0]}", x)
        if name not in valid:
            names = ", ".join(sorted({*valid, "embed_dim", "num_heads", "use_flash_attn"}))
            raise refuse(name, f"its default with kind {kind!r}, which takes {names}", x)
