"""Measures the Pallas kernels and their peers on one Hopper GPU, in one process.

    python benchmarks/gpu.py --out results [--parts bars,sweep] [--budget SECONDS] [--join DIR]

Out and gradients of all that is timed are checked, those of `bars` in `errors`: this library's on
branches against float64, beside what XLA errs; cuDNN's dense ones, its composed path and
torchscale's arithmetic against float64 too; other dense ones against cuDNN's; of `sweep` some rows
of out and dq against float64 on the host. A peer that is not installed (flash_attn3_jax, tokamax)
has a row that says so. Writes DIR/table.md, DIR/table.json and DIR/time.png, a row as soon as it is
there. The exit status is 0 only if no part failed or was left out. --join adds the rows of an
earlier run, --lower only lowers every program for CUDA: on any machine this library's, the peers'
where their libraries are.
"""

import argparse
import functools
import math
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_checks, gpu_torch
from benchmarks import gpu_peers as peers
from benchmarks.gpu_lab import (
    HEADS,
    Lab,
    Program,
    Rival,
    Shape,
    Step,
    deviation,
    out_and_gradients,
    record,
    record_memory,
    results,
    rows_deviation,
)
from benchmarks.gpu_table import OURS, Row, read_rows
from benchmarks.turns import in_turns

LONGNET = ((2048, 1), (4096, 2), (8192, 4), (16384, 8), (32768, 16))
GIGAPATH = ((1024, 1), (5792, 2), (32768, 4), (185363, 8), (1048576, 16))
DETERMINISTIC = f"{OURS}, deterministic"
REPEATS = 100
# Tokens up to which dense attention is part of the sweep: with backward two seconds a call there.
DENSE_SWEEP = 1 << 18


def longnet(H: int, causal: bool) -> Shape:
    """The dilated call of the bars."""
    kind = "causal" if causal else "full"
    return Shape(f"LongNet {kind} H={H} T=32768", LONGNET, 32768, H, causal)


def dense(H: int, causal: bool) -> Shape:
    """The dense call of the bars."""
    kind = "causal" if causal else "full"
    return Shape(f"dense {kind} H={H} T=16384", ((16384, 1),), 16384, H, causal)


def gigapath(T: int) -> Shape:
    """Prov-GigaPath's slide encoder."""
    return Shape(f"GigaPath H=48 T={T}", GIGAPATH, T, 48, dtype="float16")


def measured(lab: Lab, shape: Shape, who: str, *, backward: bool = True) -> Step:
    """Times forward, and forward with backward."""
    return compete(lab, f"{shape.name}, {who}", [(shape, who)], backward=backward)


def compete(
    lab: Lab,
    name: str,
    entries: list[tuple[Shape, str]],
    rivals: Iterable[Rival] = (),
    *,
    backward: bool = True,
) -> Step:
    """Times forward, and forward with backward, of several (shape, who) and rivals in turns."""
    works, rivals = ("forward", "both") if backward else ("forward",), tuple(rivals)
    programs = tuple(Program(shape, who, work) for work in works for shape, who in entries)
    everybody = (*entries, *((rival.shape, rival.who) for rival in rivals))

    def run(*executables: Any) -> None:
        arrays = {shape: shape.inputs() for shape, _ in entries}
        calls: dict[str, dict[int, Any]] = {work: {} for work in works}
        rows = {}
        for n, (shape, who) in enumerate(everybody):
            row = Row(shape.name, who)
            try:
                if n < len(entries):
                    mine = dict(zip(works, executables[n :: len(entries)], strict=True))
                    found = {work: _call(mine[work], arrays[shape]) for work in works}
                    for work, executable in mine.items():
                        record_memory(row, work, executable)
                else:
                    found = rivals[n - len(entries)].calls()
                for call, wait in found.values():
                    wait(call())
            except Exception as problem:  # the others are timed without it
                lab.fail(f"{shape.name}, {who}", problem)
                continue
            rows[n] = row
            for work in works:
                calls[work][n] = found[work]
        for work in works:
            for n, seconds in in_turns(calls[work]).items():
                record(rows[n], everybody[n][0], work, seconds)
        if any(n >= len(entries) for n in rows):
            gpu_torch.release()
        for row in rows.values():
            lab.add(row)

    return Step(name, programs, run, alone=False, rivals=rivals)


def _call(executable: Any, arrays: Any) -> tuple[Callable, Callable]:
    """(run, wait) of an executable; raises what is there in its place."""
    if isinstance(executable, Exception):
        raise executable
    return functools.partial(executable, *arrays), jax.block_until_ready


