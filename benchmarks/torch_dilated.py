"""LongNet's dilated attention composed in PyTorch: strided gather, flash attention, lse merge.

The peer of `benchmarks/cpu.py`, written from the paper over torch's own CPU flash kernel. It runs
in an interpreter of its own, which needs torch and numpy: it reads one command a line ("load DIR",
"forward", "both") and answers with seconds. Branch weights carry no gradient, as in Microsoft's
torchscale, so its backward pass does a little less than the exact one.
"""

import sys
import time
from typing import Any

import numpy as np
import torch


def gather(x, w, r):
    """[B, T, N, H] -> [B * T / w, N, w / r, H]: head n keeps the positions congruent to n mod r."""
    B, T, N, H = x.shape
    x = x.view(B, T // w, w // r, r, N // r, r, H).diagonal(dim1=3, dim2=5)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(B * (T // w), N, w // r, H)


def scatter(y, B, T, w, r, fill):
    """The inverse of `gather`, with `fill` where a head keeps nothing."""
    N, L, rest = y.shape[1], w // r, y.shape[3:]
    y = y.reshape(B, T // w, N // r, r, L, *rest).movedim(4, 2).movedim(4, -1)
    dense = torch.full((B, T // w, L, r, N // r, r, *rest), fill)
    dense.diagonal(dim1=3, dim2=5).copy_(y)
    return dense.view(B, T, N, *rest)


def dilated(query, key, value, segment_lengths, dilation_rates) -> Any:
    """Dilated attention [B, T, N, H] over branches that divide T and N."""
    B, T, N, _ = query.shape
    outs, lses = [], []
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        q, k, v = (gather(x, w, r) for x in (query, key, value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, False)[:2]
        lse = lse if lse.shape[1] == N else lse.transpose(1, 2)
        outs.append(scatter(out, B, T, w, r, 0.0))
        lses.append(scatter(lse, B, T, w, r, -torch.inf))
    with torch.no_grad():
        weights = torch.softmax(torch.stack(lses), 0)
    return sum(out * weight[..., None] for out, weight in zip(outs, weights, strict=True))


def main():
    torch.set_num_threads(int(sys.argv[1]))
    branches = [tuple(map(int, part.split(","))) for part in sys.argv[2:4]]
    print(torch.__version__, flush=True)
    query: Any = None
    key = value = weight = query
    for line in sys.stdin:
        command, _, folder = line.strip().partition(" ")
        if command == "load":
            query, key, value, weight = (torch.from_numpy(x) for x in np.load(f"{folder}/in.npy"))
            np.save(f"{folder}/out.npy", dilated(query, key, value, *branches).numpy())
        begin = time.perf_counter()
        if command == "forward":
            dilated(query, key, value, *branches)
        elif command == "both":
            leaves = [x.detach().requires_grad_() for x in (query, key, value)]
            (dilated(*leaves, *branches) * weight).sum().backward()
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
