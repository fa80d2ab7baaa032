# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # First attention
#
# From queries, keys and values to a picture of what each head sees, a check against the
# definition, gradients, and a swap inside a Flax model that then learns something.
# Everything here runs on a CPU in well under a minute.

# %%
# %matplotlib inline
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import dilax
from dilax import plotting, reference

# %% [markdown]
# ## From q, k, v to an output
#
# Layouts are those of `jax.nn.dot_product_attention`: `[B, T, N, H]`, that is batch, tokens,
# heads, head dim. A *branch* `(W, R)` cuts the tokens into segments of `W`, and within a segment
# a head keeps one token in `R`. Here: all pairs inside 8 tokens, every second one inside 16,
# every fourth inside 32.

# %%
B, T, N, H = 2, 32, 4, 8
segment_lengths, dilation_rates = (8, 16, 32), (1, 2, 4)

q, k, v = jax.random.normal(jax.random.key(0), (3, B, T, N, H))


@jax.jit
def attend(q, k, v):
    return dilax.dilated_attention(
        q, k, v, segment_lengths, dilation_rates, is_causal=True, return_lse=True
    )


out, lse = attend(q, k, v)
out.shape, lse.shape

# %% [markdown]
# ## What each head sees
#
# A row is a query, a column a key. Head `n` keeps the tokens with index `n mod R` in their
# segment, so the heads together see more than any one of them: the last panel counts heads.

# %%
plotting.draw_pattern(segment_lengths, dilation_rates, length=T, num_heads=N, is_causal=True)

# %% [markdown]
# ## Is it right?
#
# All branches share one softmax; a key that two branches see counts twice. That is the whole
# definition, and `dilax.reference` computes it densely, with all `T x T` logits. The two must
# agree to rounding.

# %%
exact, exact_lse = reference.dilated_attention(
    q, k, v, segment_lengths, dilation_rates, is_causal=True
)
difference = float(jnp.abs(out - exact).max())
assert difference < 1e-5
assert float(jnp.abs(lse - exact_lse).max()) < 1e-5
difference

# %% [markdown]
# ## Gradients
#
# They are exact too, also through the weights with which the branches are mixed, and through
# the log-sum-exp.


# %%
def loss(attention, q, k, v):
    return jnp.square(attention(q, k, v)).sum()


def dilated(q, k, v):
    return attend(q, k, v)[0]


def oracle(q, k, v):
    return reference.dilated_attention(q, k, v, segment_lengths, dilation_rates, is_causal=True)[0]


gradients = jax.jit(jax.grad(loss, argnums=(1, 2, 3)), static_argnums=0)
ours, exact_ones = gradients(dilated, q, k, v), gradients(oracle, q, k, v)
differences = [float(jnp.abs(a - b).max()) for a, b in zip(ours, exact_ones, strict=True)]
assert max(differences) < 1e-4
differences

# %% [markdown]
# ## A swap inside a Flax model
#
# `nnx.MultiHeadAttention` takes an `attention_fn`, and `dilax.DilatedAttentionFn` is one: the
# model below differs from an ordinary one in that argument only.


# %%
class Block(nnx.Module):
    def __init__(self, features, attention_fn, rngs):
        self.attention_norm = nnx.LayerNorm(features, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=4,
            in_features=features,
            attention_fn=attention_fn,
            decode=False,
            rngs=rngs,
        )
        self.ffn_norm = nnx.LayerNorm(features, rngs=rngs)
        self.up = nnx.Linear(features, 2 * features, rngs=rngs)
        self.down = nnx.Linear(2 * features, features, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x), is_causal=True)
        return x + self.down(nnx.gelu(self.up(self.ffn_norm(x))))


class Model(nnx.Module):
    def __init__(self, symbols, length, features, attention_fn, rngs):
        self.embed = nnx.Embed(symbols, features, rngs=rngs)
        self.places = nnx.Embed(length, features, rngs=rngs)
        self.block = Block(features, attention_fn, rngs)
        self.head = nnx.Linear(features, symbols, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.places(jnp.arange(tokens.shape[1]))[None]
        return self.head(self.block(x))


# %% [markdown]
# The task is recall: 33 random symbols, then the same again. To predict the next symbol a query
# needs the key 32 tokens back. That is outside every segment of 16, so only the branch
# `(64, 4)` can bring it, and 32 is a multiple of its rate, so that query and key are kept by the
# same head.

# %%
SYMBOLS, PERIOD, LENGTH = 16, 33, 64


def batch_of(key, size=16):
    first = jax.random.randint(key, (size, PERIOD), 0, SYMBOLS)
    tokens = jnp.concatenate([first, first], axis=1)[:, : LENGTH + 1]
    return tokens[:, :-1], tokens[:, 1:]


def recall_loss(model, inputs, targets):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets)
    return losses[:, PERIOD - 1 :].mean()  # the part that can be known


@nnx.jit
def train_step(model, optimizer, key):
    value, gradients = nnx.value_and_grad(recall_loss)(model, *batch_of(key))
    optimizer.update(model, gradients)
    return value


# %%
def trained(attention_fn, steps=90):
    model = Model(SYMBOLS, LENGTH, 64, attention_fn, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(5e-3), wrt=nnx.Param)
    keys = jax.random.split(jax.random.key(1), steps)
    return [float(train_step(model, optimizer, key)) for key in keys]


local = trained(dilax.DilatedAttentionFn(dilax.DilatedAttention([16], [1])), steps=40)
both = trained(dilax.DilatedAttentionFn(dilax.DilatedAttention([16, 64], [1, 4])))
print(f"a guess: {jnp.log(SYMBOLS):.2f}")
print(f"segments of 16: {local[0]:.2f} -> {local[-1]:.2f}")
print(f"and every fourth token of 64: {both[0]:.2f} -> {both[-1]:.2f}")

# %% [markdown]
# Segments of 16 alone cannot recall what they never see; the dilated branch can.

# %%
assert local[-1] > 2.5
assert both[-1] < 0.5
