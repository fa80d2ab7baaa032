"""What `gpu.py` measures with: programs compiled side by side, a clock, and rows written at once.

A program is compiled once, in a pool of threads; nothing is timed while anything compiles, because
both the compiler and its autotuning would disturb it.
"""

import concurrent.futures
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_peers as peers
from benchmarks import gpu_table
from benchmarks.rows import exact_row, keys_of, relative

HEADS = 16


@dataclasses.dataclass(frozen=True)
class Shape:
    """One call: query, key and value [1, T, 16, H], on a list of (segment length, rate)."""

    name: str
    lists: peers.Lists
    T: int
    H: int
    causal: bool = False
    dtype: str = "bfloat16"

    @property
    def flops(self) -> float:
        """Forward FLOPs that the mathematics needs, all heads."""
        total = 0.0
        for w, r in self.lists:
            w = min(w, self.T)
            whole, rest = divmod(self.T, w)
            total += 4 * self.H * HEADS * (whole * w * w + rest * rest) / r**2
        return total / (2 if self.causal else 1)

    def inputs(self) -> list[jax.Array]:
        """query, key, value and a cotangent."""
        keys = jax.random.split(jax.random.key(self.T + self.H), 4)
        return [jax.random.normal(key, (1, self.T, HEADS, self.H), self.dtype) for key in keys]


@dataclasses.dataclass(frozen=True)
class Program:
    """One function to compile. work: "forward" gives out, "both" the gradients, "all" both."""

    shape: Shape
    who: str
    work: str

    def traced(self) -> Any:
        """The jitted function, traced for its shapes."""
        attend = peers.attention(self.who, self.shape)

        def forward(q: Any, k: Any, v: Any, _: Any) -> Any:
            return attend(q, k, v)

        def both(q: Any, k: Any, v: Any, do: Any) -> Any:
            out, pull = jax.vjp(attend, q, k, v)
            gradients = pull(do.astype(out.dtype))
            return gradients if self.work == "both" else (out, *gradients)

        x = jax.ShapeDtypeStruct((1, self.shape.T, HEADS, self.shape.H), self.shape.dtype)
        return jax.jit(forward if self.work == "forward" else both).trace(x, x, x, x)

    def compiled(self) -> Any:
        """The executable, for the device that is there."""
        # The setting belongs to a thread, so it is made here, where the pool runs this.
        with jax.enable_x64(self.exact):
            return self.traced().lower().compile()

    @property
    def exact(self) -> bool:
        """Whether it computes in float64."""
        return "float64" in self.who


def out_and_gradients(shape: Shape, who: str) -> tuple[Program, ...]:
    """The programs of what is compared: those that are timed, or one that runs in float64."""
    whole = Program(shape, who, "all")
    return (whole,) if whole.exact else tuple(Program(shape, who, w) for w in ("forward", "both"))


def results(executables: Iterable[Callable], arrays: Iterable[Any]) -> list[Any]:
    """out, dq, dk, dv from the executables of `out_and_gradients`."""
    return jax.tree.leaves([run(*arrays) for run in executables])


@dataclasses.dataclass(frozen=True)
class Rival:
    """What is timed and is no program of JAX.

    calls: () -> (run, wait) of "forward" and "both".
    """

    shape: Shape
    who: str
    calls: Callable[[], dict[str, tuple[Callable, Callable]]]


@dataclasses.dataclass(frozen=True)
class Step:
    """A measurement: what it needs compiled, and what to do with the executables, in order.

    alone: the step fails with any of its programs; if not, run gets the exceptions of those that
    failed in their places. rivals: what else it times.
    """

    name: str
    programs: tuple[Program, ...]
    run: Callable[..., None]
    alone: bool = True
    rivals: tuple[Rival, ...] = ()


