"""Patterns under the names of the PyTorch libraries: one config, and presets."""

import dataclasses
from typing import Any

from dilax._types import refuse
from dilax.block_lists import BlockLists
from dilax.checks import check_choice, is_array, plain
from dilax.patterns import (
    DilatedSparse,
    GlobalLocal,
    Hierarchical,
    LocalWindow,
    Pattern,
    check_size,
)

PATTERN_TYPES = ("local_window", "dilated_sparse", "global_local", "hierarchical")
DEFAULT_RATIO = 0.1
# Which sizes a type takes in place of a ratio.
_SIZES = {
    "local_window": ("window_size",),
    "dilated_sparse": ("window_size",),
    "global_local": ("global_tokens", "window_size"),
    "hierarchical": ("window_size",),
}


@dataclasses.dataclass(frozen=True)
class SparsePatternConfig:
    """A block pattern by the field names of the PyTorch libraries; hashable.

    Args:
        pattern_type: "local_window", "dilated_sparse", "global_local" or "hierarchical"; see the
            classes of `dilax.patterns`.
        sparsity_ratio: the share of admissible blocks that is kept, in (0, 1]: each row keeps
            clip(round(ratio * a), 1, a) of its a admissible blocks, halves rounded up, the
            diagonal one always; 1 is dense. None: the sizes decide, or 0.1 where there are none.
            (The presets of the names "global_local" and "hierarchical" have sizes: ask `describe`
            what a pattern keeps.)
        block_size: tokens of a block, 64 or a multiple of 128.
        window_size: instead of a ratio, in tokens: for local_window and global_local the window,
            exact to the token; for dilated_sparse as many blocks as it fills; for hierarchical how
            far everything is kept, in whole blocks. An int, or for the first two (left, right).
        global_tokens: instead of a ratio, of global_local: rounded up to whole blocks; an int
            counts from the start, a pair from the start and the end. Next to a window_size the
            default is one block, and next to global_tokens that of window_size is 256.
        dilation_rates: of dilated_sparse, in blocks; None for (1, 2, 4).
        random_blocks: of global_local, more blocks per row, drawn with `seed`.
        seed: of the random blocks.

    Raises:
        ValueError: a field is wrong, belongs to another pattern_type, or sizes come with a ratio.

    Example:
        >>> SparsePatternConfig("global_local", sparsity_ratio=0.2).pattern()
        GlobalLocal(sparsity_ratio=0.2)
    """

    pattern_type: str = "local_window"
    sparsity_ratio: float | None = None
    block_size: int = 128
    window_size: int | tuple[int | None, int | None] | None = None
    global_tokens: int | tuple[int, int] | None = None
    dilation_rates: tuple[int, ...] | None = None
    random_blocks: int = 0
    seed: int = 0

    def __post_init__(self):
        check_choice("pattern_type", self.pattern_type, PATTERN_TYPES)
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, plain(f.name, getattr(self, f.name)))
        size = self.block_size
        fits = size == 64 or (isinstance(size, int) and size > 0 and size % 128 == 0)
        if isinstance(size, bool) or not isinstance(size, int) or not fits:
            raise refuse("block_size", "64 or a multiple of 128", size)
        for name, default, types in (
            (
                "window_size",
                None,
                ("local_window", "dilated_sparse", "global_local", "hierarchical"),
            ),
            ("global_tokens", None, ("global_local",)),
            ("dilation_rates", None, ("dilated_sparse",)),
            ("random_blocks", 0, ("global_local",)),
            ("seed", 0, ("global_local",)),
        ):
            x = getattr(self, name)
            if x != default and self.pattern_type not in types:
                raise refuse(name, f"{default} with pattern_type={self.pattern_type!r}", x)
        self.pattern()

    def pattern(self) -> Pattern:
        """The pattern that the fields describe."""
        kind, size, ratio = self.pattern_type, self.block_size, self.sparsity_ratio
        if ratio is None and all(getattr(self, name) is None for name in _SIZES[kind]):
            ratio = DEFAULT_RATIO
        if kind == "local_window":
            return LocalWindow(ratio, self.window_size, block_size=size)
        if kind == "dilated_sparse":
            rates = (1, 2, 4) if self.dilation_rates is None else self.dilation_rates
            window: Any = self.window_size  # a pair is refused there
            return DilatedSparse(ratio, window, rates, size)
        if kind == "hierarchical":
            near: Any = self.window_size
            if near is not None:
                check_size("window_size", near)
                if ratio is not None:
                    raise refuse("window_size", "None with a sparsity_ratio", near)
                near = -(-near // size)
            return Hierarchical(ratio, near, block_size=size)
        tokens, window = self.global_tokens, self.window_size
        if ratio is None:
            tokens = 1 if tokens is None else tokens
            window = 256 if window is None else window
        more = {"random_blocks": self.random_blocks, "seed": self.seed}
        return GlobalLocal(ratio, tokens, window, block_size=size, **more)


# The presets of the PyTorch libraries. Where theirs promised a sparsity that the pattern did not
# have, these keep the promise; `density` says what each is for a length.
PRESETS: dict[str, Pattern] = {
    "local": LocalWindow(window_size=256, block_size=64),
    "dilated": DilatedSparse(window_size=9 * 64, dilation_rates=(1, 2, 4, 8), block_size=64),
    "global_local": GlobalLocal(global_tokens=64, window_size=256, block_size=64),
    "ultra_sparse": DilatedSparse(0.01, dilation_rates=(1, 2, 4, 8), block_size=128),
    "hilbert_standard": DilatedSparse(0.1, block_size=64),
    "hilbert_ultra": DilatedSparse(0.01, block_size=64),
    "hierarchical": Hierarchical(near_blocks=4, block_size=64),
    "fine_grained": Hierarchical(near_blocks=8, block_size=64),
    "long_range": Hierarchical(near_blocks=2, block_size=128),
    "hierarchical_ultra_sparse": Hierarchical(near_blocks=1, block_size=128),
}


def as_pattern(name: str, x: Any) -> Pattern:
    """The pattern of a config, of the name of a preset or else of a type, or x itself.

    Raises:
        ValueError: x is none of these.

    Example:
        >>> as_pattern("pattern", "local").block_size
        64
    """
    if isinstance(x, Pattern):
        return x
    if isinstance(x, SparsePatternConfig):
        return x.pattern()
    if isinstance(x, str) and x in PRESETS:
        return PRESETS[x]
    if isinstance(x, str) and x in PATTERN_TYPES:
        return SparsePatternConfig(x).pattern()
    names = ", ".join(dict.fromkeys((*PRESETS, *PATTERN_TYPES)))
    wanted = f"a SparsePatternConfig, a pattern, or one of {names}"
    if isinstance(x, str) and x.startswith("adaptive"):
        wanted += "; dilax.AdaptiveAttention is what has a router"
    if isinstance(x, BlockLists):
        wanted += "; dilax.block_sparse_attention is what takes lists"
    if is_array(x):
        wanted += "; dilax.block_lists.from_mask makes lists of a mask over blocks"
    raise refuse(name, wanted, x)
