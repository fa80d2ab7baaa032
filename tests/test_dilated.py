"""dilated_attention against the oracle: every case, every dtype, and what must never happen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dilax
from dilax import reference
from dilax.spec import as_spec, branches_of
from tests.cases import BY_NAME, Case, as_parameters
from tests.compare import assert_exact, assert_within, error


def values_and_gradients(attend, case, dtype=np.float64, rounded=np.float64):
    """(out, lse) and the gradients of all differentiable inputs, random cotangents for both.

    Inputs are rounded to `rounded` and handed over in `dtype`.
    """
    return program(attend, case)(dtype, rounded)


def program(attend, case):
    """`values_and_gradients` of one case, compiled once for each dtype."""
    keywords = case.keywords()
    traced = {name: x for name, x in keywords.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in keywords.items() if name not in traced}

    @jax.jit
    def compiled(arrays, traced, cotangents):
        result, pull = jax.vjp(lambda arrays: attend(**arrays, **traced, **static), arrays)
        return result, pull(cotangents)[0]

    def run(dtype, rounded):
        arrays = {name: x.astype(dtype) for name, x in case.arrays(rounded).items()}
        d_out, d_lse = case.cotangents(rounded)
        cotangents = d_out.astype(dtype), d_lse.astype(np.promote_types(dtype, np.float32))
        return compiled(arrays, traced, cotangents)

    return run


def with_lse(**arguments):
    return dilax.dilated_attention(**arguments, return_lse=True)


def compiled(attend, arrays, keywords):
    """attend(**arrays, **keywords) under jit, arrays among the keywords traced as well."""
    traced = {name: x for name, x in keywords.items() if isinstance(x, jax.Array)}
    static = {name: x for name, x in keywords.items() if name not in traced}
    return jax.jit(lambda arrays: attend(**arrays, **static))({**arrays, **traced})


# Other sizes of pieces and masks that gradients take as values do; the other cases have each kind.
VALUES_ALONE = (
    "ids_arbitrary", "ids_many_short", "zeros_long", "zeros_blocked", "decode_one", "dropout_heads",
    "one_below_segment", "one_above_segment_ids", "prime_everything", "segment_above_length",
    "rate_above_heads_blocked", "rate_above_segment", "rate_above_length", "no_rate_one_heads",
    "rate_three_of_eight", "length_one_causal", "segment_one", "equal_segments",
    "duplicate_branches", "head_dim_24", "twelve_heads",
)  # fmt: skip


@pytest.mark.parametrize("case", as_parameters())
def test_equals_oracle(case, x64):
    ours, exact = (
        compiled(attend, case.arrays(), case.keywords())
        if case.name in VALUES_ALONE
        else values_and_gradients(attend, case)
        for attend in (with_lse, reference.dilated_attention)
    )
    assert_exact(ours, exact)


def dense(case):
    """Plain XLA: one dense softmax, matrices in the dtype of the inputs, statistics in float32."""
    options = dict(case.options)
    q_position = options.get("q_start", 0) + np.arange(case.T)
    k_position = options.get("k_start", 0) + np.arange(case.S or case.T)
    spec = as_spec(case.segment_lengths, case.dilation_rates)
    head_offset = options.get("head_offset", "interleaved")
    counts = np.zeros((1, case.N, case.T, len(k_position)))
    for w, r, _, offsets in branches_of(spec, case.N, "lse", head_offset):
        same = q_position[:, None] // w == k_position // w
        for n, offset in enumerate(offsets):
            kept_q, kept_k = (x % w % r == offset for x in (q_position, k_position))
            counts[0, n] += same & kept_q[:, None] & kept_k
    counts = counts * case.visible()[:, None]
    with np.errstate(divide="ignore"):
        logs = jnp.asarray(np.log(counts), jnp.float32)

    def attend(query, key, value, **_):
        key, value = (jnp.repeat(x, case.N // x.shape[2], axis=2) for x in (key, value))
        logits = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32)
        logits = logits * options.get("scale", case.H**-0.5) + logs
        seen = counts.any(-1, keepdims=True)
        top = jnp.where(seen, jax.lax.stop_gradient(logits).max(-1, keepdims=True), 0)
        total = jnp.exp(logits - top).sum(-1, keepdims=True)
        lse = jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), -jnp.inf)
        p = jnp.exp(logits - jnp.where(seen, lse, 0)).astype(query.dtype)
        out = jnp.einsum("BNTS,BSNH->BTNH", p, value, preferred_element_type=jnp.float32)
        return out.astype(query.dtype), jnp.swapaxes(lse[..., 0], 1, 2)

    return attend


# Starts only move integers, and scales are those of test_tile_loop.
IN_ALL_DTYPES = (
    pytest.param("plain", marks=pytest.mark.newest),
    pytest.param("gqa_causal_blocked", marks=pytest.mark.newest),
    "packed_causal",
)


@pytest.mark.parametrize("name", IN_ALL_DTYPES)
def test_lower_precision_errs_as_xla_does(name):
    case = BY_NAME[name]
    oracle = program(reference.dilated_attention, case)
    for dtype in map(jnp.dtype, ("bfloat16", "float16", "float32")):
        found = values_and_gradients(with_lse, case, dtype, dtype)
        (out, lse), gradients = found
        assert out.dtype == dtype
        assert lse.dtype == np.float32
        assert all(x.dtype == dtype for x in gradients.values())
        baseline = values_and_gradients(dense(case), case, dtype, dtype)
        with jax.enable_x64(True):
            exact = oracle(np.float64, dtype)
        assert_within(found, baseline, exact)


@pytest.mark.newest
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", [{"pad_mode": "zeros"}, {"zero_attn": True}, {"bias": True}])
def test_extras_keep_the_dtype(dtype, options, rng):
    x = jnp.asarray(rng.normal(size=(1, 10, 2, 8)), dtype)
    if "bias" in options:
        options = {"bias_k": x[0, 0], "bias_v": x[0, 1]}
    options = {"segment_lengths": [4], "dilation_rates": [1]} | options
    arrays = {"query": x, "key": x, "value": x}
    out, lse = compiled(with_lse, arrays, options)
    assert (out.dtype, lse.dtype) == (x.dtype, np.float32)
    assert np.isfinite(np.asarray(lse)).all()


CAUSAL = (
    "causal", "prime", "gqa_causal_blocked", "packed_causal", "heads_blocked_causal",
)  # fmt: skip


@pytest.mark.newest
@pytest.mark.parametrize("name", CAUSAL)
def test_the_future_changes_nothing_before_it(name):
    """Bit for bit; and the present does change what comes after."""
    case = BY_NAME[name]
    arrays, keywords = case.arrays(np.float32), case.keywords()
    other = {n: x + 1.5 for n, x in arrays.items()}
    other["value"] = -other["value"]

    @jax.jit
    def run(arrays):
        return dilax.dilated_attention(**arrays, **keywords, return_lse=True)

    before = run(arrays)
    for t in (0, 1, case.T // 2, case.T - 1):
        for which in ("query", "key", "value"):
            changed = {n: np.array(x) for n, x in arrays.items()}
            changed[which][:, t:] = other[which][:, t:]
            for x, y in zip(before, run(changed), strict=True):
                assert (np.asarray(x)[:, :t] == np.asarray(y)[:, :t]).all(), (which, t)
        changed = {n: np.array(x) for n, x in arrays.items()}
        for which in ("key", "value"):
            changed[which][:, t] = other[which][:, t]
        after = run(changed)[0]
        seen = case.visible()[:, :, t].any() and (np.isfinite(before[1][:, t])).any()
        assert (np.asarray(after) != np.asarray(before[0]))[:, t:].any() == seen


@pytest.mark.newest
def test_the_past_changes_what_follows():
    """Causal masking cuts no more than the future: every later row of the segment moves."""
    case = Case("past", (8, 24), (1, 1), B=1, options=(("is_causal", True),))
    arrays, keywords = case.arrays(np.float32), case.keywords()
    run = jax.jit(lambda arrays: dilax.dilated_attention(**arrays, **keywords))
    before = run(arrays)
    for t in (0, 7, 8, 22):
        changed = {n: np.array(x) for n, x in arrays.items()}
        changed["key"][:, t] += 1
        changed["value"][:, t] += 1
        after = run(changed)
        assert (np.asarray(after != before).any((0, 2, 3)) == (np.arange(24) >= t)).all()


@pytest.mark.newest
def test_examples_do_not_see_each_other(x64):
    case = BY_NAME["zeros_extras"]
    arrays, keywords = case.arrays(), case.keywords()
    masks = {n: x for n, x in keywords.items() if isinstance(x, jax.Array)}
    static = {n: x for n, x in keywords.items() if n not in masks}
    run = jax.jit(lambda arrays: with_lse(**arrays, **static))
    both = run(arrays | masks)
    for b in range(case.B):
        one = {n: x[b : b + 1] if n in ("query", "key", "value") else x for n, x in arrays.items()}
        alone = run(one | {n: x[b : b + 1] for n, x in masks.items()})
        assert_exact(alone, jax.tree.map(lambda x, b=b: x[b : b + 1], both))


@pytest.mark.newest
def test_packed_documents_do_not_see_each_other():
    """Another document's tokens may change to any finite number, and no bit moves."""
    x = np.random.default_rng(0).normal(size=(3, 1, 20, 2, 8)).astype(np.float32)
    ids = jnp.asarray([[1] * 9 + [2] * 8 + [0] * 3], jnp.int32)

    @jax.jit
    def run(x):
        return dilax.dilated_attention(*x, [8, 20], [1, 2], q_segment_ids=ids, return_lse=True)

    before = run(x)
    for rows in (slice(9, 17), slice(17, 20)):
        changed = x.copy()
        changed[:, :, rows] = 7 - 100 * x[:, :, rows]
        for a, b in zip(before, run(changed), strict=True):
            assert (np.asarray(a)[:, :9] == np.asarray(b)[:, :9]).all()


