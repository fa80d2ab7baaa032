"""The attention that runs on one device, as an argument, and its use on the arrays as they are."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sharding.heads import Branch
from sharding.mesh import vary_like
from sharding.plan import BranchPlan

Partial = tuple[jax.Array, jax.Array]  # out [..., H] and lse [...]


class Local(NamedTuple):
    """Functions of one device.

    forward(query, key, value, *, branches, is_causal, scale, q_segment_ids, kv_segment_ids,
        q_start, k_start, dropout_rate, dropout_bits, carry) -> (out, lse): attention over the union
        of the branches' keys that continues `carry`, in float32 (float64 for float64). Where the
        tokens have positions of their own also q_positions, kv_positions: causality goes by those.
    backward(query, key, value, d_out, lse, delta, *, (the same without carry)) -> (dq, dk, dv)
        given the total lse and delta = sum(d_out * out) - d_lse, in the same dtype.
    merge(a, b) -> (out, lse) over the keys of both.
    row_bits(seed, batch, head, position), column_bits(seed, position, branch): the dropout hash.
    seed_from(seed, batch): a local attention that has it hashes itself: in place of dropout_bits it
        takes dropout_seed, such that its first example counts as `batch`, and dropout_numbers, of
        the branches; q_start and k_start are then positions in the whole.
    alone: messages and calls take turns, because a call leaves no part of the device to messages.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    merge: Callable[..., Any]
    row_bits: Callable[..., Any]
    column_bits: Callable[..., Any]
    alone: bool = False
    seed_from: Callable[..., Any] | None = None

    def hashes(self, here: "Here") -> bool:
        """Whether there is dropout, and the local attention hashes itself."""
        return here.seed is not None and self.seed_from is not None

    def drops(self, here: "Here", batch: int, numbers: tuple[int, ...]) -> dict[str, Any]:
        """Its options of dropout if it hashes itself, for branches with these numbers."""
        assert self.seed_from is not None
        seed = self.seed_from(here.seed, here.batch_index * batch)
        return {"dropout_seed": seed, "dropout_numbers": numbers}

    def after(self, messages: Any, others: Any) -> tuple[Any, Any]:
        """(messages, others), with others not before the messages are there if calls run alone."""
        return lax.optimization_barrier((messages, others)) if self.alone else (messages, others)


class Here(NamedTuple):
    """Where this device is, and the arrays that say who sees whom.

    device, head_index, batch_index: along the axes of the sequence, of heads, of the batch.
    q_ids, kv_ids: int32 [B, n] or None. seed: uint32[2] or None, without dropout.
    q_positions, kv_positions: int32 [B, n], or None: the tokens' places in the sequence.
    """

    device: Any
    head_index: Any
    batch_index: Any
    q_ids: jax.Array | None
    kv_ids: jax.Array | None
    seed: jax.Array | None
    q_positions: jax.Array | None = None
    kv_positions: jax.Array | None = None


def stats_dtype(x: jax.Array) -> Any:
    """Dtype of softmax statistics and of sums: float64 for float64, else float32."""
    return jnp.float64 if x.dtype == jnp.float64 else jnp.float32


def zeros(x: jax.Array) -> jax.Array:
    """Zeros in the shape of x, in the dtype of sums, varying over the axes that x does."""
    return vary_like(jnp.zeros(x.shape, stats_dtype(x)), (x,))


def empty(query: jax.Array) -> Partial:
    """The partial result over no key at all."""
    out = zeros(query)
    return out, out[..., 0] - jnp.inf


def options(local: Local, here: Here, plan: Any, branches: list[BranchPlan], shape: Any) -> dict:
    """The primitive's options for branches that it takes in place; shape is that of the query."""
    start, drops = 0, {"dropout_bits": None}
    B, n, N = shape[:3]
    if local.hashes(here):
        drops = local.drops(here, B, tuple(branch.number for branch in branches))
        if plan.devices > 1:
            start = jnp.asarray(plan.token_starts[:, 0], jnp.int32)[here.device]
    elif here.seed is not None:
        starts = jnp.asarray(plan.token_starts, jnp.int32)[here.device]
        position = starts[:, None] + jnp.arange(n // len(starts), dtype=jnp.int32)[None]
        position = position.reshape(1, n, 1)
        q_position, k_position = (
            position if x is None else x[..., None] for x in (here.q_positions, here.kv_positions)
        )
        batch = (here.batch_index * B + jnp.arange(B)).reshape(B, 1, 1)
        head = (here.head_index * N + jnp.arange(N)).reshape(1, 1, N)
        rows = local.row_bits(here.seed, batch, head, q_position)
        columns = [local.column_bits(here.seed, k_position, branch.number) for branch in branches]
        drops = {"dropout_bits": (rows, jnp.stack(columns))}
    by_position = positions(here.q_positions, here.kv_positions)
    return {
        **by_position,
        **drops,
        "branches": tuple(primitive_branch(branch) for branch in branches),
        "q_segment_ids": here.q_ids,
        "kv_segment_ids": here.kv_ids,
        "q_start": start,
        "k_start": start,
    }


def positions(query: Any, key: Any) -> dict[str, Any]:
    """The primitive's options for tokens with positions of their own; empty without."""
    return {} if query is None else {"q_positions": query, "kv_positions": key}


def primitive_branch(branch: BranchPlan) -> Branch:
    """A local branch in the local heads, as the primitive takes it."""
    slots = branch.slots
    heads = slots.queries.reshape(-1)
    offsets = np.repeat(slots.offsets[0], slots.queries.shape[1])[np.argsort(heads)]
    segment, rate = branch.ranks.segment, branch.ranks.rate
    return segment, rate, int(heads.min()), tuple(int(o) for o in offsets)
