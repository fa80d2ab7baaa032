"""The tables, the bars and the plot of `gpu_blocks.py`."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.block_cases import HEADS, LONG, WIDTH
from benchmarks.block_peers import DENSE, FLASH, FLEX, OURS, TOKAMAX, WINDOW

# Over FlexAttention by head size (10 % kept), over dense by case (heads of 128): forward, and with
# backward.
FLEX_BARS = {128: (1.45, 1.3), 64: (1.15, 1.15)}
# TFLOP/s that these were with the FlexAttention of then (10 % kept, heads of 128).
RATE_BARS = (580, 490)
DENSE_BARS = {"random 10%": (9, 8), "random 5%": (17, 15)}
# Sliding windows elsewhere, TFLOP/s: the best of cuDNN and FlashAttention-3, FlexAttention.
WINDOW_BARS = {64: ((399, 385), (377, 309)), 128: ((582, 559), (404, 383))}
KINDS = ("forward", "both")


def show(x: float | None, digits: int) -> str:
    """A number, or nothing."""
    return "" if x is None else f"{x:.{digits}f}"


def line(r: dict[str, Any]) -> str:
    """One measurement as a line of the table."""
    error = "" if r["error"] is None else f"{r['error']:.1e}"
    return (
        f"| {r['case']} | {r['H']} | {r['who']} | {show(r['forward'], 3)} | {show(r['both'], 3)} |"
        f" {show(r['forward_rate'], 0)} | {show(r['both_rate'], 0)} | {error} | {r['note']} |"
    )


def _memory(rows: list[dict[str, Any]]) -> list[str]:
    found = [r for r in rows if r["forward_bound"] and r["forward_memory"]]
    if not found:
        return []
    lines = ["", "| peak MiB | H | forward | bound | fwd+bwd | bound |", "|" + "---|" * 6]
    names = [f"{kind}_{what}" for kind in KINDS for what in ("memory", "bound")]
    for r in found:
        numbers = " | ".join(show(r[name], 0) for name in names)
        lines.append(f"| {r['case']} | {r['H']} | {numbers} |")
    return lines


def markdown(report: dict[str, Any]) -> str:
    """The report as tables."""
    lines = [report["head"], ""]
    if report["checks"]:
        lines += ["| check | largest errors | |", "|---|---|---|"]
        lines += [f"| {c['name']} | {c['errors']} | {c['verdict']} |" for c in report["checks"]]
        lines += [""]
    lines += ["| case | H | who | fwd ms | fwd+bwd ms | fwd TFLOP/s | fwd+bwd | error | note |"]
    lines += ["|" + "---|" * 9, *map(line, report["rows"]), *_memory(report["rows"])]
    lines += ["", "| bar | wanted | found |", "|---|---|---|"]
    lines += [f"| {' | '.join(bar)} |" for bar in bars(report["rows"])]
    lines += ["", *report["failed"]] if report["failed"] else []
    return "\n".join(lines) + "\n"


def bars(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The bars that the rows can answer: (name, wanted, found)."""
    found = []

    def get(case: str, H: int, who: str, what: str) -> float | None:
        for r in rows:
            if (r["case"], r["H"], r["who"]) == (case, H, who):
                return r[what]
        return None

    def ratio(name: str, wanted: float, a: float | None, b: float | None) -> None:
        if a and b:
            found.append((name, f"{wanted:g}", f"{a / b:.2f}"))

    def one(H: int, kind: int) -> None:
        what, rate = KINDS[kind], f"{KINDS[kind]}_rate"
        dense = get("random 10%", H, DENSE, what)
        flex, mine = (get("random 10%", H, who, what) for who in (FLEX, OURS))
        ratio(f"random 10% H={H} {what}: over FlexAttention", FLEX_BARS[H][kind], flex, mine)
        if H == 128 and mine:
            reached = get("random 10%", H, OURS, rate)
            name = f"random 10% H={H} {what}: TFLOP/s"
            found.append((name, f"{RATE_BARS[kind]}", show(reached, 0)))
        for case, over_dense in DENSE_BARS.items() if H == 128 else ():
            mine = get(case, H, OURS, what)
            ratio(f"{case} H={H} {what}: over dense", over_dense[kind], dense, mine)
        case = f"causal window {WIDTH} T={LONG}"
        mine = get(case, H, OURS, rate)
        elsewhere = (WINDOW, FLASH, TOKAMAX)
        best = max((get(case, H, who, rate) or 0.0 for who in elsewhere), default=0.0)
        ratio(f"window H={H} {what}: over the best of the run", 0.97, mine, best)
        ratio(f"window H={H} {what}: over FlexAttention", 1, mine, get(case, H, FLEX, rate))
        for bar, name in zip(WINDOW_BARS[H], ("the best elsewhere", FLEX), strict=True):
            if mine:
                found.append((f"window H={H} {what}: {name}", f"{bar[kind]}", f"{mine:.0f}"))
        random = get("random 10%", H, OURS, rate)
        mine = get("global_local 4 heads", H, OURS, rate)
        ratio(f"global_local H={H} {what}: time over random's (at most)", 1.3, random, mine)

    for H in FLEX_BARS:
        for kind in range(2):
            one(H, kind)
    case = f"random 1% T={LONG}"
    mine, dense = (get(case, 128, who, "forward") for who in (OURS, DENSE))
    ratio(f"{case} forward: over dense", 75, dense, mine)
    for r in rows:
        for what in KINDS:
            taken, bound = r[f"{what}_memory"], r[f"{what}_bound"]
            if bound and taken:
                name = f"{r['case']} H={r['H']} {what}: peak MiB (at most)"
                found.append((name, show(bound, 0), show(taken, 0)))
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over dense against the kept fraction, with the ideal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, what in zip(axes, KINDS, strict=True):
        for H in FLEX_BARS:
            dense = [
                r[what] for r in rows if (r["who"], r["H"]) == (DENSE, H) and "10%" in r["case"]
            ]
            for who, style in ((OURS, "o-"), (FLEX, "s--")):
                mine = sorted(
                    (r["kept"], dense[0] / r[what])
                    for r in rows
                    if dense and dense[0] and (r["who"], r["H"]) == (who, H) and r[what]
                    if r["case"].startswith("random") and r["case"].endswith("%")
                )
                if mine:
                    ax.loglog(*zip(*mine, strict=True), style, label=f"{who} H={H}")
        kept = np.array([0.01, 1.0])
        ax.loglog(kept, 1 / kept, "k:", label="ideal: 1 / kept")
        title = {"forward": "forward", "both": "forward + backward"}[what]
        ax.set(xlabel="kept fraction", ylabel="speed-up over dense cuDNN", title=title)
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(f"Random blocks of 128 x 128, {HEADS} heads, bf16")
    figure.savefig(path, dpi=120)
    plt.close(figure)
