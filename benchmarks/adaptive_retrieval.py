"""Does the router of adaptive attention learn? Retrieval over 4096 tokens with 10 % of the blocks.

Pairs of a name and a value are planted among noise in the first half of a sequence; in the second
half the first token of each block asks for one of the names. One layer of dense causal attention
learns to answer. Then it is frozen, and the router alone learns from the KL loss which blocks to
keep. Compared on sequences that nobody has seen: dense attention, the router before and after
training, and `local_window` of the same density. Writes adaptive_retrieval.json and .png.

    python benchmarks/adaptive_retrieval.py
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

import dilax

HERE = Path(__file__).parent
T, BLOCK, RATIO = 4096, 64, 0.1
N, K, H = 2, 1, 64
NAMES, VALUES, NOISE = 64, 16, 8
QUESTION = 1 + VALUES  # in place of a value
PAIRS = 31  # one of them is asked for: about one in each block of the first half
ROWS = np.arange(T // 2, T, BLOCK)  # positions of the questions
LEARNING_RATE = 3e-2
MODEL_STEPS, ROUTER_STEPS, EVALUATE_EVERY = 150, 400, 40
WINDOW = dilax.SparsePatternConfig("local_window", sparsity_ratio=RATIO, block_size=BLOCK)


def draw(seed: int, batch: int) -> dict[str, np.ndarray]:
    """Sequences: what each token is, which value it carries, the answers and where they lie."""
    rng = np.random.default_rng(seed)
    token = rng.integers(0, NOISE, (batch, T))
    value = np.zeros((batch, T), int)
    answer, place = (np.zeros((batch, len(ROWS)), int) for _ in range(2))
    for b in range(batch):
        where = rng.permutation(np.arange(BLOCK, T // 2))[:PAIRS]
        names = rng.permutation(NAMES)[:PAIRS]
        values = rng.integers(0, VALUES, PAIRS)
        token[b, where], value[b, where] = NOISE + names, 1 + values
        asked = rng.integers(0, PAIRS, len(ROWS))
        token[b, ROWS], value[b, ROWS] = NOISE + names[asked], QUESTION
        answer[b], place[b] = values[asked], where[asked]
    return {"token": token, "value": value, "answer": answer, "place": place}


class Model(nnx.Module):
    """Embeddings, one attention and a classifier."""

    def __init__(self, rngs: nnx.Rngs):
        E = N * H
        self.token = nnx.Embed(NOISE + NAMES, E, rngs=rngs)
        self.value = nnx.Embed(2 + VALUES, E, rngs=rngs)
        self.query = nnx.LinearGeneral(E, (N, H), rngs=rngs)
        self.key, self.content = (nnx.LinearGeneral(E, (K, H), rngs=rngs) for _ in range(2))
        # Alike at the start, so that a question attends to its own name before it has learned to.
        self.query.kernel[...] = jnp.repeat(self.key.kernel[...], N // K, axis=1)
        self.answer = nnx.LinearGeneral((N, H), VALUES, axis=(-2, -1), rngs=rngs)

    def heads(self, batch) -> tuple[jax.Array, ...]:
        """q [B, T, N, H], k and v [B, T, K, H]."""
        x = (self.token(batch["token"]) + self.value(batch["value"])) * (N * H) ** 0.5
        return self.query(x), self.key(x), self.content(x)


def train_model(model: Model, first: int) -> list[float]:
    """Dense attention of the questions over all tokens before them."""
    optimizer = nnx.Optimizer(
        model, optax.adam(optax.cosine_decay_schedule(3e-3, MODEL_STEPS)), wrt=nnx.Param
    )
    before = jnp.asarray(ROWS[:, None] >= np.arange(T))[None, None]

    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            q, k, v = model.heads(batch)
            out = jax.nn.dot_product_attention(q[:, ROWS], k, v, mask=before)
            return optax.softmax_cross_entropy_with_integer_labels(
                model.answer(out), batch["answer"]
            ).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    return [float(step(model, optimizer, draw(first + 1000 + i, 4))) for i in range(MODEL_STEPS)]


@nnx.jit(static_argnames="attend")
def answered(model: Model, router: dilax.AdaptiveAttention, batch, attend: Any) -> jax.Array:
    """The share of questions answered, with `attend` as the attention of all the tokens."""
    out = attend(router, *model.heads(batch))
    return (model.answer(out[:, ROWS]).argmax(-1) == batch["answer"]).mean()


@nnx.jit
def found(model: Model, router: dilax.AdaptiveAttention, batch) -> jax.Array:
    """The share of questions whose row keeps the block of its pair, in some head."""
    lists = router.route(*model.heads(batch)[:2], is_causal=True).lists
    rows, kept = (x[:, :, ROWS // BLOCK] for x in (lists.columns, lists.valid))
    hit = rows == batch["place"][:, None, :, None] // BLOCK
    return (hit & kept).any((1, 3)).mean()


def adaptive(router, q, k, v):
    return router(q, k, v, is_causal=True)


def local_window(router, q, k, v):
    return dilax.block_sparse_attention(q, k, v, WINDOW, is_causal=True)


def dense(router, q, k, v):
    return dilax.dilated_attention(q, k, v, [T], [1], is_causal=True)


def train_router(
    model: Model, router: dilax.AdaptiveAttention, first: int, evaluate: Any
) -> list[dict]:
    """The router by its own loss, the model as it is; what `evaluate` finds now and then."""
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, ROUTER_STEPS)
    optimizer = nnx.Optimizer(router, optax.adam(schedule), wrt=nnx.Param)

    @nnx.jit
    def step(router, optimizer, q, k, v):
        def loss(router):
            return router(q, k, v, is_causal=True, return_loss=True)[1]

        value, gradients = nnx.value_and_grad(loss)(router)
        optimizer.update(router, gradients)
        return value

    history, heads = [], jax.jit(model.heads)
    for i in range(ROUTER_STEPS + 1):
        if i % EVALUATE_EVERY == 0:
            history.append({"step": i} | evaluate())
            print(history[-1], flush=True)
        if i < ROUTER_STEPS:
            step(router, optimizer, *heads(draw(first + 500_000 + i, 4)))
    return history


def plot(record: dict) -> Figure:
    """Accuracy and recall while the router learns, beside dense attention and the window."""
    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    panel = figure.subplots()
    steps = [x["step"] for x in record["history"]]
    for name, colour, style in (("accuracy", "#0072b2", "-"), ("recall", "#56b4e9", "--")):
        label = {"accuracy": "adaptive: accuracy", "recall": "adaptive: pair's block kept"}[name]
        panel.plot(steps, [x[name] for x in record["history"]], style, color=colour, label=label)
    for name, colour in (("dense", "#009e73"), ("local_window", "#d55e00")):
        panel.axhline(record[name], color=colour, label=f"{name}: {record[name]:.3f}")
    panel.axhline(1 / VALUES, color="#4d4d4d", linestyle=":", label=f"chance: {1 / VALUES:.3f}")
    panel.set_xlabel("training steps of the router")
    panel.set_ylabel("share of questions")
    panel.set_ylim(0, 1.03)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    panel.set_title(f"{T} tokens, {RATIO:.0%} of the blocks of {BLOCK} kept", fontsize=10)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the sequences")
    options = parser.parse_args()
    begin, first = time.perf_counter(), options.seed * 1_000_000
    model = Model(nnx.Rngs(options.seed))
    losses = train_model(model, first)
    model_seconds = time.perf_counter() - begin
    print(f"model: loss {losses[0]:.2f} to {losses[-1]:.4f}, {model_seconds:.0f} s", flush=True)

    batches = [draw(first + i, 4) for i in range(16)]
    few = batches[:4]

    def mean(measure, some, *arguments):
        return float(np.mean([measure(model, router, batch, *arguments) for batch in some]))

    def evaluate(some):
        return {"accuracy": mean(answered, some, adaptive), "recall": mean(found, some)}

    router = dilax.AdaptiveAttention(N, H, num_kv_heads=K, sparsity_ratio=RATIO, block_size=BLOCK)
    before = evaluate(batches)
    history = train_router(model, router, first, lambda: evaluate(few))
    after = evaluate(batches)
    record = {
        "seed": options.seed,
        "tokens": T,
        "block_size": BLOCK,
        "sparsity_ratio": RATIO,
        "questions": len(batches) * 4 * len(ROWS),
        "chance": 1 / VALUES,
        "dense": mean(answered, batches, dense),
        "local_window": mean(answered, batches, local_window),
        "adaptive": after["accuracy"],
        "adaptive_untrained": before["accuracy"],
        "recall": after["recall"],
        "recall_untrained": before["recall"],
        "history": history,
        "seconds": time.perf_counter() - begin,
    }
    options.out.mkdir(exist_ok=True)
    (options.out / "adaptive_retrieval.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record).savefig(options.out / "adaptive_retrieval.png")
    print({name: x for name, x in record.items() if name != "history"})
    reached = record["adaptive"] >= 0.95 * record["dense"]
    print(f"adaptive / dense = {record['adaptive'] / record['dense']:.3f}: wanted 0.95", end=", ")
    print("reached" if reached else "missed")


if __name__ == "__main__":
    main()
