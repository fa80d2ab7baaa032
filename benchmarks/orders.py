"""Kept blocks and time of one 2-D window in each token order. Writes orders.md, .json and .png.

The blocks of an order are those with a pair of tokens inside the window; attention then runs over
whole blocks, so what is compared is the cost of covering the window, not one and the same sum.

    python benchmarks/orders.py
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax

import dilax
from dilax import TokenOrder
from dilax.block_lists import from_mask
from dilax.order import window_blocks
from dilax.plotting import draw_orders

HERE = Path(__file__).parent
GRID, TILE = (128, 128), (8, 16)
CASES = ((17, 64), (17, 128), (33, 64), (33, 128))  # side of the window, block size
PICTURE = (17, 64)


def seconds(q, k, v, lists, rounds: int) -> float:
    """Median time of the forward pass over these lists."""
    run = jax.jit(lambda q, k, v: dilax.block_sparse_attention(q, k, v, lists))
    jax.block_until_ready(run(q, k, v))
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        jax.block_until_ready(run(q, k, v))
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()

    orders = [TokenOrder(GRID, "row"), TokenOrder(GRID, "tile", TILE), TokenOrder(GRID)]
    shape = (3, 1, len(orders[0]), options.heads, options.head_dim)
    q, k, v = jax.random.normal(jax.random.key(0), shape, options.dtype)
    machine = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    lines = [
        f"{machine}; {options.dtype}, grid {GRID}, N={shape[3]}, H={shape[4]}, forward,",
        f"median of {options.rounds}; a ratio is row order's blocks or time over the order's.",
        "",
        "| window | block | order | blocks | kept | ratio | time | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    record = []
    for side, size in CASES:
        first = None
        for order in orders:
            kept = window_blocks(order, (side, side), size)
            taken = seconds(q, k, v, from_mask(kept, size), options.rounds)
            row = {
                "window": side,
                "block_size": size,
                "order": order.kind,
                "blocks": int(kept.sum()),
                "kept": float(kept.mean()),
                "seconds": taken,
            }
            record.append(row)
            first = first or row
            lines.append(
                f"| {side} x {side} | {size} | {order.kind} | {row['blocks']} | {row['kept']:.2%} "
                f"| {first['blocks'] / row['blocks']:.2f} | {taken * 1e3:.0f} ms "
                f"| {first['seconds'] / taken:.2f} |"
            )
            print(lines[-1], flush=True)
    options.out.mkdir(exist_ok=True)
    (options.out / "orders.md").write_text("\n".join(lines) + "\n")
    result = {"machine": machine, "rows": record}
    (options.out / "orders.json").write_text(json.dumps(result, indent=1) + "\n")
    side, size = PICTURE
    draw_orders(orders, (side, side), size).savefig(options.out / "orders.png")


if __name__ == "__main__":
    main()
