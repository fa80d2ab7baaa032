"""What the kernels cannot take, decided from shapes, dtypes and options alone."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import config, schedule
from pallas_kernels.compat import varying_axes
from pallas_kernels.copies import copies_boxes
from pallas_kernels.marks import kinds_of


def unsupported(
    query: Any,
    key: Any,
    value: Any,
    *,
    branches: Sequence[tuple[int, int, int, tuple[int, ...]]],
    is_causal: bool = False,
    scale: float | None = None,
    q_segment_ids: Any = None,
    kv_segment_ids: Any = None,
    q_start: Any = 0,
    k_start: Any = 0,
    q_positions: Any = None,
    kv_positions: Any = None,
    dropout_rate: float = 0.0,
    dropout_seed: Any = None,
    keep: Any = None,
    carry: Any = None,
    out_dtype: Any = None,
    deterministic: bool | None = None,
    device_kind: str,
) -> tuple[str, ...]:
    """Why `attend` cannot take this call; empty if it can. Looks at shapes, dtypes, options only.

    device_kind: `jax.Device.device_kind` of the device that would run it.

    Example:
        >>> x = jax.ShapeDtypeStruct((1, 8, 1, 20), jnp.float32)
        >>> unsupported(x, x, x, branches=((8, 1, 0, (0,)),), device_kind="NVIDIA H100 80GB HBM3")
        ('dtype float32: wanted bfloat16 or float16', 'head size 20: wanted 16 to 256 by 8')
    """
    ids, positions = (q_segment_ids, kv_segment_ids), (q_positions, kv_positions)
    if wrong := _shape_reasons(query, key, value, ids, positions, carry):
        return wrong
    reasons = []
    if not config.is_hopper(device_kind):
        reasons.append(f"device {device_kind!r}: wanted an NVIDIA Hopper GPU")
    dtypes = {jnp.dtype(x.dtype).name for x in (query, key, value)}
    if not dtypes <= {"bfloat16", "float16"} or len(dtypes) != 1:
        reasons.append(f"dtype {', '.join(sorted(dtypes))}: wanted bfloat16 or float16")
    head_dim = query.shape[-1]
    if head_dim % 8 or not 16 <= head_dim <= 256:
        reasons.append(f"head size {head_dim}: wanted 16 to 256 by 8")
    axes = ", ".join(sorted(varying_axes(query)))
    if axes:
        reasons.append(
            f"inside a shard_map that checks what varies over {axes}: wanted check_vma=False,"
            " because JAX's kernels cannot update arrays in place under that check"
        )
    if min(*query.shape, *key.shape) == 0:
        reasons.append("an empty array")
    if scale is not None and not (_is_number(scale) and 0 < scale < math.inf):
        reasons.append(f"scale {scale}: wanted a positive number known when tracing")
    if not (_is_number(dropout_rate) and 0 <= dropout_rate < 1):
        reasons.append(f"dropout_rate {dropout_rate}: wanted a number in [0, 1)")
    elif dropout_rate and dropout_seed is None:
        reasons.append("dropout_rate without dropout_seed")
    reasons += mark_reasons(query, key, ids, positions)
    reasons += _branch_reasons(query, key, branches, q_start, k_start)
    out = result_dtype(query, carry, out_dtype)
    if not reasons and out.name not in ("bfloat16", "float16", "float32"):
        reasons.append(f"out_dtype {out.name}: wanted bfloat16, float16 or float32")
    head = tile_columns(head_dim, False)
    marks = kinds_of(is_causal, dropout_rate, q_segment_ids, q_positions)
    blocks = (
        config.forward_blocks(head, out.itemsize, 1, causal=is_causal, marks=marks.count),
        config.queries_blocks(head, marks.count),
        config.keys_blocks(head, marks.count),
    )
    if not reasons and None in blocks:
        what = f"{out.name} output{marks.named}"
        reasons.append(f"head size {head_dim} with {what}: tiles exceed shared memory")
    return tuple(reasons)


def mark_reasons(
    query: Any, key: Any, ids: tuple[Any, Any], positions: tuple[Any, Any]
) -> list[str]:
    """Why what tokens carry cannot be taken; ids, positions: of queries and keys."""
    reasons = []
    for name, (q, k) in (("segment_ids", ids), ("positions", positions)):
        if q is None and k is not None:
            reasons.append(f"kv_{name} without q_{name}")
        if q is not None and k is None and key.shape[1] != query.shape[1]:
            reasons.append(f"q_{name} without kv_{name} for keys of another length")
    return reasons


def _shape_reasons(
    query: Any,
    key: Any,
    value: Any,
    ids: tuple[Any, Any],
    positions: tuple[Any, Any],
    carry: Any,
) -> tuple[str, ...]:
    """Arrays that do not fit each other: a kernel would read past their ends, where it finds 0."""
    if len(query.shape) != 4 or len(key.shape) != 4:
        return (f"query {query.shape}, key {key.shape}: wanted [B, T, N, H] and [B, S, K, H]",)
    (B, T, N, H), (S, K) = query.shape, key.shape[1:3]
    out, lse = (None, None) if carry is None else (carry[0], carry[1])
    wanted = {
        "key": (key, (B, S, K, H)),
        "value": (value, (B, S, K, H)),
        "q_segment_ids": (ids[0], (B, T)),
        "kv_segment_ids": (ids[1], (B, S)),
        "carry[0]": (out, (B, T, N, H)),
        "carry[1]": (lse, (B, T, N)),
    }
    for name, x, length in zip(("q_positions", "kv_positions"), positions, (T, S), strict=True):
        one_for_all = x is not None and tuple(x.shape) == (1, length)
        wanted[name] = (x, (1 if one_for_all else B, length))
    found = [
        f"{name} {tuple(x.shape)}: wanted {shape}"
        for name, (x, shape) in wanted.items()
        if x is not None and tuple(x.shape) != shape
    ]
    if K and N % K:
        found.append(f"{N} query heads: wanted a multiple of the {K} key heads")
    return tuple(found)


def _branch_reasons(query: Any, key: Any, branches: Any, q_start: Any, k_start: Any) -> list[str]:
    reasons = []
    end = None
    if is_static(q_start) and is_static(k_start):
        end = max(int(q_start) + query.shape[1], int(k_start) + key.shape[1])
        if end >= schedule.UNBOUNDED:
            reasons.append(f"positions up to {end}: wanted less than {schedule.UNBOUNDED}")
        if min(q_start, k_start) < 0:
            reasons.append(f"starts {q_start} and {k_start}: wanted 0 or more")
    for w, r, first, offsets in branches:
        if min(w, r) < 1 or first < 0 or first + len(offsets) > query.shape[2]:
            reasons.append(
                f"branch ({w}, {r}) of heads {first} to {first + len(offsets) - 1}: wanted positive"
                f" lengths and rates, and heads of {query.shape[2]}"
            )
            return reasons
    count = sum(len(schedule.phases(w, r, end)) for w, r, _, _ in branches)
    if not 1 <= count <= 30:
        reasons.append(
            f"{count} branches, where one whose rate does not divide its segments counts for each"
            " residue that these start with: wanted 1 to 30"
        )
    step = 8 * schedule.common_stride(tuple(r for _, r, _, _ in branches))
    longest = max(query.shape[1], key.shape[1])
    if step > max(4096, longest):
        reasons.append(f"rates whose common multiple, {step // 8}, is large for {longest} rows")
    return reasons


def is_static(x: Any) -> bool:
    """Whether a start position is an int, not a traced value."""
    return isinstance(x, int | np.integer)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.number)


def result_dtype(query: Any, carry: Any, out_dtype: Any) -> Any:
    """The dtype of out: as asked, else float32 with a carry and query's own without."""
    if out_dtype is None:
        out_dtype = query.dtype if carry is None else jnp.float32
    return jnp.dtype(out_dtype)