class Lab:
    """The rows of a run, its clock, and its compiler."""

    def __init__(self, out: Path, budget: float, head: str, rows: Iterable[gpu_table.Row] = ()):
        self.out, self.budget, self.head = out, budget, head
        self.begun = time.monotonic()
        self.rows = list(rows)
        self.failed: list[str] = []
        self.left_out: list[str] = []
        self.pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
        self.programs: dict[Program, concurrent.futures.Future] = {}

    def say(self, text: str) -> None:
        """Prints a line with the seconds since the beginning."""
        print(f"[{time.monotonic() - self.begun:5.0f} s] {text}", flush=True)

    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.budget - (time.monotonic() - self.begun)

    def add(self, row: gpu_table.Row) -> None:
        """Prints a row and writes the tables with it."""
        self.rows.append(row)
        self.say(row.line())
        self.write()

    def write(self) -> None:
        """Writes the tables of all rows so far."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "table.md").write_text(gpu_table.markdown(self.rows, self.head, self.notes()))
        data = {"head": self.head, "notes": self.notes()}
        data["rows"] = [dataclasses.asdict(row) for row in self.rows]
        (self.out / "table.json").write_text(json.dumps(data, indent=1) + "\n")

    def notes(self) -> list[str]:
        """What is missing in the rows."""
        late = [f"left out, the budget is spent: {'; '.join(self.left_out)}"]
        return [f"failed: {name}" for name in self.failed] + (late if self.left_out else [])

    def fail(self, name: str, problem: BaseException | str) -> None:
        """Reports a failure; the run goes on and ends with a status that is not 0."""
        said = problem if isinstance(problem, str) else f"{type(problem).__name__}: {problem}"
        self.failed.append(f"{name}: {' '.join(said.split())[:300]}")
        self.say(f"FAILED {self.failed[-1]}")

    def compare(self, shape: Shape, who: str, peer: str, wrong: Iterable[float]) -> None:
        """Adds a row with the largest deviation from a peer, which fails from 0.05 on."""
        worst = float(np.max(list(wrong)))  # NaN if one of them is
        self.add(gpu_table.Row(shape.name, f"{who}, compared", error=worst, note=f"with {peer}"))
        if not worst < 0.05:
            self.fail(f"{shape.name}, {who}", f"differs from {peer} by {worst:.1e}")

    def part(self, name: str, steps: list[Step]) -> None:
        """Compiles what the steps need, all at once, then runs them one by one."""
        wanted = dict.fromkeys(p for step in steps for p in step.programs)
        new = [p for p in wanted if p not in self.programs] if self.left() > 0 else []
        for program in new:
            self.programs[program] = self.pool.submit(self.compiled, program)
        start = time.monotonic()
        futures = [self.programs[p] for p in new]
        concurrent.futures.wait(futures, max(0.0, self.left()))
        self.say(f"{name}: {len(new)} programs compiled in {time.monotonic() - start:.0f} s")
        for step in steps:
            if self.left() <= 0:
                self.left_out.append(step.name)
                continue
            try:
                step.run(*(self.result(p, step.alone) for p in step.programs))
            except Exception as problem:  # the other steps go on, and the status says so
                self.fail(step.name, problem)
        self.write()

    def result(self, program: Program, alone: bool) -> Any:
        """The executable of a program; if it has failed and is not alone, the exception."""
        try:
            return self.programs[program].result(max(0.0, self.left()))
        except Exception as problem:
            if alone:
                raise
            return problem

    def compiled(self, program: Program) -> Any:
        """The executable of a program."""
        start = time.monotonic()
        executable = program.compiled()
        self.say(
            f"{program.shape.name}, {program.who}, {program.work}: compiled in "
            f"{time.monotonic() - start:.0f} s, beside others"
        )
        return executable

    def end(self) -> None:
        """Writes everything and leaves, without waiting for programs that still compile."""
        self.write()
        gpu_table.plot(self.rows, self.out / "time.png")
        for note in self.notes():
            print(note)
        sys.stdout.flush()
        os._exit(1 if self.notes() else 0)


def record(row: gpu_table.Row, shape: Shape, work: str, seconds: float) -> None:
    """Fills in a time and its rate. work: "forward" or "both"."""
    factor = {"forward": 1.0, "both": 3.5}[work]
    setattr(row, work, seconds * 1e3)
    setattr(row, f"{work}_rate", factor * shape.flops / seconds / 1e12)


def record_memory(row: gpu_table.Row, work: str, executable: Any) -> None:
    """Fills in what an executable holds beside its inputs. work: "forward" or "both"."""
    stats = executable.memory_analysis()
    held = (stats.temp_size_in_bytes + stats.output_size_in_bytes) / 2**20
    setattr(row, {"forward": "memory_mib", "both": "both_memory_mib"}[work], held)


def deviation(found: Iterable[Any], exact: Iterable[Any]) -> list[float]:
    """Largest deviation of each array over the largest value of the exact one."""

    def one(a: Any, b: Any) -> Any:
        wrong = abs(a.astype(b.dtype) - b)
        # XLA's maximum may pass over a NaN, on a CPU even if there is nothing else.
        return jnp.where(jnp.isnan(wrong), jnp.inf, wrong).max() / abs(b).max()

    with jax.enable_x64(True):
        pairs = zip(found, exact, strict=True)
        return [float(jax.jit(one)(jnp.asarray(a), jnp.asarray(b))) for a, b in pairs]


def rows_deviation(
    shape: Shape, arrays: Iterable[jax.Array], out: jax.Array, dq: jax.Array, samples: int = 8
) -> list[float]:
    """Deviations of sampled rows of out and dq from float64 on the host, over their lengths.

    Only these rows and the keys that they see leave the device.
    """
    rng = np.random.default_rng(shape.T)
    at, heads = rng.integers(shape.T, size=samples), rng.integers(HEADS, size=samples)
    # Few rows are in the branches of high rates; the heads of these keep them at every rate.
    heads[::2] = at[::2] % HEADS
    branches = [(w, r, 0, peers.offsets(HEADS, r)) for w, r in shape.lists]
    seen = [keys_of(branches, *row, shape.T, shape.causal) for row in zip(at, heads, strict=True)]
    counts = [len(place) for place in seen]
    q, k, v, do = arrays
    queries = (np.asarray(x[0, at, heads]) for x in (q, do, out, dq))
    places = 0, np.concatenate(seen), np.repeat(heads, counts)
    keys = (np.split(np.asarray(x[places]), np.cumsum(counts)[:-1]) for x in (k, v))
    wrong = []
    for q, do, *found, k, v in zip(*queries, *keys, strict=True):
        exact = exact_row(q, do, k, v)
        wrong += [relative(a.astype(np.float64), b) for a, b in zip(found, exact, strict=True)]
    return wrong
