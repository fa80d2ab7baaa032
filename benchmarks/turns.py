"""A clock for several functions: batches of one after those of another.

A card gets warm and its clock falls, so what is timed first would look faster than what comes last.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any


def in_turns(
    runs: dict[Any, tuple[Callable, Callable]],
    least: float = 0.02,
    most: float = 3.0,
    warm: float = 0.3,
) -> dict[Any, float]:
    """Median seconds of each of (run, wait), batches of one after those of another.

    least: seconds of a batch; most: a function that has taken so many begins no further batch;
    warm: seconds for which all of them run before, since a card that was idle is slow.
    """
    begun = time.perf_counter()
    while True:
        for run, wait in runs.values():
            wait(run())
        if time.perf_counter() - begun > warm:
            break
    counts, samples = {}, {name: [] for name in runs}
    for name, (run, wait) in runs.items():
        start = time.perf_counter()
        wait(run())
        counts[name] = max(1, min(100, int(least / max(time.perf_counter() - start, 1e-5))))
    for _ in range(5):
        for name, (run, wait) in runs.items():
            if sum(samples[name]) * counts[name] > most:
                continue
            start = time.perf_counter()
            for _ in range(counts[name]):
                result = run()
            wait(result)
            samples[name].append((time.perf_counter() - start) / counts[name])
    return {name: statistics.median(x) for name, x in samples.items()}
