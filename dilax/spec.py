"""Dilated specs: segment lengths and dilation rates, validated once, frozen and hashable."""

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from dilax._types import refuse

Combine = Literal["lse", "heads"]
HeadOffset = Literal["interleaved", "blocked"]


class Branch(NamedTuple):
    """One branch of a call, ready to compute.

    Heads first_head, first_head + 1, ... take part; head first_head + i keeps the positions whose
    index in their segment is congruent to offsets[i] modulo dilation_rate.
    """

    segment_length: int
    dilation_rate: int
    first_head: int
    offsets: tuple[int, ...]


def _positive_ints(name: str, values: Any) -> tuple[int, ...]:
    listed = isinstance(values, Sequence) and not isinstance(values, str | bytes)
    if not listed and getattr(values, "ndim", 0) != 1:
        raise refuse(name, "a sequence of positive ints", values)
    result = []
    value: Any
    for i, value in enumerate(values):
        try:
            number = operator.index(value)
        except TypeError:
            raise refuse(f"{name}[{i}]", "a positive int", value) from None
        if isinstance(value, bool) or number <= 0:
            raise refuse(f"{name}[{i}]", "a positive int", value)
        result.append(number)
    if not result:
        raise refuse(name, "at least one branch", values)
    return tuple(result)


@dataclasses.dataclass(frozen=True)
class DilatedSpec:
    """Segment lengths W and dilation rates R of a list of branches.

    Segment lengths must not decrease. Any positive rate goes with any segment length.

    Raises:
        ValueError: an entry is not a positive int, the counts differ, or lengths decrease.

    Source: LongNet (arXiv:2307.02486), section 2.2.

    Example:
        >>> DilatedSpec((2048, 4096), (1, 2)).segment_lengths
        (2048, 4096)
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]

    def __post_init__(self):
        lengths = _positive_ints("segment_lengths", self.segment_lengths)
        rates = _positive_ints("dilation_rates", self.dilation_rates)
        if len(lengths) != len(rates):
            raise refuse(
                "dilation_rates", f"as many as segment_lengths ({len(lengths)})", list(rates)
            )
        if any(a > b for a, b in itertools.pairwise(lengths)):
            raise refuse("segment_lengths", "lengths that do not decrease", list(lengths))
        object.__setattr__(self, "segment_lengths", lengths)
        object.__setattr__(self, "dilation_rates", rates)

    def __len__(self) -> int:
        return len(self.segment_lengths)


def as_spec(segment_lengths: Any, dilation_rates: Any = None) -> DilatedSpec:
    """The DilatedSpec of two sequences of ints, or of one DilatedSpec in place of both.

    Example:
        >>> as_spec([8, 16], [1, 2]) == as_spec(DilatedSpec((8, 16), (1, 2)))
        True
    """
    if isinstance(segment_lengths, DilatedSpec):
        if dilation_rates is not None:
            raise refuse(
                "dilation_rates", "None when segment_lengths is a DilatedSpec", dilation_rates
            )
        return segment_lengths
    if dilation_rates is None:
        raise refuse("dilation_rates", "a sequence of positive ints", dilation_rates)
    return DilatedSpec(segment_lengths, dilation_rates)


def head_groups(num_heads: int, groups: int) -> tuple[tuple[int, int], ...]:
    """Contiguous disjoint head ranges (first, end), one per group; the first ones get one more.

    Example:
        >>> head_groups(12, 5)
        ((0, 3), (3, 6), (6, 8), (8, 10), (10, 12))
    """
    size, more = divmod(num_heads, groups)
    ends = [size * (i + 1) + min(i + 1, more) for i in range(groups)]
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def head_offset_of(head: int, num_heads: int, rate: int, head_offset: HeadOffset) -> int:
    """Residue modulo `rate` that a query head keeps, in combine="lse".

    Source: interleaved: LongNet eq. 13-15; blocked: Microsoft's torchscale.

    Example:
        >>> [head_offset_of(n, 6, 4, "blocked") for n in range(6)]
        [0, 0, 1, 1, 2, 2]
    """
    return head % rate if head_offset == "interleaved" else head // -(-num_heads // rate)


def within(branch: Branch, extent: int) -> Branch:
    """The same branch for positions below `extent`, with no number larger than needed.

    A segment beyond the extent is one segment; a rate beyond the segment keeps one position of it,
    or none.

    Example:
        >>> within(Branch(4096, 10**6, 0, (0, 1)), 100)
        Branch(segment_length=100, dilation_rate=100, first_head=0, offsets=(0, 1))
    """
    w, r, first_head, offsets = branch
    w = min(w, extent)
    return Branch(w, min(r, max(w, max(offsets) + 1)), first_head, offsets)


def branches_of(
    spec: DilatedSpec, num_heads: int, combine: Combine, head_offset: HeadOffset
) -> tuple[Branch, ...]:
    """The branches of a spec for `num_heads` query heads.

    Raises:
        ValueError: combine or head_offset is unknown, or combine="heads" has more branches than
            heads.

    Example:
        >>> branches_of(DilatedSpec((8, 16), (1, 2)), 4, "heads", "interleaved")[1]
        Branch(segment_length=16, dilation_rate=2, first_head=2, offsets=(1, 1))
    """
    if head_offset not in ("interleaved", "blocked"):
        raise refuse("head_offset", "'interleaved' or 'blocked'", head_offset)
    if combine == "lse":
        return tuple(
            Branch(
                w,
                r,
                0,
                tuple(head_offset_of(n, num_heads, r, head_offset) for n in range(num_heads)),
            )
            for w, r in zip(spec.segment_lengths, spec.dilation_rates, strict=True)
        )
    if combine != "heads":
        raise refuse("combine", "'lse' or 'heads'", combine)
    if num_heads < len(spec):
        raise refuse(
            "combine", f"at least {len(spec)} heads, one per branch, with 'heads'", num_heads
        )
    groups = head_groups(num_heads, len(spec))
    return tuple(
        Branch(w, r, first, (i % r,) * (end - first))
        for i, (w, r, (first, end)) in enumerate(
            zip(spec.segment_lengths, spec.dilation_rates, groups, strict=True)
        )
    )
