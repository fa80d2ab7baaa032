"""Measures attention of a sequence on several GPUs of one host, or on emulated CPU devices.

    python benchmarks/mesh.py --out results [--devices 2] [--cases dense,longnet] [--trace DIR]
    python benchmarks/mesh.py --out results --billion [--length 1073741824] [--head-dim 32]

For every case and pass, in one process: the mesh; the same local work with the messages removed;
one device alone with the whole sequence, where it fits. Rows sampled in every device's part are
checked against an oracle in float64 before anything is timed. Writes mesh.md and mesh.json.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# In one piece where the memory is just enough; else a device's peak tells what a case needs.
os.environ.setdefault(
    "XLA_PYTHON_CLIENT_PREALLOCATE", "true" if "--billion" in sys.argv else "false"
)
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.97")
# Without these XLA sends some keys and values before it computes, not meanwhile.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_gpu_enable_latency_hiding_scheduler=true"
    + " --xla_gpu_experimental_parallel_collective_overlap_limit=4"
)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from dilax.sharded import choose_local, plan_of
from dilax.spec import as_spec, branches_of, within
from sharding.attention import Setup, attend
from sharding.mesh import local_positions
from sharding.messages import MESSAGES, SILENT

AXIS = "sequence"
LONGNET = ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
GIGAPATH = ((1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16))


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention; length is that of the whole sequence, `per_device` that of a device's part."""

    name: str
    lists: tuple[tuple[int, ...], tuple[int, ...]] | None  # None: dense
    per_device: int | None = None
    length: int | None = None
    causal: bool = False
    layout: str = "contiguous"
    method: str | None = None
    heads: int = 16
    head_dim: int = 128
    backward: bool = True
    alone: bool = True

    def tokens(self, devices: int) -> int:
        """T of the whole sequence."""
        return self.length or (self.per_device or 0) * devices


CASES = (
    Case("dense", None, per_device=32768, method="ring"),
    Case("dense-zigzag", None, per_device=32768, causal=True, layout="zigzag", method="ring"),
    Case("dense-contiguous", None, per_device=32768, causal=True, method="ring"),
    Case("longnet", LONGNET, length=1 << 20),
    Case("gigapath", GIGAPATH, length=1 << 20),
    Case("gigapath-ring", GIGAPATH, length=1 << 20, method="ring"),
)


