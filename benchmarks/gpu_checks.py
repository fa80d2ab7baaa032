"""What `gpu.py` finds out in processes of their own: memory, first calls, host time, races.

python benchmarks/gpu_checks.py memory|host|once SHAPE
"""

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
import subprocess
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

import dilax
from benchmarks.gpu_lab import HEADS, Lab, Program, Shape, Step
from benchmarks.gpu_table import OURS, Row

# Their launches share programs, where they are causal.
SMALL = (
    Shape("small ragged causal", ((128, 1), (260, 2), (640, 4)), 421, 64, True),
    Shape("small full", ((128, 1), (256, 2), (512, 4)), 512, 128),
)
MIB = 2**20


def start(task: str, shape: Shape, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """A process that does a task of this file."""
    said = json.dumps(dataclasses.asdict(shape))
    command = [*before, sys.executable, str(Path(__file__)), task, said]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # What runs before the process makes kernels slow: it shall not try out several.
    tries = {"XLA_FLAGS": "--xla_gpu_autotune_level=0"} if before else {}
    return subprocess.Popen(command, env=os.environ | tries, **pipe)


def finish(lab: Lab, process: subprocess.Popen) -> tuple[int, str]:
    """Status and output of a process, which ends when the budget does."""
    try:
        said, _ = process.communicate(timeout=max(1.0, lab.left()))
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        raise TimeoutError(f"did not end within the budget: {said[-200:]}") from None
    return process.returncode, said


def answer(lab: Lab, process: subprocess.Popen) -> dict[str, Any]:
    """What a process says in its last line."""
    status, said = finish(lab, process)
    if status:
        raise RuntimeError(f"status {status}: {said[-300:]}")
    return json.loads(said.strip().splitlines()[-1])


def shape_of(said: str) -> Shape:
    """A shape from its JSON."""
    fields = json.loads(said)
    return Shape(**fields | {"lists": tuple(map(tuple, fields["lists"]))})


def memory(lab: Lab, shapes: list[Shape]) -> list[Step]:
    """Peak device memory of forward, and with backward, beside the bounds."""
    begun = [start("memory", shape) for shape in shapes]

    def run(shape: Shape, process: subprocess.Popen) -> None:
        found, limits = answer(lab, process), bounds(shape)
        for work in ("forward", "both"):
            row = Row(f"{shape.name}, {work}", f"{OURS}, peak", memory_mib=found[work])
            row.bound_mib = limits[work]
            row.note = f"bound {limits[work]:.0f} MiB, compiler's count {found[work + '_plan']:.0f}"
            lab.add(row)

    return [
        Step(f"{shape.name}, memory", (), functools.partial(run, shape, process))
        for shape, process in zip(shapes, begun, strict=True)
    ]


def bounds(shape: Shape) -> dict[str, float]:
    """MiB: inputs, out, lse and 64; then also cotangent, gradients and a float32 copy of each."""
    elements = shape.T * HEADS * shape.H
    forward = 4 * 2 * elements + 4 * shape.T * HEADS + 64 * MIB
    return {"forward": forward / MIB, "both": (forward + (2 + 3 * 2 + 3 * 4) * elements) / MIB}


def _memory(shape: Shape) -> dict[str, float]:
    device, found = jax.local_devices()[0], {}
    size = (1, shape.T, HEADS, shape.H)
    rng = np.random.default_rng(0)

    def array() -> Any:  # from the host: making it on the device would leave a peak of its own
        return jax.device_put(np.asarray(rng.normal(size=size), jnp.dtype(shape.dtype)))

    arrays = [array() for _ in range(3)]
    for work in ("forward", "both"):
        executable = Program(shape, OURS, work).compiled()
        # The forward pass has no cotangent; its argument is one that is not used.
        given = [*arrays, arrays[0]] if work == "forward" else [*arrays, array()]
        jax.block_until_ready(executable(*given))
        found[work] = device.memory_stats()["peak_bytes_in_use"] / MIB
        plan = executable.memory_analysis()
        inputs = (3 if work == "forward" else 4) * arrays[0].nbytes
        used = inputs + plan.temp_size_in_bytes + plan.output_size_in_bytes
        found[f"{work}_plan"] = used / MIB
    return found


def host(lab: Lab, shapes: list[Shape]) -> list[Step]:
    """First calls with backward, and what a cached call costs the host; each process alone."""

    def run(shape: Shape) -> None:
        found = answer(lab, start("host", shape))
        row = Row(shape.name, f"{OURS}, first call", first_s=found["first"])
        row.host_us = found["jitted"] - found["trivial"]
        parts = ("trace", "lower", "compile", "run")
        row.note = "forward+backward: " + ", ".join(f"{x} {found[x]:.1f} s" for x in parts)
        row.note += f"; a cached small call {found['jitted']:.0f} us, of a trivial function"
        row.note += f" {found['trivial']:.0f} us, without jit {found['eager']:.0f} us"
        lab.add(row)

    return [Step(f"{shape.name}, host", (), functools.partial(run, shape)) for shape in shapes]


def _host(shape: Shape) -> dict[str, float]:
    arrays, found = shape.inputs(), {}
    jax.block_until_ready(arrays)
    times = [time.perf_counter()]
    program = Program(shape, OURS, "both").traced()
    times.append(time.perf_counter())
    lowered = program.lower()
    times.append(time.perf_counter())
    executable = lowered.compile()
    times.append(time.perf_counter())
    jax.block_until_ready(executable(*arrays))
    times.append(time.perf_counter())
    for name, a, b in zip(("trace", "lower", "compile", "run"), times, times[1:], strict=False):
        found[name] = b - a
    return found | {"first": times[-1] - times[0]} | cached_calls()


def cached_calls(T: int = 256, dtype: Any = jnp.bfloat16) -> dict[str, float]:
    """Microseconds of the host for a call: jitted, of a trivial function, without jit."""
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, T, 4, 64), dtype)

    def attend(q: Any, k: Any, v: Any) -> Any:
        return dilax.dilated_attention(q, k, v, (128, 256), (1, 2))

    def trivial(q: Any, k: Any, v: Any) -> Any:
        return q + k + v

    def microseconds(f: Callable, count: int) -> float:
        jax.block_until_ready(f(q, k, v))
        samples = []
        for _ in range(count):
            start = time.perf_counter()
            result = f(q, k, v)
            samples.append(time.perf_counter() - start)
            jax.block_until_ready(result)
        return sorted(samples)[count // 2] * 1e6

    found = {"jitted": microseconds(jax.jit(attend), 300)}
    found["trivial"] = microseconds(jax.jit(trivial), 300)
    return found | {"eager": microseconds(attend, 30)}


def sanitizer() -> str | None:
    """Where compute-sanitizer is, if it is there."""
    if found := shutil.which("compute-sanitizer"):
        return found
    places = [Path("/usr/local"), Path("/opt")]
    nvidia = importlib.util.find_spec("nvidia")
    places += [Path(p) for p in (nvidia.submodule_search_locations or ()) if nvidia]
    for place in places:
        for pattern in ("cuda*/bin", "cuda*/compute-sanitizer", "*/bin", "*/compute-sanitizer"):
            for path in place.glob(f"{pattern}/compute-sanitizer"):
                if path.is_file() and os.access(path, os.X_OK):
                    return str(path)
    return None


def sanitize(lab: Lab) -> list[Step]:
    """compute-sanitizer's memcheck and racecheck on small calls, forward and backward."""
    tool = sanitizer()
    if tool is None:
        lab.add(Row("small shapes", "compute-sanitizer", note="not there: not run"))
        return []
    begun = {}
    for check in ("memcheck", "racecheck"):
        for shape in SMALL:
            command = (tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "5")
            begun[check, shape] = start("once", shape, command)

    def run(check: str, shape: Shape, process: subprocess.Popen) -> None:
        status, said = finish(lab, process)
        lines = [
            line for line in said.splitlines() if "ERROR SUMMARY" in line or "RACECHECK" in line
        ]
        (lab.out / f"{check}_{shape.name.replace(' ', '_')}.txt").write_text(said)
        lab.add(Row(shape.name, check, note=" ".join(lines)[-120:] or f"status {status}"))
        if status or not lines or "ran" not in said:
            lab.fail(f"{shape.name}, {check}", f"status {status}: {said[-200:]}")

    return [
        Step(f"{shape.name}, {check}", (), functools.partial(run, check, shape, process))
        for (check, shape), process in begun.items()
    ]


def _once(shape: Shape) -> dict[str, Any]:
    gradients = Program(shape, OURS, "both").compiled()(*shape.inputs())
    return {"ran": all(bool(jnp.isfinite(x).all()) for x in gradients)}


def main() -> None:
    """Does one task and prints what it found as JSON, in the last line."""
    task, said = sys.argv[1:]
    print(json.dumps({"memory": _memory, "host": _host, "once": _once}[task](shape_of(said))))


if __name__ == "__main__":
    main()
