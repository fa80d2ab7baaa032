"""Specs: what they hold, and the heads and residues that they mean."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dilax
from dilax.spec import as_spec, branches_of, head_groups, head_offset_of
from tests.cases import BY_NAME
from tests.compare import assert_exact


def test_a_spec_stands_for_two_lists(x64):
    arrays = BY_NAME["plain"].arrays()
    spec = dilax.DilatedSpec([6, 12], [1, 2])
    assert_exact(
        dilax.dilated_attention(**arrays, segment_lengths=spec),
        dilax.dilated_attention(**arrays, segment_lengths=[6, 12], dilation_rates=[1, 2]),
    )


@pytest.mark.parametrize("kind", [list, tuple, np.array, lambda x: [np.int32(i) for i in x]])
def test_any_sequence_of_ints(kind):
    spec = dilax.DilatedSpec(kind([4, 8]), kind([1, 3]))
    assert spec == dilax.DilatedSpec((4, 8), (1, 3))
    assert all(type(x) is int for x in spec.segment_lengths + spec.dilation_rates)
    assert len(spec) == 2


def test_is_static_and_hashable():
    spec = dilax.DilatedSpec((4, 8), (1, 2))
    assert hash(spec) == hash(dilax.DilatedSpec([4, 8], [1, 2]))
    traces = []

    @jax.jit(static_argnums=1)
    def run(x, spec):
        traces.append(spec)
        return dilax.dilated_attention(x, x, x, spec)

    x = np.ones((1, 8, 2, 8), np.float32)
    run(x, spec)
    run(x, dilax.DilatedSpec([4, 8], [1, 2]))
    assert len(traces) == 1
    with pytest.raises(AttributeError):
        spec.segment_lengths = (1,)


def test_as_spec_keeps_a_spec():
    spec = dilax.DilatedSpec((4, 8), (1, 2))
    assert as_spec(spec) is spec


@given(st.integers(1, 40), st.integers(1, 12))
def test_groups_are_contiguous_and_even(heads, groups):
    found = head_groups(heads, groups)
    assert [n for first, end in found for n in range(first, end)] == list(range(heads))
    sizes = [end - first for first, end in found]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == groups
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 40), st.integers(1, 50), st.sampled_from(["interleaved", "blocked"]))
def test_offsets_are_residues(heads, rate, head_offset):
    found = [head_offset_of(n, heads, rate, head_offset) for n in range(heads)]
    assert all(0 <= offset < rate for offset in found)
    if head_offset == "interleaved":
        assert set(found) == set(range(min(rate, heads)))
    else:
        assert found == sorted(found)
        assert found[0] == 0


@given(st.integers(1, 16), st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans())
def test_every_head_has_its_branches(heads, rates, interleaved):
    spec = dilax.DilatedSpec([16] * len(rates), rates)
    head_offset = "interleaved" if interleaved else "blocked"
    for branch in branches_of(spec, heads, "lse", head_offset):
        assert (branch.first_head, len(branch.offsets)) == (0, heads)
    if heads >= len(rates):
        groups = branches_of(spec, heads, "heads", head_offset)
        taken = [g.first_head + i for g in groups for i in range(len(g.offsets))]
        assert taken == list(range(heads))
        for i, group in enumerate(groups):
            assert set(group.offsets) == {i % rates[i]}
