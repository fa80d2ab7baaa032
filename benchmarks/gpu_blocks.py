"""Block-sparse kernels on one Hopper GPU: checked, then timed in turns with their peers.

    python benchmarks/gpu_blocks.py --out results [--quick] [--only WORD] [--budget SECONDS]

Checks compare with a float64 softmax; timings take turns with dense cuDNN, FlexAttention (torch)
and FlashAttention-3 where installed, and compare results with a peer's. Writes blocks.md,
blocks.json and blocks.png after each part. --quick: the checks and the bars of the project's issue.
--smoke: the checks' smallest case and no timing, also under the interpreter on a CPU.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import gc
import importlib.util
import json
import math
import os
import statistics
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
import numpy as np

from benchmarks import block_peers as peers
from pallas_kernels import block_schedule, blocks

HEADS = 16
DENSE = "cuDNN dense"
FLEX = "FlexAttention"
OURS = "dilax"


def _dropout() -> Any:
    """`dilax.dropout` without the rest of the package, which needs flax."""
    path = Path(__file__).resolve().parent.parent / "dilax" / "dropout.py"
    spec: Any = importlib.util.spec_from_file_location("dropout", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DROPOUT = _dropout()


# ---- checks -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Check:
    """A small case: sizes, pattern, options."""

    name: str
    pattern: peers.Pattern
    T: int
    S: int
    H: int
    N: int = 2
    K: int = 2
    B: int = 1
    ids: bool = False
    rate: float = 0.0
    starts: tuple[int, int] = (0, 0)
    carry: bool = False
    traced: bool = False
    split: int | None = None


def checks(smoke: bool) -> list[Check]:
    """The cases; with smoke only tiny ones."""
    if smoke:
        return [
            Check("window", peers.window(256, 100), 256, 256, 16, 1, 1),
            Check("split", peers.global_local(3, 1, 0), 384, 384, 16, 1, 1, traced=True, split=1),
        ]
    random, window, far = peers.random_blocks, peers.window, peers.global_local(64, 1, 1)
    halves, coarse = window(1100, 300, 64), random(4, 0.5, True, block_size=256)
    return [
        Check("random 128", random(16, 0.3), 2048, 2048, 128, 16, 16),
        Check("random 64 per head gqa", random(12, 0.4, True, 8), 1500, 1500, 64, 8, 2),
        Check("window 128", window(2048, 300), 2048, 2048, 128, 8, 4),
        Check("global rows", far, 8192, 8192, 128, 1, 1),
        Check("global rows traced", far, 8192, 8192, 64, 1, 1, traced=True, split=8),
        Check("block 64 window", halves, 1100, 1100, 64),
        Check("block 64 random", random(9, 0.4, block_size=64), 530, 530, 128),
        Check("block 256 traced", coarse, 1000, 1000, 96, 2, 2, 2, traced=True),
        Check("ids ragged", random(6, 0.6), 700, 768, 128, ids=True),
        Check("dropout", random(6, 0.6, True), 700, 700, 64, 4, 2, rate=0.2),
        Check("carry starts", random(5, 0.6, True), 600, 640, 64, starts=(200, 130), carry=True),
        Check("head 192", random(5, 0.6), 600, 600, 192),
        Check("head 16", window(700, 200), 700, 700, 16),
    ]


def oracle(c: Check, arrays: dict[str, np.ndarray], ids: Any, seed: Any) -> dict[str, np.ndarray]:
    """out, lse and gradients by a dense masked softmax in float64."""
    q, k, v, do, dlse = (arrays[x].swapaxes(1, 2) for x in ("q", "k", "v", "do", "dlse"))
    group = c.N // c.K
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    seen = np.broadcast_to(c.pattern.visible(c.N, c.T, c.S, c.starts), (c.B, c.N, c.T, c.S))
    if ids is not None:
        same = (ids[0][:, :, None] == ids[1][:, None]) & (ids[0] != 0)[:, :, None]
        seen = seen & same[:, None]
    scale = 1 / math.sqrt(c.H)
    logits = np.where(seen, q @ k.swapaxes(2, 3) * scale, -np.inf)
    if c.carry:
        old_lse = arrays["old_lse"].swapaxes(1, 2)
        logits = np.concatenate([logits, old_lse[..., None]], -1)
    top = logits.max(-1, keepdims=True)
    weights = np.exp(logits - np.where(top > -np.inf, top, 0.0))
    mass = weights.sum(-1, keepdims=True)
    p = weights / np.where(mass > 0, mass, 1.0)
    with np.errstate(divide="ignore"):
        lse = np.where(mass > 0, np.log(mass) + top, -np.inf)[..., 0]
    old = 0.0
    if c.carry:
        old, p = p[..., -1:] * arrays["old_out"].swapaxes(1, 2), p[..., :-1]
    drop: Any = 1.0
    if c.rate:
        example, head, row = np.ogrid[: c.B, : c.N, : c.T]
        rows = DROPOUT.row_bits(seed, example, head, row + c.starts[0])
        columns = DROPOUT.column_bits(seed, np.arange(c.S) + c.starts[1], 0)
        drop = np.asarray(DROPOUT.keep(rows, columns, c.rate)) / (1 - c.rate)
    out = (p * drop) @ v + old
    dp = (do @ v.swapaxes(2, 3)) * drop
    delta = (do * out).sum(-1) - np.where(lse > -np.inf, dlse, 0.0)
    ds = p * (dp - delta[..., None])
    dk, dv = ds.swapaxes(2, 3) @ q * scale, (p * drop).swapaxes(2, 3) @ do
    dk, dv = (x.reshape(c.B, c.K, group, c.S, c.H).sum(2) for x in (dk, dv))
    found = {"out": out, "lse": lse, "dq": ds @ k * scale, "dk": dk, "dv": dv}
    return {name: x.swapaxes(1, 2) for name, x in found.items()}


def prepare_check(c: Check) -> tuple[Any, tuple, Callable]:
    """A lowered call, its arguments, and a function for the exact results."""
    rng = np.random.default_rng(7)

    def draw(*shape: int) -> np.ndarray:
        return np.asarray(jnp.asarray(rng.normal(size=shape), jnp.bfloat16), np.float64)

    a = {"q": draw(c.B, c.T, c.N, c.H), "k": draw(c.B, c.S, c.K, c.H)}
    a |= {"v": draw(*a["k"].shape), "do": draw(*a["q"].shape), "dlse": draw(c.B, c.T, c.N)}
    a |= {"old_out": draw(*a["q"].shape), "old_lse": draw(c.B, c.T, c.N) + 4}
    a["old_lse"][:, ::3] = -np.inf
    options: dict[str, Any] = {"is_causal": c.pattern.is_causal}
    ids, seed = None, jnp.asarray([11, 22], jnp.uint32)
    if c.ids:
        ids = tuple(np.sort(rng.integers(0, 4, (c.B, n)), axis=1) for n in (c.T, c.S))
        options |= {"q_segment_ids": jnp.asarray(ids[0], jnp.int32)}
        options |= {"kv_segment_ids": jnp.asarray(ids[1], jnp.int32)}
    if c.rate:
        options |= {"dropout_rate": c.rate, "dropout_seed": seed, "keep": DROPOUT}
    if c.carry:
        options["carry"] = tuple(jnp.asarray(a[x], jnp.float32) for x in ("old_out", "old_lse"))
    lists = (c.pattern.columns, c.pattern.counts, c.pattern.band_index)

    def run(q: Any, k: Any, v: Any, lists: Any, starts: Any) -> dict[str, Any]:
        names = ("columns", "counts", "band_index")
        pattern = dataclasses.replace(c.pattern, **dict(zip(names, lists, strict=True)))
        pattern = pattern if c.traced else c.pattern
        (out, lse), pull = jax.vjp(
            lambda *x: blocks.attend(
                *x, blocks=pattern, q_start=starts[0], k_start=starts[1], **options
            ),
            q,
            k,
            v,
        )
        d_lse = jnp.where(lse > -jnp.inf, jnp.asarray(a["dlse"], jnp.float32), 0.0)
        dq, dk, dv = pull((jnp.asarray(a["do"], out.dtype), d_lse))
        return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}

    before = block_schedule.SHORTEST_TRACED_SPLIT
    block_schedule.SHORTEST_TRACED_SPLIT = c.split or before
    arrays = [jnp.asarray(a[x], jnp.bfloat16) for x in "qkv"]
    arguments = (*arrays, lists, tuple(map(jnp.int32, c.starts)))
    try:
        lowered = jax.jit(run).lower(*arguments)
    finally:
        block_schedule.SHORTEST_TRACED_SPLIT = before
    return lowered, arguments, functools.partial(oracle, c, a, ids, seed)


def run_check(compiled: Any, arguments: tuple, exact: Callable, repeats: int) -> dict[str, float]:
    """Largest error of each result over its largest value; raises where bits move."""
    first = jax.tree.map(np.asarray, compiled(*arguments))
    for _ in range(repeats):
        # NaN in the memory that comes next: what a kernel forgets to write would show.
        jnp.full((1 << 24,), jnp.nan, jnp.float32).block_until_ready()
        for name, x in compiled(*arguments).items():
            if not np.array_equal(first[name], np.asarray(x), equal_nan=True):
                raise AssertionError(f"{name} differs from run to run")
    return {name: largest(first[name], x) for name, x in exact().items()}


def largest(actual: Any, exact: np.ndarray) -> float:
    """Largest deviation over the largest value; infinite where a NaN is or infinities differ."""
    actual = np.asarray(actual, np.float64)
    finite = np.isfinite(exact)
    if not np.array_equal(np.isfinite(actual), finite) or np.isnan(actual).any():
        return float("inf")
    size = np.abs(exact[finite]).max(initial=0.0) or 1.0
    return float(np.abs(actual[finite] - exact[finite]).max(initial=0.0) / size)


# ---- timings ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One measurement: milliseconds, TFLOP/s on what is kept, relative error against a peer."""

    case: str
    who: str
    H: int
    kept: float
    forward: float | None = None
    both: float | None = None
    forward_rate: float | None = None
    both_rate: float | None = None
    error: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A pattern, its useful pairs of tokens a head, and who is timed on it."""

    name: str
    pattern: peers.Pattern
    T: int
    H: int
    pairs: float
    heads: int = HEADS
    width: int | None = None
    who: tuple[str, ...] = (OURS, FLEX)

    @property
    def kept(self) -> float:
        """Share of all pairs that is kept."""
        return self.pairs / self.T**2


def cases(quick: bool) -> list[Case]:
    """What is timed, the bars first."""
    found = []
    T, long, width = 32768, 131072, 4096

    def blocks_of(name: str, pattern: Any, T: int, H: int, **options: Any) -> Case:
        return Case(name, pattern, T, H, float(pattern.counts.sum()) * 128**2, **options)

    fractions = (0.1, 0.05) if quick else (0.1, 0.05, 0.02, 0.01, 0.25, 0.5, 1.0)
    for H in (128, 64):
        for fraction in fractions:
            pattern = peers.random_blocks(T // 128, fraction)
            who = (OURS, FLEX, DENSE) if fraction == fractions[0] else (OURS, FLEX)
            found.append(blocks_of(f"random {fraction:.0%}", pattern, T, H, who=who))
        pairs = float(long * width - width * (width - 1) / 2)
        who = (OURS, FLEX, "cuDNN window", "FlashAttention-3")
        name, pattern = f"causal window {width} T={long}", peers.window(long, width)
        found.append(Case(name, pattern, long, H, pairs, width=width, who=who))
        pattern = peers.global_local(T // 128, 1, 6)
        found.append(blocks_of("global_local 4 heads", pattern, T, H, heads=4))
    if not quick:
        pattern = peers.random_blocks(long // 128, 0.01)
        found.append(blocks_of(f"random 1% T={long}", pattern, long, 128, who=(OURS, FLEX)))
        pattern = peers.random_blocks(T // 128, 0.1, True)
        found.append(blocks_of("causal random 10%", pattern, T, 128))
        pattern = peers.random_blocks(T // 64, 0.1, block_size=64)
        pairs = float(pattern.counts.sum()) * 64**2
        found.append(Case("random 10% block 64", pattern, T, 128, pairs, who=(OURS,)))
        pattern = peers.random_blocks(T // 128, 0.1, heads=HEADS)
        pairs = float(pattern.counts.sum()) * 128**2 / HEADS
        found.append(Case("random 10% per head", pattern, T, 128, pairs))
    return found


def inputs(c: Case) -> list[jax.Array]:
    """query, key, value and a cotangent."""
    keys = jax.random.split(jax.random.key(c.T + c.H), 4)
    return [jax.random.normal(key, (1, c.T, c.heads, c.H), jnp.bfloat16) for key in keys]


def jax_runs(f: Callable, c: Case) -> tuple[Any, Any]:
    """Lowered forward, and forward with backward."""
    x = jax.ShapeDtypeStruct((1, c.T, c.heads, c.H), jnp.bfloat16)
    forward = jax.jit(f).lower(x, x, x)
    return forward, jax.jit(lambda q, k, v, do: jax.vjp(f, q, k, v)[1](do)).lower(x, x, x, x)


def functions(c: Case) -> dict[str, Callable]:
    """The JAX functions of a case."""
    every = {
        OURS: peers.ours(c.pattern),
        DENSE: peers.cudnn(),
        "cuDNN window": peers.cudnn(c.width),
        "FlashAttention-3": peers.flash3(c.width or 0),
    }
    return {who: every[who] for who in c.who if who in every}


class Compiled:
    """Compiles in threads; everything is compiled before anything is timed."""

    def __init__(self) -> None:
        self.pool = concurrent.futures.ThreadPoolExecutor(12)
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
            self.begin((c, who), functools.partial(jax_runs, f, c))

    def get(self, key: Any) -> tuple[Any, ...]:
        """The compiled functions, or the problem raised."""
        found = self.found.pop(key)
        if isinstance(found, Exception):
            raise found
        return tuple(x.result() for x in found)

    def wait(self) -> None:
        """Until nothing compiles any more."""
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


def in_turns(runs: dict[str, tuple[Callable, Callable]], least: float = 0.02) -> dict[str, float]:
    """Median seconds of each of (run, wait), batches of one after those of another."""
    counts, samples = {}, {name: [] for name in runs}
    for name, (run, wait) in runs.items():
        wait(run())
        start = time.perf_counter()
        wait(run())
        counts[name] = max(1, min(100, int(least / max(time.perf_counter() - start, 1e-5))))
    for _ in range(5):
        for name, (run, wait) in runs.items():
            start = time.perf_counter()
            for _ in range(counts[name]):
                result = run()
            wait(result)
            samples[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(x) for name, x in samples.items()}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """Norm of the difference over the norm of b."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def measure(c: Case, compiled: Compiled, flex: Flex | None, add: Callable[[Row], None]) -> None:
    """Times one case, everybody in turns, and compares results."""
    arrays = inputs(c)
    rows = {who: Row(c.name, who, c.H, c.kept) for who in c.who}
    forward, both, outputs = {}, {}, {}

    def torch_wait(_: Any) -> None:
        flex.torch.cuda.synchronize()

    for who in c.who:
        try:
            if who == FLEX:
                if flex is None:
                    raise ImportError("no torch")
                f, g = flex.runs(c, arrays)
                outputs[who] = [x[:, 0].float().cpu().numpy() for x in (f(), *g())]
                forward[who], both[who] = (f, torch_wait), (g, torch_wait)
                continue
            f, g = compiled.get((c, who))
            results = (f(*arrays[:3]), *g(*arrays))
            outputs[who] = [np.asarray(x[:, :, 0], np.float32) for x in results]
            forward[who] = (functools.partial(f, *arrays[:3]), jax.block_until_ready)
            both[who] = (functools.partial(g, *arrays), jax.block_until_ready)
        except Exception as problem:  # a peer may lack a case: its row says so
            rows[who].note = brief(problem)
            forward.pop(who, None)
    flops = 4 * c.H * c.heads * c.pairs
    for kind, factor, found in (("forward", 1.0, in_turns(forward)), ("both", 3.5, in_turns(both))):
        for who, seconds in found.items():
            useful = flops / c.kept if who == DENSE else flops
            setattr(rows[who], kind, seconds * 1e3)
            setattr(rows[who], f"{kind}_rate", factor * useful / seconds / 1e12)
    others = [who for who in outputs if who not in (OURS, DENSE)]
    if OURS in outputs and others:
        pairs = zip(outputs[OURS], outputs[others[0]], strict=True)
        rows[OURS].error = max(relative(a, b) for a, b in pairs)
    for row in rows.values():
        add(row)


