"""Measures the Pallas kernels and their peers on one Hopper GPU, in one process.

    python benchmarks/gpu.py --out results [--quick] [--budget SECONDS]

Every result is checked (small sizes against a float64 oracle, large ones against a peer) before
it is timed. Writes results/table.md, results/table.json and results/time.png.
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_peers as peers

LONGNET = ((2048, 1), (4096, 2), (8192, 4), (16384, 8), (32768, 16))
GIGAPATH = ((1024, 1), (5792, 2), (32768, 4), (185363, 8), (1048576, 16))
HEADS = 16


@dataclasses.dataclass
class Row:
    """One measurement; times in milliseconds, rates in useful TFLOP/s."""

    case: str
    peer: str
    forward: float | None = None
    both: float | None = None
    forward_rate: float | None = None
    both_rate: float | None = None
    error: float | None = None
    memory_mib: float | None = None
    note: str = ""


def useful_flops(lists: peers.Lists, T: int, H: int, causal: bool) -> float:
    """Forward FLOPs that the mathematics needs, all heads."""
    total = 0.0
    for w, r in lists:
        w = min(w, T)
        whole, rest = divmod(T, w)
        total += 4 * H * HEADS * (whole * w * w + rest * rest) / r**2
    return total / (2 if causal else 1)


def clock(run: Callable[[], Any], wait: Callable[[Any], Any], least: float = 0.03) -> float:
    """Median seconds of one call over batches of back-to-back calls."""
    wait(run())
    start = time.perf_counter()
    wait(run())
    count = max(2, min(100, int(least / max(time.perf_counter() - start, 1e-5))))
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            result = run()
        wait(result)
        samples.append((time.perf_counter() - start) / count)
    return statistics.median(samples)


def inputs(T: int, H: int, dtype: Any) -> list[jax.Array]:
    """query, key, value and a cotangent."""
    keys = jax.random.split(jax.random.key(T + H), 4)
    return [jax.random.normal(key, (1, T, HEADS, H), dtype) for key in keys]


def relative(a: Any, b: Any) -> float:
    """Norm of the difference over the norm of b."""
    a, b = (np.asarray(x, np.float32) for x in (a, b))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def measure(
    case: str,
    peer: str,
    f: Callable,
    lists: peers.Lists,
    T: int,
    H: int,
    causal: bool,
    dtype: Any = jnp.bfloat16,
    reference: Any = None,
    backward: bool = True,
) -> tuple[Row, Any]:
    """Times forward, and forward with backward, and compares the output with a reference."""
    row, out = Row(case, peer), None
    q, k, v, do = inputs(T, H, dtype)
    flops = useful_flops(lists, T, H, causal)
    try:
        forward = jax.jit(f).lower(q, k, v).compile()
        stats = forward.memory_analysis()
        row.memory_mib = (stats.temp_size_in_bytes + stats.output_size_in_bytes) / 2**20
        out = forward(q, k, v)
        if reference is not None:
            row.error = relative(out, reference)
        seconds = clock(lambda: forward(q, k, v), jax.block_until_ready)
        row.forward, row.forward_rate = seconds * 1e3, flops / seconds / 1e12
        if backward:
            both = jax.jit(lambda q, k, v, do: jax.vjp(f, q, k, v)[1](do))
            seconds = clock(lambda: both(q, k, v, do), jax.block_until_ready)
            row.both, row.both_rate = seconds * 1e3, 3.5 * flops / seconds / 1e12
    except Exception as problem:  # a peer may lack a case: its row says so and the run goes on
        row.note = f"{type(problem).__name__}: {str(problem)[:120]}"
    return row, out


def measure_torch(case: str, peer: str, make: Callable, lists: Any, T: int, H: int) -> Row:
    """The same for a torch function, in float16."""
    row = Row(case, peer)
    try:
        import torch

        arrays = [torch.randn(1, T, HEADS, H, device="cuda", dtype=torch.float16) for _ in "qkvd"]
        q, k, v = (x.requires_grad_() for x in arrays[:3])
        f = make(torch)

        def wait(_: Any) -> None:
            torch.cuda.synchronize()

        def forward() -> Any:
            with torch.no_grad():
                return f(q, k, v)

        flops = useful_flops(lists, T, H, False)
        seconds = clock(forward, wait)
        row.forward, row.forward_rate = seconds * 1e3, flops / seconds / 1e12
        both = clock(lambda: torch.autograd.grad(f(q, k, v), (q, k, v), arrays[3]), wait)
        row.both, row.both_rate = both * 1e3, 3.5 * flops / both / 1e12
    except Exception as problem:  # torch or its flash kernel may be missing
        row.note = f"{type(problem).__name__}: {str(problem)[:120]}"
    return row


def oracle_error(lists: peers.Lists, T: int, H: int, causal: bool, dtype: Any) -> float:
    """Error of this library's output against a float64 softmax in numpy (small T)."""
    q, k, v, _ = inputs(T, H, dtype)
    q64, k64, v64 = (np.asarray(x, np.float64)[0] for x in (q, k, v))
    position = np.arange(T)
    count = np.zeros((HEADS, T, T))
    for w, r in lists:
        for n, offset in enumerate(peers.offsets(HEADS, r)):
            kept = position % w % r == offset
            same = position[:, None] // w == position[None] // w
            count[n] += kept[:, None] & kept[None] & same
    if causal:
        count *= position[:, None] >= position[None]
    logits = np.einsum("qnh,knh->nqk", q64, k64) / math.sqrt(H)
    p = count * np.exp(logits - logits.max(-1, keepdims=True))
    exact = np.einsum("nqk,knh->qnh", p / np.maximum(p.sum(-1, keepdims=True), 1e-300), v64)
    return relative(jax.jit(peers.ours(lists, causal))(q, k, v)[0], exact)


