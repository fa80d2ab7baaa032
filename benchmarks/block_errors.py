"""The errors of the block-sparse kernels and of the XLA path at size, against float64."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import block_peers as peers
from benchmarks.block_cases import Case, inputs
from benchmarks.block_timing import Row, relative

NAMES = ("out", "dq", "dk", "dv")


def cases(T: int = 32768, heads: int = 2) -> list[Case]:
    """Random blocks of both head sizes, and a window."""
    found = []
    for H in (128, 64):
        pattern = peers.random_blocks(T // 128, 0.1)
        found.append(Case("error, random 10%", pattern, T, H, 0.1 * T**2, heads))
    width = T // 8
    window = peers.window(T, width)
    found.append(Case(f"error, window {width}", window, T, 128, T * width, heads, width))
    return found


def exact_head(c: Case, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """out, dq, dk and dv of one head in float64, a row of blocks at a time."""
    q, k, v, do = arrays
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    size, scale = c.pattern.block_size, 1 / math.sqrt(c.H)
    for row in range(c.pattern.columns.shape[2]):
        mine = slice(row * size, (row + 1) * size)
        kept = c.pattern.columns[0, 0, row, : c.pattern.counts[0, 0, row]]
        keys = (kept[:, None] * size + np.arange(size)).reshape(-1)
        keys = keys[keys < c.T]
        s = q[mine] @ k[keys].T * scale
        away = np.arange(c.T)[mine, None] - keys
        if c.pattern.is_causal:
            s = np.where(away >= 0, s, -np.inf)
        if c.width is not None:
            s = np.where(away < c.width, s, -np.inf)
        p = np.exp(s - s.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        out[mine] = p @ v[keys]
        delta = (do[mine] * out[mine]).sum(1, keepdims=True)
        ds = p * (do[mine] @ v[keys].T - delta) * scale
        dq[mine] = ds @ k[keys]
        dk[keys] += ds.T @ q[mine]
        dv[keys] += p.T @ do[mine]
    return [out, dq, dk, dv]


def functions(c: Case) -> dict[str, Callable]:
    """out and gradients, by the kernels and by XLA."""

    def results(f: Callable) -> Callable:
        def run(q: Any, k: Any, v: Any, do: Any) -> Any:
            out, pull = jax.vjp(f, q, k, v)
            return out, *pull(do)

        return run

    return {peers.OURS: results(peers.ours(c.pattern)), peers.XLA: results(peers.xla(c.pattern))}


def measure(c: Case, compiled: dict[str, Callable], add: Callable[[Row], None]) -> None:
    """Errors of every row of the first head."""
    arrays = inputs(c)
    exact = exact_head(c, [np.asarray(x[0, :, 0], np.float64) for x in arrays])
    errors = {}
    for who, f in compiled.items():
        found = [np.asarray(x[0, :, 0], np.float64) for x in f(*arrays)]
        errors[who] = [relative(a, b) for a, b in zip(found, exact, strict=True)]
    for who, mine in errors.items():
        text = ", ".join(f"{name} {x:.1e}" for name, x in zip(NAMES, mine, strict=True))
        if who == peers.OURS and peers.XLA in errors:
            ratios = [a / b for a, b in zip(mine, errors[peers.XLA], strict=True)]
            text += f"; at most {max(ratios):.2f} x XLA's (bar 2)"
        add(Row(c.name, who, c.H, c.kept, error=max(mine), note=text))
