"""Measures attention of a sequence on several GPUs of one host, or on emulated CPU devices.

    python benchmarks/mesh.py --out results [--devices 2] [--cases dense,longnet] [--budget 500]
    python benchmarks/mesh.py --out results --billion [--backward] [--length 1073741824]

For every case and pass, in one process: the mesh; the same local work with the messages removed;
a profile of the mesh, which says how long messages run while nothing is computed; at the end one
device alone with the whole sequence, where it fits. Before anything is timed, rows of out (or the
query's gradient) that are sampled in every device's part are checked against an oracle in float64,
the gradients of keys and values by their sums. What the planner expects of a forward pass stands
beside what was measured. "held": by the program; "peak": by the process up to then. Writes mesh.md
and mesh.json (billion.md and billion.json), a row as soon as it is there; rows of other calls that
are in the file stay. A case that fails is left out, with the reason; the exit status is 1 then.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# In one piece where the memory is just enough; else a device's peak tells what a case needs.
os.environ.setdefault(
    "XLA_PYTHON_CLIENT_PREALLOCATE", "true" if "--billion" in sys.argv else "false"
)
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.97")
# Without the first two XLA sends some keys and values before it computes, not meanwhile.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_gpu_enable_latency_hiding_scheduler=true"
    + " --xla_gpu_experimental_parallel_collective_overlap_limit=4"
    + f" --xla_gpu_use_memcpy_local_p2p={'--copy-engines' in sys.argv}".lower()
)
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from benchmarks.billion import billion
from benchmarks.exposed import exposed_in
from benchmarks.mesh_cases import CASES, Run, sums_error, tiny, useful_flops, worst_error
from benchmarks.mesh_table import BILLION, MESH, table
from benchmarks.program import held_gib, peak_gib, received
from dilax import UnsupportedError
from sharding.messages import MESSAGES, SILENT

STARTED = time.monotonic()
PASSES = ("forward", "both")
KEY = ("case", "pass", "devices", "T", "copy engines")
PROFILED = 3  # calls


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


def profiled(f: Callable, arrays: tuple, folder: Path) -> dict[str, float]:
    """Milliseconds of one call by `exposed_in`, from a profile of a few."""
    with jax.profiler.trace(str(folder)):
        for _ in range(PROFILED):
            result = f(*arrays)
        jax.block_until_ready(result)
        del result
    return {f"{name} ms": x / PROFILED for name, x in exposed_in(folder).items()}


def measure(run: Run, name: str, copy_engines: bool, traces: Path) -> dict:
    """The row of one case and pass."""
    row: dict[str, Any] = {"case": run.case.name, "pass": name, "devices": run.devices}
    row |= {"T": run.length, "H": run.case.head_dim, "N": run.case.heads}
    row |= {"copy engines": copy_engines, "local": run.chosen}
    row["methods"] = " ".join(branch.method for branch in run.plan.branches)
    backward = name == "both"
    row["balance"] = run.plan.balance
    if not backward:  # which is all that a plan is about
        row |= {"planned": run.plan.seconds, "planned bytes": run.plan.bytes}
    arrays = run.arrays(3 + backward)
    with ThreadPoolExecutor() as pool:
        programs = [jax.jit(run.program(backward, m)).lower(*arrays) for m in (MESSAGES, SILENT)]
        row["bytes"] = received(programs[0].as_text())
        f, silent = pool.map(lambda program: program.compile(), programs)
    row["held GiB"] = held_gib(f)
    row |= checked(run, f(*arrays), backward)
    row["seconds"] = clock(f, arrays)
    row["silent"] = clock(silent, arrays)
    row["ratio"] = row["silent"] / row["seconds"]
    row |= profiled(f, arrays, traces / f"{run.case.name}-{name}")
    rate = (3.5 if backward else 1.0) * useful_flops(run) / run.devices / 1e12
    row["TFLOP/s per device"] = rate / row["seconds"]
    row["peak GiB"] = peak_gib(run.mesh.devices.flat)
    return row


def checked(run: Run, results: Any, backward: bool) -> dict[str, float]:
    """The errors of the results, if they are small."""
    found = {"error": worst_error(run, jax.tree.leaves(results)[0], backward)}
    if backward:
        found["error of sums"] = sums_error(run, results)
    limit = 0.03 if jnp.dtype(run.dtype).itemsize == 2 else 1e-4
    if not max(found.values()) < limit:
        raise RuntimeError(f"the results are not those of the oracle: {found}")
    return found


def alone(run: Run, name: str) -> dict:
    """One device with the whole sequence."""
    backward = name == "both"
    case = dataclasses.replace(run.case, layout="contiguous", method=None, plain=False, hosts=1)
    one = dataclasses.replace(run, devices=1, case=case, implementation=run.chosen)
    try:
        arrays = one.arrays(3 + backward)
        f = jax.jit(one.program(backward, MESSAGES))
        checked(one, f(*arrays), backward)
        return {"alone": clock(f, arrays)}
    except (jax.errors.JaxRuntimeError, UnsupportedError) as problem:  # the row says why
        return {"alone": None, "note": f"one device: {str(problem)[:100]}"}


class Record:
    """The rows on disk: those of other calls stay, the newest of equal ones counts."""

    def __init__(self, out: Path, name: str, key: tuple[str, ...]):
        self.path, self.key = out / f"{name}.json", key
        found = json.loads(self.path.read_text()) if self.path.exists() else []
        self.rows = {self._key(row): row for row in found}

    def _key(self, row: dict) -> tuple:
        return tuple(row.get(name) for name in self.key)

    def table(self, columns: tuple) -> str:
        """All rows as Markdown."""
        return table(list(self.rows.values()), columns)

    def add(self, row: dict) -> None:
        """Print and write."""
        print(json.dumps(row), flush=True)
        self.rows[self._key(row)] = row
        self.path.write_text(json.dumps(list(self.rows.values()), indent=1) + "\n")


class Budget:
    """Seconds since the start; a step that would not fit or that fails is said to, and left out."""

    def __init__(self, seconds: float | None):
        self.seconds, self.longest = seconds, 0.0
        self.failed: list[str] = []

    def run(self, what: str, step: Callable[[], Any]) -> Any:
        """The step's result, None where it failed or the longest yet would not fit any more."""
        began = time.monotonic()
        if self.seconds and began - STARTED + self.longest > self.seconds:
            print(f"skipped, the budget is used up: {what}", flush=True)
            return None
        result = None
        try:
            result = step()
        except (RuntimeError, UnsupportedError) as problem:
            print(f"failed: {what}: {str(problem)[:1000]}", flush=True)
            self.failed.append(what)
        self.longest = max(self.longest, time.monotonic() - began)
        print(f"{what}: {time.monotonic() - began:.0f} s", flush=True)
        return result


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--devices", type=int, default=None, help="default: all")
    names = ",".join(case.name for case in CASES)
    parser.add_argument("--cases", default=names, help="case or case:pass, in this order")
    parser.add_argument("--implementation", default=None, help="of the local attention")
    parser.add_argument("--copy-engines", action="store_true", help="not NCCL's kernels")
    parser.add_argument("--budget", type=float, default=None, help="seconds since the start")
    parser.add_argument("--trace", default=None, help="folder for profiles, if they are to stay")
    parser.add_argument("--tiny", action="store_true", help="sizes for emulated devices")
    parser.add_argument("--billion", action="store_true")
    parser.add_argument("--backward", action="store_true", help="with --billion")
    parser.add_argument("--length", type=int, default=1 << 30, help="with --billion")
    parser.add_argument("--head-dim", type=int, default=32, help="with --billion")
    return parser.parse_args()