UNSEEN = {
    "padding": {"key_padding_mask": jnp.zeros((2, 12), bool)},
    "half padding": {
        "key_padding_mask": jnp.arange(24).reshape(2, 12) < 12,
        "segment_lengths": [6, 12], "dilation_rates": [1, 2],
    },
    "ids": {"q_segment_ids": jnp.asarray([[0] * 12, [1] * 5 + [0] * 7], jnp.int32)},
    "unlike ids": {
        "q_segment_ids": jnp.ones((2, 12), jnp.int32),
        "kv_segment_ids": jnp.full((2, 12), 2, jnp.int32),
    },
    "future keys": {"is_causal": True, "k_start": 6},
    "all keys in the future": {"is_causal": True, "k_start": 12},
    "another segment": {"q_start": 48},
    "no rate one": {"segment_lengths": [6, 12], "dilation_rates": [2, 4]},
    "dropout": {
        "key_padding_mask": jnp.zeros((2, 12), bool),
        "dropout_rate": 0.5, "dropout_key": jax.random.PRNGKey(0), "deterministic": False,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if name == "padding" else pytest.mark.newest)
        for dtype, names in (
            ("float32", UNSEEN),
            ("bfloat16", ("half padding", "no rate one", "dropout")),
        )
        for name in names
    ],
)
def test_rows_that_see_nothing(name, dtype):
    """out 0, lse -inf, gradients 0; and no NaN arises on the way, not even a masked one."""
    arrays = {n: jnp.asarray(x, dtype) for n, x in Case("unseen", (), (), T=12).arrays().items()}
    options = {"segment_lengths": [12], "dilation_rates": [1]} | UNSEEN[name]
    masks = {n: x for n, x in options.items() if isinstance(x, jax.Array)}
    static = {n: x for n, x in options.items() if n not in masks}

    @jax.jit
    def run(arrays, masks):
        result, pull = jax.vjp(lambda x: with_lse(**x, **masks, **static), arrays)
        return result, pull(jax.tree.map(jnp.ones_like, result))[0]

    with jax.debug_nans(True):
        (out, lse), gradients = run(arrays, masks)
    unseen = np.isneginf(np.asarray(lse))
    exact = compiled(reference.dilated_attention, arrays, options)
    assert unseen.any()
    assert (unseen == np.isneginf(np.asarray(exact[1]))).all()
    assert (np.asarray(out)[unseen] == 0).all()
    assert (np.asarray(gradients["query"])[unseen] == 0).all()
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in gradients.values())
    if unseen.all():
        assert all((np.asarray(x) == 0).all() for x in gradients.values())


