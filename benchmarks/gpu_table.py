"""The rows of `gpu.py`: a table, how they stand against the bars of the kernels' issue, a plot."""

import dataclasses
import json
from pathlib import Path


@dataclasses.dataclass
class Row:
    """One measurement: times in milliseconds, rates in useful TFLOP/s.

    error: largest deviation from float64 over the largest value, of out and the gradients; ratio:
    the same over that of the XLA path in the same dtype, the largest of them. memory_mib and
    both_memory_mib: beside the inputs, forward and with backward; memory_mib under a bound_mib: all
    of the device. first_s: seconds of the first call. host_us: what a cached call adds to a trivial
    one, in microseconds.
    """

    case: str
    who: str
    forward: float | None = None
    both: float | None = None
    forward_rate: float | None = None
    both_rate: float | None = None
    error: float | None = None
    ratio: float | None = None
    memory_mib: float | None = None
    note: str = ""
    bound_mib: float | None = None
    first_s: float | None = None
    host_us: float | None = None
    both_memory_mib: float | None = None

    def line(self) -> str:
        """The row of the table."""
        times = f"{_show(self.forward, 3)} | {_show(self.both, 3)}"
        rates = f"{_show(self.forward_rate, 0)} | {_show(self.both_rate, 0)}"
        error = "" if self.error is None else f"{self.error:.1e}"
        memory = f"{_show(self.memory_mib, 0)} | {_show(self.both_memory_mib, 0)}"
        return (
            f"| {self.case} | {self.who} | {times} | {rates} | {error} | {_show(self.ratio, 2)} |"
            f" {memory} | {self.note} |"
        )


def _show(x: float | None, digits: int) -> str:
    return "" if x is None else f"{x:.{digits}f}"


def markdown(rows: list[Row], head: str, notes: list[str]) -> str:
    """The table, and under it the bars."""
    names = "case | who | fwd ms | fwd+bwd ms | TFLOP/s | fwd+bwd TFLOP/s | error | / XLA's | MiB"
    names += " | fwd+bwd MiB | note"
    lines = [head, "", f"| {names} |", "|---" * 11 + "|"]
    lines += [row.line() for row in rows]
    judged = verdicts(rows)
    if judged:
        lines += ["", "| bar | wanted | found | |", "|---|---|---|---|"]
        for name, wanted, found, holds in judged:
            lines.append(f"| {name} | {wanted} | {found} | {'holds' if holds else 'missed'} |")
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


OURS = "dilax pallas"
# Of each kind: least share of dense cuDNN, forward and with backward.
LONGNET_BARS = {"full": (0.95, 0.95), "causal": (0.90, 0.85)}
# Of each length: how many times faster than torchscale's arithmetic, forward and with backward.
GIGAPATH_BARS = {10000: (8.0, 6.0), 45000: (4.0, 3.0)}


def verdicts(rows: list[Row]) -> list[tuple[str, str, str, bool]]:
    """(bar, wanted, found, whether it holds) for every bar that the rows say something about."""
    best: dict[tuple[str, str], Row] = {(row.case, row.who): row for row in rows}
    found = []

    def judge(name: str, ours: float | None, theirs: float | None, least: float) -> None:
        """ours and theirs: times."""
        if ours is not None and theirs is not None:
            share = theirs / ours
            found.append((name, f">= {least:.2f}", f"{share:.2f}", share >= least))

    def times(case: str, who: str) -> tuple[float | None, float | None]:
        row = best.get((case, who), Row(case, who))
        return row.forward, row.both

    for H in (64, 128):
        for kind, least in LONGNET_BARS.items():
            dense, dilated = f"dense {kind} H={H} T=16384", f"LongNet {kind} H={H} T=32768"
            mine, cudnn = best.get((dilated, OURS)), best.get((dense, "cudnn"))
            for i, work in enumerate(("forward_rate", "both_rate")):
                name = f"{dilated}, {('forward', 'forward+backward')[i]}, of dense cuDNN's rate"
                if mine and cudnn:
                    # Rates compare as inverse times do.
                    a, b = getattr(mine, work), getattr(cudnn, work)
                    judge(name, a and 1 / a, b and 1 / b, least[i])
            others = [r for r in rows if r.case == dense and not r.who.startswith("dilax")]
            for i, work in enumerate(("forward", "both")):
                peers = [getattr(r, work) for r in others if getattr(r, work)]
                name = f"{dense}, {('forward', 'forward+backward')[i]}, of the best peer"
                judge(name, times(dense, OURS)[i], min(peers, default=None), 0.97)
    for T, least in GIGAPATH_BARS.items():
        case = f"GigaPath H=48 T={T}"
        mine = times(case, OURS)
        for i, work in enumerate(("forward", "forward+backward")):
            theirs = times(case, "torchscale arithmetic")[i]
            judge(f"{case}, {work}, times torchscale", mine[i], theirs, least[i])
            judge(f"{case}, {work}, times dense", mine[i], times(case, "dense torch SDPA")[i], 1.0)
    for row in rows:
        limits = (
            ("error over the XLA path's", row.ratio, 2.0),
            ("MiB at the peak", row.memory_mib if row.bound_mib else None, row.bound_mib),
            ("seconds of the first call", row.first_s, 5.0),
            ("host microseconds of a cached call", row.host_us, 100.0),
        )
        for what, value, most in limits:
            if value is not None and most is not None:
                name = f"{row.case}, {what}"
                found.append((name, f"<= {most:.2f}", f"{value:.2f}", value <= most))
    return found


def plot(rows: list[Row], path: Path) -> None:
    """Time and memory against T, log-log."""
    points = [r for r in rows if r.case.startswith("sweep") and r.forward is not None]
    if not points:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for n, who in enumerate(sorted({r.who for r in points}, key=lambda who: (who != OURS, who))):
        mine = {int(r.case.rpartition("=")[2]): r for r in points if r.who == who}
        for axes, forward, both in (
            (left, "forward", "both"),
            (right, "memory_mib", "both_memory_mib"),
        ):
            for field, marker, label in (
                (forward, "o-", f"{who}, forward"),
                (both, "s--", f"{who}, forward and backward"),
            ):
                found = [(T, x) for T in sorted(mine) if (x := getattr(mine[T], field)) is not None]
                if found:
                    axes.loglog(*zip(*found, strict=True), marker, color=f"C{n}", label=label)
    for axes, label in ((left, "ms"), (right, "MiB beside the inputs")):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="tokens", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.suptitle("H = 64: LongNet's segments (dilax), all of the sequence (cudnn)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def read_rows(path: Path) -> list[Row]:
    """The rows of a run's table.json."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]
