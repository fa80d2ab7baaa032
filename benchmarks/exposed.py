"""What a profile says about messages: how long they run while their device computes nothing."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jax.profiler import ProfileData

_COLLECTIVES = ("collective-permute", "all-to-all", "all-gather", "reduce-scatter", "all-reduce")
Span = tuple[float, float]


def covered(spans: Iterable[Span]) -> float:
    """Length of the union of intervals.

    Example:
        >>> covered([(0, 2), (1, 3), (5, 6)])
        4.0
    """
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _is_message(event: Any) -> bool:
    """Whether an event of a GPU's stream is a message: a kernel of NCCL, a copy between devices."""
    operation = str(dict(event.stats).get("hlo_op", ""))
    name = event.name.lower()
    return "nccl" in name or "p2p" in name or operation.startswith(_COLLECTIVES)


def exposed_of(profile: Any) -> dict[str, float]:
    """Milliseconds of the device that has most of each: messages, exposed messages, idle.

    "exposed": a message runs and nothing else does; "idle": nothing runs between the first event
    and the last. Empty where the profile has no message on a GPU's stream.
    """
    found: dict[str, float] = {}
    for plane in profile.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        messages, work = [], []
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    span = (event.start_ns, event.start_ns + event.duration_ns)
                    (messages if _is_message(event) else work).append(span)
        if not messages:
            continue
        spans = messages + work
        every = covered(spans)
        whole = max(end for _, end in spans) - min(start for start, _ in spans)
        times = {"messages": covered(messages), "exposed": every - covered(work)}
        for name, x in (times | {"idle": whole - every}).items():
            found[name] = max(found.get(name, 0.0), x / 1e6)
    return found


def exposed_in(folder: str | Path) -> dict[str, float]:
    """`exposed_of` the newest profile under a folder that `jax.profiler.trace` wrote to."""
    newest = max(Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return exposed_of(ProfileData.from_file(str(newest)))