@pytest.mark.newest
def test_large_logits_keep_the_weights_of_the_branches():
    """Weights add up to 1 although a large lse has no bits left for the log of their number."""
    case = BY_NAME["causal"]
    ours, baseline, oracle = (
        jax.jit(functools.partial(attend, **case.keywords()))
        for attend in (with_lse, dense(case), reference.dilated_attention)
    )
    for size in (1e2, 1e4, 1e9):
        arrays = case.arrays(np.float32)
        arrays["query"] = arrays["query"] * np.float32(size)
        with jax.enable_x64(True):
            exact = oracle(**{name: x.astype(np.float64) for name, x in arrays.items()})
        assert_within(ours(**arrays), baseline(**arrays), exact)


def test_numpy_arrays_are_arrays():
    case = Case("numpy", (24,), (2,), segment_ids="packed")
    arrays = case.arrays(np.float32)
    keywords = case.keywords() | case.masks()
    jaxed = {n: jnp.asarray(x) for n, x in arrays.items()}
    found = with_lse(**arrays, **keywords)
    assert all(isinstance(x, jax.Array) for x in found)
    for x, y in zip(found, with_lse(**jaxed, **case.keywords()), strict=True):
        assert error(x, y) == 0


@pytest.mark.newest
def test_return_lse_changes_nothing_else():
    case = BY_NAME["rate_three_of_eight"]
    arrays = case.arrays(np.float32)
    out, _ = compiled(with_lse, arrays, case.keywords())
    assert (compiled(dilax.dilated_attention, arrays, case.keywords()) == out).all()


