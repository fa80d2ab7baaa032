"""Kept blocks and time of one 2-D window in each token order. Writes orders.md, .json and .png.

The blocks of an order are those with a pair of tokens inside the window; attention then runs over
whole blocks, so what is compared is the cost of covering the window, not one and the same sum.

    python benchmarks/orders.py
"""

import argparse
import json
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


def seconds(arrays: tuple, lists: list, rounds: int) -> list[float]:
    """The fastest of some forward passes over each of the lists, taken in turns."""
    runs = [jax.jit(lambda q, k, v, x=x: dilax.block_sparse_attention(q, k, v, x)) for x in lists]
    times = [[] for _ in runs]
    for _ in range(rounds + 1):
        for run, taken in zip(runs, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(run(*arrays))
            taken.append(time.perf_counter() - begin)
    return [min(taken[1:]) for taken in times]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()

    orders = [TokenOrder(GRID, "row"), TokenOrder(GRID, "tile", TILE), TokenOrder(GRID)]
    shape = (3, 1, len(orders[0]), options.heads, options.head_dim)
    q, k, v = jax.random.normal(jax.random.key(0), shape, options.dtype)
    machine = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
    lines = [
        f"{machine}; {options.dtype}, grid {GRID}, N={shape[3]}, H={shape[4]}, forward,",
        f"fastest of {options.rounds} in turns; a ratio is row order's blocks or time over the"
        " order's.",
        "",
        "| window | block | order | blocks | kept | ratio | time | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    record = []
    for side, size in CASES:
        kept = [window_blocks(order, (side, side), size) for order in orders]
        lists = [from_mask(mask, size) for mask in kept]
        times = seconds((q, k, v), lists, options.rounds)
        for order, mask, taken in zip(orders, kept, times, strict=True):
            row = {
                "window": side,
                "block_size": size,
                "order": order.kind,
                "blocks": int(mask.sum()),
                "kept": float(mask.mean()),
                "seconds": taken,
            }
            record.append(row)
            lines.append(
                f"| {side} x {side} | {size} | {order.kind} | {row['blocks']} | {row['kept']:.2%} "
                f"| {kept[0].sum() / row['blocks']:.2f} | {taken * 1e3:.0f} ms "
                f"| {times[0] / taken:.2f} |"
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
