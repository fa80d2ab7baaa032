"""Letters of the dimensions, shared types and errors.

Every shape in the library is written with these letters:

    B batch        T query length   S key length
    N query heads  K key/value heads (N is a multiple of K)   H head dim
    W segment length   R dilation rate   L tokens left of a segment after dilation   M segments
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

Implementation = Literal["xla", "pallas"]

FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


class UnsupportedError(NotImplementedError):
    """No implementation takes the call; `reasons` says why, per implementation.

    Example:
        >>> print(UnsupportedError("q float32", {"pallas": ("float32 is not supported",)}))
        no implementation takes q float32: pallas: float32 is not supported
    """

    def __init__(self, call: str, reasons: Mapping[str, tuple[str, ...]]):
        self.reasons = dict(reasons)
        listed = "; ".join(f"{name}: {', '.join(why)}" for name, why in self.reasons.items())
        super().__init__(f"no implementation takes {call}: {listed}")


def stats_dtype(dtype: Any) -> Any:
    """Dtype of softmax statistics: float64 for float64 inputs, else float32."""
    return jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32


def dtype_name(x: Any) -> str:
    """The name of an array's dtype, also of one that NumPy does not know (PRNG keys, torch).

    Example:
        >>> dtype_name(jnp.ones(3))
        'float32'
    """
    return str(getattr(x.dtype, "name", x.dtype))


def shown(x: Any) -> str:
    """An array as `dtype[shape]`, anything else as its repr: for error messages."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{dtype_name(x)}[{','.join(map(str, x.shape))}]"
    return repr(x)


def refuse(name: str, wanted: str, got: Any) -> ValueError:
    """The one form of an argument error: which argument, what was wanted, what came."""
    return ValueError(f"{name}: wanted {wanted}, got {shown(got)}")


class LostProcessError(RuntimeError):
    """Another process of a run has ended, or cannot be reached any more."""
