"""Which implementation runs, and why the others do not."""

from collections.abc import Callable
from typing import Any

import jax

from dilax import xla_attention
from dilax._types import UnsupportedError, refuse, shown

IMPLEMENTATIONS = ("pallas", "xla")  # the first that has no reason against it runs


def check_implementation(implementation: Any) -> None:
    """Refuse an implementation that is neither None nor the name of one."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise refuse("implementation", f"None or one of {IMPLEMENTATIONS}", implementation)


def unsupported(name: str, query: Any, key: Any, value: Any, **options: Any) -> tuple[str, ...]:
    """Why an implementation cannot take this call; empty if it can. Never runs a kernel."""
    if name == "xla":
        return ()
    return ("no Pallas kernel is installed",)


def choose(
    implementation: str | None, query: Any, key: Any, value: Any, **options: Any
) -> Callable:
    """The `attend` function to call.

    Raises:
        ValueError: the name is unknown.
        UnsupportedError: the named implementation cannot take the call.
    """
    check_implementation(implementation)
    reasons = {}
    for name in IMPLEMENTATIONS if implementation is None else (implementation,):
        reasons[name] = unsupported(name, query, key, value, **options)
        if not reasons[name]:
            return xla_attention.attend
    raise UnsupportedError(f"query {shown(query)}, key {shown(key)}", reasons)
