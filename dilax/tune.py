"""Tile sizes of the Pallas kernels, searched on the GPU at hand."""

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from dilax import xla_attention
from dilax._types import UnsupportedError, refuse, shown
from dilax.bench import median
from dilax.select import sibling, unsupported
from dilax.spec import DilatedSpec, branches_of, within

ERROR = 2.0  # times what the XLA path errs in the same dtype
# What ptxas calls them.
FUNCTIONS = {
    "forward": "dilated_forward",
    "fused": "dilated_gradients",
    "queries": "dilated_queries_gradient",
    "keys": "dilated_keys_gradient",
}
KERNELS = tuple(FUNCTIONS)


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """What to tune for.

    Args:
        length: Sequence length T.
        segment_lengths: Segment length W of each branch, in tokens.
        dilation_rates: Dilation rate R of each branch.
        num_heads: N, of queries, keys and values.
        head_dim: H.
        dtype: bfloat16 or float16.
        causal: A query sees no key after it.
        kernels: Which of forward, fused (backward), queries and keys (deterministic backward).
        spill_bytes: Candidates that spill more registers than this, and more than today's tiles,
            are left out.
        repeats: Timed calls per candidate; their median counts.

    Raises:
        ValueError: an argument is wrong.

    Example:
        >>> TuneConfig(length=512).kernels
        ('forward', 'fused', 'queries', 'keys')
    """

    length: int = 32768
    segment_lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: tuple[int, ...] = (1, 2, 4, 8, 16)
    num_heads: int = 16
    head_dim: int = 128
    dtype: str = "bfloat16"
    causal: bool = False
    kernels: tuple[str, ...] = KERNELS
    spill_bytes: int = 64
    repeats: int = 9

    def __post_init__(self):
        DilatedSpec(self.segment_lengths, self.dilation_rates)
        for name in ("length", "num_heads", "head_dim", "repeats"):
            if getattr(self, name) < 1:
                raise refuse(name, "a positive int", getattr(self, name))
        if self.dtype not in ("bfloat16", "float16"):
            raise refuse("dtype", "bfloat16 or float16", self.dtype)
        if not self.kernels or not set(self.kernels) <= set(KERNELS):
            raise refuse("kernels", f"some of {', '.join(KERNELS)}", self.kernels)
        if self.spill_bytes < 0:
            raise refuse("spill_bytes", "0 or more", self.spill_bytes)


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate: its time, or the reason why it is out.

    Example:
        >>> Trial("forward", None, False, 0.001, 0, 1.5, None).reason is None
        True
    """

    kernel: str
    tiles: Any  # pallas_kernels.config.Blocks
    chosen: bool  # what a call would run today
    seconds: float | None
    spilled: int | None  # bytes; None: not known
    error: float | None  # times the XLA path's
    reason: str | None

    HEADER: ClassVar[str] = f"{'kernel':<9}{'tiles':<44}{'ms':>9}{'spilled':>9}{'/ XLA error':>12}"

    def line(self) -> str:
        """The trial as a row under HEADER."""
        milliseconds = None if self.seconds is None else self.seconds * 1e3
        numbers = ((milliseconds, "9.3f", 9), (self.spilled, "9d", 9), (self.error, "12.2f", 12))
        line = f"{self.kernel:<9}{self.sizes():<44}"
        line += "".join(" " * width if x is None else format(x, form) for x, form, width in numbers)
        return f"{line}  {self.reason or ('runs today' if self.chosen else '')}".rstrip()

    def sizes(self) -> str:
        """The tile sizes in words."""
        fields = dataclasses.asdict(self.tiles).items()
        return ", ".join(f"{name} {x}" for name, x in fields if x)


@dataclasses.dataclass(frozen=True)
class Jobs:
    """What a search does with a candidate; the three functions take what `compile` returns.

    compile: kernel and tiles -> a program. spilled: -> bytes, or None. error: -> times the XLA
    path's. seconds: -> of one call.
    """

    compile: Callable[[str, Any], Any]
    spilled: Callable[[Any], int | None]
    error: Callable[[Any], float]
    seconds: Callable[[Any], float]


def search(
    kernel: str, candidates: Sequence[Any], chosen: Any, jobs: Jobs, spill_bytes: int
) -> Iterator[Trial]:
    """A trial per candidate, as each one is done.

    Example:
        >>> jobs = Jobs(lambda kernel, tiles: tiles, lambda p: 0, lambda p: 1.0, lambda p: 1 / p)
        >>> best(list(search("forward", [1, 4, 2], 1, jobs, 0))).tiles
        4
    """
    for tiles in candidates:
        spilled = error = seconds = reason = None
        try:
            program = jobs.compile(kernel, tiles)
            spilled = jobs.spilled(program)
            if tiles == chosen:
                spill_bytes = max(spill_bytes, spilled or 0)
            if spilled is not None and spilled > spill_bytes:
                reason = f"spills {spilled} bytes"
            else:
                error = jobs.error(program)
                if error <= ERROR:
                    seconds = jobs.seconds(program)
                else:  # also if it is not a number
                    reason = f"wrong: errs {error:.3g} times as much as the XLA path"
        except Exception as problem:  # a candidate that fails is out, whatever the cause
            reason = f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}"
        yield Trial(kernel, tiles, tiles == chosen, seconds, spilled, error, reason)


def best(trials: Sequence[Trial]) -> Trial | None:
    """The fastest of those that are right.

    Example:
        >>> best([]) is None
        True
    """
    timed = [trial for trial in trials if trial.seconds is not None]
    return min(timed, key=lambda trial: trial.seconds or 0.0, default=None)


def verdict(kernel: str, trials: Sequence[Trial]) -> str:
    """What the trials of a kernel say, in a line.

    Example:
        >>> verdict("fused", [])
        'fused: nothing to choose from'
    """
    mine = [trial for trial in trials if trial.kernel == kernel]
    found, today = best(mine), next((t for t in mine if t.chosen), None)
    if found is None:
        return f"{kernel}: nothing to choose from"
    if found.chosen:
        return f"{kernel}: what runs today is the fastest"
    ratio = ""
    if today is not None and today.seconds and found.seconds:
        ratio = f", {today.seconds / found.seconds:.3f} times as fast as what runs today"
    return f"{kernel}: {found.sizes()}{ratio}"


def tune(config: TuneConfig) -> Iterator[Trial]:
    """Searches the tile sizes of each kernel, the others being what a call would run.

    Raises:
        UnsupportedError: this machine or the kernels cannot run the call, with reasons.

    Example:
        >>> list(tune(TuneConfig(length=256)))
        Traceback (most recent call last):
        ...
        dilax._types.UnsupportedError: no implementation takes query bfloat16[1,256,16,128]: ...
    """
    shape = (1, config.length, config.num_heads, config.head_dim)
    x = jax.ShapeDtypeStruct(shape, config.dtype)
    spec = DilatedSpec(config.segment_lengths, config.dilation_rates)
    branches = branches_of(spec, config.num_heads, "lse", "interleaved")
    branches = tuple(within(branch, config.length) for branch in branches)
    reasons = unsupported("pallas", x, x, x, branches=branches, is_causal=config.causal)
    if reasons:
        raise UnsupportedError(f"query {shown(x)}", {"pallas": reasons})
    settings: Any = sibling("pallas_kernels.config")
    support: Any = sibling("pallas_kernels.support")
    head_dim = support.tile_columns(config.head_dim, interpret=False)
    rows = zip(config.segment_lengths, config.dilation_rates, strict=True)
    length = min(min(w, config.length) // r for w, r in rows)
    chosen = {
        "forward": settings.forward_blocks(head_dim, 2, length, causal=config.causal, marks=0),
        "fused": settings.fused_blocks(head_dim),
        "queries": settings.queries_blocks(head_dim, 0),
        "keys": settings.keys_blocks(head_dim, 0),
    }
    jobs = _jobs(config, branches)
    for kernel in config.kernels:
        if chosen[kernel] is None:  # the kernel does not take this head size
            continue
        # The one of today first: it must be in the table, right or wrong.
        tiles = dict.fromkeys([chosen[kernel], *settings.candidates(kernel, head_dim)])
        yield from search(kernel, list(tiles), chosen[kernel], jobs, config.spill_bytes)


@dataclasses.dataclass(frozen=True)
class _Program:
    run: Any
    spilled: int | None
    backward: bool


def _jobs(config: TuneConfig, branches: Any) -> Jobs:
    """The jobs on this machine's GPU."""
    flash: Any = sibling("pallas_kernels.flash")
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (1, config.length, config.num_heads, config.head_dim)
    arrays = [jax.random.normal(key, shape, config.dtype) for key in keys]

    def job(attend: Callable, backward: bool, dtype: str) -> Callable:
        def run(q, k, v, do):
            q, k, v, do = (x.astype(dtype) for x in (q, k, v, do))
            if not backward:
                return (attend(q, k, v).astype(dtype),)
            _, pull = jax.vjp(lambda *x: attend(*x).astype(dtype), q, k, v)
            return pull(do)

        return run

    def compile(kernel: str, tiles: Any) -> _Program:
        options = {"deterministic": kernel != "fused", "tiles": {kernel: tiles}}

        def attend(q, k, v):
            given = {"branches": branches, "is_causal": config.causal, **options}
            return flash.attend(q, k, v, **given)[0]

        backward = kernel != "forward"
        traced = jax.jit(job(attend, backward, config.dtype)).trace(*arrays)
        with assembler_output() as said:
            run = traced.lower().compile()
        return _Program(run, spilled_bytes(said(), FUNCTIONS[kernel]), backward)

    def xla(backward: bool, dtype: str) -> Any:
        def attend(q, k, v):
            return xla_attention.attend(q, k, v, branches=branches, is_causal=config.causal).out

        return jax.jit(job(attend, backward, dtype))(*arrays)

    references: dict[bool, Any] = {}

    def error(program: _Program) -> float:
        if program.backward not in references:
            exact = xla(program.backward, "float32")
            usual = deviations(xla(program.backward, config.dtype), exact)
            least = float(jnp.finfo(config.dtype).eps) / 4  # half a unit in the last place
            references[program.backward] = exact, [max(e, least) for e in usual]
        exact, usual = references[program.backward]
        found = deviations(program.run(*arrays), exact)
        return max(a / b for a, b in zip(found, usual, strict=True))

    def seconds(program: _Program) -> float:
        return median(lambda: program.run(*arrays), config.repeats)

    return Jobs(compile, lambda program: program.spilled, error, seconds)


