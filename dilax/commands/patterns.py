"""A block pattern as the command line writes it."""

from typing import Any

from dilax._types import refuse
from dilax.pattern_config import PATTERN_TYPES, SparsePatternConfig, as_pattern
from dilax.patterns import Intersection, Pattern, PerHead, Union

PATTERN_FIELDS = (
    "sparsity_ratio",
    "block_size",
    "window_size",
    "global_tokens",
    "random_blocks",
    "seed",
)


def refuse_without_pattern(given: dict[str, Any]) -> None:
    """Refuse options of a pattern where none is named."""
    for name, x in given.items():
        raise refuse(name, "no value without a pattern", x)


def pattern_of(text: str, given: dict[str, Any]) -> Pattern:
    """The pattern that a text names, each type in it with the given options."""
    for mark, compose in ((",", PerHead), ("|", Union), ("&", Intersection)):
        if mark in text:
            return compose(tuple(pattern_of(part, given) for part in text.split(mark)))
    name = text.strip()
    if not given:
        return as_pattern("pattern", name)
    if name not in PATTERN_TYPES:
        raise refuse("pattern", f"one of {', '.join(PATTERN_TYPES)} with options", name)
    return SparsePatternConfig(name, **given).pattern()
