"""What the planner expects of one layer's attention on many GPUs: computed, not measured.

    python benchmarks/plans.py --out benchmarks/results

Writes plans.md: N = K = 32 heads of 128, bfloat16, causal, forward, batch 1; messages at 340 GB/s
inside a host of 8 GPUs (NVLink, measured by ppermute) and at 50 GB/s between hosts (one InfiniBand
port a GPU, assumed), and beside that all of them at 340 GB/s; attention at 550 TFLOP/s.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dilax.sharded import link_of, plan_of
from dilax.spec import as_spec, branches_of, within

LENGTHS = {"1 M": 1 << 20, "16 M": 1 << 24, "128 M": 1 << 27, "1 B": 1 << 30}
DEVICES = (64, 256, 1024)
HOST = 8  # GPUs
HEADS, HEAD_DIM = 32, 128


def lists(name: str, length: int) -> tuple[list[int], list[int]]:
    """Segment lengths and rates of a named list."""
    if name == "geometric to T":
        rates = [2**i for i in range(length.bit_length()) if 2048 << i <= length]
        return [2048 * r for r in rates], rates
    if name == "LongNet to 32768":
        return [2048, 4096, 8192, 16384, 32768], [1, 2, 4, 8, 16]
    ratio = (length / 1024) ** 0.25
    widths = [round(1024 * ratio**i) for i in range(4)]
    return [*widths, length], [1, 2, 4, 8, 16]


def plan(name: str, length: int, devices: int, speeds: Any, **options: Any) -> Any:
    """The plan of a list on hosts of devices, speeds in GB/s: between hosts, inside one."""
    every = branches_of(as_spec(*lists(name, length)), HEADS, "lse", "interleaved")
    return plan_of(
        tuple(within(branch, length) for branch in every),
        (1, length, HEADS, HEADS, HEAD_DIM),
        "bfloat16",
        devices=devices,
        is_causal=True,
        link=link_of((devices // HOST, HOST), speeds),
        **options,
    )


def row(name: str, label: str, devices: int) -> str:
    """One line of the table, in the layout that is faster on hosts."""
    length = LENGTHS[label]
    plans = [plan(name, length, devices, (50, 340), layout=x) for x in ("contiguous", "zigzag")]
    hosts = min(plans, key=lambda one: one.seconds)
    near = plan(name, length, devices, 340, layout=hosts.layout)
    methods: dict[str, int] = {}
    for branch in hosts.branches:
        methods[branch.method] = methods.get(branch.method, 0) + 1
    said = ", ".join(f"{count} {method}" for method, count in methods.items())
    cells = [name, label, devices, hosts.layout, said, f"{hosts.bytes / 1e6:,.0f}", hosts.messages]
    cells += [f"{hosts.balance:.2f}", *(f"{x.seconds * 1e3:,.2f}" for x in (near, hosts))]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    out = Path(parser.parse_args().out)
    head = ("list", "tokens", "GPUs", "layout", "how branches move on hosts", "MB received")
    head += ("messages", "busiest", "ms at 340 GB/s", "ms on hosts")
    lines = ["Computed by the planner, not measured.", "", *(__doc__ or "").splitlines()[4:], ""]
    lines += [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name in ("geometric to T", "LongNet to 32768", "GigaPath-like"):
        for label in LENGTHS:
            for devices in DEVICES:
                lines.append(row(name, label, devices))
                print(lines[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / "plans.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
