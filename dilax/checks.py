"""Argument checks of the attention functions: name, wanted, got, before anything is computed."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from dilax._types import FLOAT_DTYPES, dtype_name, refuse


def is_array(x: Any) -> bool:
    """Is x something with a shape and a dtype?"""
    return hasattr(x, "shape") and hasattr(x, "dtype")


def is_traceable(x: Any) -> bool:
    """May x, an array or a tree of them, be an argument of a function that JAX transforms?"""
    try:
        for leaf in jax.tree.leaves(x):
            jax.typeof(leaf)
    except TypeError:
        return False
    return True


def is_key(x: Any) -> bool:
    """Is x one `jax.random` key, typed or raw?"""
    if not is_array(x):
        return False
    if dtype_name(x) == "uint32":
        return len(x.shape) == 1 and x.shape[0] > 0
    return is_traceable(x) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and x.shape == ()


def check_array(name: str, x: Any, shape: tuple[int | None, ...], dtypes: tuple[str, ...]) -> None:
    """Refuse x unless it is an array of this shape (None: any size) and one of these dtypes."""
    sizes = ", ".join("any" if s is None else str(s) for s in shape)
    wanted = f"an array [{sizes}] of {' or '.join(dtypes)}"
    if not is_array(x) or len(x.shape) != len(shape):
        raise refuse(name, wanted, x)
    if any(s is not None and s != n for s, n in zip(shape, x.shape, strict=True)):
        raise refuse(name, wanted, x)
    if dtype_name(x) not in dtypes:
        raise refuse(name, wanted, x)


def check_qkv(query: Any, key: Any, value: Any) -> None:
    """Refuse queries, keys and values whose shapes or dtypes do not go together."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_array(name, x, (None,) * 4, FLOAT_DTYPES)
        if 0 in x.shape:
            raise refuse(name, "no dimension of size 0", x)
    B, _, N, H = query.shape
    dtype = jnp.dtype(query.dtype).name
    check_array("key", key, (B, None, None, H), (dtype,))
    check_array("value", value, key.shape, (dtype,))
    if N % key.shape[2]:
        raise refuse("key", f"a number of kv heads that divides the {N} query heads", key)
    if H % 8 or H > 256:
        raise refuse("query", "a head dim that is a multiple of 8 up to 256", query)


def check_bool(name: str, x: Any) -> None:
    """Refuse x unless it is True or False."""
    if not isinstance(x, bool):
        raise refuse(name, "True or False", x)


def check_choice(name: str, x: Any, choices: tuple[str, ...]) -> None:
    """Refuse x unless it is one of these strings."""
    if not isinstance(x, str) or x not in choices:
        raise refuse(name, " or ".join(map(repr, choices)), x)


def check_index(name: str, x: Any) -> int:
    """x as an int, refused unless it is one and not negative."""
    try:
        number = operator.index(x)
    except TypeError:
        raise refuse(name, "an int that is not negative", x) from None
    if isinstance(x, bool) or number < 0:
        raise refuse(name, "an int that is not negative", x)
    return number


def check_number(name: str, x: Any, low: float, high: float, wanted: str) -> None:
    """Refuse x unless it is a Python number with low <= x < high."""
    if isinstance(x, bool) or not isinstance(x, int | float) or not low <= x < high:
        raise refuse(name, wanted, x)


def check_positive(name: str, x: Any) -> None:
    """Refuse x unless it is a positive finite Python number."""
    check_number(name, x, math.nextafter(0.0, 1.0), math.inf, "a positive finite Python number")


def check_dtype(name: str, x: Any) -> Any:
    """x as a dtype, refused unless it is a floating point one that attention takes."""
    try:
        dtype = None if x is None else jnp.dtype(x)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in FLOAT_DTYPES:
        raise refuse(name, f"one of {', '.join(FLOAT_DTYPES)}", x)
    return dtype


def check_ratio(ratio: Any) -> None:
    """Refuse a sparsity_ratio that is not a number in (0, 1]."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio <= 1:
        raise refuse("sparsity_ratio", "the share of admissible blocks kept, in (0, 1]", ratio)


def plain(name: str, x: Any) -> Any:
    """x with the numbers of arrays as Python's and with lists as tuples, so that it has a hash.

    Example:
        >>> plain("window_size", [np.int64(3), None]), plain("dilation_rates", np.array([1, 2]))
        ((3, None), (1, 2))
    """
    if isinstance(x, Tracer):
        raise refuse(name, "a value that is known when the call is traced", x)
    if is_array(x):
        x = np.asarray(x).tolist()
    return tuple(plain(name, i) for i in x) if isinstance(x, list | tuple) else x


def check_scale(scale: Any) -> None:
    """Refuse a scale that is neither None nor a finite number."""
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) < 1e30:
        raise refuse("scale", "None or a finite Python number", scale)


def check_dropout(dropout_rate: Any, dropout_key: Any, deterministic: Any) -> bool:
    """Refuse inconsistent dropout arguments; True if dropout acts."""
    if isinstance(dropout_rate, bool) or not isinstance(dropout_rate, int | float):
        raise refuse("dropout_rate", "a Python number in [0, 1)", dropout_rate)
    if not 0 <= dropout_rate < 1:
        raise refuse("dropout_rate", "a Python number in [0, 1)", dropout_rate)
    check_bool("deterministic", deterministic)
    if dropout_key is not None:
        typed = is_array(dropout_key) and jnp.issubdtype(dropout_key.dtype, jax.dtypes.prng_key)
        raw = is_array(dropout_key) and dtype_name(dropout_key) == "uint32"
        raw = raw and dropout_key.ndim == 1 and dropout_key.size > 0
        if not (raw or (typed and dropout_key.shape == ())):
            raise refuse("dropout_key", "one jax.random key", dropout_key)
    acts = dropout_rate > 0 and not deterministic
    if acts and dropout_key is None:
        raise refuse("dropout_key", "a jax.random key when dropout acts", dropout_key)
    return acts


def segment_ids_of(
    query: Any, key: Any, q_segment_ids: Any, kv_segment_ids: Any, key_padding_mask: Any
) -> tuple[jax.Array | None, jax.Array | None]:
    """Both segment ids, int32 [B, T] and [B, S], from the three ways to say who attends whom.

    Raises:
        ValueError: wrong shape or dtype, or ids for only one side where T differs from S.
    """
    (B, T), S = query.shape[:2], key.shape[1]
    if q_segment_ids is not None:
        check_array("q_segment_ids", q_segment_ids, (B, T), ("int32",))
    if kv_segment_ids is not None:
        check_array("kv_segment_ids", kv_segment_ids, (B, S), ("int32",))
        if q_segment_ids is None:
            raise refuse("q_segment_ids", "segment ids too when kv_segment_ids are given", None)
    elif q_segment_ids is not None:
        if T != S:
            raise refuse("kv_segment_ids", f"segment ids too when T={T} differs from S={S}", None)
        kv_segment_ids = q_segment_ids
    if key_padding_mask is not None:
        check_array("key_padding_mask", key_padding_mask, (B, S), ("bool",))
        ids: Any = kv_segment_ids
        if q_segment_ids is None:
            q_segment_ids, ids = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
        kv_segment_ids = jnp.where(key_padding_mask, ids, 0)
    return q_segment_ids, kv_segment_ids
