"""What a block pattern is, and how patterns combine: frozen, hashable data.

A pattern says which key blocks each block of queries visits; it becomes `BlockLists` for given
lengths and causality. The patterns themselves are in `dilax.patterns`.
"""

import dataclasses
from typing import Any, cast

import numpy as np

from dilax import block_entries
from dilax._types import refuse
from dilax.block_entries import Entries, Grid, as_lists
from dilax.block_lists import BlockLists, density, partial_blocks
from dilax.checks import check_bool, check_index


class Pattern:
    """A rule for which key blocks each block of queries visits.

    Example:
        >>> from dilax.patterns import LocalWindow
        >>> pattern = LocalWindow(sparsity_ratio=0.5, block_size=64)
        >>> pattern.lists(256, is_causal=True).rows()[0][0]
        [[0], [1], [1, 2], [2, 3]]
        >>> round(pattern.density(256, is_causal=True), 3)
        0.6
    """

    block_size: int

    def entries(self, grid: Grid, group: int, groups: int) -> Entries:
        """The blocks that the heads of one of `groups` equal groups keep."""
        raise NotImplementedError

    def head_groups(self) -> int:
        """Into how many groups of heads with patterns of their own the heads are split."""
        return 1

    def __repr__(self) -> str:
        fields = dataclasses.fields(cast(Any, self))
        said = [f for f in fields if getattr(self, f.name) != f.default]
        said = [f"{f.name}={getattr(self, f.name)!r}" for f in said]
        return f"{type(self).__name__}({', '.join(said)})"

    def __or__(self, other: "Pattern") -> "Pattern":
        return Union((self, other))

    def __and__(self, other: "Pattern") -> "Pattern":
        return Intersection((self, other))

    def lists(
        self,
        T: int,
        S: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        *,
        is_causal: bool = False,
        q_start: int = 0,
        k_start: int = 0,
    ) -> BlockLists:
        """The BlockLists for T queries and S keys (None: T); one list where all heads agree.

        Raises:
            ValueError: an argument is wrong, such as a length that is not positive, or the heads
                cannot be split into as many groups as the pattern has.
        """
        given = {"T": T, "S": S, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        for name, x in given.items():
            if (x is not None or name == "T") and check_index(name, x) == 0:
                raise refuse(name, "a positive int", x)
        for name, x in (("q_start", q_start), ("k_start", k_start)):
            check_index(name, x)
        check_bool("is_causal", is_causal)
        grid = Grid(T, T if S is None else S, self.block_size, is_causal, q_start, k_start)
        groups = self.head_groups()
        numbers = [groups if n is None else n for n in (num_heads, num_kv_heads or num_heads)]
        sizes = [n for n in numbers if n % groups == 0]
        if not sizes:
            raise refuse("pattern", f"{groups} patterns to divide the number of heads", numbers[0])
        each = [self.entries(grid, group, groups) for group in range(groups)]
        if groups == 1:
            return as_lists(grid, each)
        return as_lists(grid, [x for x in each for _ in range(min(sizes) // groups)])

    def density(self, T: int, S: int | None = None, *, is_causal: bool = False) -> float:
        """The share of admissible blocks that are kept, partly masked ones counted whole."""
        lists = self.lists(T, S, is_causal=is_causal)
        return density(lists, T, T if S is None else S, is_causal)

    def describe(self, T: int, S: int | None = None, *, is_causal: bool = False) -> str:
        """What the pattern is for these lengths, in a few lines."""
        S = T if S is None else S
        lists = self.lists(T, S, is_causal=is_causal)
        grid = Grid(T, S, self.block_size, is_causal)
        cut = partial_blocks(lists, T, S, is_causal)
        counts = np.asarray(lists.counts)
        kept, partly = counts.sum() / counts.shape[1], cut.sum() / counts.shape[1]
        return "\n".join(
            [
                f"{self}",
                f"T={T}, S={S}, {'causal' if is_causal else 'not causal'}: {grid.rows} x"
                f" {grid.columns} blocks of {self.block_size}, {int(grid.limit.sum())} admissible",
                f"kept {kept:g} blocks, {counts.min()} to {counts.max()} per row (mean"
                f" {counts.mean():.1f}), {partly:g} of them partly masked",
                f"density {density(lists, T, S, is_causal):.4f} of the admissible blocks",
            ]
        )


@dataclasses.dataclass(frozen=True, repr=False)
class _Composed(Pattern):
    patterns: tuple[Pattern, ...]

    def __post_init__(self):
        good = isinstance(self.patterns, tuple) and len(self.patterns) > 0
        if not good or not all(isinstance(x, Pattern) for x in self.patterns):
            raise refuse("patterns", "a tuple of patterns", self.patterns)
        sizes = {x.block_size for x in self.patterns}
        if len(sizes) > 1:
            raise refuse("patterns", "one block_size", sorted(sizes))

    @property
    def block_size(self) -> int:
        """Tokens of a block, the same in all patterns."""
        return self.patterns[0].block_size

    def head_groups(self) -> int:
        """The least common multiple of those of the patterns."""
        return int(np.lcm.reduce([x.head_groups() for x in self.patterns]))

    def _parts(self, grid: Grid, group: int, groups: int) -> list[Entries]:
        return [x.entries(grid, group, groups) for x in self.patterns]


@dataclasses.dataclass(frozen=True, repr=False)
class Union(_Composed):
    """What any of several patterns keeps; `a | b` makes one.

    Example:
        >>> from dilax.patterns import GlobalLocal, LocalWindow
        >>> a, b = LocalWindow(0.1, block_size=64), GlobalLocal(0.3, block_size=64)
        >>> (a | b).lists(256).counts.tolist()
        [[[1, 1, 1, 1]]]
    """

    def entries(self, grid: Grid, group: int, groups: int) -> Entries:
        """The union of the patterns' blocks."""
        return block_entries.union(grid, self._parts(grid, group, groups))


@dataclasses.dataclass(frozen=True, repr=False)
class Intersection(_Composed):
    """What all of several patterns keep; `a & b` makes one.

    Example:
        >>> from dilax.patterns import Hierarchical, LocalWindow
        >>> a, b = Hierarchical(near_blocks=1, block_size=64), LocalWindow(0.5, block_size=64)
        >>> (a & b).lists(256).counts.tolist()
        [[[1, 2, 1, 2]]]
    """

    def entries(self, grid: Grid, group: int, groups: int) -> Entries:
        """The intersection of the patterns' blocks."""
        return block_entries.intersection(grid, self._parts(grid, group, groups))


@dataclasses.dataclass(frozen=True, repr=False)
class PerHead(_Composed):
    """A pattern for each of as many equal groups of heads, in order.

    Example:
        >>> from dilax.patterns import DilatedSparse, LocalWindow
        >>> lists = PerHead((LocalWindow(0.25), DilatedSparse(0.25))).lists(1024, num_heads=4)
        >>> lists.counts.shape, [head[7] for head in lists.rows()[0]]
        ((1, 4, 8), [[6, 7], [6, 7], [6, 7], [6, 7]])
    """

    def head_groups(self) -> int:
        """One per pattern, times the groups within the patterns."""
        return len(self.patterns) * super().head_groups()

    def entries(self, grid: Grid, group: int, groups: int) -> Entries:
        """The blocks of the pattern that has this group."""
        each = groups // len(self.patterns)
        return self.patterns[group // each].entries(grid, group % each, each)


@dataclasses.dataclass(frozen=True, repr=False)
class Causal(Pattern):
    """A pattern under causality, whatever the call says.

    Example:
        >>> from dilax.patterns import LocalWindow
        >>> Causal(LocalWindow(1.0, block_size=64)).lists(192).counts.tolist()
        [[[1, 2, 3]]]
    """

    pattern: Pattern

    def __post_init__(self):
        if not isinstance(self.pattern, Pattern):
            raise refuse("pattern", "a pattern", self.pattern)

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.pattern.block_size

    def head_groups(self) -> int:
        """Those of the pattern."""
        return self.pattern.head_groups()

    def entries(self, grid: Grid, group: int, groups: int) -> Entries:
        """The pattern's blocks for a causal call, masked beyond the diagonal."""
        kept = self.pattern.entries(dataclasses.replace(grid, is_causal=True), group, groups)
        return kept._replace(right=np.minimum(kept.right, 0))