def tiny(case: Case) -> Case:
    """The same at a size for emulated devices."""
    lists = None
    if case.lists:
        lists = tuple(max(w // 1024, 4) for w in case.lists[0]), case.lists[1]
    small = 256 if case.length else None
    part = 64 if case.per_device else None
    return dataclasses.replace(
        case, lists=lists, length=small, per_device=part, heads=4, head_dim=16
    )


def values(salt: int, position: Any, head: Any, dim: Any, dtype: Any, xp: Any = jnp) -> Any:
    """Numbers in [-sqrt(3), sqrt(3)) that depend on where they are, the same on every machine."""
    u32 = xp.uint32
    x = position.astype(u32) * u32(0x9E3779B1) + head.astype(u32) * u32(0x85EBCA77)
    x = x + dim.astype(u32) * u32(0xC2B2AE3D) + u32(salt * 0x27D4EB2F % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> u32(shift))) * u32(factor)
    unit = (x >> u32(8)).astype(xp.float32) * xp.float32(2**-24)
    return ((unit - xp.float32(0.5)) * xp.float32(12**0.5)).astype(dtype)


def inputs(case: Case, length: int, axis: str | None, dtype: Any, count: int = 4) -> Any:
    """query, key, value and the cotangent of out, of this device's positions."""
    place = jnp.arange(length, dtype=jnp.int32)
    if axis is not None:
        place = local_positions(length, axis, case.layout)
    head, dim = jnp.arange(case.heads), jnp.arange(case.head_dim)
    at = place[None, :, None, None], head[None, None, :, None], dim[None, None, None]
    return tuple(values(salt, *at, dtype) for salt in range(count))


@dataclasses.dataclass(frozen=True)
class Run:
    """One case on the first `devices` devices."""

    case: Case
    length: int
    devices: int
    implementation: str | None
    dtype: Any

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices as one axis."""
        kinds = (jax.sharding.AxisType.Auto,)
        return jax.make_mesh(
            (self.devices,), (AXIS,), axis_types=kinds, devices=jax.devices()[: self.devices]
        )

    @property
    def branches(self) -> tuple:
        """Those of the case, over all positions."""
        spec = as_spec(*(self.case.lists or ((self.length,), (1,))))
        every = branches_of(spec, self.case.heads, "lse", "interleaved")
        return tuple(within(branch, self.length) for branch in every)

    @functools.cached_property
    def plan(self) -> Any:
        """Who sends what."""
        case = self.case
        return plan_of(
            self.branches,
            (1, self.length, case.heads, case.heads, case.head_dim),
            self.dtype,
            devices=self.devices,
            layout=case.layout,
            is_causal=case.causal,
            method=case.method,
        )

    def place(self, f: Callable, count: int) -> Callable:
        """f of `count` arrays [1, T, N, H] under shard_map."""
        part = jax.P(None, AXIS)
        return jax.shard_map(
            f, mesh=self.mesh, in_specs=(part,) * count, out_specs=part, check_vma=False
        )

    def arrays(self, count: int) -> tuple[jax.Array, ...]:
        """query, key, value and the cotangent of out, made where they lie."""
        n = self.length // self.devices
        make = self.place(lambda: inputs(self.case, n, AXIS, self.dtype, count), 0)
        return jax.jit(make)()

    def forward(self, messages: Any) -> Callable:
        """(query, key, value) -> out, all sharded."""
        case, scale = self.case, self.case.head_dim**-0.5

        def one(q, k, v):
            local = choose_local(
                self.implementation, q, k, v, self.plan, scale, (None, None), 0.0, None
            )
            args = AXIS, None, None, case.causal, scale, 0.0, messages
            return attend(Setup(self.plan, local, *args), q, k, v)[0].astype(q.dtype)

        return self.place(one, 3)

    def both(self, messages: Any) -> Callable:
        """(query, key, value, cotangent) -> gradients of the first three."""
        return lambda q, k, v, do: jax.vjp(self.forward(messages), q, k, v)[1](do)


def oracle(run: Run, position: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """out and the gradient of the query of one row, in float64."""
    dim, scale = np.arange(run.case.head_dim)[None], run.case.head_dim**-0.5
    found = []
    for w, r, first, offsets in run.branches:
        offset = offsets[head - first]
        if position % w % r == offset:
            place = position // w * w + np.arange(offset, w, r)
            end = min(position + 1 if run.case.causal else run.length, run.length)
            found.append(place[place < end])
    place, one = np.concatenate(found)[:, None], np.array([[head]])

    def rows(salt: int, at: np.ndarray) -> np.ndarray:
        return values(salt, at, one, dim, run.dtype, np).astype(np.float64)

    q, do = (rows(salt, np.array([[position]]))[0] for salt in (0, 3))
    k, v = rows(1, place), rows(2, place)
    logits = k @ q * scale
    p = np.exp(logits - logits.max())
    p /= p.sum()
    out = p @ v
    return out, (p * (v @ do - do @ out)) @ k * scale


def worst_error(run: Run, result: jax.Array, gradient: bool, samples: int = 4) -> float:
    """The largest relative error of rows sampled in every device's part."""
    rng, worst = np.random.default_rng(0), 0.0
    starts = run.plan.token_starts
    for shard in result.addressable_shards:
        n = shard.data.shape[1]
        device = (shard.index[1].start or 0) // n
        size = n // starts.shape[1]
        for _ in range(samples):
            row, head = int(rng.integers(n)), int(rng.integers(run.case.heads))
            position = int(starts[device, row // size]) + row % size
            wanted = oracle(run, position, head)[int(gradient)]
            found = np.asarray(shard.data[0, row, head], np.float64)
            worst = max(worst, float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)))
    return worst


def clock(f: Callable, arrays: tuple, least: float = 0.05) -> float:
    """Median seconds of one call over batches of back-to-back calls."""
    jax.block_until_ready(f(*arrays))
    start = time.perf_counter()
    jax.block_until_ready(f(*arrays))
    count = max(1, min(50, int(least / max(time.perf_counter() - start, 1e-5))))
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            result = f(*arrays)
        jax.block_until_ready(result)
        samples.append((time.perf_counter() - start) / count)
        del result
    return statistics.median(samples)


def useful_flops(run: Run) -> float:
    """Forward FLOPs that the mathematics needs, on all devices."""
    total = 0.0
    for w, r, _, offsets in run.branches:
        whole, rest = divmod(run.length, w)
        total += 4 * run.case.head_dim * len(offsets) * (whole * w * w + rest * rest) / r**2
    return total / (2 if run.case.causal else 1)


def measure(run: Run, trace: str | None) -> list[dict]:
    """The rows of one case: forward, and forward with backward."""
    limit = 0.03 if jnp.dtype(run.dtype).itemsize == 2 else 1e-4
    rows = []
    for name in ("forward", "both")[: 1 + run.case.backward]:
        row: dict[str, Any] = {"case": run.case.name, "pass": name, "devices": run.devices}
        row |= {"T": run.length, "H": run.case.head_dim, "N": run.case.heads}
        row["methods"] = " ".join(branch.method for branch in run.plan.branches)
        row |= {"planned bytes": run.plan.bytes, "balance": run.plan.balance}
        arrays = run.arrays(3 + (name == "both"))
        f = jax.jit(getattr(run, name)(MESSAGES)).lower(*arrays).compile()
        row["temporary MiB"] = f.memory_analysis().temp_size_in_bytes / 2**20
        result = jax.tree.leaves(f(*arrays))[0]
        row["error"] = worst_error(run, result, name == "both")
        del result
        if not row["error"] < limit:
            raise SystemExit(f"{run.case.name} {name}: rows differ from the oracle: {row}")
        row["seconds"] = clock(f, arrays)
        if trace:
            with jax.profiler.trace(f"{trace}/{run.case.name}-{name}"):
                jax.block_until_ready(f(*arrays))
        silent = jax.jit(getattr(run, name)(SILENT)).lower(*arrays).compile()
        row["silent"] = clock(silent, arrays)
        del silent, f, arrays
        row["ratio"] = row["silent"] / row["seconds"]
        row["exposed ms"] = (row["seconds"] - row["silent"]) * 1e3
        factor = 3.5 if name == "both" else 1.0
        rate = factor * useful_flops(run) / run.devices / 1e12
        row["TFLOP/s per device"] = rate / row["seconds"]
        if run.case.alone and run.devices > 1:
            row |= alone(run, name)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def alone(run: Run, name: str) -> dict:
    """One device with the whole sequence."""
    case = dataclasses.replace(run.case, layout="contiguous", method=None)
    one = dataclasses.replace(run, devices=1, case=case)
    try:
        arrays = one.arrays(3 + (name == "both"))
        seconds = clock(jax.jit(getattr(one, name)(MESSAGES)), arrays)
    except jax.errors.JaxRuntimeError as problem:  # out of memory: the row says so
        return {"alone": None, "note": f"one device: {str(problem)[:100]}"}
    return {"alone": seconds}


def speed(row: dict) -> float | None:
    """Seconds of one device over the devices' seconds together."""
    if not row.get("alone"):
        return None
    return row["alone"] / (row["devices"] * row["seconds"])


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    head = ("case", "pass", "devices", "T", "ms", "without messages", "ratio", "one device")
    head += ("share of it", "TFLOP/s per device", "exposed ms", "error", "methods")
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        one, share = row.get("alone"), speed(row)
        cells = [row["case"], row["pass"], row["devices"], row["T"], f"{row['seconds'] * 1e3:.2f}"]
        cells += [f"{row['silent'] * 1e3:.2f}", f"{row['ratio']:.3f}"]
        cells += [f"{one * 1e3:.2f}" if one else "-", f"{share:.3f}" if share else "-"]
        cells += [f"{row['TFLOP/s per device']:.1f}", f"{row['exposed ms']:.2f}"]
        cells += [f"{row['error']:.1e}", row["methods"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def billion(length: int, head_dim: int, devices: int, implementation: str | None) -> dict:
    """One forward pass over a very long sequence; out takes the memory of the query."""
    rates = tuple(2**i for i in range(11))
    lists = tuple(min(2048 * r, length) for r in rates), rates
    case = Case("billion", lists, length=length, heads=1, head_dim=head_dim, backward=False)
    run = Run(case, length, devices, implementation, jnp.bfloat16)
    q, k, v = run.arrays(3)
    f = jax.jit(run.forward(MESSAGES), donate_argnums=0).lower(q, k, v).compile()
    start = time.perf_counter()
    out = jax.block_until_ready(f(q, k, v))
    row: dict[str, Any] = {"T": length, "H": head_dim, "devices": devices}
    row["seconds"] = time.perf_counter() - start
    row["error"] = worst_error(run, out, False)
    stats = [device.memory_stats() or {} for device in jax.devices()[:devices]]
    row["peak GiB"] = max(s.get("peak_bytes_in_use", 0) for s in stats) / 2**30
    row["TFLOP/s per device"] = useful_flops(run) / devices / row["seconds"] / 1e12
    row["methods"] = " ".join(branch.method for branch in run.plan.branches)
    return row


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--devices", type=int, default=None, help="default: all")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--implementation", default=None, help="of the local attention")
    parser.add_argument("--trace", default=None, help="folder for profiles")
    parser.add_argument("--tiny", action="store_true", help="sizes for emulated devices")
    parser.add_argument("--billion", action="store_true")
    parser.add_argument("--length", type=int, default=1 << 30, help="with --billion")
    parser.add_argument("--head-dim", type=int, default=32, help="with --billion")
    args = parser.parse_args()
    devices = args.devices or len(jax.devices())
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.billion:
        row = billion(args.length, args.head_dim, devices, args.implementation)
        print(json.dumps(row))
        (out / "billion.json").write_text(json.dumps(row, indent=1) + "\n")
        return
    rows: list[dict] = []
    for case in CASES:
        if case.name in args.cases.split(","):
            case = tiny(case) if args.tiny else case
            dtype = jnp.float32 if args.tiny else jnp.bfloat16
            run = Run(case, case.tokens(devices), devices, args.implementation, dtype)
            rows += measure(run, args.trace)
            (out / "mesh.json").write_text(json.dumps(rows, indent=1) + "\n")
            (out / "mesh.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
