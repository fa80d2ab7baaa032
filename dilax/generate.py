"""Sampling text from a causal language model, exactly: every token from a full forward pass."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dilax import data
from dilax._types import refuse
from dilax.checks import check_bool, check_index, check_number
from dilax.longnet import LongNetLM

_SHORTEST = 256  # tokens of the first window


def next_logits(model: LongNetLM, tokens: Any) -> jax.Array:
    """Logits [vocab_size] of the token that follows `tokens` (int [T], T >= 1).

    Example:
        >>> from dilax.longnet_config import LongNetConfig
        >>> config = LongNetConfig(64, 4, 1, 96, (8,), (1,), vocab_size=258)
        >>> next_logits(LongNetLM(config, rngs=nnx.Rngs(0)), [256, 104]).shape
        (258,)
    """
    tokens = _checked_tokens(model, tokens)
    graphdef, state = nnx.split(model)
    return _logits_at(graphdef, state, _padded(tokens, len(tokens)), len(tokens))


def _checked_tokens(model: LongNetLM, tokens: Any) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
        raise refuse("tokens", "at least one int token [T]", tokens)
    vocab = model.config.vocab_size or 0
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise refuse("tokens", f"tokens in [0, {vocab})", [int(tokens.min()), int(tokens.max())])
    return tokens.astype(np.int32)


def _padded(tokens: np.ndarray, length: int) -> np.ndarray:
    """Tokens [1, window], filled up at the end: what follows changes nothing in a causal model.

    Windows are powers of two, so that a text of any length compiles only a few programs.
    """
    window = _SHORTEST
    while window < length:
        window *= 2
    return np.pad(tokens, (0, window - len(tokens)))[None].astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _logits_at(graphdef, state, tokens, length):
    return nnx.merge(graphdef, state)(tokens)[0, length - 1]


@functools.partial(jax.jit, static_argnums=(0, 5))
def _sample_at(graphdef, state, tokens, length, temperature, top_k, key):
    """One token after tokens[:length], temperature 0 for the most probable one."""
    logits = nnx.merge(graphdef, state)(tokens)[0, length - 1].astype(jnp.float32)
    if top_k is not None:
        logits = jnp.where(logits >= jax.lax.top_k(logits, top_k)[0][-1], logits, -jnp.inf)
    hot = jax.random.categorical(
        jax.random.fold_in(key, length), logits / jnp.where(temperature > 0, temperature, 1)
    )
    return jnp.where(temperature > 0, hot, logits.argmax())


def generate_tokens(
    model: LongNetLM,
    prompt: Any,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_token: int | None = None,
) -> np.ndarray:
    """Tokens that a model continues a prompt with: int32 [at most max_new_tokens].

    Args:
        model: the language model.
        prompt: int [T], T >= 1.
        max_new_tokens: how many tokens at most.
        temperature: divides the logits; 0 takes the most probable token every time.
        top_k: sample among the k most probable tokens only; None: among all.
        seed: of the random choices.
        stop_token: end after this token, which is then the last one returned.

    Raises:
        ValueError: an argument is wrong; the message says which, what was wanted and what came.

    Example:
        >>> from dilax.longnet_config import LongNetConfig
        >>> config = LongNetConfig(64, 4, 1, 96, (8,), (1,), vocab_size=258)
        >>> model = LongNetLM(config, rngs=nnx.Rngs(0))
        >>> generate_tokens(model, [256], max_new_tokens=3, temperature=0).shape
        (3,)
    """
    if not isinstance(model, LongNetLM):
        raise refuse("model", "a LongNetLM", model)
    tokens = _checked_tokens(model, prompt)
    check_number("temperature", temperature, 0, float("inf"), "a number that is not negative")
    if check_index("max_new_tokens", max_new_tokens) == 0:
        raise refuse("max_new_tokens", "a positive int", max_new_tokens)
    vocab = model.config.vocab_size or 0
    if top_k is not None and not 1 <= check_index("top_k", top_k) <= vocab:
        raise refuse("top_k", f"None or an int in [1, {vocab}]", top_k)
    if check_index("seed", seed) >= 2**32:
        raise refuse("seed", "an int in [0, 2**32)", seed)
    key = jax.random.key(seed)
    graphdef, state = nnx.split(model)
    length = first = len(tokens)
    window = _padded(tokens, first + 1)
    while length < first + max_new_tokens:
        if length == window.shape[1]:
            window = _padded(window[0], length + 1)
        token = _sample_at(graphdef, state, window, length, float(temperature), top_k, key)
        window[0, length] = token = int(token)
        length += 1
        if token == stop_token:
            break
    return window[0, first:length]


def generate(
    model: LongNetLM,
    prompt: str | bytes = b"",
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_at_end: bool = True,
) -> bytes:
    """Text that a byte-level language model continues a prompt with (the prompt is not repeated).

    Args:
        model, max_new_tokens, temperature, top_k, seed: as in `generate_tokens`.
        prompt: the beginning of a document; strings are taken as UTF-8, where the surrogates of
            `os.fsdecode` stand for the bytes that are not.
        stop_at_end: end where the model ends the document.

    Raises:
        ValueError: an argument is wrong; the message says which, what was wanted and what came.

    Example:
        >>> from dilax.longnet_config import LongNetConfig
        >>> config = LongNetConfig(64, 4, 1, 96, (8,), (1,), vocab_size=258)
        >>> text = generate(LongNetLM(config, rngs=nnx.Rngs(0)), "import ", max_new_tokens=3)
        >>> len(text) <= 3
        True
    """
    if not isinstance(prompt, str | bytes):
        raise refuse("prompt", "str or bytes", prompt)
    check_bool("stop_at_end", stop_at_end)
    try:
        text = prompt.encode(errors="surrogateescape") if isinstance(prompt, str) else prompt
    except UnicodeEncodeError:
        raise refuse("prompt", "text that UTF-8 can encode", prompt) from None
    tokens = generate_tokens(
        model,
        data.encode(text)[:-1],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        stop_token=data.END if stop_at_end else None,
    )
    return data.decode(tokens)
