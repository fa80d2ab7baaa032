"""Single rows of attention in float64 on the host: which keys a row sees, and what they give it."""

from collections.abc import Iterable
from typing import Any

import numpy as np


def keys_of(
    branches: Iterable[Any], position: int, head: int, length: int, causal: bool
) -> np.ndarray:
    """Positions of the keys that a query sees, as often as branches show them to it.

    branches: (segment length, rate, first head, residue of each head from that one on).
    """
    found = []
    for w, r, first, offsets in branches:
        offset = offsets[head - first]
        if position % w % r == offset:
            place = position // w * w + np.arange(offset, w, r)
            found.append(place[place < (position + 1 if causal else length)])
    return np.concatenate(found)


def exact_row(
    q: np.ndarray, do: np.ndarray, k: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """out and the gradient of the query: q and do are [H], k and v [S, H] of the keys it sees.

    One softmax over all of them is what branches give that are merged by their log-sum-exps.
    """
    q, do, k, v = (x.astype(np.float64) for x in (q, do, k, v))
    scale = q.size**-0.5
    logits = k @ q * scale
    p = np.exp(logits - logits.max())
    p /= p.sum()
    out = p @ v
    return out, (p * (v @ do - do @ out)) @ k * scale


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    """How far a row is from another, over the length of that one."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