def deviations(found: Sequence[Any], exact: Sequence[Any]) -> list[float]:
    """Largest deviation of each array over the largest value of the exact one.

    Example:
        >>> import jax.numpy as jnp
        >>> deviations([jnp.ones(2)], [jnp.array([1.0, 2.0])])
        [0.5]
    """
    pairs = zip(found, exact, strict=True)
    return [float(abs(a.astype(b.dtype) - b).max() / abs(b).max()) for a, b in pairs]


@contextlib.contextmanager
def assembler_output() -> Iterator[Callable[[], str]]:
    """Catches what ptxas says of the kernels compiled inside; a function gives it afterwards.

    It is printed by the compiler's own code, so both streams of the process are caught.
    """
    name = "MOSAIC_GPU_DUMP_PTXAS"
    before, text = os.environ.get(name), []
    sys.stdout.flush()
    with tempfile.TemporaryFile() as file:
        saved = os.dup(1), os.dup(2)
        os.environ[name] = "1"
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield lambda: "".join(text)
        finally:
            for stream, number in zip(saved, (1, 2), strict=True):
                os.dup2(stream, number)
                os.close(stream)
            if before is None:
                del os.environ[name]
            file.seek(0)
            text.append(file.read().decode(errors="replace"))


def spilled_bytes(said: str, function: str) -> int | None:
    """The most that kernels of a name store, or None if ptxas said nothing of them.

    Example:
        >>> said = "properties for f_mosaic_gpu_kernel  16 bytes stack frame, 12 bytes spill stores"
        >>> spilled_bytes(said, "f"), spilled_bytes(said, "g")
        (12, None)
    """
    line = (
        rf"properties for {function}_mosaic_gpu_kernel\s+\d+ bytes stack frame, (\d+) bytes spill"
    )
    return max((int(number) for number in re.findall(line, said)), default=None)
