"""Block-sparse attention on a CPU, 10 % of the blocks kept, against dense attention of jax.nn.

    python benchmarks/block_sparse_cpu.py

Both run in turns, in one run, on the same float32 inputs: B=1, T=16384, N=2, H=64, random blocks of
128, not causal and causal. First, with every block kept at T=2048, both must agree. Writes
benchmarks/results/block_sparse_cpu.md and block_sparse_cpu.json.
"""

import argparse
import functools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import dilax
from dilax.block_lists import BlockLists, admissible, density, from_mask

HERE = Path(__file__).parent
T, N, H, BLOCK, RATIO = 16384, 2, 64, 128, 0.1


def random_lists(is_causal: bool) -> BlockLists:
    """A tenth of the admissible blocks of each row, the diagonal one among them."""
    rng, limit = np.random.default_rng(0), admissible(T, T, BLOCK, is_causal)
    mask = np.eye(len(limit), dtype=bool)
    for row, a in enumerate(limit):
        others = rng.permutation(np.delete(np.arange(a), row if row < a else []))
        mask[row, others[: max(1, round(RATIO * a)) - 1]] = True
    return from_mask(mask, BLOCK)


def inputs(length: int) -> tuple[jax.Array, ...]:
    """query, key, value and a weight of the output."""
    arrays = np.random.default_rng(1).standard_normal((4, 1, length, N, H))
    return tuple(jnp.asarray(x, jnp.float32) for x in arrays)


def jobs(attention: Callable) -> dict[str, Callable]:
    """The forward pass, and the forward and backward pass."""

    def both(q, k, v, weight):
        return jax.grad(lambda *x: jnp.vdot(attention(*x), weight), (0, 1, 2))(q, k, v)

    return {"forward": lambda q, k, v, _: attention(q, k, v), "forward and backward": both}


def check() -> float:
    """How far block-sparse attention with every block kept is from dense attention."""
    q, k, v, _ = inputs(2048)
    full = dilax.block_sparse_attention(q, k, v, from_mask(np.ones((16, 16), bool), BLOCK))
    dense = jax.nn.dot_product_attention(q, k, v)
    return float(jnp.abs(full - dense).max() / jnp.abs(dense).max())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()

    difference = check()
    assert difference < 1e-5, f"block-sparse and dense attention differ by {difference:.1e}"
    arrays, rows = inputs(T), []
    for is_causal in (False, True):
        lists = random_lists(is_causal)
        sparse = functools.partial(
            dilax.block_sparse_attention, pattern=lists, is_causal=is_causal, implementation="xla"
        )
        dense = functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)
        contestants = {"dilax": jobs(sparse), "dense": jobs(dense)}
        for work in contestants["dilax"]:
            seconds = {who: [] for who in contestants}
            compiled = {
                who: jax.jit(found[work]).lower(*arrays).compile()
                for who, found in contestants.items()
            }
            for _ in range(options.rounds + 1):
                for who, function in compiled.items():
                    begin = time.perf_counter()
                    jax.block_until_ready(function(*arrays))
                    seconds[who].append(time.perf_counter() - begin)
            rows.append(
                {
                    "causal": is_causal,
                    "work": work,
                    "kept": density(lists, T, T, is_causal),
                    "seconds": {who: times[1:] for who, times in seconds.items()},
                }
            )
            print(rows[-1], flush=True)

    cores = len(os.sched_getaffinity(0))
    lines = [
        f"{platform.machine()}, {cores} cores, jax {jax.__version__}; float32, B=1, T={T}, N={N},"
        f" H={H}, random blocks of {BLOCK}. Fastest of {options.rounds} rounds in turns.",
        "",
        "| | kept | block-sparse | dense, jax.nn | times faster |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        ours, dense = (min(row["seconds"][who]) for who in ("dilax", "dense"))
        title = row["work"] + (", causal" if row["causal"] else "")
        lines.append(
            f"| {title} | {row['kept']:.1%} | {ours:.2f} s | {dense:.2f} s | {dense / ours:.1f} |"
        )
    options.out.mkdir(exist_ok=True)
    (options.out / "block_sparse_cpu.md").write_text("\n".join(lines) + "\n")
    record = {"jax": jax.__version__, "cores": cores, "difference": difference, "rows": rows}
    (options.out / "block_sparse_cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
