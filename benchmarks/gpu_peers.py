"""The attentions that `gpu.py` measures side by side: each takes JAX arrays [1, T, N, H]."""

import importlib.util
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dilax import xla_attention
from dilax.spec import Branch
from pallas_kernels import flash

Lists = tuple[tuple[int, int], ...]
# A dense peer that may be missing, and the package it is in.
OPTIONAL = ("flash_attn3_jax", "tokamax")


def attention(who: str, shape: Any) -> Callable:
    """The function of query, key and value of a contestant; shape: a `gpu_lab.Shape`."""
    lists, causal = shape.lists, shape.causal
    match who:
        case "dilax pallas":
            return ours(lists, causal)
        case "dilax pallas, deterministic":
            return ours(lists, causal, deterministic=True)
        case "cudnn":
            return cudnn(causal)
        case "composed cudnn":
            return composed(lists, causal)
        case "xla":
            return xla(lists, causal, shape.dtype)
        case "xla float64":
            return xla(lists, causal, "float64")
    return optional(who, causal)


def offsets(heads: int, rate: int) -> tuple[int, ...]:
    """Residues of LongNet's interleaved heads."""
    return tuple(n % rate for n in range(heads))


def ours(lists: Lists, causal: bool, **options: Any) -> Callable:
    """This library's kernels on a list of (segment length, rate)."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        branches = tuple((w, r, 0, offsets(q.shape[2], r)) for w, r in lists)
        return flash.attend(q, k, v, branches=branches, is_causal=causal, **options)[0]

    return attend


def has_switch() -> bool:
    """Whether the kernels' backward pass has a deterministic form beside its default."""
    return "deterministic" in inspect.signature(flash.attend).parameters


def xla(lists: Lists, causal: bool, dtype: str) -> Callable:
    """The same in jax.numpy, computed in `dtype`, which is also that of out."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        branches = tuple(Branch(w, r, 0, offsets(q.shape[2], r)) for w, r in lists)
        q, k, v = (x.astype(dtype) for x in (q, k, v))
        return xla_attention.attend(q, k, v, branches=branches, is_causal=causal).out.astype(dtype)

    return attend


def cudnn(causal: bool) -> Callable:
    """Dense attention by cuDNN."""
    return lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, implementation="cudnn"
    )


def composed(lists: Lists, causal: bool) -> Callable:
    """Dilated attention from strided gathers, cuDNN and a merge; sizes must divide."""

    def gather(x: Any, w: int, r: int) -> Any:
        B, T, N, H = x.shape
        x = x.reshape(B, T // w, w // r, r, N // r, r, H)
        return jnp.einsum("bsmrhrd->bsmhrd", x).reshape(B * T // w, w // r, N, H)

    def scatter(x: Any, B: int, T: int, w: int, r: int) -> Any:
        N, H = x.shape[-2:]
        x = x.reshape(B, T // w, w // r, N // r, r, H)
        return jnp.einsum("bsmhrd,rt->bsmthrd", x, jnp.eye(r, dtype=x.dtype)).reshape(B, T, N, H)

    def attend(q: Any, k: Any, v: Any) -> Any:
        B, T, N, _ = q.shape
        outs, lses = [], []
        for w, r in lists:
            out, lse = jax.nn.dot_product_attention(
                *(gather(x, w, r) for x in (q, k, v)),
                is_causal=causal,
                implementation="cudnn",
                return_residual=True,
            )
            lse = lse.swapaxes(1, 2) if lse.shape[1] == N else lse
            kept = scatter(jnp.ones_like(lse)[..., None], B, T, w, r)[..., 0] > 0
            outs.append(scatter(out, B, T, w, r))
            lses.append(jnp.where(kept, scatter(lse[..., None], B, T, w, r)[..., 0], -jnp.inf))
        weights = jax.nn.softmax(jax.lax.stop_gradient(jnp.stack(lses)), axis=0)
        return sum(o * w[..., None].astype(o.dtype) for o, w in zip(outs, weights, strict=True))

    return attend


def present() -> tuple[str, ...]:
    """The dense peers of other packages that are installed."""
    return tuple(name for name in OPTIONAL if importlib.util.find_spec(name) is not None)


def optional(name: str, causal: bool) -> Callable:
    """A dense peer from another package."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        # Imported when measured: one that lacks something itself then says so in its own row.
        module = importlib.import_module(name)
        if name == "flash_attn3_jax":
            return module.flash_mha(q, k, v, is_causal=causal)
        return module.dot_product_attention(q, k, v, is_causal=causal, implementation="mosaic")

    return attend


def torch_dense(torch: Any, causal: bool) -> Callable:
    """PyTorch's dense flash attention on torch tensors [1, T, N, H]."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            run = torch.nn.functional.scaled_dot_product_attention
            return run(q, k, v, is_causal=causal).transpose(1, 2)

    return attend


def torchscale(torch: Any, lists: Lists) -> Callable:
    """torchscale's arithmetic on torch tensors: pad, gather, flash, scatter, weigh by lse."""

    def branch(q: Any, k: Any, v: Any, w: int, r: int) -> tuple[Any, Any]:
        _, T, N, H = q.shape
        w = min(w, T)
        segments, rows, width = -(-T // w), -(-w // r), -(-N // r)

        def gather(x: Any) -> Any:
            x = torch.nn.functional.pad(x, (0, 0, 0, width * r - N, 0, segments * w - T))
            x = x.reshape(segments, w, width * r, H)
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, rows * r - w))
            x = x.reshape(segments, rows, r, r, width, H)
            x = torch.diagonal(x, dim1=2, dim2=3)  # segments, rows, width, H, r
            return x.permute(0, 4, 2, 1, 3).reshape(segments, r * width, rows, H)

        q, k, v = (gather(x) for x in (q, k, v))
        scale = 1 / math.sqrt(H)
        if q.is_cuda:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            out, lse, *_ = flash(q, k, v, 0.0, False, False, scale=scale)
        else:
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out, lse = flash(q, k, v, 0.0, False, scale=scale)

        def scatter(x: Any, fill: float) -> Any:
            x = x.reshape(segments, r, width, rows, -1).permute(0, 3, 2, 4, 1)
            y = torch.full(
                (segments, rows, r, r, width, x.shape[3]), fill, dtype=x.dtype, device=x.device
            )
            torch.diagonal(y, dim1=2, dim2=3).copy_(x)
            y = y.reshape(segments, rows * r, r * width, -1)[:, :w]
            return y.reshape(1, segments * w, r * width, -1)[:, :T, :N]

        return scatter(out, 0.0), scatter(lse[..., None], -1e8)

    def attend(q: Any, k: Any, v: Any) -> Any:
        parts = [branch(q, k, v, w, r) for w, r in lists]
        with torch.no_grad():
            weights = torch.softmax(torch.stack([lse for _, lse in parts]), dim=0)
        return sum(out * w.to(out.dtype) for (out, _), w in zip(parts, weights, strict=True))

    return attend
