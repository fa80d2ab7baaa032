"""Dilated attention on a CPU: this library against the same arithmetic composed in PyTorch.

    python benchmarks/cpu.py --torch-python PATH_OF_A_PYTHON_WITH_TORCH

Both run in turns, in one run, on the same float32 inputs: B=1, T=16384, N=8, H=64, segment lengths
1024 to 8192, rates 1 to 8. The outputs are compared first. Writes benchmarks/results/cpu.md and
cpu.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import dilax

HERE = Path(__file__).parent
B, T, N, H = 1, 16384, 8, 64
SEGMENT_LENGTHS, DILATION_RATES = (1024, 2048, 4096, 8192), (1, 2, 4, 8)


def forward(query, key, value):
    """The dilated attention that is measured."""
    return dilax.dilated_attention(
        query, key, value, SEGMENT_LENGTHS, DILATION_RATES, implementation="xla"
    )


def both(query, key, value, weight):
    """Gradients of a random projection of the output."""
    return jax.grad(lambda *x: jnp.vdot(forward(*x), weight), (0, 1, 2))(query, key, value)


def peak_bytes(function, *arrays, times: int) -> int:
    """Bytes alive at once, inputs and outputs included, on sequences `times` as long."""
    shapes = [jax.ShapeDtypeStruct((B, T * times, N, H), x.dtype) for x in arrays]
    memory = jax.jit(function).lower(*shapes).compile().memory_analysis()
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes


class Peer:
    """PyTorch in an interpreter of its own."""

    def __init__(self, python: str, threads: int, arrays: np.ndarray):
        lists = [",".join(map(str, x)) for x in (SEGMENT_LENGTHS, DILATION_RATES)]
        self.process = subprocess.Popen(
            [python, str(HERE / "torch_dilated.py"), str(threads), *lists],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.version = self.process.stdout.readline().strip()
        if not self.version:
            sys.exit(f"--torch-python: wanted a python with torch and numpy, got {python}")
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/in.npy", arrays)
            self.seconds(f"load {folder}")
            self.out = np.load(f"{folder}/out.npy")

    def seconds(self, command: str) -> float:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable, help="a python with torch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    options = parser.parse_args()

    threads = len(os.sched_getaffinity(0))
    arrays = np.random.default_rng(0).standard_normal((4, B, T, N, H)).astype(np.float32)
    peer = Peer(options.torch_python, threads, arrays)
    query, key, value, weight = (jnp.asarray(x) for x in arrays)
    ours = {
        "forward": jax.jit(forward).lower(query, key, value).compile(),
        "both": jax.jit(both).lower(query, key, value, weight).compile(),
    }
    inputs = {"forward": (query, key, value), "both": (query, key, value, weight)}

    out = np.asarray(ours["forward"](query, key, value), np.float64)
    difference = np.linalg.norm(out - peer.out) / np.linalg.norm(out)
    assert difference < 1e-5, f"the two outputs differ by {difference:.1e}"

    seconds = {(who, what): [] for who in ("dilax", "torch") for what in ours}
    for _ in range(options.rounds + 1):
        for what, function in ours.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(*inputs[what]))
            seconds["dilax", what].append(time.perf_counter() - begin)
            seconds["torch", what].append(peer.seconds(what))
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    memory = {
        what: [peak_bytes(f, *inputs[what], times=times) / 2**20 for times in (1, 4)]
        for what, f in (("forward", forward), ("both", both))
    }

    machine = f"{processor()}, {threads} cores; jax {jax.__version__}, torch {peer.version}"
    lines = [
        f"{machine}; float32, B={B}, T={T}, N={N}, H={H}, W={SEGMENT_LENGTHS}, R={DILATION_RATES}.",
        f"Median of {options.rounds} rounds in turns; outputs differ by {difference:.1e}.",
        "",
        "| | dilax | PyTorch, composed | ratio | dilax, peak at T | at 4 T | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, title in (("forward", "forward"), ("both", "forward and backward")):
        a, b = median["dilax", what], median["torch", what]
        small, large = memory[what]
        lines.append(
            f"| {title} | {a * 1e3:.0f} ms | {b * 1e3:.0f} ms | {a / b:.2f} "
            f"| {small:.0f} MiB | {large:.0f} MiB | {large / small:.2f} |"
        )
    options.out.mkdir(exist_ok=True)
    (options.out / "cpu.md").write_text("\n".join(lines) + "\n")
    record = {
        "machine": machine,
        "difference": difference,
        "seconds": {" ".join(name): times for name, times in seconds.items()},
        "peak_mib": memory,
    }
    (options.out / "cpu.json").write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