def orders(add: Callable[[Row], None]) -> None:
    """The three visiting orders, in turns, with equal bits."""
    T, H = 32768, 128
    for name, pattern in (
        ("random 10%", peers.random_blocks(T // 128, 0.1)),
        ("causal random 10%", peers.random_blocks(T // 128, 0.1, True)),
    ):
        pairs = float(pattern.counts.sum()) * 128**2
        c = Case(f"order, {name}", pattern, T, H, pairs)
        q, k, v, _ = inputs(c)
        runs, outputs = {}, {}
        for order in block_schedule.ORDERS:
            f = jax.jit(peers.ours(pattern, order))
            outputs[order] = np.asarray(f(q, k, v))
            runs[order] = (functools.partial(f, q, k, v), jax.block_until_ready)
        first = next(iter(outputs.values()))
        same = all(np.array_equal(first, x) for x in outputs.values())
        for order, seconds in in_turns(runs).items():
            rate = 4 * H * HEADS * pairs / seconds / 1e12
            note = "same bits" if same else "BITS DIFFER"
            add(Row(c.name, order, H, c.kept, seconds * 1e3, None, rate, note=note))


def selection(add: Callable[[Row], None]) -> None:
    """Lists that depend on data: choosing them, and attention with choosing and scheduling."""
    T, H = 32768, 128
    pattern = peers.random_blocks(T // 128, 0.1)
    c = Case("traced lists 10%", pattern, T, H, float(pattern.counts.sum()) * 128**2)
    q, k, v, _ = inputs(c)
    select = peers.pooled_top_k(0.1)

    def attend(q: Any, k: Any, v: Any) -> Any:
        columns, counts = select(q, k)
        lists = peers.Pattern(columns, counts)
        return blocks.attend(q, k, v, blocks=lists)[0]

    def given(q: Any, k: Any, v: Any, columns: Any, counts: Any) -> Any:
        return blocks.attend(q, k, v, blocks=peers.Pattern(columns, counts))[0]

    chosen = jax.jit(select)(q, k)
    calls = {
        "selection alone": functools.partial(jax.jit(select), q, k),
        "selection, schedule, attention": functools.partial(jax.jit(attend), q, k, v),
        "schedule, attention": functools.partial(jax.jit(given), q, k, v, *chosen),
    }
    runs = {who: (call, jax.block_until_ready) for who, call in calls.items()}
    for who, seconds in in_turns(runs).items():
        rate = None if "alone" in who else 4 * H * HEADS * c.pairs / seconds / 1e12
        add(Row(c.name, who, H, c.kept, seconds * 1e3, None, rate))


# ---- output -------------------------------------------------------------------------------------


def brief(problem: Exception) -> str:
    """A problem in one line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"


def line(r: dict[str, Any]) -> str:
    """One measurement as a line of the table."""

    def show(x: float | None, digits: int) -> str:
        return "" if x is None else f"{x:.{digits}f}"

    error = "" if r["error"] is None else f"{r['error']:.1e}"
    return (
        f"| {r['case']} | {r['H']} | {r['who']} | {show(r['forward'], 3)} | {show(r['both'], 3)} |"
        f" {show(r['forward_rate'], 0)} | {show(r['both_rate'], 0)} | {error} | {r['note']} |"
    )


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [report["head"], "", "| check | largest errors | |", "|---|---|---|"]
    lines += [f"| {c['name']} | {c['errors']} | {c['verdict']} |" for c in report["checks"]]
    lines += ["", "| case | H | who | fwd ms | fwd+bwd ms | fwd TFLOP/s | fwd+bwd | error | note |"]
    lines += ["|" + "---|" * 9]
    lines += [line(r) for r in report["rows"]]
    lines += ["", "| bar | wanted | found |", "|---|---|---|"]
    lines += [f"| {name} | {wanted} | {found} |" for name, wanted, found in bars(report["rows"])]
    return "\n".join(lines) + "\n"


def bars(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The bars of the issue that the rows can answer."""

    def get(case: str, H: int, who: str, what: str) -> float | None:
        for r in rows:
            if r["case"] == case and r["H"] == H and r["who"] == who:
                return r[what]
        return None

    found = []

    def ratio(name: str, wanted: float, a: float | None, b: float | None) -> None:
        if a and b:
            found.append((name, f"{wanted:g}", f"{a / b:.2f}"))

    for H, flex_f, flex_b in ((128, 1.45, 1.3), (64, 1.15, 1.15)):
        for case in ("random 10%", "random 5%"):
            for what, bar in (("forward", flex_f), ("both", flex_b)):
                mine = get(case, H, OURS, what)
                ratio(f"{case} H={H} {what} over Flex", bar, get(case, H, FLEX, what), mine)
                dense = get("random 10%", H, DENSE, what)
                bar = {"random 10%": (9, 8), "random 5%": (17, 15)}[case][what == "both"]
                ratio(f"{case} H={H} {what} over dense", bar, dense, mine)
        case = "causal window 4096 T=131072"
        anchors = {64: (399, 385), 128: (582, 559)}[H]
        for what, bar in zip(("forward_rate", "both_rate"), anchors, strict=True):
            mine = get(case, H, OURS, what)
            peers_ = [get(case, H, w, what) for w in ("cuDNN window", "FlashAttention-3")]
            best = max((x for x in peers_ if x), default=None)
            ratio(f"window H={H} {what} over the best of the run", 0.97, mine, best)
            if mine:
                found.append((f"window H={H} {what}", f"{bar}", f"{mine:.0f}"))
        for what in ("forward_rate", "both_rate"):
            random = get("random 10%", H, OURS, what)
            mine = get("global_local 4 heads", H, OURS, what)
            ratio(f"global_local H={H} {what}: time over random's (at most)", 1.3, random, mine)
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over dense against the kept fraction, with the ideal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    titles = {"forward": "forward", "both": "forward + backward"}
    for ax, (what, title) in zip(axes, titles.items(), strict=True):
        for H in (64, 128):
            dense = [r for r in rows if r["who"] == DENSE and r["H"] == H and r[what]]
            for who, style in ((OURS, "o-"), (FLEX, "s--")):
                mine = sorted(
                    (r["kept"], dense[0][what] / r[what])
                    for r in rows
                    if dense
                    and r["who"] == who
                    and r["H"] == H
                    and r[what]
                    and r["case"].startswith("random")
                    and r["case"].endswith("%")
                )
                if mine:
                    ax.loglog(*zip(*mine, strict=True), style, label=f"{who} H={H}")
        kept = np.array([0.01, 1.0])
        ax.loglog(kept, 1 / kept, "k:", label="ideal: 1 / kept")
        ax.set(xlabel="kept fraction", ylabel="speed-up over dense cuDNN", title=title)
        ax.grid(alpha=0.3)
        ax.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Runs what fits the budget; one failure does not end the rest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--quick", action="store_true", help="only checks and bars")
    parser.add_argument("--smoke", action="store_true", help="only the smallest checks")
    parser.add_argument("--only", default="", help="cases and checks with this word in their name")
    parser.add_argument("--no-checks", action="store_true", help="leave the checks out")
    parser.add_argument("--repeats", type=int, default=20, help="runs that must give equal bits")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    device = jax.local_devices()[0].device_kind
    head = f"{device}, jax {jax.__version__}, bf16"
    report: dict[str, Any] = {"head": head, "checks": [], "rows": []}

    def save() -> None:
        (options.out / "blocks.json").write_text(json.dumps(report, indent=1))
        (options.out / "blocks.md").write_text(markdown(report))

    def tell(text: str) -> None:
        print(f"{time.monotonic() - begun:5.0f}s {text}", flush=True)

    def add(row: Row) -> None:
        report["rows"].append(dataclasses.asdict(row))
        tell(line(dataclasses.asdict(row)))
        save()

    def guarded(name: str, run: Callable[[], None]) -> None:
        if options.only not in name or time.monotonic() - begun > options.budget:
            return
        try:
            run()
        except Exception as problem:
            tell(f"FAILED {name}: {brief(problem)}")
            traceback.print_exc(limit=-3)
        gc.collect()

    def check(c: Check) -> None:
        prepared = prepared_checks[c]
        (ready,) = compiled.get(c)
        repeats = 1 if options.smoke else options.repeats
        errors = run_check(ready, *prepared, repeats=repeats)
        good = errors["lse"] < 1e-5 and max(errors.values()) < 2e-2
        text = " ".join(f"{k} {x:.1e}" for k, x in errors.items())
        report["checks"].append(
            {"name": c.name, "errors": text, "verdict": "agrees" if good else "WRONG"}
        )
        tell(f"{'agrees' if good else 'WRONG'} {c.name}: {text}")
        save()

    def begin_check(c: Check) -> None:
        lowered, *rest = prepare_check(c)
        prepared_checks[c] = rest
        compiled.begin(c, lambda: (lowered,))

    tell(head)
    compiled, prepared_checks = Compiled(), {}
    found = [] if options.no_checks else checks(options.smoke)
    todo = [] if options.smoke else [c for c in cases(options.quick) if options.only in c.name]
    for c in found:
        guarded(c.name, functools.partial(begin_check, c))
    for c in todo:
        compiled.begin_case(c)
    tell("lowered")
    for c in found:
        if c in prepared_checks:
            guarded(c.name, functools.partial(check, c))
    compiled.wait()
    if todo:
        time_all(todo, compiled, guarded, add, tell)
        guarded("selection traced", lambda: selection(add))
        guarded("order", lambda: orders(add))
        guarded("plot", lambda: plot(report["rows"], options.out / "blocks.png"))
    save()
    for bar in bars(report["rows"]):
        print(" | ".join(bar))
    bad = [c["name"] for c in report["checks"] if c["verdict"] != "agrees"]
    print("wrong:", ", ".join(bad) or "none")


def time_all(todo: list[Case], compiled: Compiled, guarded: Any, add: Any, tell: Any) -> None:
    """Times every case while the next ones compile."""
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    seconds = in_turns({"matmul": (lambda: product(a), jax.block_until_ready)})["matmul"]
    tell(f"matmul {2 * 8192**3 / seconds / 1e12:.0f} TFLOP/s")
    try:
        flex = Flex()
    except Exception as problem:  # torch may be missing
        tell(f"no FlexAttention: {brief(problem)}")
        flex = None
    for c in todo:
        guarded(c.name, functools.partial(measure, c, compiled, flex, add))


if __name__ == "__main__":
    main()
