"""Attention inside the segments of dilated branches, each residue of each segment for itself.

A router needs that: its lists differ from segment to segment, so the segments become examples of a
batch. Only the rows that a head keeps are computed with; the branches' results are merged.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dilax._types import stats_dtype
from dilax.dilate import Piece, dilate, pieces, scatter
from dilax.partial import Partial
from dilax.spec import Branch

# (query [b, L, n, H], key, value [b, L, k, H], ids of both, query heads, key heads, places [M, L])
# -> out [b, L, n, H], lse [b, L, n]; example i lies in places[i % M], -1 where there is padding
Attend = Callable[..., tuple[jax.Array, jax.Array]]


def attend_branch(
    attend: Attend, branch: Branch, query: jax.Array, key: jax.Array, value: jax.Array, ids: Any
) -> Partial:
    """The Partial [B, T, N] of one branch; positions and heads that it does not keep see nothing.

    query [B, T, N, H], key and value [B, T, K, H]; ids of queries and keys [B, T], or None twice.

    Example:
        >>> def mean(q, k, v, *_):
        ...     return jnp.broadcast_to(v.mean(1, keepdims=True), q.shape), 0 * q[..., 0]
        >>> x = jnp.arange(8.0).reshape(1, 8, 1, 1)
        >>> found = attend_branch(mean, Branch(4, 2, 0, (1,)), x, x, x, (None, None))
        >>> found.out[0, :, 0, 0].tolist()
        [0.0, 2.0, 0.0, 2.0, 0.0, 6.0, 0.0, 6.0]
    """
    T, N = query.shape[1:3]
    along = [
        _piece(attend, branch, piece, query, key, value, ids)
        for piece in pieces(branch, T, T, 0, 0)
    ]
    out, lse = (jnp.concatenate(x, axis=1) for x in zip(*along, strict=True))
    after = N - branch.first_head - len(branch.offsets)
    others = [(0, 0), (0, 0), (branch.first_head, after)]
    lse = jnp.pad(lse, others, constant_values=-jnp.inf)
    return Partial(jnp.pad(out, [*others, (0, 0)]), lse)


def _piece(attend: Attend, branch: Branch, piece: Piece, query, key, value, ids):
    """out and lse [B, M * length, heads of the branch, ...] of M segments."""
    (B, T, N, H), rows, M = query.shape, piece.queries, piece.segments
    stats, share = stats_dtype(query.dtype), N // key.shape[2]
    outs, lses, done = [], [], []
    for residue in sorted({*branch.offsets}):
        heads = [i for i, x in enumerate(branch.offsets, branch.first_head) if x == residue]
        kv_heads = _kv_heads(heads, share)
        done += heads
        real = rows.real(residue)
        shape = (B, M, len(heads), rows.steps)
        if not real.any():
            outs.append(jnp.zeros((*shape, H), stats))
            lses.append(jnp.full(shape, -jnp.inf, stats))
            continue

        def taken(x, heads: Iterable[int], residue=residue):
            x = dilate(x, rows, M, tuple((head, residue) for head in heads))
            return jnp.swapaxes(x.reshape(B * M, *x.shape[2:]), 1, 2)

        mine = ids
        if ids[0] is not None or not real.all():
            ones = jnp.ones((B, T), jnp.int32)
            mine = (ones if x is None else x for x in ids)
            mine = tuple(taken(x[..., None], (0,))[..., 0] for x in mine)  # 0 in padding rows
        kept = taken(query, heads), *(taken(x, kv_heads) for x in (key, value))
        out, lse = attend(*kept, mine, heads, kv_heads, rows.places(residue, M))
        outs.append(jnp.swapaxes(out.astype(stats), 1, 2).reshape(*shape, H))
        lses.append(jnp.swapaxes(lse, 1, 2).reshape(shape))
    back = np.argsort(done)
    return tuple(
        scatter(jnp.concatenate(x, axis=2)[:, :, back], rows, branch.offsets, fill)
        for x, fill in ((outs, 0.0), (lses, -jnp.inf))
    )


def _kv_heads(heads: Sequence[int], share: int) -> list[int]:
    """The key heads of some query heads: each once if they share them evenly, else one each."""
    each = [head // share for head in heads]
    once = sorted({*each})
    return once if each == [x for x in once for _ in range(len(each) // len(once))] else each
