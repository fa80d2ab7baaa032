"""Sampling is exact: past every segment boundary it follows the full forward pass."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dilax import data
from dilax.generate import generate, generate_tokens, next_logits
from dilax.longnet import LongNetLM
from dilax.longnet_config import LongNetConfig
from tests.compare import EXACT, error

CONFIG = LongNetConfig(
    embed_dim=32,
    num_heads=4,
    num_layers=2,
    ffn_dim=48,
    segment_lengths=(8, 24),
    dilation_rates=(1, 3),
    vocab_size=data.VOCAB_SIZE,
    param_dtype="float64",
)


full_pass = nnx.jit(lambda model, tokens: model(jnp.asarray(tokens[None], jnp.int32))[0])


@pytest.fixture
def model(x64):
    return LongNetLM(CONFIG, rngs=nnx.Rngs(0))


def test_logits_after_a_prompt_of_any_length_are_those_of_the_full_pass(model, rng):
    """torchscale decodes wrongly beyond the first segment; here padding must change nothing."""
    tokens = rng.integers(0, 256, 259)
    full = full_pass(model, tokens)
    for length in (1, 7, 8, 9, 23, 24, 25, 47, 49, 255, 256, 257):
        assert error(next_logits(model, tokens[:length]), full[length - 1]) <= EXACT, length


def test_greedy_tokens_are_the_argmax_of_one_full_pass(model, rng):
    """All 60, over many boundaries of segments of 8 and 24, from one pass without padding."""
    prompt = rng.integers(0, 256, 5)
    new = generate_tokens(model, prompt, max_new_tokens=60, temperature=0)
    logits = np.asarray(full_pass(model, np.concatenate([prompt, new])))
    np.testing.assert_array_equal(new, logits[4:-1].argmax(-1))
    assert len(set(new.tolist())) > 5


def test_windows_grow(model, rng):
    prompt = rng.integers(0, 256, 254)
    new = generate_tokens(model, prompt, max_new_tokens=5, temperature=0)
    logits = np.asarray(full_pass(model, np.concatenate([prompt, new])))
    np.testing.assert_array_equal(new, logits[253:-1].argmax(-1))


def test_sampling_follows_seed_temperature_and_top_k(model):
    def sample(**options):
        return generate_tokens(model, [256], max_new_tokens=20, **options).tolist()

    assert sample(seed=1) == sample(seed=1)
    assert sample(seed=1) != sample(seed=2)
    greedy = sample(temperature=0)
    assert sample(top_k=1, seed=3) == greedy
    assert sample(temperature=1e-6, seed=3) == greedy
    assert sample(seed=1) != greedy


def test_top_k_and_temperature_shape_the_distribution(model):
    logits = np.asarray(next_logits(model, [256]), np.float64)
    best = np.argsort(logits)[::-1][:3]
    draws = [
        int(generate_tokens(model, [256], max_new_tokens=1, top_k=3, temperature=0.7, seed=s)[0])
        for s in range(300)
    ]
    assert set(draws) == set(best.tolist())
    wanted = np.exp(logits[best] / 0.7)
    wanted /= wanted.sum()
    found = np.array([draws.count(b) for b in best]) / 300
    assert np.abs(found - wanted).max() < 0.1  # more than three standard deviations


def test_text_ends_where_the_model_ends_it(model):
    model.head.kernel[...] = jnp.zeros_like(model.head.kernel).at[:, data.END].set(0.0)
    tokens = generate_tokens(model, [256], max_new_tokens=9, temperature=0, stop_token=0)
    assert tokens.tolist() == [0]  # all logits are equal: the first one wins
    assert generate(model, "x", max_new_tokens=4, temperature=0) == b"\0\0\0\0"


def test_prompts_are_bytes_or_text(model):
    options = {"max_new_tokens": 3, "seed": 5, "stop_at_end": False}
    assert generate(model, "ä", **options) == generate(model, "ä".encode(), **options)
    assert isinstance(generate(model, **options), bytes)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"prompt": []}, "tokens"),
        ({"prompt": [999]}, "tokens"),
        ({"prompt": [0.5]}, "tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": 999}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"model": None}, "model"),
    ],
)
def test_wrong_arguments_are_refused_by_name(options, name, model):
    with pytest.raises(ValueError, match=name):
        generate_tokens(**{"model": model, "prompt": [256], **options})
    with pytest.raises(ValueError, match="prompt"):
        generate(model, 3)
    with pytest.raises(ValueError, match="stop_at_end"):
        generate(model, "", stop_at_end=1)