def steps_of(args: argparse.Namespace, devices: int) -> list[tuple[Run, str]]:
    """The cases and passes that were asked for."""
    cases = {case.name: tiny(case) if args.tiny else case for case in CASES}
    dtype = jnp.float32 if args.tiny else jnp.bfloat16
    steps = []
    for wanted in args.cases.split(","):
        name, _, only = wanted.partition(":")
        case = cases[name]
        if devices % case.hosts:
            print(f"left out, {devices} devices are not {case.hosts} hosts: {name}", flush=True)
            continue
        run = Run(case, case.tokens(devices), devices, args.implementation, dtype)
        passes = PASSES[:1] if case.plain else PASSES
        steps += [(run, one) for one in passes if only in ("", one)]
    return steps


def main() -> None:
    """Parse, run, write."""
    args = parse()
    devices = args.devices or len(jax.devices())
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.billion:
        record = Record(out, "billion", ("pass", "T", "H", "devices"))
        options = args.length, args.head_dim, devices, args.implementation, args.backward
        record.add(billion(*options))
        (out / "billion.md").write_text(record.table(BILLION))
        print(record.table(BILLION))
        return
    record, budget = Record(out, "mesh", KEY), Budget(args.budget)
    measured = []
    with tempfile.TemporaryDirectory() as temporary:
        traces = Path(args.trace or temporary)
        for run, name in steps_of(args, devices):
            what = f"{run.case.name} {name}"
            row = budget.run(what, lambda: measure(run, name, args.copy_engines, traces))  # noqa: B023
            if row:
                measured.append((run, name, row))
                record.add(row)
                (out / "mesh.md").write_text(record.table(MESH))
    for run, name, row in measured if devices > 1 else ():
        found = budget.run(f"one device: {run.case.name} {name}", lambda: alone(run, name))  # noqa: B023
        if found:
            record.add(row | found)
            (out / "mesh.md").write_text(record.table(MESH))
    print(record.table(MESH))
    if budget.failed:
        raise SystemExit(f"failed: {', '.join(budget.failed)}")


if __name__ == "__main__":
    main()
