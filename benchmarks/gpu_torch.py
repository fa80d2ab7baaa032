"""The rows of `gpu.py` that PyTorch gives: its dense attention, and torchscale's arithmetic."""

import functools
from collections.abc import Callable
from typing import Any

from benchmarks import gpu_peers as peers
from benchmarks.gpu_lab import HEADS, Lab, Shape, Step, timed
from benchmarks.gpu_table import Row


def dense(lab: Lab, shape: Shape) -> Step:
    """Dense attention over all T, whatever the shape's lists."""
    everything = Shape(shape.name, ((shape.T, 1),), shape.T, shape.H, shape.causal, shape.dtype)
    return _step(lab, everything, "dense torch SDPA", lambda t: peers.torch_dense(t, shape.causal))


def torchscale(lab: Lab, shape: Shape) -> Step:
    """The shape's lists with torchscale's operations."""
    return _step(lab, shape, "torchscale arithmetic", lambda t: peers.torchscale(t, shape.lists))


def _step(lab: Lab, shape: Shape, who: str, make: Callable[[Any], Callable]) -> Step:
    return Step(f"{shape.name}, {who}", (), lambda: lab.add(row(shape, who, make, "cuda")))


def row(shape: Shape, who: str, make: Callable[[Any], Callable], device: str) -> Row:
    """Times forward, and forward with backward, of a function of torch tensors [1, T, N, H]."""
    import torch

    size = (1, shape.T, HEADS, shape.H)
    dtype = getattr(torch, shape.dtype)
    q, k, v, do = (torch.randn(size, device=device, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attend, found = make(torch), Row(shape.name, who)

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def both() -> Any:
        return torch.autograd.grad(attend(*leaves), leaves, do)

    with torch.no_grad():
        timed(found, shape, functools.partial(attend, *leaves), None, wait)
    timed(found, shape, None, both, wait)
    if device == "cuda":
        torch.cuda.empty_cache()
    return found
