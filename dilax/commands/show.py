"""`dilax show`."""

import dataclasses
from pathlib import Path

from dilax import plotting
from dilax._types import refuse
from dilax.commands.output import check_output
from dilax.commands.patterns import PatternOptions
from dilax.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class Show(PatternOptions):
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
    out: Path = Path("pattern.png")
    """The picture to write, a name that ends in .png."""

    def run(self) -> None:
        """Write the picture and say so."""
        check_output("out", self.out, ".png")
        # Rates are of the branches, or of a pattern type in place of them.
        rates = self.dilation_rates != Show.dilation_rates and self.pattern is not None
        pattern = self.block_pattern(**{"dilation_rates": self.dilation_rates} if rates else {})
        if pattern is not None:
            self._draw_blocks(pattern)
            return
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

    def _draw_blocks(self, pattern: Pattern) -> None:
        for name in ("segment_lengths", "combine", "head_offset"):
            x = getattr(self, name)
            if x != getattr(Show, name):
                raise refuse(name, "its default with a pattern", x)
        sizes = {"num_heads": self.num_heads, "is_causal": self.causal}
        plotting.draw_blocks(pattern, length=self.length, **sizes).savefig(self.out)
        print(pattern.describe(self.length, is_causal=self.causal))
        print(f"wrote {self.out}")
