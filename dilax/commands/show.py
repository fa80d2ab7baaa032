"""`dilax show`."""

import dataclasses
from pathlib import Path
from typing import Any

from dilax import plotting
from dilax._types import refuse
from dilax.commands.output import check_output
from dilax.commands.patterns import PATTERN_FIELDS, pattern_of, refuse_without_pattern


@dataclasses.dataclass(frozen=True)
class Show:
    """Draw which keys each query of each head sees, as a PNG picture."""

    segment_lengths: tuple[int, ...] = (8, 16, 32)
    """Segment length W of each branch, in tokens."""
    dilation_rates: tuple[int, ...] = (1, 2, 4)
    """Dilation rate R of each branch; of the pattern type dilated_sparse, in blocks."""
    length: int = 32
    """Number of tokens, up to 65536."""
    num_heads: int = 4
    """Number of heads; of more than 16 the first 16 that differ are drawn."""
    combine: str = "lse"
    """lse: every head takes part in every branch; heads: each branch has heads of its own."""
    head_offset: str = "interleaved"
    """Which residue a head keeps: interleaved (the paper) or blocked (torchscale)."""
    causal: bool = False
    """A query sees no key after it."""
    pattern: str | None = None
    """Draw a block pattern instead: a preset (local, dilated, ...) or a pattern type, which takes
    the options below; several with | (union), & (intersection) or , (one per group of heads)."""
    sparsity_ratio: float | None = None
    """Of a pattern type: the share of admissible blocks kept."""
    block_size: int | None = None
    """Of a pattern type: tokens of a block, a multiple of 64."""
    window_size: int | tuple[int | None, int | None] | None = None
    """Of a pattern type: tokens of the window, or those to the left and to the right."""
    global_tokens: int | tuple[int, int] | None = None
    """Of global_local: tokens that everybody sees, from the start, or from the start and the end.
    """
    random_blocks: int = 0
    """Of global_local: more blocks per row."""
    seed: int = 0
    """Of the random blocks."""
    out: Path = Path("pattern.png")
    """The picture to write, a name that ends in .png."""

    def run(self) -> None:
        """Write the picture and say so."""
        check_output("out", self.out, ".png")
        given = {name: getattr(self, name) for name in PATTERN_FIELDS}
        given = {name: x for name, x in given.items() if x != getattr(Show, name)}
        if self.pattern is not None:
            self._draw_blocks(self.pattern, given)
            return
        refuse_without_pattern(given)
        figure = plotting.draw_pattern(
            self.segment_lengths,
            self.dilation_rates,
            length=self.length,
            num_heads=self.num_heads,
            combine=self.combine,  # pyright: ignore[reportArgumentType]  checked there
            head_offset=self.head_offset,  # pyright: ignore[reportArgumentType]
            is_causal=self.causal,
        )
        figure.savefig(self.out)
        print(f"wrote {self.out}")

    def _draw_blocks(self, pattern: str, given: dict[str, Any]) -> None:
        for name in ("segment_lengths", "combine", "head_offset"):
            x = getattr(self, name)
            if x != getattr(Show, name):
                raise refuse(name, "its default with a pattern", x)
        if self.dilation_rates != Show.dilation_rates:
            given["dilation_rates"] = self.dilation_rates
        made = pattern_of(pattern, given)
        sizes = {"num_heads": self.num_heads, "is_causal": self.causal}
        plotting.draw_blocks(made, length=self.length, **sizes).savefig(self.out)
        print(made.describe(self.length, is_causal=self.causal))
        print(f"wrote {self.out}")
