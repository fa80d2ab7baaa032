"""A block pattern as the command line writes it."""

import dataclasses
from typing import Any

from dilax._types import refuse
from dilax.pattern_config import PATTERN_TYPES, SparsePatternConfig, as_pattern
from dilax.patterns import Intersection, Pattern, PerHead, Union


@dataclasses.dataclass(frozen=True)
class PatternOptions:
    """The options of a command that takes a block pattern."""

    pattern: str | None = None
    """Of blocks: a preset (local, dilated, ...) or a pattern type, which takes the options below;
    several with | (union), & (intersection) or , (one per group of heads)."""
    sparsity_ratio: float | None = None
    """Of a pattern type: the share of admissible blocks kept."""
    block_size: int | None = None
    """Of a pattern type: tokens of a block, 64 or a multiple of 128."""
    window_size: int | tuple[int | None, int | None] | None = None
    """Of a pattern type: tokens of the window, or those to the left and to the right."""
    global_tokens: int | tuple[int, int] | None = None
    """Of global_local: tokens that everybody sees, from the start, or from the start and the end.
    """
    random_blocks: int = 0
    """Of global_local: more blocks per row."""
    seed: int = 0
    """Of the random blocks."""

    def block_pattern(self, **more: Any) -> Pattern | None:
        """The pattern, if one is named; more: further options of its type.

        Raises:
            ValueError: options without a pattern.
        """
        names = [f.name for f in dataclasses.fields(PatternOptions)][1:]
        given = {n: getattr(self, n) for n in names if getattr(self, n) != getattr(type(self), n)}
        if self.pattern is not None:
            return pattern_of(self.pattern, given | more)
        for name, x in given.items():
            raise refuse(name, "no value without a pattern", x)
        return None


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