def padded_head(head_dim: int) -> int:
    """wgmma takes the head dimension in steps of 16."""
    return -(-head_dim // 16) * 16


def tile_columns(head_dim: int, interpret: bool) -> int:
    """Columns of a tile in shared memory: where they are boxes as many as a swizzle has.

    Example:
        >>> tile_columns(48, False), tile_columns(48, True), tile_columns(72, False)
        (64, 48, 80)
    """
    if copies_boxes(head_dim, interpret):
        return max(16, 1 << (head_dim - 1).bit_length())
    return padded_head(head_dim)


def pad(x: jax.Array, axis: int, size: int, fill: float = 0) -> jax.Array:
    """x with `fill` behind its end along an axis, up to a size."""
    if x.shape[axis] == size:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, widths, constant_values=fill)


def pad_marks(marks: Any, q_rows: int, k_rows: int) -> Any:
    """Marks of queries and of keys for whole tiles or copies; id 0 sees nothing."""
    sides = zip(marks, (q_rows, k_rows), strict=True)
    return tuple(tuple(pad(x.astype(jnp.int32), 1, rows) for x in side) for side, rows in sides)


def two_passes(deterministic: bool | None) -> bool:
    """Whether gradients come from two passes, whose sums have a fixed order.

    deterministic None: if XLA_FLAGS ask for deterministic operations.

    Example:
        >>> two_passes(None), two_passes(True)
        (False, True)
    """
    if deterministic is not None:
        return bool(deterministic)
    flags = os.environ.get("XLA_FLAGS", "").split()
    names = ("--xla_gpu_deterministic_ops", "--xla_gpu_exclude_nondeterministic_ops")
    return any(flag in (name, f"{name}=true", f"{name}=1") for flag in flags for name in names)


def current_device_kind() -> str:
    """The kind of the device that kernels are made for."""
    if jax.default_backend() == "gpu":
        return jax.local_devices()[0].device_kind
    # Lowered for a GPU elsewhere, or interpreted.
    return "NVIDIA H100 80GB HBM3"
