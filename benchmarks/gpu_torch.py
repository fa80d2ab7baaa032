"""The rows of `gpu.py` that PyTorch gives: its dense attention, and torchscale's arithmetic."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpu_peers as peers
from benchmarks import torchscale_peer
from benchmarks.gpu_lab import (
    HEADS,
    Lab,
    Rival,
    Shape,
    Step,
    deviation,
    out_and_gradients,
    results,
)

DENSE = "dense torch SDPA"
# Of each, how the arithmetic is written.
TORCHSCALE = {
    "torchscale arithmetic": torchscale_peer.original,
    "torchscale arithmetic, rewritten": torchscale_peer.rewritten,
}


def dense(shape: Shape) -> Rival:
    """Dense attention over all T, whatever the shape's lists."""
    return rival(_everything(shape), DENSE, lambda t: peers.torch_dense(t, shape.causal))


def torchscale(shape: Shape) -> list[Rival]:
    """The shape's lists with torchscale's operations, as it runs them and rewritten."""
    return [rival(shape, who, _on_lists(shape, make)) for who, make in TORCHSCALE.items()]


def dense_compared(lab: Lab, shape: Shape) -> Step:
    """What `dense` times against cuDNN's result."""
    whole = _everything(shape)
    return _compared(lab, whole, DENSE, lambda t: peers.torch_dense(t, shape.causal), "cudnn")


def torchscale_compared(lab: Lab, shape: Shape) -> list[Step]:
    """What `torchscale` times against the same in float64: its heads, padding and weights."""
    return [
        _compared(lab, shape, who, _on_lists(shape, make), "torchscale in float64")
        for who, make in TORCHSCALE.items()
    ]


def _on_lists(shape: Shape, make: Callable[..., Callable]) -> Callable[[Any], Callable]:
    return functools.partial(make, lists=shape.lists)


def _everything(shape: Shape) -> Shape:
    return dataclasses.replace(shape, lists=((shape.T, 1),))


def _compared(lab: Lab, shape: Shape, who: str, make: Callable[[Any], Callable], peer: str) -> Step:
    def run(*theirs: Any) -> None:
        arrays = shape.inputs()
        lab.compare(shape, who, peer, deviation(outcome(make, arrays), results(theirs, arrays)))

    return Step(f"{shape.name}, {who}, beside {peer}", out_and_gradients(shape, peer), run)


def outcome(make: Callable[[Any], Callable], arrays: Iterable[jax.Array]) -> list[jax.Array]:
    """out, dq, dk, dv of a function of torch tensors, on JAX's arrays where they lie."""
    import torch

    *leaves, do = (torch.from_dlpack(x) for x in arrays)
    leaves = [x.requires_grad_() for x in leaves]
    out = make(torch)(*leaves)
    found = [x.detach().contiguous() for x in (out, *torch.autograd.grad(out, leaves, do))]
    if out.is_cuda:  # JAX, whose memory this is, does not know what torch still runs
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return [jnp.from_dlpack(x) for x in found]


def rival(shape: Shape, who: str, make: Callable[[Any], Callable], device: str = "cuda") -> Rival:
    """A function of torch tensors [1, T, N, H]."""

    def calls() -> dict[str, tuple[Callable, Callable]]:
        import torch

        size, dtype = (1, shape.T, HEADS, shape.H), getattr(torch, shape.dtype)
        q, k, v, do = (torch.randn(size, device=device, dtype=dtype) for _ in range(4))
        leaves = [x.requires_grad_() for x in (q, k, v)]
        attend = make(torch)

        def wait(_: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()

        def forward() -> Any:
            with torch.no_grad():
                return attend(*leaves)

        def both() -> Any:
            return torch.autograd.grad(attend(*leaves), leaves, do)

        return {"forward": (forward, wait), "both": (both, wait)}

    return Rival(shape, who, calls)


def release() -> None:
    """Gives back the device memory that torch keeps."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
