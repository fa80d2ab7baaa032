"""What a program takes on each device: bytes that messages bring, memory."""

import math
import re
from typing import Any

_MESSAGES = "collective_permute|all_to_all|all_gather|reduce_scatter"


def received(text: str) -> int:
    """Bytes that one device receives in a lowered program, by the types of what it sends and gets.

    Example:
        >>> sends = '"stablehlo.collective_permute"(%0) : (tensor<4x8xbf16>) -> tensor<4x8xbf16>'
        >>> received(sends)
        64
    """
    total = 0.0
    for kind, options, sent, got in re.findall(
        rf'"stablehlo\.({_MESSAGES})"(.*?) : \(tensor<(\S+)>\) -> tensor<(\S+)>', text, re.DOTALL
    ):
        groups = re.search(r"replica_groups = dense<.*?> : tensor<\d+x(\d+)xi64>", options)
        from_others = (int(groups[1]) - 1) / int(groups[1]) if groups else 1.0
        total += from_others * _bytes(sent if kind == "reduce_scatter" else got)
    return round(total)


def _bytes(kind: str) -> int:
    *sizes, dtype = kind.split("x")
    return math.prod(map(int, sizes)) * int(re.sub(r"\D", "", dtype)) // 8


def held_gib(compiled: Any) -> float:
    """Arguments, results and what lies between, on one device."""
    stats = compiled.memory_analysis()
    taken = stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes
    return (taken - stats.alias_size_in_bytes) / 2**30


def peak_gib(devices: Any) -> float | None:
    """The most that any of the devices has held since the process began, where they count it."""
    found = [device.memory_stats() for device in devices]
    return max(x["peak_bytes_in_use"] for x in found) / 2**30 if all(found) else None
