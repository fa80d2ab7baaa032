"""The attention of one device of a mesh: the named implementation, or the first that can."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dilax import dropout, xla_attention
from dilax._types import UnsupportedError, shown
from dilax.partial import Partial, merge
from dilax.select import IMPLEMENTATIONS, sibling, unsupported

sibling("sharding")  # says which file it is that comes before ours, if there is one
from sharding.local import Local, primitive_branch  # noqa: E402
from sharding.plan import Plan  # noqa: E402
from sharding.rows import UNBOUNDED  # noqa: E402

# Why kernels cannot drop the pairs that one device would.
HEADS_FROM_0 = "dropout with heads over several devices: its kernels count heads from 0"


def _merge(*parts: Any) -> Partial:
    return merge(*(Partial(*part) for part in parts))


XLA = Local(
    xla_attention.attend,
    xla_attention.attend_backward,
    _merge,
    dropout.row_bits,
    dropout.column_bits,
)


def choose_local(
    implementation, query, key, value, plan: Plan, scale: float, ids, rate: float
) -> Local:
    """The attention that runs on each device: the named one, or the first that takes the calls."""
    reasons = {}
    for name in IMPLEMENTATIONS if implementation is None else (implementation,):
        if name == "xla":
            return XLA
        reasons[name] = local_reasons(name, query, key, value, plan, scale, ids, rate)
        if not reasons[name]:
            return _pallas(all(branch.in_place for branch in plan.branches))
    raise UnsupportedError(f"query {shown(query)}, key {shown(key)} on a mesh", reasons)


def local_reasons(
    name, query, key, value, plan: Plan, scale, ids, rate, device_kind=None
) -> tuple[str, ...]:
    """Why an implementation cannot take the calls of a plan; empty if it can."""
    N, reasons = query.shape[2], []
    if rate:
        reasons += _dropout_reasons(plan)
    q_rows, k_rows = (jax.ShapeDtypeStruct(x.shape[:2], jnp.int32) for x in (query, key))
    ordered = plan.sizes.positions  # then causality is theirs, not the plan's
    options: dict[str, Any] = dict(
        is_causal=plan.causal or ordered,
        scale=scale,
        q_start=0,
        k_start=0,
        out_dtype=jnp.float32,
        device_kind=device_kind,
    )
    if rate and plan.devices > 1:  # then they must know where they are
        where = jax.ShapeDtypeStruct((), jnp.int32)
        options |= {"q_start": where, "k_start": where}
    if ordered:
        options |= {"q_positions": q_rows, "kv_positions": k_rows}
    here = [b for b in plan.branches if b.in_place]
    used = [(tuple(primitive_branch(b) for b in here), ids)] if here else []
    for moving in (b for b in plan.branches if not b.in_place):
        masks = (q_rows, k_rows) if moving.masked else (None, None)
        used.append((((UNBOUNDED, 1, 0, (0,) * N),), masks))
    for branches, (q_ids, kv_ids) in used:
        masks = {"q_segment_ids": q_ids, "kv_segment_ids": kv_ids}
        reasons += unsupported(name, query, key, value, branches=branches, **masks, **options)
    return tuple(dict.fromkeys(reasons))


def _dropout_reasons(plan: Plan) -> list[str]:
    """Why kernels, which count rows from one start, cannot drop what one device would."""
    reasons = [HEADS_FROM_0] if plan.head_parts > 1 else []
    for branch in plan.branches:
        what = f"dropout in segments of {branch.ranks.segment} at rate {branch.ranks.rate}"
        if branch.in_place and plan.layout == "zigzag":
            reasons.append(f"{what}: its kernels count the rows of both chunks from one start")
        if not (branch.in_place or branch.direct(plan.sizes.num_heads)):
            reasons.append(
                f"{what}: its kernels do not know the positions and heads of rows that were cut"
            )
    return reasons


def kernel_options(
    *, dropout_rate, dropout_bits=None, dropout_seed=None, dropout_numbers=(), **options
) -> dict[str, Any]:
    """The options of a local call as kernels take them; dropout_bits: None."""
    if dropout_seed is None:
        return options
    keep = dropout.Numbered(dropout_numbers)
    return options | {"dropout_rate": dropout_rate, "dropout_seed": dropout_seed, "keep": keep}


@functools.cache
def _pallas(all_local: bool) -> Local:
    flash = sibling("pallas_kernels.flash")
    assert flash is not None  # `unsupported` looked
    out_dtype = None if all_local else jnp.float32  # the query's where nothing will be added

    def forward(query, key, value, *, carry, **options):
        options = kernel_options(**options)
        return flash.attend(query, key, value, carry=carry, out_dtype=out_dtype, **options)

    def backward(*arrays, **options):
        return flash.attend_backward(*arrays, **kernel_options(**options))

    # The kernels hold every multiprocessor until they are done: one block of theirs that waits for
    # a message's makes the whole call wait (measured: benchmarks/NOTES.md).
    bits = dropout.row_bits, dropout.column_bits
    return Local(forward, backward, _merge, *bits, alone=True, seed_from=dropout.seed_from)
