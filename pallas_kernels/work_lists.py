"""Who works on which tile, in which order: the list of every block of a persistent grid."""

import heapq

import numpy as np

from pallas_kernels.schedule import Launch, knows_starts, participation, steps

# Keys and values that tiles in flight together should share in the L2 cache.
CHUNK_BYTES = 12 << 20


def _chunks(launch: Launch, kv_head: np.ndarray, tile: np.ndarray, row_bytes: int) -> np.ndarray:
    """Numbers the chunks of tiles that share CHUNK_BYTES of keys and values."""
    budget = max(1, CHUNK_BYTES // row_bytes)
    shortest = min(launch.home, *(n * r for n, r in zip(launch.lengths, launch.rates, strict=True)))
    span = max(budget // shortest, 1) * shortest
    if span >= launch.home:
        return kv_head // max(1, budget // launch.home)
    position = tile * (launch.block_home * launch.stride)
    return kv_head * -(-launch.home // span) + position // span


def work_lists(
    launch: Launch, *, batch: int, ctas: int, row_bytes: int, group: int, skip_empty: bool
) -> np.ndarray:
    """Assigns every tile to a block of the persistent grid, longest first.

    Tiles are taken head by head in chunks whose keys and values fit the L2 cache, longest first
    within a chunk, and each goes to the block with the least work so far.

    row_bytes: bytes of one position of one kv head, both away arrays together.
    group: query heads for each kv head (items of `transposed` launches are per kv head).
    Returns int32 `[ctas, 1 + items, 3]`: entry 0 holds the count; the others (tile code, branch
    mask, away tiles), code = ((batch * tiles + tile) * heads + head) * residues + residue, with
    tiles and residues those of `launch.numbering`.
    """
    away_tiles, mask = steps(launch), participation(launch)
    heads = launch.heads
    if launch.transposed:
        heads = launch.heads // group
        away_tiles = away_tiles.reshape(heads, group, *away_tiles.shape[1:]).sum(1)
        mask = np.bitwise_or.reduce(mask.reshape(heads, group, -1), axis=1)
    head, residue, tile = np.meshgrid(
        *(np.arange(n) for n in away_tiles.shape), indexing="ij", sparse=False
    )
    keep = np.ones(away_tiles.shape, bool)
    if skip_empty:
        keep &= (mask != 0)[:, :, None]
        if launch.gaps and knows_starts(launch):
            keep &= away_tiles > 0
    head, residue, tile, cost = (x[keep] for x in (head, residue, tile, away_tiles))
    kv_head = head // (1 if launch.transposed else group)
    chunk = _chunks(launch, kv_head, tile, row_bytes)
    example = np.repeat(np.arange(batch), len(cost))
    head, residue, tile, cost, chunk = (
        np.tile(x, batch) for x in (head, residue, tile, cost, chunk)
    )
    order = np.lexsort((residue, tile, head, -cost, chunk, example))
    # The end of the list only fills gaps: the smallest tiles of all chunks, longest first. No more
    # than it needs: what they read has left the cache by then, so they take twice as long.
    ascending = np.sort(cost)
    tail = ctas * int(cost.max(initial=0)) // 2
    largest = int(np.searchsorted(np.cumsum(ascending), tail))
    fill = cost[order] <= (ascending[min(largest, len(cost) - 1)] if len(cost) else 0)
    last = order[fill]
    order = np.concatenate([order[~fill], last[np.argsort(-cost[last], kind="stable")]])
    tiles, residues = launch.numbering
    code = ((example * tiles + tile) * heads + head) * residues + residue
    items = np.stack([code, mask[head, residue], cost], axis=-1)[order].astype(np.int32)
    # Loading the home tile and writing the result cost about as much as one more visit.
    cta = _deal(cost[order] + 1, ctas)
    counts = np.bincount(cta, minlength=ctas)
    table = np.zeros((ctas, 1 + int(counts.max(initial=0)), 3), np.int32)
    table[:, 0, 0] = counts
    by_cta = np.argsort(cta, kind="stable")
    place = np.arange(len(cta)) - np.repeat(np.cumsum(counts) - counts, counts)
    table[cta[by_cta], 1 + place] = items[by_cta]
    return table


def _deal(weights: np.ndarray, ctas: int) -> np.ndarray:
    """Gives each item in turn to the block with the least work so far: its number."""
    if len(weights) == 0 or weights.min() == weights.max():
        return np.arange(len(weights)) % ctas  # the same, at once
    load = [(0, cta) for cta in range(ctas)]
    chosen = np.empty(len(weights), np.int64)
    for i, weight in enumerate(weights.tolist()):
        total, chosen[i] = load[0]
        heapq.heapreplace(load, (total + weight, load[0][1]))
    return chosen
