"""Small cases of the block-sparse kernels, every result against a float64 softmax."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import block_peers as peers
from pallas_kernels import block_schedule, blocks, config
from pallas_kernels.support import padded_head

dropout = peers.library("dropout")
FUSED = " fused"  # of one pass, whose order of additions varies


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
    positions: bool = False  # tokens in any order; causality goes by their positions
    rate: float = 0.0
    starts: tuple[int, int] = (0, 0)
    carry: bool = False
    traced: bool = False
    split: int | None = None
    apart: float = 0.0  # mean of queries and, negated, of keys: logits lie far below 0
    rises: bool = False  # later keys are longer, and every other 16 queries: maxima rise for some


def checks(smoke: bool) -> list[Check]:
    """The cases; with smoke only tiny ones."""
    random = peers.random_blocks
    if smoke:
        small = peers.global_local(4, 1, 0, block_size=64)
        triangle = peers.from_mask(np.tri(2, dtype=bool)[None, None])
        return [
            Check("window", peers.window(256, 100), 256, 256, 16, 1, 1, rises=True),
            Check("pairs", triangle, 256, 256, 16, 1, 1, traced=True),
            Check(
                "split", small, 230, 250, 16, 1, 1, ids=True, positions=True, traced=True, split=1
            ),
            Check(
                "positions",
                random(2, 0.7),
                230,
                250,
                128,
                2,
                1,
                positions=True,
                rate=0.2,
                apart=2.0,
            ),
        ]
    window, far = peers.window, peers.global_local(64, 1, 1)
    halves, coarse = window(1100, 300, 64), random(4, 0.5, True, block_size=256)
    return [
        Check("random 128", random(16, 0.3), 2048, 2048, 128, 16, 16),
        Check("random 64 per head gqa", random(12, 0.4, True, 8), 1500, 1500, 64, 8, 2),
        Check("window 128", window(2048, 300), 2048, 2048, 128, 8, 4),
        Check("global rows", far, 8192, 8192, 128, 1, 1),
        Check("global rows traced", far, 8192, 8192, 64, 1, 1, traced=True, split=8),
        Check("block 64 window", halves, 1100, 1100, 64),
        Check("block 64 random", random(9, 0.4, block_size=64), 530, 530, 128),
        Check("pairs", random(9, 0.4), 1152, 1152, 64),
        Check(
            "pairs traced", random(16, 0.3, False, 4), 2048, 2048, 48, 4, 2, traced=True, split=4
        ),
        Check("block 256", random(5, 0.5, block_size=256), 1280, 1280, 64),
        Check("block 256 ragged", random(5, 0.5, block_size=256), 1152, 1152, 128),
        Check("block 256 traced", coarse, 1000, 1000, 96, 2, 2, 2, traced=True),
        Check("ids ragged", random(6, 0.6), 700, 768, 128, ids=True),
        Check("logits below", random(6, 0.6), 700, 700, 128, apart=4.0),
        Check("rising", random(9, 0.5, block_size=256), 2200, 2304, 128, rises=True),
        Check("rising window", window(1100, 500), 1100, 1100, 64, rises=True),
        Check("dropout", random(6, 0.6, True), 700, 700, 64, 4, 2, rate=0.2),
        Check("carry starts", random(5, 0.6, True), 600, 640, 64, starts=(200, 130), carry=True),
        Check("positions", random(6, 0.6, True), 700, 740, 128, 4, 2, 2, positions=True, rate=0.2),
        Check("positions ids", random(6, 0.6), 700, 700, 128, ids=True, positions=True),
        Check("positions window", window(700, 300), 700, 700, 64, 4, 1, positions=True),
        Check("positions block 64", halves, 1100, 1100, 64, positions=True, rate=0.1),
        Check("head 192", random(5, 0.6), 600, 600, 192),
        Check("head 16", window(700, 200), 700, 700, 16),
    ]


def oracle(
    c: Check, arrays: dict[str, np.ndarray], ids: Any, positions: Any, seed: Any
) -> dict[str, np.ndarray]:
    """out, lse and gradients by a dense masked softmax in float64."""
    q, k, v, do, dlse = (arrays[x].swapaxes(1, 2) for x in ("q", "k", "v", "do", "dlse"))
    group = c.N // c.K
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    # With positions, what is causal about places is the lists and bands alone.
    pattern = dataclasses.replace(c.pattern, is_causal=False) if c.positions else c.pattern
    seen = np.broadcast_to(pattern.visible(c.N, c.T, c.S, c.starts), (c.B, c.N, c.T, c.S))
    if ids is not None:
        same = (ids[0][:, :, None] == ids[1][:, None]) & (ids[0] != 0)[:, :, None]
        seen = seen & same[:, None]
    q_positions, kv_positions = positions
    if c.positions:
        seen = seen & (q_positions[:, None, :, None] >= kv_positions[:, None, None])
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
        example, head, _ = np.ogrid[: c.B, : c.N, :1]
        rows = dropout.row_bits(seed, example, head, q_positions[:, None])
        columns = dropout.column_bits(seed, kv_positions[:, None], 0)
        drop = np.asarray(dropout.keep(rows, columns, c.rate)) / (1 - c.rate)
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

    def draw(*shape: int, mean: float = 0.0) -> np.ndarray:
        return np.asarray(jnp.asarray(rng.normal(mean, size=shape), jnp.bfloat16), np.float64)

    a = {"q": draw(c.B, c.T, c.N, c.H, mean=c.apart)}
    a["k"] = draw(c.B, c.S, c.K, c.H, mean=-c.apart)
    if c.rises:
        a["q"] *= np.where(np.arange(c.T) // 16 % 2, 4.0, 1.0)[:, None, None]
        a["k"] *= np.exp2(np.floor(np.linspace(-2.0, 2.9, c.S)))[:, None, None]
    a |= {"v": draw(*a["k"].shape), "do": draw(*a["q"].shape), "dlse": draw(c.B, c.T, c.N)}
    a |= {"old_out": draw(*a["q"].shape), "old_lse": draw(c.B, c.T, c.N) + 4}
    a["old_lse"][:, ::3] = -np.inf
    options: dict[str, Any] = {"is_causal": c.pattern.is_causal}
    ids, seed = None, jnp.asarray([11, 22], jnp.uint32)
    positions = tuple(np.arange(n)[None] + at for n, at in zip((c.T, c.S), c.starts, strict=True))
    if c.positions:
        places = np.tile(np.arange(max(c.T, c.S)), (c.B, 1))
        positions = tuple(rng.permuted(places, axis=1)[:, :n] for n in (c.T, c.S))
        given = (jnp.asarray(x, jnp.int32) for x in positions)
        options |= dict(zip(("q_positions", "kv_positions"), given, strict=True), is_causal=True)
    if c.ids:
        ids = tuple(np.sort(rng.integers(0, 4, (c.B, n)), axis=1) for n in (c.T, c.S))
        options |= {"q_segment_ids": jnp.asarray(ids[0], jnp.int32)}
        options |= {"kv_segment_ids": jnp.asarray(ids[1], jnp.int32)}
    if c.rate:
        options |= {"dropout_rate": c.rate, "dropout_seed": seed, "keep": dropout}
    if c.carry:
        options["carry"] = tuple(jnp.asarray(a[x], jnp.float32) for x in ("old_out", "old_lse"))
    sizes = (padded_head(c.H), c.pattern.block_size, c.ids + c.positions)
    fused = config.block_fused_blocks(*sizes) is not None
    lists = (c.pattern.columns, c.pattern.counts, c.pattern.band_index)

    def run(q: Any, k: Any, v: Any, lists: Any, starts: Any) -> dict[str, Any]:
        names = ("columns", "counts", "band_index")
        pattern = dataclasses.replace(c.pattern, **dict(zip(names, lists, strict=True)))
        pattern = pattern if c.traced else c.pattern
        where, found = {"q_start": starts[0], "k_start": starts[1], "blocks": pattern}, {}
        for suffix, deterministic in (("", True), (FUSED, False))[: 1 + fused]:
            said = where | options | {"deterministic": deterministic}
            (out, lse), pull = jax.vjp(lambda *x, o=said: blocks.attend(*x, **o), q, k, v)
            d_lse = jnp.where(lse > -jnp.inf, jnp.asarray(a["dlse"], jnp.float32), 0.0)
            grads = pull((jnp.asarray(a["do"], out.dtype), d_lse))
            names = (f"{x}{suffix}" for x in ("dq", "dk", "dv"))
            found |= {"out": out, "lse": lse} | dict(zip(names, grads, strict=True))
        return found

    before = block_schedule.SHORTEST_TRACED_SPLIT
    block_schedule.SHORTEST_TRACED_SPLIT = c.split or before
    arrays = [jnp.asarray(a[x], jnp.bfloat16) for x in "qkv"]
    arguments = (*arrays, lists, tuple(map(jnp.int32, c.starts)))
    try:
        lowered = jax.jit(run).lower(*arguments)
    finally:
        block_schedule.SHORTEST_TRACED_SPLIT = before
    return lowered, arguments, functools.partial(oracle, c, a, ids, positions, seed)


def run_check(compiled: Any, arguments: tuple, exact: Callable, repeats: int) -> dict[str, float]:
    """Largest error of each result over its largest value; raises where bits move."""
    first = jax.tree.map(np.asarray, compiled(*arguments))
    for _ in range(repeats):
        # NaN in the memory that comes next: what a kernel forgets to write would show.
        jnp.full((1 << 24,), jnp.nan, jnp.float32).block_until_ready()
        for name, x in compiled(*arguments).items():
            same = np.array_equal(first[name], np.asarray(x), equal_nan=True)
            if not same and not name.endswith(FUSED):
                raise AssertionError(f"{name} differs from run to run")
    wanted = exact()
    return {name: largest(x, wanted[name.removesuffix(FUSED)]) for name, x in first.items()}


def largest(actual: Any, exact: np.ndarray) -> float:
    """Largest deviation over the largest value; infinite where a NaN is or infinities differ."""
    actual = np.asarray(actual, np.float64)
    finite = np.isfinite(exact)
    if not np.array_equal(np.isfinite(actual), finite) or np.isnan(actual).any():
        return float("inf")
    size = np.abs(exact[finite]).max(initial=0.0) or 1.0
    return float(np.abs(actual[finite] - exact[finite]).max(initial=0.0) / size)
