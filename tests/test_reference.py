"""The oracle itself, against jax.nn and against loops over single (query, key, branch) triples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilax import reference
from tests.cases import CASES, Case, as_parameters
from tests.compare import assert_exact, assert_within

ONE = ((64,), (1,))  # one branch, one segment: ordinary attention

LIKE_JAX_NN = (
    Case("gqa_cross_causal", *ONE, T=9, S=20, N=6, K=2, options=(("is_causal", True),)),
    Case("padding_scale", *ONE, key_padding=True, options=(("scale", 0.4),)),
    Case("mqa_ids_cross", *ONE, T=20, S=14, K=1, segment_ids="packed"),
)


@pytest.mark.newest
@pytest.mark.parametrize("case", LIKE_JAX_NN, ids=lambda case: case.name)
def test_one_segment_is_jax_nn(case):
    """In float32, for jax.nn is never float64: it errs no more than the oracle in float32."""
    mask, options = case.visible()[:, None], dict(case.options)
    seen = jnp.asarray(mask.any(-1)[:, 0, :, None])  # jax.nn averages where no key is

    def of_jax_nn(query, key, value):
        out, lse = jax.nn.dot_product_attention(
            query, key, value, mask=jnp.asarray(mask), **options, return_residual=True
        )
        return jnp.where(seen[..., None], out, 0), jnp.where(seen, lse, -jnp.inf)

    def of_oracle(query, key, value):
        return reference.dilated_attention(query, key, value, **case.keywords())

    def run(attend, dtype):
        arrays = {name: x.astype(dtype) for name, x in case.arrays(np.float32).items()}
        cotangent = case.cotangents(np.float32)[0].astype(dtype)

        @jax.jit
        def values_and_gradients(arrays):
            (out, lse), pull = jax.vjp(lambda x: attend(**x), arrays)
            return (out, lse), pull((cotangent, jnp.zeros_like(lse)))[0]

        return values_and_gradients(arrays)

    with jax.enable_x64(True):
        exact = run(of_oracle, np.float64)
    assert_within(run(of_jax_nn, np.float32), run(of_oracle, np.float32), exact)


def by_hand(case):
    """out and lse by SEMANTICS.md, one (example, head, query, branch, key) at a time."""
    options, arrays, visible = dict(case.options), case.arrays(), case.visible()
    B, T, N, S, H = case.B, case.T, case.N, case.S or case.T, case.H
    share = N // (case.K or N)
    q_start, k_start = options.get("q_start", 0), options.get("k_start", 0)
    heads_mode = options.get("combine") == "heads"
    zeros = options.get("pad_mode") == "zeros" and not options.get("is_causal")
    scale = options.get("scale", H**-0.5)
    G = len(case.segment_lengths)
    group_of = np.concatenate(
        [np.full(len(g), i) for i, g in enumerate(np.array_split(range(N), G))]
    )

    def offset(n, i, rate):
        if heads_mode:
            return i % rate
        blocked = options.get("head_offset") == "blocked"
        return n // int(np.ceil(N / rate)) if blocked else n % rate

    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        q, p = arrays["query"][b, t, n], q_start + t
        logits, values = [], []
        for i, (w, r) in enumerate(zip(case.segment_lengths, case.dilation_rates, strict=True)):
            W, keeps = (min(w, T) if zeros else w), offset(n, i, r)
            if (heads_mode and group_of[n] != i) or p % W % r != keeps:
                continue
            for s in range(S):
                same = (k_start + s) // W == p // W and (k_start + s) % W % r == keeps
                if same and visible[b, t, s]:
                    logits.append(scale * q @ arrays["key"][b, s, n // share])
                    values.append(arrays["value"][b, s, n // share])
            if zeros:  # pad to whole segments, then each segment to a multiple of r
                begin = p // W * W
                for index in range(-(-W // r) * r):
                    if index % r == keeps and (index >= W or begin + index >= T):
                        logits.append(0.0)
                        values.append(np.zeros(H))
        if case.bias:
            logits.append(scale * q @ arrays["bias_k"][n // share])
            values.append(arrays["bias_v"][n // share])
        if options.get("zero_attn"):
            logits.append(0.0)
            values.append(np.zeros(H))
        if logits:
            weights = np.exp(logits)
            lse[b, t, n] = np.log(weights.sum())
            out[b, t, n] = weights @ np.array(values) / weights.sum()
    return out / (G if options.get("average_branches", heads_mode) else 1), lse


@pytest.mark.parametrize("case", as_parameters(c for c in CASES if not c.dropout_rate))
def test_equals_loops(case, x64):
    run = jax.jit(functools.partial(reference.dilated_attention, **case.keywords()))
    assert_exact(run(**case.arrays()), by_hand(case))


def test_duplicates_count_twice(x64):
    """A branch given twice weighs every key double, which adds log 2 to lse and nothing to out."""
    arrays = Case("duplicates", (8,), (2,)).arrays()
    out, lse = reference.dilated_attention(**arrays, segment_lengths=[8], dilation_rates=[2])
    twice = reference.dilated_attention(**arrays, segment_lengths=[8, 8], dilation_rates=[2, 2])
    assert_exact(twice, (out, np.where(np.isinf(lse), lse, lse + np.log(2))))
