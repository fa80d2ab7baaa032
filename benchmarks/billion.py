"""A very long sequence on a mesh, in pieces whose results take the memory of the arguments.

Segments of w = 2048..2^21 lie within pieces of 2^21 tokens a device, so these are computed one
after the other: out is written where the queries were, gradients where query, key and value were.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.mesh_cases import Case, Run, sums_error, useful_flops, worst_error
from benchmarks.program import held_gib, peak_gib
from sharding.messages import MESSAGES

RATES = tuple(2**i for i in range(11))


def in_pieces(f: Callable, size: int) -> Callable:
    """f over pieces of `size` rows [1, size, N, H] of each argument, in place of the arguments.

    f gives one result for each of its first arguments; what is after these is not written.
    """

    def run(*arrays: jax.Array) -> Any:
        def step(i: jax.Array, arrays: tuple) -> tuple:
            pieces = [lax.dynamic_slice_in_dim(x, i * size, size, 1) for x in arrays]
            # All pieces are read before any is written.
            results = lax.optimization_barrier(f(*pieces))
            written = (
                lax.dynamic_update_slice_in_dim(x, y, i * size, 1)
                for x, y in zip(arrays, results, strict=False)
            )
            return (*written, *arrays[len(results) :])

        return lax.fori_loop(0, arrays[0].shape[1] // size, step, arrays)

    return run


def run_of(length: int, head_dim: int, devices: int, implementation: str | None) -> Run:
    """The whole sequence, as the oracle takes it."""
    lists = tuple(min(2048 * r, length // devices) for r in RATES), RATES
    case = Case("billion", lists, length=length, heads=1, head_dim=head_dim)
    return Run(case, length, devices, implementation, jnp.bfloat16)


def program(run: Run, backward: bool) -> Callable:
    """(query, key, value[, cotangent]) -> the same, with the results in place of the first."""
    size = max(w for w, *_ in run.branches)
    part = dataclasses.replace(run.case, length=size * run.devices)
    piece = dataclasses.replace(run, case=part, length=size * run.devices)
    assert all(branch.method == "local" for branch in piece.plan.branches)

    def forward(q, k, v):
        return (piece.attend(MESSAGES)(q, k, v),)

    f = piece.gradients(MESSAGES) if backward else forward
    count = 4 if backward else 3
    placed = run.place(in_pieces(f, size), count)
    return jax.jit(placed, donate_argnums=tuple(range(count)))


def billion(
    length: int, head_dim: int, devices: int, implementation: str | None, backward: bool
) -> dict:
    """One pass over the sequence: its time, memory, and the error of sampled rows."""
    run = run_of(length, head_dim, devices, implementation)
    arrays = run.arrays(3 + backward)
    f = program(run, backward).lower(*arrays).compile()
    start = time.perf_counter()
    arrays = jax.block_until_ready(f(*arrays))
    row: dict[str, Any] = {"case": "billion", "pass": "both" if backward else "forward"}
    row |= {"T": length, "H": head_dim, "N": 1, "devices": devices}
    row["seconds"] = time.perf_counter() - start
    row["planned"] = None if backward else run.plan.seconds
    row["error"] = worst_error(run, arrays[0], backward)
    row["error of sums"] = sums_error(run, arrays[:3]) if backward else None
    row["peak GiB"] = peak_gib(jax.devices()[:devices])
    row["held GiB"] = held_gib(f)
    rate = (3.5 if backward else 1.0) * useful_flops(run) / devices / 1e12
    row["TFLOP/s per device"] = rate / row["seconds"]
    row["methods"] = " ".join(branch.method for branch in run.plan.branches)
    return row
