"""Block-sparse attention in float64 against one dense masked softmax, values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dilax
from dilax import block_loop, reference
from dilax.block_lists import BlockLists, from_mask, token_mask
from dilax.block_sparse import branch_lists
from dilax.partial import Partial, merge
from dilax.patterns import DilatedSparse, GlobalLocal, Hierarchical, LocalWindow, PerHead
from dilax.spec import branches_of, within
from dilax.tile import Settings
from dilax.xla_attention import attend
from tests.cases import Case
from tests.compare import assert_exact, assert_within

LOCAL = LocalWindow(0.3, block_size=8)
WINDOW = LocalWindow(window_size=(13, 5), block_size=8)
GLOBAL = GlobalLocal(global_tokens=3, window_size=7, random_blocks=1, block_size=8)
HEADS = PerHead((DilatedSparse(0.3, block_size=8), Hierarchical(near_blocks=1, block_size=8)))
CAUSAL = (("is_causal", True),)
# No kernel takes blocks as small as these.
sparse_attention = functools.partial(dilax.block_sparse_attention, implementation="xla")


def lists(shape, seed=0, size=0):
    """Random lists with bands, one row of each empty: of `shape` [b, n, rows, columns]."""
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.45
    mask[..., 1, :] = False
    bands = ((None, None), (9, None), (20, 3))
    blocks = from_mask(mask, 8, bands, rng.integers(0, 3, shape))
    more = ((0, 0), (0, 0), (0, max(0, size - blocks.columns.shape[-1])))
    wide = {name: np.pad(getattr(blocks, name), more) for name in ("columns", "band_index")}
    return dataclasses.replace(blocks, **wide)


def case(name, **options):
    return Case(name, (), (), **{"T": 37, "B": 2, "N": 4} | options)


CASES = (
    (case("local_causal_gqa", K=2, options=CAUSAL), LOCAL),
    (case("window_ids", segment_ids="packed", options=CAUSAL), WINDOW),
    (case("window_padding_bias", key_padding=True, bias=True), WINDOW),
    (case("global_dropout", K=1, dropout_rate=0.3, segment_ids="arbitrary"), GLOBAL),
    (case("per_head_cross", T=23, S=41, K=2, options=CAUSAL), HEADS),
    (case("starts", T=19, S=30, dropout_rate=0.2,
          options=(*CAUSAL, ("q_start", 14), ("k_start", 3), ("zero_attn", True))), HEADS),
    (case("one_token", T=1), LOCAL),
    (case("lists", K=2, S=29, options=(("scale", 0.7),)), lists((2, 2, 5, 4))),
)  # fmt: skip


def run(function, case, pattern, **more):
    """out, lse and gradients of everything differentiable, with random cotangents."""
    arrays, (d_out, d_lse) = case.arrays(), case.cotangents()
    keywords = case.keywords()
    del keywords["segment_lengths"], keywords["dilation_rates"]
    keywords |= more

    def both(arrays):
        out, lse = function(**arrays, pattern=pattern, **keywords)
        return out, jnp.where(lse != -jnp.inf, lse, 0), lse

    def values_and_gradients(arrays):
        (out, _, lse), pull = jax.vjp(both, arrays)
        return {"out": out, "lse": lse, **pull((d_out, d_lse, jnp.zeros_like(lse)))[0]}

    return jax.jit(values_and_gradients)(arrays)


def library(pattern, **options):
    return sparse_attention(pattern=pattern, return_lse=True, **options)


def oracle(pattern, query, key, value, segment_lengths=None, dilation_rates=None, **options):
    """The reference on the lists of a pattern."""
    (T, N), (S, K) = query.shape[1:3], key.shape[1:3]
    more = {"segment_lengths": segment_lengths, "dilation_rates": dilation_rates}
    place = {name: options.get(name, 0) for name in ("q_start", "k_start")}
    causal = options.get("is_causal", False)
    if isinstance(pattern, BlockLists):
        blocks = pattern
    elif segment_lengths is None:
        blocks = pattern.lists(T, S, N, K, is_causal=causal, **place)
    else:
        extent = max(place["q_start"] + T, place["k_start"] + S)
        lengths = [
            -(-min(w, extent) // min(r, max(min(w, extent), N)))
            for w, r in zip(segment_lengths, dilation_rates, strict=True)
        ]
        blocks = [pattern.lists(L, L, N, K, is_causal=causal) for L in lengths]
    return reference.block_sparse_attention(query, key, value, blocks, **more, **options)


@pytest.mark.parametrize(("case", "pattern"), CASES, ids=lambda x: getattr(x, "name", ""))
def test_equals_the_oracle(case, pattern, x64, monkeypatch):
    monkeypatch.setattr(block_loop, "_KEYS", 16)  # several steps, several tiles
    monkeypatch.setattr(block_loop, "_TILE", {jax.default_backend(): 16 * 8 * 5})
    assert_exact(run(library, case, pattern), run(oracle, case, pattern))


INSIDE = (
    ("ids", WINDOW, (24, 40), (1, 2),
     {"T": 33, "segment_ids": "packed", "key_padding": True, "dropout_rate": 0.3}),
    ("heads", GLOBAL, (20, 50), (1, 2),
     {"K": 2, "bias": True, "options": (("combine", "heads"), *CAUSAL)}),
    ("starts", HEADS, (9, 48), (1, 3),
     {"T": 19, "S": 27, "options": (*CAUSAL, ("q_start", 13), ("k_start", 5))}),
)  # fmt: skip


@pytest.mark.parametrize(("name", "pattern", "lengths", "rates", "sizes"), INSIDE)
def test_inside_dilated_branches(name, pattern, lengths, rates, sizes, x64):
    branches = {"segment_lengths": lengths, "dilation_rates": rates}
    one = case(f"inside_{name}", **sizes)
    assert_exact(run(library, one, pattern, **branches), run(oracle, one, pattern, **branches))


@pytest.mark.newest
def test_lists_of_segments_longer_than_the_sequence():
    """They have the sizes of the segments, and are cut; so does the pattern that they are of."""
    x = jnp.ones((1, 37, 4, 8))
    spec = dilax.DilatedSpec((24, 90, 800), (1, 2, 3))
    branches = [within(branch, 37) for branch in branches_of(spec, 4, "lse", "interleaved")]
    given = [HEADS.lists(L, num_heads=4, is_causal=True) for L in (24, 45, 267)]
    cut = [HEADS.lists(L, num_heads=4, is_causal=True) for L in (24, 19, 13)]
    for lists in (HEADS, given, [jax.tree.map(jnp.asarray, one) for one in given], cut):
        found = branch_lists(x, x, lists, spec, branches, True)
        for one, wanted in zip(found, cut, strict=True):
            assert (one.counts == wanted.counts).all()
            assert one.rows() == wanted.rows()
            assert (one.columns < one.counts.shape[2]).all()
    attend = functools.partial(sparse_attention, x, x, x)
    inside = {"segment_lengths": spec, "is_causal": True}
    assert jax.eval_shape(functools.partial(attend, pattern=given, **inside)).shape == x.shape
    wrong = r"^pattern\[2\].counts: wanted lists with 34 rows, for segments of 800 every 3, or 2 wi"
    with pytest.raises(ValueError, match=wrong):
        attend([*given[:2], given[0]], **inside)


@pytest.mark.newest
def test_traced_lists(x64):
    """Lists that are arguments of a compiled function: two of them, one compilation."""
    one, compiled = case("traced", B=1, K=2, options=CAUSAL), []

    def traced(pattern, **options):
        compiled.append(pattern.is_static)
        return run(library, one, pattern)

    attention = jax.jit(traced)
    for seed in (3, 4):
        blocks = lists((1, 2, 5, 5), seed, size=20)
        assert_exact(attention(blocks), run(oracle, one, blocks))
    assert compiled == [False]


@pytest.mark.newest
def test_all_blocks_kept_is_dense(x64):
    one = case("dense", options=CAUSAL)
    found = run(library, one, LocalWindow(1.0, block_size=8))
    dense = run(
        lambda pattern, **x: dilax.dilated_attention(**x, return_lse=True), one, None,
        segment_lengths=(64,), dilation_rates=(1,),
    )  # fmt: skip
    assert_exact(found, dense)


@pytest.mark.newest
def test_constant_values_come_back(x64, rng):
    q, k = rng.normal(size=(2, 2, 37, 4, 8))
    v = np.broadcast_to(rng.normal(size=8), q.shape)
    for pattern in (WINDOW, GLOBAL | HEADS):
        assert_exact(jax.jit(sparse_attention, static_argnums=3)(q, k, v, pattern), v)


@pytest.mark.newest
def test_empty_rows_are_zero_with_zero_gradients(x64, rng):
    q, k, v, d_out = rng.normal(size=(4, 1, 32, 2, 8))
    blocks = from_mask(np.diag([True, False, True, False]), 8)

    def attention(q, k, v):
        return sparse_attention(q, k, v, blocks, return_lse=True)

    (out, lse), pull = jax.vjp(jax.jit(attention), q, k, v)
    grads = pull((d_out, jnp.ones_like(lse)))
    gone = np.repeat([False, True, False, True], 8)
    assert (np.asarray(out)[:, gone] == 0).all()
    assert (np.asarray(lse)[:, gone] == -np.inf).all()
    assert all((np.asarray(g)[:, gone] == 0).all() for g in grads)
    assert all((np.asarray(g)[:, ~gone] != 0).all() for g in grads)


@pytest.mark.newest
def test_examples_do_not_influence_each_other(x64, rng):
    arrays = rng.normal(size=(3, 3, 37, 4, 8))
    blocks = lists((3, 4, 5, 5), 9)
    attention = jax.jit(functools.partial(sparse_attention, is_causal=True))
    together = attention(*arrays, blocks)
    for i in range(3):
        alone = jax.tree.map(lambda x, i=i: x[i : i + 1], blocks)
        assert_exact(attention(*arrays[:, i : i + 1], alone), together[i : i + 1])


@pytest.mark.newest
@pytest.mark.parametrize("pattern", [GLOBAL, HEADS], ids=["global", "heads"])
def test_the_future_is_not_seen(pattern, rng):
    q, k, v = rng.normal(size=(3, 1, 37, 4, 8)).astype(np.float32)
    attention = jax.jit(functools.partial(sparse_attention, pattern=pattern, is_causal=True))
    before = attention(q, k, v)
    for t in (5, 16, 31):
        changed = [np.where(np.arange(37)[None, :, None, None] > t, 7 * x, x) for x in (q, k, v)]
        assert (np.asarray(attention(*changed))[:, : t + 1] == before[:, : t + 1]).all()


@pytest.mark.newest
def test_continues_from_a_carry(x64, rng):
    q, k, v, out = rng.normal(size=(4, 1, 37, 2, 8))
    carry = Partial(out, rng.normal(size=out.shape[:3]))
    blocks = lists((1, 1, 5, 5), 2)
    options = {"blocks": blocks, "is_causal": True}
    weights = rng.normal(size=out.shape)

    def loss(function):
        def total(q, k, v, carry):
            part = function(q, k, v, carry)
            return (part.out * weights).sum() + jnp.sin(part.lse).sum()

        return jax.jit(jax.value_and_grad(total, (0, 1, 2, 3)))(q, k, v, carry)

    assert_exact(
        loss(lambda q, k, v, carry: attend(q, k, v, **options, carry=carry)),
        loss(lambda q, k, v, carry: merge(carry, attend(q, k, v, **options))),
    )


@pytest.mark.newest
def test_time_and_memory_follow_the_kept_blocks():
    """Four times as long a sequence with as many blocks per row needs four times the memory."""

    def bytes_of(T, attention):
        x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        both = jax.value_and_grad(lambda *x: attention(*x).sum(), (0, 1, 2))
        return jax.jit(both).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    few = LocalWindow(window_blocks=3, block_size=64)
    small, large = (
        bytes_of(T, functools.partial(dilax.block_sparse_attention, pattern=few))
        for T in (4096, 16384)
    )
    assert large < 4.5 * small
    # Steps of all tiles together: one global row costs its own length, not that of every row.
    settings = Settings(is_causal=False, scale=1.0, dropout_rate=0.0, platform="cpu")
    pattern = GlobalLocal(global_tokens=1, window_blocks=3, block_size=64)
    blocks = pattern.lists(16384)
    to = block_loop.visits(blocks, np.zeros(2, int), 0, 0)
    plan = block_loop._plan(settings, to, 256)
    work = (plan.steps * plan.width * plan.items.count.shape[1]).sum()
    assert work < 2 * 2 * blocks.counts.sum()


@pytest.mark.newest
def test_lower_precision_errs_as_plain_attention_does(rng):
    q, k, v, d_out = (jnp.asarray(rng.normal(size=(1, 96, 2, 16)), jnp.bfloat16) for _ in range(4))
    mask = np.asarray(token_mask(WINDOW.lists(96), 96, 96))

    def plain(q, k, v):
        logits = jnp.einsum("BTNH,BSNH->BNTS", q, k, preferred_element_type=jnp.float32)
        p = jax.nn.softmax(jnp.where(mask, logits / 4, -jnp.inf)).astype(q.dtype)
        out = jnp.einsum("BNTS,BSNH->BTNH", p, v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype)

    def values(attention, *arrays):
        out, pull = jax.vjp(jax.jit(attention), *arrays[:3])
        return (out, *pull(arrays[3]))

    def sparse(q, k, v):
        return sparse_attention(q, k, v, WINDOW)

    with jax.enable_x64(True):
        exact = values(
            lambda q, k, v: reference.block_sparse_attention(q, k, v, WINDOW.lists(96))[0],
            *(x.astype(jnp.float64) for x in (q, k, v, d_out)),
        )
    assert_within(values(sparse, q, k, v, d_out), values(plain, q, k, v, d_out), exact)


@pytest.mark.newest
def test_vmap_also_over_lists(x64, rng):
    arrays = rng.normal(size=(3, 2, 1, 40, 2, 8))
    each = [lists((1, 1, 5, 5), seed, size=20) for seed in (5, 6)]
    both = jax.tree.map(lambda *x: jnp.stack(x), *each)
    found = jax.jit(jax.vmap(sparse_attention))(*arrays, both)
    alone = jax.jit(sparse_attention)
    for i in range(2):
        assert_exact(found[i], alone(*arrays[:, i], each[i]))


def refused(match, pattern=LOCAL, error=ValueError, **options):
    x = jnp.ones((2, 37, 4, 8))
    with pytest.raises(error, match=match):
        sparse_attention(x, x, x, pattern, **options)


@pytest.mark.newest
def test_wrong_arguments_are_refused():
    good = lists((2, 4, 5, 5))
    refused("pattern: wanted a SparsePatternConfig, a pattern.*got 3", 3)
    refused("pattern: wanted a SparsePatternConfig.*one of local, .*got 'learned'", "learned")
    refused("pattern: wanted .*AdaptiveAttention is what has a router", "adaptive_standard")
    for mask in (np.ones((5, 5), bool), jnp.ones((5, 5))):
        refused("^pattern: wanted .*from_mask makes lists of a mask", mask)
    with pytest.raises(ValueError, match=r"^pattern: wanted .*_attention is what takes lists, got"):
        dilax.DilatedAttention(None, pattern=good)
    refused("blocks.counts: wanted int32 .* with 5 rows", lists((2, 4, 6, 5)))
    padded = BlockLists(
        np.zeros((2, 4, 6, 1), np.int32), np.ones((2, 4, 6), np.int32), block_size=8
    )
    refused("blocks.columns: wanted int32 .* with 5 rows", padded)
    refused("blocks.columns: wanted columns from 0 to 4, got 5", lists((2, 4, 5, 6), 1))
    for one in (lists((2, 4, 5, 6), 1), dataclasses.replace(good, counts=good.counts + 9)):
        refused("blocks.(columns|counts): wanted", jax.tree.map(jnp.asarray, one))
    refused("blocks.block_size: wanted a pos", dataclasses.replace(good, block_size=0))
    refused("axis 0 of size 1 or 2", lists((3, 4, 5, 5)))
    refused("axis 1 of size 1 or 4", lists((1, 3, 5, 5)))
    refused("pattern: wanted 2 BlockLists, one per branch", good,
            segment_lengths=(8, 16), dilation_rates=(1, 2))  # fmt: skip
    refused("dilation_rates: wanted None without segment_lengths", dilation_rates=(1,))
    refused("combine: wanted 'lse' without segment_lengths", combine="heads")
    refused("pad_mode: wanted 'mask'", pad_mode="zeros")
    refused("its kernels are for NVIDIA", LocalWindow(0.3, block_size=64),
            error=dilax.UnsupportedError, implementation="pallas")  # fmt: skip
    refused(
        "pattern: wanted 3 patterns to divide the number of heads, got 4", PerHead((LOCAL,) * 3)
    )
