"""The linear layers of a module: kernels of several slices, each with a gain of its own."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dilax._types import refuse

ZEROS = nnx.initializers.zeros_init()
XAVIER_NORMAL = nnx.initializers.variance_scaling(1.0, "fan_avg", "normal")


@dataclasses.dataclass(frozen=True)
class Linear:
    """How to make linear layers whose kernel is a row of slices, each started on its own."""

    bias: bool
    kernel_init: Callable
    bias_init: Callable
    kernel_metadata: Mapping[str, Any]
    bias_metadata: Mapping[str, Any]
    dtype: Any
    param_dtype: Any

    def make(self, inputs: int, slices: tuple[tuple[int, float], ...], rngs: nnx.Rngs):
        """A layer with one slice of (size, gain) after the other as outputs."""
        return nnx.Linear(
            inputs,
            sum(size for size, _ in slices),
            use_bias=self.bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=lambda key, shape, dtype: self._kernel(key, shape[0], slices, dtype),
            bias_init=self.bias_init,
            kernel_metadata=self.kernel_metadata,
            bias_metadata=self.bias_metadata,
            rngs=rngs,
        )

    def _kernel(self, key, inputs: int, slices, dtype):
        keys = [key] if len(slices) == 1 else jax.random.split(key, len(slices))
        parts = [
            self.kernel_init(one, (inputs, size), dtype)
            for one, (size, _) in zip(keys, slices, strict=True)
        ]
        # nnx.with_partitioning wraps the array with its metadata: the gain is for the array.
        arrays = [x.raw_value if isinstance(x, nnx.VariableMetadata) else x for x in parts]
        kernel = jnp.concatenate(
            [x * jnp.asarray(gain, dtype) for x, (_, gain) in zip(arrays, slices, strict=True)], 1
        )
        if isinstance(parts[0], nnx.VariableMetadata):
            return dataclasses.replace(parts[0], raw_value=kernel)
        return kernel


def linear_makers(
    bias: bool,
    kernel_init: Any,
    out_kernel_init: Any,
    bias_init: Any,
    out_bias_init: Any,
    kernel_metadata: Any,
    out_kernel_metadata: Any,
    bias_metadata: Any,
    out_bias_metadata: Any,
    *,
    dtype: Any,
    param_dtype: Any,
) -> tuple[Linear, Linear]:
    """What makes the input and the output projections; an `out_` argument of None is the other.

    Example:
        >>> inner, outer = linear_makers(
        ...     True, XAVIER_NORMAL, None, ZEROS, None, {}, None, {}, None, dtype=None,
        ...     param_dtype="float32")
        >>> inner == outer
        True
    """
    for name, x, optional, wanted in (
        ("kernel_init", kernel_init, False, "an initializer"),
        ("bias_init", bias_init, False, "an initializer"),
        ("out_kernel_init", out_kernel_init, True, "an initializer"),
        ("out_bias_init", out_bias_init, True, "an initializer"),
        ("kernel_metadata", kernel_metadata, False, "a mapping from strings"),
        ("bias_metadata", bias_metadata, False, "a mapping from strings"),
        ("out_kernel_metadata", out_kernel_metadata, True, "a mapping from strings"),
        ("out_bias_metadata", out_bias_metadata, True, "a mapping from strings"),
    ):
        good = callable(x) if name.endswith("init") else _is_metadata(x)
        if not good and not (optional and x is None):
            raise refuse(name, f"{'None or ' if optional else ''}{wanted}", x)
    inner = Linear(bias, kernel_init, bias_init, kernel_metadata, bias_metadata, dtype, param_dtype)
    given = {
        "kernel_init": out_kernel_init,
        "bias_init": out_bias_init,
        "kernel_metadata": out_kernel_metadata,
        "bias_metadata": out_bias_metadata,
    }
    given = {name: x for name, x in given.items() if x is not None}
    return inner, dataclasses.replace(inner, **given)


def columns_of(linear: nnx.Linear, x: jax.Array, part: slice, dtype: Any) -> jax.Array:
    """Some output columns of a linear layer, without computing the others."""
    kernel = linear.kernel[...][:, part]
    bias = None if linear.bias is None else linear.bias[...][part]
    dtype = jnp.result_type(x, kernel) if dtype is None else dtype
    y = x.astype(dtype) @ kernel.astype(dtype)
    return y if bias is None else y + bias.astype(dtype)[None, None]


def _is_metadata(x: Any) -> bool:
    return isinstance(x, Mapping) and all(isinstance(name, str) for name in x)