def checked(lab: Lab, shape: Shape, who: str) -> Step:
    """Out and gradients against float64, beside what the XLA path errs in the same dtype."""
    programs = (
        *out_and_gradients(shape, who),
        Program(shape, "xla", "all"),
        Program(shape, "xla float64", "all"),
    )

    def run(forward: Any, both: Any, xla: Any, exact: Any) -> None:
        arrays = shape.inputs()
        right = exact(*arrays)
        ours = deviation(results((forward, both), arrays), right)
        theirs = deviation(xla(*arrays), right)
        ratios = [a / b if b else math.inf for a, b in zip(ours, theirs, strict=True)]
        row = Row(shape.name, f"{who}, checked", error=float(np.max(ours)))
        row.ratio = float(np.max(ratios))  # NaN if one of them is
        names = zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True)
        row.note = ", ".join(f"{name} {a:.1e} (XLA {b:.1e})" for name, a, b in names)
        lab.add(row)
        if not row.ratio <= 2.0:
            lab.fail(f"{shape.name}, {who}", f"errs {row.ratio:.2f} times as much as the XLA path")

    return Step(f"{shape.name}, {who}, float64", programs, run)


def compared(lab: Lab, shape: Shape, who: str, peer: str) -> Step:
    """Out and gradients against those of a peer."""
    programs = (*out_and_gradients(shape, who), *out_and_gradients(shape, peer))

    def run(forward: Any, both: Any, *theirs: Any) -> None:
        arrays = shape.inputs()
        found, right = results((forward, both), arrays), results(theirs, arrays)
        lab.compare(shape, who, peer, deviation(found, right))

    return Step(f"{shape.name}, {who}, beside {peer}", programs, run)


def rows_compared(lab: Lab, shape: Shape, who: str) -> Step:
    """Sampled rows of out and dq against float64, where all of it would take too long."""

    def run(forward: Any, both: Any) -> None:
        arrays = shape.inputs()
        wrong = rows_deviation(shape, arrays, forward(*arrays), both(*arrays)[0])
        lab.compare(shape, who, f"float64, {len(wrong) // 2} rows of out and dq", wrong)

    return Step(f"{shape.name}, {who}, rows", out_and_gradients(shape, who), run)


def absent(lab: Lab, shape: Shape, who: str) -> Step:
    """Says in the table that a peer is missing."""
    row = Row(shape.name, who, note=f"not measured: no package {peers.package(who)}")
    return Step(f"{shape.name}, {who}", (), lambda: lab.add(row))


CALLS = [(H, causal) for H in (128, 64) for causal in (False, True)]


def bars(lab: Lab) -> list[Step]:
    """LongNet and dense, H = 64 and 128, causal or not, beside dense cuDNN and other packages."""
    steps = []
    for H, causal in CALLS:
        whole, dilated = dense(H, causal), longnet(H, causal)
        entries = [(whole, "cudnn"), (dilated, OURS), (whole, OURS)]
        steps += [absent(lab, whole, who) for who in peers.others(H) if not peers.installed(who)]
        entries += [(whole, who) for who in peers.others(H) if peers.installed(who)]
        if peers.has_switch():
            entries.append((dilated, DETERMINISTIC))
        kind = "causal" if causal else "full"
        name, rivals = f"dense and LongNet {kind} H={H}", [gpu_torch.dense(whole)]
        steps.append(compete(lab, name, entries, rivals))
    return steps


def errors(lab: Lab) -> list[Step]:
    """The calls of `bars`: ours and cuDNN's against float64, other dense ones against cuDNN's."""
    kinds = [OURS, DETERMINISTIC] if peers.has_switch() else [OURS]
    steps = [checked(lab, longnet(H, causal), who) for H, causal in CALLS for who in kinds]
    for H, causal in CALLS:
        whole, found = dense(H, causal), [OURS, *filter(peers.installed, peers.others(H))]
        steps.append(compared(lab, whole, "cudnn", "xla float64"))
        steps += [compared(lab, whole, who, "cudnn") for who in found]
        steps.append(gpu_torch.dense_compared(lab, whole))
    return steps


def composed(lab: Lab) -> list[Step]:
    """LongNet from gathers, cuDNN and merges: its times, then its results."""
    who, shapes = "composed cudnn", [longnet(H, causal) for H, causal in CALLS]
    steps = [measured(lab, shape, who) for shape in shapes]
    return steps + [compared(lab, shape, who, "float64 with fixed weights") for shape in shapes]


def determinism(lab: Lab) -> list[Step]:
    """Repeated runs of forward and of the deterministic backward give the same bits."""
    who = DETERMINISTIC if peers.has_switch() else OURS

    def step(shape: Shape) -> Step:
        programs = tuple(Program(shape, who, work) for work in ("forward", "both"))

        def run(forward: Any, both: Any) -> None:
            arrays, same = shape.inputs(), jax.jit(_same_bits)
            for executable in (forward, both):
                first = executable(*arrays)
                equal = [same(first, executable(*arrays)) for _ in range(REPEATS)]
                if not all(map(bool, equal)):
                    count = REPEATS - sum(map(bool, equal))
                    raise AssertionError(f"{count} of {REPEATS} runs differ from the first")
            lab.add(Row(shape.name, who, note=f"{REPEATS} runs, forward and both: equal bits"))

        return Step(f"{shape.name}, {REPEATS} runs", programs, run)

    return [step(longnet(H, causal)) for H, causal in CALLS]