def bars(add: Callable[[Row], None], quick: bool, late: Callable[[], bool]) -> None:
    """The measurements behind the bars of the project's kernel issue."""
    for H in (128, 64):
        for causal in (False, True):
            kind = "causal" if causal else "full"
            if late():
                return
            row, reference = measure(
                f"dense {kind} H={H} T=16384",
                "cudnn",
                peers.cudnn(causal),
                ((16384, 1),),
                16384,
                H,
                causal,
            )
            add(row)
            row, _ = measure(
                f"LongNet {kind} H={H} T=32768",
                "dilax pallas",
                peers.ours(LONGNET, causal),
                LONGNET,
                32768,
                H,
                causal,
            )
            row.error = oracle_error(((256, 1), (512, 2)), 1024, H, causal, jnp.bfloat16)
            add(row)
            row, _ = measure(
                f"dense {kind} H={H} T=16384",
                "dilax pallas",
                peers.ours(((16384, 1),), causal),
                ((16384, 1),),
                16384,
                H,
                causal,
                reference=reference,
            )
            add(row)
            for name in ("flash_attn3_jax", "tokamax"):
                f = peers.optional(name, causal)
                if f is not None:
                    case = f"dense {kind} H={H} T=16384"
                    add(measure(case, name, f, ((16384, 1),), 16384, H, causal)[0])
            if not quick and not late():
                add(
                    measure(
                        f"LongNet {kind} H={H} T=32768",
                        "composed cudnn",
                        peers.composed(LONGNET, causal),
                        LONGNET,
                        32768,
                        H,
                        causal,
                    )[0]
                )


def gigapath(add: Callable[[Row], None]) -> None:
    """Prov-GigaPath's slide encoder, float16, heads of 48."""
    for T in (10000, 45000):
        case = f"GigaPath H=48 T={T}"
        add(
            measure(
                case,
                "dilax pallas",
                peers.ours(GIGAPATH, False),
                GIGAPATH,
                T,
                48,
                False,
                jnp.float16,
            )[0]
        )
        add(
            measure_torch(
                case,
                "torchscale arithmetic",
                lambda t: peers.torchscale(t, GIGAPATH),
                GIGAPATH,
                T,
                48,
            )
        )
        add(measure_torch(case, "dense torch SDPA", peers.torch_dense, ((T, 1),), T, 48))
        gc.collect()


def sweep(add: Callable[[Row], None], late: Callable[[], bool]) -> None:
    """Time and memory against T, 4k to 1M tokens, H=64."""
    for power in range(12, 21):
        T = 1 << power
        if late():
            return
        lists = tuple((w, r) for w, r in LONGNET if w <= T)
        add(
            measure(
                f"sweep H=64 T={T}",
                "dilax pallas",
                peers.ours(lists, False),
                lists,
                T,
                64,
                False,
                backward=False,
            )[0]
        )
        if T <= 1 << 16:
            add(
                measure(
                    f"sweep H=64 T={T}",
                    "cudnn",
                    peers.cudnn(False),
                    ((T, 1),),
                    T,
                    64,
                    False,
                    backward=False,
                )[0]
            )


def markdown(rows: list[Row], head: str) -> str:
    """The table."""

    def show(x: float | None, digits: int) -> str:
        return "" if x is None else f"{x:.{digits}f}"

    lines = [
        head,
        "",
        "| case | who | fwd ms | fwd+bwd ms | TFLOP/s | fwd+bwd TFLOP/s | error | MiB | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        error = "" if r.error is None else f"{r.error:.1e}"
        lines.append(
            f"| {r.case} | {r.peer} | {show(r.forward, 3)} | {show(r.both, 3)} |"
            f" {show(r.forward_rate, 0)} | {show(r.both_rate, 0)} | {error} |"
            f" {show(r.memory_mib, 0)} | {r.note} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[Row], path: Path) -> None:
    """Time and memory against T, log-log."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    points = [r for r in rows if r.case.startswith("sweep") and r.forward is not None]
    for peer in sorted({r.peer for r in points}):
        mine = [r for r in points if r.peer == peer]
        lengths = [int(r.case.rpartition("=")[2]) for r in mine]
        left.loglog(lengths, [r.forward for r in mine], "o-", base=2, label=peer)
        right.loglog(lengths, [r.memory_mib for r in mine], "o-", base=2, label=peer)
    for axes, label in ((left, "forward, ms"), (right, "output and temporaries, MiB")):
        axes.set(xlabel="tokens", ylabel=label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs everything that fits the budget and writes the results after each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="leave the composed path out")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()

    def late() -> bool:
        return time.monotonic() - begun > options.budget

    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    rate = 2 * 8192**3 / clock(lambda: product(a), jax.block_until_ready) / 1e12
    device = jax.local_devices()[0].device_kind
    head = f"{device}, jax {jax.__version__}, bf16 matmul {rate:.0f} TFLOP/s"
    print(head, flush=True)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(markdown([row], "").splitlines()[-1], f"{time.monotonic() - begun:.0f}s", flush=True)
        (options.out / "table.md").write_text(markdown(rows, head))
        data = {"head": head, "rows": [dataclasses.asdict(r) for r in rows]}
        (options.out / "table.json").write_text(json.dumps(data, indent=1))

    bars(add, options.quick, late)
    if not late():
        gigapath(add)
    sweep(add, late)
    plot(rows, options.out / "time.png")


if __name__ == "__main__":
    main()