@pytest.mark.newest
def test_q_start_continues_a_sequence(x64):
    """Chunks of queries at their positions are the rows of the whole: how decoding works."""
    case = BY_NAME["rate_three_of_eight"]
    arrays, keywords = case.arrays(), case.keywords()
    out, lse = compiled(with_lse, arrays, keywords)
    for start, end, S in ((0, 5, 5), (20, 21, case.T), (21, 29, case.T)):
        chunk = {"query": arrays["query"][:, start:end]}
        chunk |= {n: arrays[n][:, :S] for n in ("key", "value")}
        found = compiled(with_lse, chunk, keywords | {"q_start": start})
        assert_exact(found, (out[:, start:end], lse[:, start:end]))


@pytest.mark.newest
def test_key_chunks_merge_to_the_whole(x64):
    """Ring hops: keys in parts at their positions, merged, are all keys."""
    case = BY_NAME["rate_three_of_eight"]
    arrays, keywords = case.arrays(), case.keywords()
    parts = []
    for start, end in ((0, 9), (9, 10), (10, 29)):
        keys = {n: arrays[n][:, start:end] for n in ("key", "value")}
        part = compiled(with_lse, arrays | keys, keywords | {"k_start": start})
        parts.append(dilax.Partial(*part))
    assert_exact(tuple(dilax.merge(*parts)), compiled(with_lse, arrays, keywords))
