"""The attentions that `gpu.py` measures side by side: each takes JAX arrays [1, T, N, H]."""

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import dilax
from dilax import xla_attention
from dilax.spec import Branch
from pallas_kernels import flash

Lists = tuple[tuple[int, int], ...]
# Dense peers that may be missing: a package, then what is chosen in it.
FLASH3, TOKAMAX = "flash_attn3_jax", "tokamax"
TOKAMAX_TILES = f"{TOKAMAX}, tiles for 32 heads"
# What tokamax's own search found for 32 heads of 64 at 16384 tokens on an H100, by causality; for
# 16 heads it has found none and takes a default. Query block, key block, stages.
TILES = {False: ((128, 128, 3), (128, 64, 2)), True: ((64, 256, 3), (128, 64, 3))}


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
        case "float64 with fixed weights":
            return fixed_weights(lists, causal)
        case "torchscale in float64":
            return fixed_weights(lists, causal, head_offset="blocked", pad_mode="zeros")
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


def fixed_weights(lists: Lists, causal: bool, **options: Any) -> Callable:
    """Branches in float64 under weights without a gradient, as peers merge them.

    out and the gradient of v are the exact ones, those of q and k are not.
    """
    options |= {"is_causal": causal, "implementation": "xla", "return_lse": True}

    def attend(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.astype("float64") for x in (q, k, v))
        parts = [dilax.dilated_attention(q, k, v, [w], [r], **options) for w, r in lists]
        outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
        weights = jax.nn.softmax(jax.lax.stop_gradient(lses), axis=0)
        return (outs * weights[..., None]).sum(0)

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


def others(H: int) -> tuple[str, ...]:
    """The dense peers of other packages, installed or not."""
    return (FLASH3, TOKAMAX, TOKAMAX_TILES) if H == 64 else (FLASH3, TOKAMAX)


def package(who: str) -> str:
    """The package that a dense peer is in."""
    return who.partition(",")[0]


def installed(who: str) -> bool:
    """Whether there is a package with a dense peer."""
    return importlib.util.find_spec(package(who)) is not None


def optional(who: str, causal: bool) -> Callable:
    """A dense peer from another package."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        # Imported when measured: one that lacks something itself then says so in its own row.
        module = importlib.import_module(package(who))
        if who == FLASH3:
            return module.flash_mha(q, k, v, is_causal=causal)
        chosen = (tokamax_tiled(*TILES[causal]),) if who == TOKAMAX_TILES else "mosaic"
        return module.dot_product_attention(q, k, v, is_causal=causal, implementation=chosen)

    return attend


def tokamax_tiled(forward: tuple[int, int, int], backward: tuple[int, int, int]) -> Any:
    """tokamax's kernels for Hopper with given tiles, which its public functions do not take."""
    folder = "tokamax._src.ops.attention.pallas_mosaic_gpu"
    first, second = (importlib.import_module(folder + end) for end in ("", "_vjp"))
    q, k, stages = backward
    tiles = {"block_q_dkv": q, "block_kv_dkv": k, "block_q_dq": q, "block_kv_dq": k}
    config = second.Config(**tiles, num_stages=stages, compute_wgs=2)
    pull = second.PallasMosaicGpuFlashAttentionVjp(config=config)
    q, k, stages = forward
    config = first.ConfigSM90(block_q=q, block_kv=k, num_stages=stages, persistent=False)
    return first.PallasMosaicGpuFlashAttention(config=config, vjp=pull)


def torch_dense(torch: Any, causal: bool) -> Callable:
    """PyTorch's dense flash attention on torch tensors [1, T, N, H]."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            run = torch.nn.functional.scaled_dot_product_attention
            return run(q, k, v, is_causal=causal).transpose(1, 2)

    return attend
