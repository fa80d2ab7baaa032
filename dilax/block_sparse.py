"""Block-sparse attention: each block of queries sees only the key blocks of a pattern."""

from typing import Any

import jax
import numpy as np

from dilax._types import refuse
from dilax.block_lists import BlockLists, check_lists, window
from dilax.checks import check_choice
from dilax.pattern_config import as_pattern
from dilax.spec import Branch, Combine, DilatedSpec, HeadOffset, as_spec
from dilax.union import union_attention

VISITING_ORDERS = ("longest_first", "row", "hilbert")


def block_sparse_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    pattern: Any,
    *,
    segment_lengths: Any = None,
    dilation_rates: Any = None,
    combine: Combine = "lse",
    head_offset: HeadOffset = "interleaved",
    pad_mode: str = "mask",
    average_branches: bool | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    q_segment_ids: jax.Array | None = None,
    kv_segment_ids: jax.Array | None = None,
    key_padding_mask: jax.Array | None = None,
    q_start: int = 0,
    k_start: int = 0,
    q_positions: jax.Array | None = None,
    kv_positions: jax.Array | None = None,
    bias_k: jax.Array | None = None,
    bias_v: jax.Array | None = None,
    zero_attn: bool = False,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    deterministic: bool = True,
    implementation: str | None = None,
    visiting_order: str = "longest_first",
    return_lse: bool = False,
) -> Any:
    """Attention in which each block of queries sees only the key blocks that a pattern lists.

    One softmax per query over all the keys of its blocks; time and memory grow with the number of
    blocks kept. Any T and S: the last block may be short.

    Args:
        query: [B, T, N, H], float32, bfloat16, float16 or float64; H a multiple of 8 up to 256.
        key, value: [B, S, K, H] of the same dtype; N is a multiple of K.
        pattern: a `SparsePatternConfig`, a pattern of `dilax.patterns`, the name of a preset, or
            `BlockLists`, static or traced (one per branch if there are segments, for the
            ceil(W / R) places of a segment; where W is longer than the sequence they are cut).
            Blocks of 64 or a multiple of 128 (any, with implementation="xla").
        segment_lengths, dilation_rates: None, or branches as in `dilax.dilated_attention`: the
            pattern then applies inside each branch, in blocks of the places that a segment has
            after dilation, and is cut where a segment is short; window sizes count such places.
        combine, head_offset, average_branches: of the branches; their defaults without segments.
        pad_mode: "mask", the only one: padding that acts as keys lies in no block.
        is_causal, scale, q_segment_ids, kv_segment_ids, key_padding_mask, q_start, k_start, bias_k,
            bias_v, zero_attn, dropout_rate, dropout_key, deterministic, implementation, return_lse:
            as in `dilax.dilated_attention`. Blocks count from the arrays' first rows; causality and
            windows go by positions. Segment ids only mask: a pattern does not know them.
        q_positions, kv_positions: as there. The pattern goes by the order in which the tokens lie
            and every block of it is admissible; causality goes by the positions and masks.
        visiting_order: "longest_first", "row" or "hilbert", in which order the blocks of queries
            are worked on; the result is the same to the bit.

    Returns:
        out [B, T, N, H] in the query's dtype. A query that sees no key gives 0, and lse -inf.

    Raises:
        ValueError: an argument is wrong; the message says which, what was wanted and what came.
        UnsupportedError: the named implementation cannot take the call, with reasons.

    Source: Child et al. (arXiv:1904.10509), Longformer (arXiv:2004.05150), BigBird
    (arXiv:2007.14062).

    Example:
        >>> import jax, dilax
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 1000, 4, 16))
        >>> config = dilax.SparsePatternConfig("local_window", sparsity_ratio=0.25, block_size=64)
        >>> dilax.block_sparse_attention(q, k, v, config, is_causal=True).shape
        (1, 1000, 4, 16)
    """
    if segment_lengths is None:
        refuse_branch_options(dilation_rates, combine, head_offset, average_branches)
    check_choice("visiting_order", visiting_order, VISITING_ORDERS)
    if pad_mode != "mask":
        raise refuse("pad_mode", "'mask': padding that acts as keys lies in no block", pad_mode)

    def blocks(branches: tuple[Branch, ...] | None, q_start: int, k_start: int):
        causal = is_causal and q_positions is None  # of the indices
        if branches is None:
            return whole_lists(query, key, pattern, causal, q_start, k_start)
        spec = as_spec(segment_lengths, dilation_rates)
        return branch_lists(query, key, pattern, spec, branches, causal)

    with jax.named_scope("dilax.block_sparse_attention"):
        return union_attention(
            query,
            key,
            value,
            segment_lengths,
            dilation_rates,
            combine=combine,
            head_offset=head_offset,
            pad_mode=pad_mode,
            average_branches=average_branches,
            is_causal=is_causal,
            scale=scale,
            q_segment_ids=q_segment_ids,
            kv_segment_ids=kv_segment_ids,
            key_padding_mask=key_padding_mask,
            q_start=q_start,
            k_start=k_start,
            q_positions=q_positions,
            kv_positions=kv_positions,
            bias_k=bias_k,
            bias_v=bias_v,
            zero_attn=zero_attn,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            deterministic=deterministic,
            implementation=implementation,
            return_lse=return_lse,
            blocks=blocks,
            visiting_order=visiting_order,
        )