def _same_bits(a: Any, b: Any) -> Any:
    def bits(x: Any) -> Any:
        return jax.lax.bitcast_convert_type(x, jnp.uint16)

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jnp.all(jnp.stack([jnp.all(bits(x) == bits(y)) for x, y in pairs]))


def giga(lab: Lab) -> list[Step]:
    """GigaPath's shape beside torchscale's arithmetic and dense attention, both by torch."""
    times, checks = [], []
    for T in (10000, 45000):
        shape = gigapath(T)
        rivals = [*gpu_torch.torchscale(shape), gpu_torch.dense(shape)]
        times.append(compete(lab, f"{shape.name}, everybody", [(shape, OURS)], rivals))
        checks += [checked(lab, shape, OURS), *gpu_torch.torchscale_compared(lab, shape)]
        checks.append(gpu_torch.dense_compared(lab, shape))
    return times + checks


def sweep(lab: Lab) -> list[Step]:
    """Time and memory against T, 4k to 1M tokens, H = 64: LongNet's branches, and dense."""
    times, checks = [], []
    for power in range(12, 21):
        T = 1 << power
        name, lists = f"sweep H=64 T={T}", tuple((w, r) for w, r in LONGNET if w <= T)
        dilated, whole = Shape(name, lists, T, 64), Shape(name, ((T, 1),), T, 64)
        entries = [(dilated, OURS)] + [(whole, "cudnn")] * (T <= DENSE_SWEEP)
        times.append(compete(lab, f"{name}, everybody", entries))
        checks += [rows_compared(lab, *entry) for entry in entries]
    return times + checks


# In the order in which they run; bars before what repeats their programs.
PARTS: dict[str, Callable[[Lab], list[Step]]] = {
    "bars": bars,
    "determinism": determinism,
    "errors": errors,
    "composed": composed,
    "gigapath": giga,
    "sweep": sweep,
    "memory": lambda lab: gpu_checks.memory(lab, [longnet(64, False), longnet(128, True)]),
    "sanitize": gpu_checks.sanitize,
    "host": lambda lab: gpu_checks.host(lab, [longnet(128, False), longnet(128, True)]),
}
# Nothing is timed in these, so their processes run side by side.
TOGETHER = ("memory", "sanitize")


def grouped(parts: list[str]) -> list[list[str]]:
    """The parts in the order in which they run, with those that run side by side in one list."""
    groups: list[list[str]] = []
    for name in parts:
        if groups and name in TOGETHER and groups[-1][0] in TOGETHER:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def lower(lab: Lab, parts: list[str]) -> None:
    """Lowers every program for CUDA, without a GPU, and says which do not."""
    programs = [p for name in parts for step in PARTS[name](lab) for p in step.programs]
    for program in dict.fromkeys(programs):
        name = f"{program.shape.name}, {program.who}, {program.work}"
        try:
            with jax.enable_x64(program.exact):
                program.traced().lower(lowering_platforms=("cuda",))
            lab.say(f"lowered: {name}")
        except Exception as problem:  # all of them are tried
            lab.fail(name, problem)


def matmul_rate() -> float:
    """TFLOP/s of a large bf16 product, the ceiling of this card at this moment."""
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    calls = {"product": (lambda: product(a), jax.block_until_ready)}
    return 2 * 8192**3 / in_turns(calls)["product"] / 1e12


def main() -> None:
    """Runs the parts that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, by commas")
    parser.add_argument("--budget", type=float, default=86400.0, help="seconds")
    parser.add_argument("--join", type=Path, nargs="*", default=[], help="folders of earlier runs")
    parser.add_argument("--lower", action="store_true", help="only lower the programs")
    options = parser.parse_args()
    wanted = [name for name in options.parts.split(",") if name]
    if unknown := [name for name in wanted if name not in PARTS]:
        parser.error(f"--parts: wanted some of {', '.join(PARTS)}, got {', '.join(unknown)}")
    parts = [name for name in PARTS if name in wanted]
    rows = [row for folder in options.join for row in read_rows(folder / "table.json")]
    head = f"{jax.local_devices()[0].device_kind}, jax {jax.__version__}, B = 1, N = {HEADS}"
    lab = Lab(options.out, options.budget, head, rows)
    if options.lower:
        lower(lab, parts)
    else:
        if parts:
            lab.head += f", bf16 matmul {matmul_rate():.0f} TFLOP/s"
        lab.say(lab.head)
        for group in grouped(parts):
            try:
                steps = [step for name in group for step in PARTS[name](lab)]
                lab.part(", ".join(group), steps)
            except Exception as problem:  # the other parts go on, and the status says so
                lab.fail(", ".join(group), problem)
    lab.end()


if __name__ == "__main__":
    main()
