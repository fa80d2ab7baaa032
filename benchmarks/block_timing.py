"""Times the cases of `block_cases.py`: everybody in turns, results compared."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import block_peers as peers
from benchmarks.block_cases import Case, functions, inputs, traces
from benchmarks.block_peers import DENSE, FLEX, OURS
from benchmarks.turns import in_turns
from pallas_kernels import block_schedule


@dataclasses.dataclass
class Row:
    """One measurement: milliseconds, TFLOP/s on what is kept, relative error, MiB at the peak."""

    case: str
    who: str
    H: int
    kept: float
    forward: float | None = None
    both: float | None = None
    forward_rate: float | None = None
    both_rate: float | None = None
    error: float | None = None
    forward_memory: float | None = None
    both_memory: float | None = None
    forward_bound: float | None = None
    both_bound: float | None = None
    note: str = ""


def brief(problem: BaseException) -> str:
    """A problem in one line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"


class Compiled:
    """Compiles in threads; what a part needs is compiled before it is timed."""

    def __init__(self, threads: int = 14) -> None:
        self.pool = concurrent.futures.ThreadPoolExecutor(threads)
        self.found: dict[Any, Any] = {}

    def begin(self, key: Any, lower: Callable[[], tuple]) -> None:
        """Starts to compile what `lower` gives under a key."""
        try:
            self.found[key] = [self.pool.submit(x.compile) for x in lower()]
        except Exception as problem:  # a peer may lack a case: its row says so
            self.found[key] = problem

    def begin_case(self, c: Case) -> None:
        """Starts to compile everything of a case."""
        for who, f in functions(c).items():
            self.begin((c, who), lambda f=f: tuple(x.lower() for x in traces(f, c)))

    def get(self, key: Any) -> tuple[Any, ...]:
        """The compiled functions, or the problem raised."""
        found = self.found.pop(key)
        if isinstance(found, Exception):
            raise found
        return tuple(x.result() for x in found)

    def wait(self) -> None:
        """Until nothing compiles any more: it would disturb what is timed."""
        futures = [x for found in self.found.values() if isinstance(found, list) for x in found]
        concurrent.futures.wait(futures)


class Flex:
    """FlexAttention, compiled once for each shape."""

    def __init__(self) -> None:
        import torch
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.config.cache_size_limit = 64
        self.torch = torch
        self.attend = torch.compile(flex_attention, dynamic=False)

    def runs(self, c: Case, arrays: list[jax.Array]) -> tuple[Callable, Callable]:
        """Forward, and forward with backward, on the same numbers."""
        torch = self.torch
        tensors = [torch.from_dlpack(x).transpose(1, 2).contiguous() for x in arrays]
        q, k, v = (x.requires_grad_() for x in tensors[:3])
        mask = peers.flex_mask(torch, c.pattern, c.T, c.width)

        def forward() -> Any:
            with torch.no_grad():
                return self.attend(q, k, v, block_mask=mask)

        def both() -> Any:
            out = self.attend(q, k, v, block_mask=mask)
            return torch.autograd.grad(out, (q, k, v), tensors[3])

        return forward, both

    def wait(self, _: Any) -> None:
        """Until the GPU is idle."""
        self.torch.cuda.synchronize()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Norm of the difference over the norm of b."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def peak_mib(compiled: Any) -> float:
    """What a compiled function holds at most: arguments, results, what lies between."""
    stats = compiled.memory_analysis()
    taken = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return (taken - stats.alias_size_in_bytes) / 2**20


def _ready(c: Case, who: str, compiled: Compiled, row: Row, arrays: Any, flex: Any) -> Any:
    """(forward, both) as (run, wait) each, and the results of the first head."""
    if who == FLEX:
        if flex is None:
            raise ImportError("no torch")
        f, g = flex.runs(c, arrays)
        results = [x[:, 0].float().cpu().numpy() for x in (f(), *g())]
        return (f, flex.wait), (g, flex.wait), results
    f, g = compiled.get((c, who))
    row.forward_memory, row.both_memory = peak_mib(f), peak_mib(g)
    results = (f(*arrays[:3]), *g(*arrays))
    results = [np.asarray(x[:, :, 0], np.float32) for x in results]
    forward = (functools.partial(f, *arrays[:3]), jax.block_until_ready)
    return forward, (functools.partial(g, *arrays), jax.block_until_ready), results


def measure(c: Case, compiled: Compiled, flex: Flex | None, add: Callable[[Row], None]) -> None:
    """Times one case, everybody in turns, and compares results."""
    arrays = inputs(c)
    rows = {who: Row(c.name, who, c.H, c.kept) for who in c.who}
    forward, both, results = {}, {}, {}
    for who, row in rows.items():
        if who == OURS:
            row.forward_bound, row.both_bound = c.bounds()
        try:
            ready = _ready(c, who, compiled, row, arrays, flex)
            forward[who], both[who], results[who] = ready
        except Exception as problem:  # a peer may lack a case: its row says so
            row.note = brief(problem)
    flops = 4 * c.H * c.heads * c.pairs
    for kind, factor, runs in (("forward", 1.0, forward), ("both", 3.5, both)):
        for who, seconds in in_turns(runs).items():
            useful = flops / c.kept if who == DENSE else flops
            setattr(rows[who], kind, seconds * 1e3)
            setattr(rows[who], f"{kind}_rate", factor * useful / seconds / 1e12)
    _compare(rows, results)
    for row in rows.values():
        add(row)


def _compare(rows: dict[str, Row], results: dict[str, list[np.ndarray]]) -> None:
    """Errors against a peer; of visiting orders, whether their bits are the same."""
    orders = [who for who in results if who in block_schedule.ORDERS]
    for who in orders:
        pairs = zip(results[who], results[orders[0]], strict=True)
        same = all(np.array_equal(a, b) for a, b in pairs)
        rows[who].note = "same bits" if same else "BITS DIFFER"
    others = [who for who in results if who not in (OURS, DENSE, *orders)]
    if OURS in results and others:
        pairs = zip(results[OURS], results[others[0]], strict=True)
        rows[OURS].error = max(relative(a, b) for a, b in pairs)