def attend_lists(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lists: BlockLists,
    *,
    dropout_bits: tuple[jax.Array, jax.Array] | None = None,
    bias_k: jax.Array | None = None,
    bias_v: jax.Array | None = None,
    zero_attn: bool = False,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """out and lse of `block_sparse_attention` over lists, without branches.

    dropout_bits: as in `union_attention`.
    """
    whole: Any = {"combine": "lse", "head_offset": "interleaved", "pad_mode": "mask"}
    whole |= {"average_branches": None, "q_start": 0, "k_start": 0}
    with jax.named_scope("dilax.block_sparse_attention"):
        return union_attention(
            query,
            key,
            value,
            None,
            None,
            key_padding_mask=None,
            kv_positions=None,
            bias_k=bias_k,
            bias_v=bias_v,
            zero_attn=zero_attn,
            return_lse=True,
            blocks=lambda *_: whole_lists(query, key, lists, False, 0, 0),
            dropout_bits=dropout_bits,
            **whole,
            **options,
        )


def refuse_branch_options(dilation_rates, combine, head_offset, average_branches) -> None:
    """Refuse options of branches where there are none."""
    for name, x, default in (
        ("dilation_rates", dilation_rates, None),
        ("combine", combine, "lse"),
        ("head_offset", head_offset, "interleaved"),
        ("average_branches", average_branches, None),
    ):
        if not isinstance(x, type(default)) or x != default:
            raise refuse(name, f"{default!r} without segment_lengths", x)


def whole_lists(query, key, pattern, is_causal: bool, q_start: int, k_start: int) -> BlockLists:
    """The checked block lists of a call without branches."""
    (B, T, N), (S, K) = query.shape[:3], key.shape[1:3]
    lists = pattern[0] if _are_lists(pattern) and len(pattern) == 1 else pattern
    if not isinstance(lists, BlockLists):
        where = {"is_causal": is_causal, "q_start": q_start, "k_start": k_start}
        lists = as_pattern("pattern", lists).lists(T, S, N, K, **where)
    check_lists(lists, lists.blocks(T), lists.blocks(S), batch=(1, B), heads=(1, K, N))
    return lists


def branch_lists(
    query, key, pattern, spec: DilatedSpec, branches: tuple[Branch, ...], is_causal: bool
) -> tuple[BlockLists, ...]:
    """The checked block lists of each branch: `branches` are those of the spec within the call."""
    B, N, K = query.shape[0], query.shape[2], key.shape[2]
    given = (pattern,) if isinstance(pattern, BlockLists) else pattern
    if not _are_lists(given):
        made = as_pattern("pattern", pattern)
        lengths = (-(-branch.segment_length // branch.dilation_rate) for branch in branches)
        given = [made.lists(L, L, N, K, is_causal=is_causal) for L in lengths]
    if len(given) != len(branches) or not all(isinstance(x, BlockLists) for x in given):
        raise refuse("pattern", f"{len(branches)} BlockLists, one per branch", pattern)
    found = []
    for i, (lists, branch) in enumerate(zip(given, branches, strict=True)):
        w, r = spec.segment_lengths[i], spec.dilation_rates[i]
        natural = lists.blocks(-(-w // r))
        rows = lists.blocks(-(-branch.segment_length // branch.dilation_rate))
        has = np.shape(lists.counts)[2:3]
        if has not in ((rows,), (natural,)):
            cut = f", or {rows} within the sequence" if rows < natural else ""
            wanted = f"lists with {natural} rows, for segments of {w} every {r}{cut}"
            raise refuse(f"pattern[{i}].counts", wanted, lists.counts)
        check_lists(lists, *has, *has, batch=(1, B), heads=(1, K, N))
        found.append(window(lists, 0, rows, 0, rows) if has != (rows,) else lists)
    return tuple(found)


def _are_lists(x: Any) -> bool:
    return isinstance(x, tuple | list) and len(x) > 0 and isinstance(x[0], BlockLists)
