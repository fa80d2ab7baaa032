"""Block-sparse kernels on one Hopper GPU: checked, then timed in turns with their peers.

    python benchmarks/gpu_blocks.py --out results [--parts windows,long] [--budget SECONDS]

Parts, in this order: windows, long (1 % of 131072 tokens), fractions (100 to 1 % kept, and the
plot), few_heads, errors (beside the XLA path's, float64), adaptive (the router's time), orders,
more (causal, per head, blocks of 64), two_passes (the deterministic backward), checks (every
option). Peers: dense cuDNN and its window, and where installed FlexAttention (torch) and the
windows of FlashAttention-3 and tokamax. Rows are printed and written (blocks.md, blocks.json,
blocks.png) as they come. A part that fails, or that the budget does not reach, is named and the
others go on. --lower: only lowers this library's functions for CUDA, without a GPU. --smoke: the
smallest checks, also on a CPU.
"""

import argparse
import dataclasses
import functools
import gc
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from benchmarks import block_cases, block_checks, block_errors, block_report, block_router
from benchmarks.block_peers import FLEX, OURS, TWO, XLA
from benchmarks.block_timing import Compiled, Flex, Row, brief, measure
from benchmarks.turns import in_turns
from pallas_kernels import block_schedule

PARTS = (
    "windows",
    "long",
    "fractions",
    "few_heads",
    "errors",
    "adaptive",
    "orders",
    "more",
    "two_passes",
    "checks",
)


class Run:
    """One run: what it found so far, and what it still may do."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.begun = options, time.monotonic()
        options.out.mkdir(parents=True, exist_ok=True)
        head = f"{jax.local_devices()[0].device_kind}, jax {jax.__version__}, bf16"
        self.report: dict[str, Any] = {"head": head, "checks": [], "rows": [], "failed": []}
        self.compiled = Compiled()

    def tell(self, text: str) -> None:
        """Prints a line with the time."""
        print(f"{time.monotonic() - self.begun:5.0f}s {text}", flush=True)

    def save(self) -> None:
        """Writes what there is."""
        (self.options.out / "blocks.json").write_text(json.dumps(self.report, indent=1))
        (self.options.out / "blocks.md").write_text(block_report.markdown(self.report))

    def add(self, row: Row) -> None:
        """One measurement more."""
        self.report["rows"].append(dataclasses.asdict(row))
        self.tell(block_report.line(dataclasses.asdict(row)))
        self.save()

    def failed(self, what: str, why: str) -> None:
        """Notes what is missing."""
        self.report["failed"].append(f"Missing: {what}: {why}")
        self.tell(self.report["failed"][-1])
        self.save()

    def guarded(self, name: str, run: Callable[[], None]) -> None:
        """Runs a step unless the time is over; one failure does not end the rest."""
        if time.monotonic() - self.begun > self.options.budget:
            self.failed(name, "no time")
            return
        try:
            run()
        except Exception as problem:
            self.failed(name, brief(problem))
            traceback.print_exc(limit=-3)
        gc.collect()

    def wanted(self, name: str) -> bool:
        """Whether --only lets a case or check pass."""
        return self.options.only in name


def time_part(run: Run, part: str, flex: Flex | None) -> None:
    """Times the cases of a part."""
    cases = [c for c in block_cases.PARTS[part]() if run.wanted(c.name)]
    for c in cases:
        run.compiled.begin_case(c)
    run.compiled.wait()
    for c in cases:
        name = f"{c.name} H={c.H}"
        run.guarded(name, functools.partial(measure, c, run.compiled, flex, run.add))
    if part == "fractions":
        path = run.options.out / "blocks.png"
        run.guarded("plot", lambda: block_report.plot(run.report["rows"], path))


def errors_part(run: Run) -> None:
    """Errors at size."""
    cases = [c for c in block_errors.cases() if run.wanted(c.name)]
    for c in cases:
        shapes = [jax.ShapeDtypeStruct((1, c.T, c.heads, c.H), jnp.bfloat16)] * 4
        for who, f in block_errors.functions(c).items():
            run.compiled.begin((c, who), lambda f=f, x=shapes: (jax.jit(f).lower(*x),))
    for c in cases:

        def one(c: Any = c) -> None:
            ready = {}
            for who in block_errors.functions(c):
                try:
                    (ready[who],) = run.compiled.get((c, who))
                except Exception as problem:
                    run.failed(f"{c.name} by {who}", brief(problem))
            block_errors.measure(c, ready, run.add)

        run.guarded(f"{c.name} H={c.H}", one)


def adaptive_part(run: Run) -> None:
    """Times of the adaptive variant."""
    found = block_router.functions()
    shapes = block_router.arguments()
    for who, f in found.items():
        run.compiled.begin(who, lambda f=f: (jax.jit(f).lower(*shapes),))
    run.compiled.wait()
    ready = {}
    for who in found:
        try:
            (ready[who],) = run.compiled.get(who)
        except Exception as problem:
            run.failed(f"adaptive: {who}", brief(problem))
    block_router.measure(ready, run.add)


def checks_part(run: Run) -> None:
    """Small cases with every option against float64, repeated for equal bits."""
    prepared = {}
    for c in block_checks.checks(run.options.smoke):
        if run.wanted(c.name):

            def prepare(c: Any = c) -> None:
                lowered, *prepared[c] = block_checks.prepare_check(c)
                run.compiled.begin(c, lambda: (lowered,))

            run.guarded(c.name, prepare)
    repeats = 0 if run.options.smoke else run.options.repeats

    def check(c: Any) -> None:
        (ready,) = run.compiled.get(c)
        errors = block_checks.run_check(ready, *prepared[c], repeats=repeats)
        good = errors["lse"] < 1e-5 and max(errors.values()) < 2e-2
        text = " ".join(f"{k} {x:.1e}" for k, x in errors.items())
        verdict = "agrees" if good else "WRONG"
        run.report["checks"].append({"name": c.name, "errors": text, "verdict": verdict})
        run.tell(f"{verdict} {c.name}: {text}")
        run.save()

    for c in prepared:
        run.guarded(c.name, functools.partial(check, c))


def lower_everything(run: Run) -> None:
    """Lowers this library's functions of the parts for CUDA; peers need a GPU for that."""
    own = (OURS, TWO, XLA, *block_schedule.ORDERS)
    traced: list[tuple[str, Callable[[], tuple]]] = []
    for part in run.options.parts:
        for c in block_cases.PARTS.get(part, list)():
            for who, f in block_cases.functions(c).items():
                if who in own:
                    name = f"{c.name} H={c.H} {who}"
                    traced.append((name, functools.partial(block_cases.traces, f, c)))
    if "errors" in run.options.parts:
        for c in block_errors.cases():
            x = [jax.ShapeDtypeStruct((1, c.T, c.heads, c.H), jnp.bfloat16)] * 4
            for who, f in block_errors.functions(c).items():
                traced.append((f"{c.name} {who}", lambda f=f, x=x: (jax.jit(f).trace(*x),)))
    if "adaptive" in run.options.parts:
        shapes = block_router.arguments()
        for who, f in block_router.functions().items():
            traced.append((f"adaptive {who}", lambda f=f: (jax.jit(f).trace(*shapes),)))
    for name, traces in traced:
        if run.wanted(name):
            run.guarded(name, lambda traces=traces: _lower(traces))
    run.tell(f"{len(traced)} functions, {len(run.report['failed'])} failed")


