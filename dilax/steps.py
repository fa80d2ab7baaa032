"""One step of training, on any placement: loss, optimizer, update; and the evaluation."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dilax import data
from dilax._types import refuse
from dilax.checkpoints import merged
from dilax.distributed import Placement
from dilax.longnet import LongNetLM
from dilax.train_config import TrainConfig


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Gradient clipping and AdamW with the schedule of `config`; decay on matrices only.

    Example:
        >>> make_optimizer(TrainConfig()).init({"kernel": jnp.ones((2, 2))}) is not None
        True
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule_of(config),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )


def schedule_of(config: TrainConfig) -> optax.Schedule:
    """The learning rate of each step: a linear rise, then a cosine down.

    Example:
        >>> float(schedule_of(TrainConfig(warmup_steps=5, learning_rate=0.5))(5))
        0.5
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1),
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=config.steps,
        end_value=min(config.final_learning_rate, peak),
    )


def _decayed(params: Any) -> Any:
    """True on projections and embeddings. Names tell: stacked norms and biases have two axes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("kernel", "embedding"), params
    )


def loss_sums(
    model: LongNetLM, batch: data.Batch, rngs: nnx.Rngs | None = None
) -> tuple[jax.Array, jax.Array]:
    """Summed cross-entropy in nats over the predicted tokens of a batch, and their number.

    Args:
        model: the language model.
        batch: tokens, segment_ids, positions, int32 [B, T + 1].
        rngs: with a "dropout" stream for dropout; None for none.

    Example:
        >>> from dilax.longnet_config import LongNetConfig
        >>> config = LongNetConfig(64, 4, 1, 96, (8,), (1,), vocab_size=258)
        >>> batch = {name: jnp.ones((1, 9), jnp.int32)
        ...          for name in ("tokens", "segment_ids", "positions")}
        >>> int(loss_sums(LongNetLM(config, rngs=nnx.Rngs(0)), batch)[1])
        8
    """
    return _loss_sums(model, data.shifted(batch), rngs)


def _loss_sums(model: LongNetLM, batch: data.Batch, rngs: nnx.Rngs | None = None):
    """`loss_sums` of a batch that `data.shifted` cut."""
    logits = model(
        jnp.asarray(batch["tokens"]),
        segment_ids=jnp.asarray(batch["segment_ids"]),
        positions=jnp.asarray(batch["positions"]) if model.config.position else None,
        deterministic=rngs is None,
        rngs=rngs,
    )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    chosen = batch["predicted"]
    return jnp.where(chosen, nats, 0).sum(), chosen.sum()


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(3, 4))
def train_step(
    config: TrainConfig, placement: Placement, graphdef, params, optimizer_state, rest, batch, step
):
    """One update; the loss sums are those before it."""
    key = jax.random.fold_in(jax.random.key(config.seed), step)

    def loss(params):
        model = merged(graphdef, params, rest)
        total, number = _loss_sums(model, batch, nnx.Rngs(dropout=key))
        return total / jnp.maximum(number, 1), (total, number)

    gradients, sums = jax.grad(loss, has_aux=True)(params)
    optimizer = make_optimizer(config)
    updates, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    params = optax.apply_updates(params, updates)
    return placement.kept_everywhere((params, optimizer_state, sums))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _evaluation_step(placement: Placement, graphdef, state, batch):
    return placement.kept_everywhere(_loss_sums(nnx.merge(graphdef, state), batch))


def evaluate(model: LongNetLM, batches: Iterable[data.Batch]) -> float:
    """Bits per predicted token (bytes, and one end mark per document) of packed batches.

    Raises:
        ValueError: no token is predicted in the batches.

    Example:
        >>> from dilax.corpus import Document
        >>> from dilax.longnet_config import LongNetConfig
        >>> config = LongNetConfig(64, 4, 1, 96, (8,), (1,), vocab_size=258)
        >>> held_out = data.validation_batches(
        ...     [Document("a", b"text")], sequence_length=8, batch_size=1)
        >>> 5 < evaluate(LongNetLM(config, rngs=nnx.Rngs(0)), held_out) < 15
        True
    """
    return evaluate_on(model, batches, Placement(None))


def evaluate_on(model: LongNetLM, batches: Iterable[data.Batch], placement: Placement) -> float:
    """`evaluate` of a model whose parameters lie on a placement."""
    graphdef, state = nnx.split(model)
    nats, number = 0.0, 0
    for batch in batches:
        batch = placement.batch(data.shifted(batch))
        with placement.around():
            total, count = _evaluation_step(placement, graphdef, state, batch)
        nats, number = nats + float(total), number + int(count)
    if not number:
        raise refuse("batches", "at least one predicted token", number)
    return nats / number / math.log(2)
