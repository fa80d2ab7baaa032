"""Which implementation runs, and why the others do not."""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from jax.core import Tracer

from dilax import dropout, xla_attention
from dilax._types import UnsupportedError, refuse, shown

IMPLEMENTATIONS = ("pallas", "xla")  # the first that has no reason against it runs


def check_implementation(implementation: Any) -> None:
    """Refuse an implementation that is neither None nor the name of one."""
    known = isinstance(implementation, str) and implementation in IMPLEMENTATIONS
    if implementation is not None and not known:
        raise refuse("implementation", f"None or one of {IMPLEMENTATIONS}", implementation)


def sibling(module: str) -> ModuleType | None:
    """A module of the packages that are installed beside dilax, or None if it is not there.

    Raises:
        ImportError: another package of that name comes first on sys.path; the message says which.

    Example:
        >>> sibling("sharding").__name__
        'sharding'
    """
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    home = Path(__file__).resolve().parent.parent
    found = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    if not any(
        Path(x).resolve() in (home / package, home / package / "__init__.py") for x in found
    ):
        raise ImportError(
            f"{package}: wanted the package beside dilax in {home}, but {', '.join(found)} comes"
            " first on sys.path; rename it or move it",
            name=package,
            path=found[0] if found else None,
        )
    if importlib.util.find_spec(module) is None:
        return None
    return importlib.import_module(module)


def check_block_size(implementation: str | None, block_size: int) -> None:
    """Refuse blocks that no kernel takes, unless XLA is named: it takes any."""
    if implementation != "xla" and block_size != 64 and block_size % 128:
        wanted = "64 or a multiple of 128, or implementation='xla', which takes any"
        raise refuse("block_size", wanted, block_size)


def device_of(x: Any) -> Any:
    """The `jax.Device` that will compute on x: where x lies, or, for a tracer, JAX's default."""
    if isinstance(x, jax.Array) and not isinstance(x, Tracer):
        return min(x.devices(), key=lambda device: device.id)
    default = jax.config.jax_default_device
    if isinstance(default, jax.Device):
        return default
    return jax.local_devices(backend=default)[0]


def unsupported(
    name: str, query: Any, key: Any, value: Any, *, device_kind: str | None = None, **options: Any
) -> tuple[str, ...]:
    """Why an implementation cannot take this call; empty if it can. Never runs a kernel.

    `query`, `key`, `value` need only a shape and a dtype; `options` are those of the primitive,
    `xla_attention.attend`. device_kind is `jax.Device.device_kind`, None for the device at hand.
    """
    if name == "xla":
        return ()
    if device_kind is None:
        device = device_of(query)
        if device.platform != "gpu":
            return (f"its kernels are for NVIDIA Hopper GPUs, the device is a {device.platform}",)
        device_kind = device.device_kind
    # Looked up, not tried: an error inside the kernels' package must be seen.
    if importlib.util.find_spec("absl") is None:
        return ("JAX's Mosaic GPU needs absl, which is not installed: pip install absl-py",)
    if "blocks" in options and "branches" in options:
        why = "a branch's rows lie a rate apart, and a list names blocks of neighbours"
        return (f"its kernels take no block lists inside dilated branches: {why}",)
    options.pop("order", None)  # any order will do
    if options.pop("dropout_bits", None) is not None:
        return ("its kernels drop by one batch, head and branch, not by those of many segments",)
    module = _kernels(options)
    kernels = sibling(f"pallas_kernels.{module}")
    if kernels is None:
        return (f"the package pallas_kernels has no kernel ({module}) in this installation",)
    options |= {"device_kind": device_kind, "keep": dropout}
    return tuple(kernels.unsupported(query, key, value, **options))


def _kernels(options: dict[str, Any]) -> str:
    """The module of pallas_kernels that has the kernels for a call."""
    return "blocks" if "blocks" in options else "flash"


def load(name: str, **options: Any) -> Callable:
    """The `attend` function of an implementation that is supported for a call's options."""
    if name == "xla":
        return xla_attention.attend
    module = _kernels(options)
    kernels = sibling(f"pallas_kernels.{module}")
    if kernels is None:
        raise UnsupportedError("any call", {name: (f"pallas_kernels.{module} is not installed",)})
    return functools.partial(kernels.attend, keep=dropout)


def choose(
    implementation: str | None, query: Any, key: Any, value: Any, **options: Any
) -> Callable:
    """The `attend` function to call: the named one, or the first that takes the call.

    Raises:
        ValueError: the name is unknown.
        UnsupportedError: the named implementation cannot take the call, with its reasons.
    """
    check_implementation(implementation)
    blocks = options.get("blocks", ())
    for lists in blocks if isinstance(blocks, tuple) else (blocks,):
        check_block_size(implementation, lists.block_size)
    reasons = {}
    for name in IMPLEMENTATIONS if implementation is None else (implementation,):
        reasons[name] = unsupported(name, query, key, value, **options)
        if not reasons[name]:
            return load(name, **options)
    raise UnsupportedError(f"query {shown(query)}, key {shown(key)}", reasons)