def _lower(traces: Callable[[], tuple]) -> None:
    for x in traces():
        x.lower(lowering_platforms=("cuda",))


def matmul_rate() -> float:
    """TFLOP/s of a large product: what the card gives today."""
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    runs = {"matmul": (lambda: product(a), jax.block_until_ready)}
    return 2 * 8192**3 / in_turns(runs)["matmul"] / 1e12


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--parts", default=",".join(PARTS), help="some of %(default)s")
    parser.add_argument("--only", default="", help="cases and checks with this word in their name")
    parser.add_argument("--without", default="", help=f"leave out {FLEX}: it compiles slowly")
    parser.add_argument("--repeats", type=int, default=6, help="runs that must give equal bits")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds")
    parser.add_argument("--lower", action="store_true", help="only lower for CUDA")
    parser.add_argument("--smoke", action="store_true", help="only the smallest checks")
    options = parser.parse_args(arguments)
    options.parts = ["checks"] if options.smoke else options.parts.split(",")
    unknown = [x for x in options.parts if x not in PARTS]
    if unknown or options.without not in ("", FLEX):
        parser.error(f"parts {PARTS}, without {FLEX}; got {unknown} {options.without}")
    return options


def main() -> None:
    """Runs the parts in order."""
    run = Run(parse())
    options = run.options
    run.tell(run.report["head"])
    if options.lower:
        lower_everything(run)
        sys.exit(bool(run.report["failed"]))
    flex = None
    if {*options.parts} - {"checks", "errors", "adaptive", "orders"}:
        run.tell(f"matmul {matmul_rate():.0f} TFLOP/s")
        try:
            flex = None if options.without == FLEX else Flex()
        except Exception as problem:  # torch may be missing
            run.failed(FLEX, brief(problem))
    others = {"errors": errors_part, "adaptive": adaptive_part, "checks": checks_part}
    for part in PARTS:
        if part in options.parts:
            start = others.get(part, functools.partial(time_part, part=part, flex=flex))
            run.guarded(part, functools.partial(start, run))
    run.save()
    for bar in block_report.bars(run.report["rows"]):
        print(" | ".join(bar))
    bad = [c["name"] for c in run.report["checks"] if c["verdict"] != "agrees"]
    print("wrong:", ", ".join(bad) or "none", flush=True)


if __name__ == "__main__":
    main()
