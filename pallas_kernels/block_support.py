"""What the kernels over block lists cannot take, decided from shapes, dtypes and options alone."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import block_lists, config
from pallas_kernels.compat import varying_axes
from pallas_kernels.marks import kinds_of
from pallas_kernels.support import (
    is_static,
    mark_reasons,
    padded_head,
    result_dtype,
)

LARGEST_POSITION = 1 << 28


def unsupported(
    query: Any,
    key: Any,
    value: Any,
    *,
    blocks: Any,
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
    """Why `blocks.attend` cannot take this call; empty if it can.

    Looks at shapes, dtypes and options only. device_kind: `jax.Device.device_kind` of the device
    that would run it.

    Example:
        >>> import types, jax
        >>> x = jax.ShapeDtypeStruct((1, 256, 1, 64), jnp.bfloat16)
        >>> one = np.zeros((1, 1, 8, 1), np.int32)
        >>> lists = types.SimpleNamespace(
        ...     columns=one, counts=one[..., 0], bands=((None, None),), band_index=None,
        ...     block_size=32, starts=None, longest=None)
        >>> unsupported(x, x, x, blocks=lists, device_kind="NVIDIA H100 80GB HBM3")
        ('block_size 32: wanted 64 or a multiple of 128',)
    """
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
    if scale is not None and not (isinstance(scale, int | float | np.number) and scale > 0):
        reasons.append(f"scale {scale}: wanted a positive number known when tracing")
    if dropout_rate and dropout_seed is None:
        reasons.append("dropout_rate without dropout_seed")
    ids, positions = (q_segment_ids, kv_segment_ids), (q_positions, kv_positions)
    reasons += mark_reasons(query, key, ids, positions)
    ends = [x.shape[1] + int(s) for x, s in ((query, q_start), (key, k_start)) if is_static(s)]
    if max(ends, default=0) >= LARGEST_POSITION:
        reasons.append(f"positions up to {max(ends)}: wanted less than {LARGEST_POSITION}")
    reasons += _list_reasons(query, key, blocks)
    if reasons:
        return tuple(reasons)
    out = result_dtype(query, carry, out_dtype)
    marks = kinds_of(is_causal, dropout_rate, q_segment_ids, q_positions)
    head, size = padded_head(head_dim), blocks.block_size
    tiles = (
        config.block_forward_blocks(head, size, out.itemsize, marks.count),
        config.block_queries_blocks(head, size, marks.count),
        config.block_keys_blocks(head, size, marks.count),
    )
    if None in tiles:
        what = f"blocks of {size}, {out.name} output{marks.named}"
        reasons.append(f"head size {head_dim} with {what}: tiles exceed shared memory")
    return tuple(reasons)


def _list_reasons(query: Any, key: Any, blocks: Any) -> list[str]:
    reasons, size = [], blocks.block_size
    if size != 64 and (size % 128 or size < 128):
        return [f"block_size {size}: wanted 64 or a multiple of 128"]
    B, T, N, _ = query.shape
    S, K = key.shape[1:3]
    b, n, rows = blocks.counts.shape
    if b not in (1, B) or n not in (1, K, N) or rows != -(-T // size):
        reasons.append(
            f"lists {blocks.counts.shape}: wanted [1 or {B}, 1, {K} or {N}, {-(-T // size)}]"
        )
    for name, count, bits in (
        ("blocks", -(-max(T, S) // size), block_lists.BLOCK_BITS),
        ("query heads for each key head", N // K, block_lists.MEMBER_BITS),
        ("bands", len(blocks.bands), block_lists.BAND_BITS),
    ):
        if count > 1 << bits:
            reasons.append(f"{count} {name}: wanted at most {1 << bits}")
    return reasons
