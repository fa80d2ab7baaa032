"""torchscale's arithmetic on torch tensors `[1, T, N, H]`, over torch's flash kernel.

Per branch: pad, keep every r-th row of a head, attend, spread the results out again with zeros and
-1e8 in between; then branches are weighed by their log-sum-exp, without a gradient of the weights.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

Lists = Sequence[tuple[int, int]]


def original(torch: Any, lists: Lists) -> Callable:
    """Operation by operation as in Microsoft's code: diagonals embedded in zeros, then permuted."""
    pad = torch.nn.functional.pad

    def gather(x: Any, r: int) -> Any:
        segments, length, N, H = x.shape
        x = pad(x, (0, 0, 0, -N % r, 0, -length % r))
        rows, width = x.shape[1] // r, x.shape[2] // r
        x = x.reshape(segments, rows, r, r, width, H).permute(0, 1, 4, 5, 2, 3)
        x = torch.diagonal(x, dim1=4, dim2=5).permute(0, 1, 4, 2, 3)
        return x.reshape(segments, rows, r * width, H)[:, :, :N]

    def scatter(out: Any, lse: Any, r: int) -> tuple[Any, Any]:
        segments, rows, N, H = out.shape
        out, lse = pad(out, (0, 0, 0, -N % r)), pad(lse, (0, 0, 0, -N % r))
        width = out.shape[2] // r
        out = torch.diag_embed(out.reshape(segments, rows, r, width, H).permute(0, 1, 3, 4, 2))
        out = out.permute(0, 5, 2, 1, 4, 3).reshape(segments, r * width, rows * r, H)
        lse = torch.diag_embed(lse.reshape(segments, r, width, rows).permute(0, 2, 3, 1))
        lse = lse.masked_fill_(lse == 0, -1e8).permute(0, 4, 1, 2, 3)
        return out[:, :N], lse.reshape(segments, r * width, rows * r, 1)[:, :N]

    def branch(q: Any, k: Any, v: Any, w: int, r: int) -> tuple[Any, Any]:
        _, T, N, H = q.shape
        w = min(w, T)

        def kept(x: Any) -> Any:
            x = pad(x, (0, 0, 0, 0, 0, -T % w)).reshape(-1, w, N, H)
            return gather(x, r).transpose(1, 2)

        out, lse = flash(torch, *(kept(x) for x in (q, k, v)))
        parts = scatter(out.transpose(1, 2), lse, r)
        parts = (x[:, :, :w].permute(1, 0, 2, 3) for x in parts)
        out, lse = (x.reshape(1, N, -1, x.shape[-1])[:, :, :T] for x in parts)
        return out, lse

    def attend(q: Any, k: Any, v: Any) -> Any:
        parts = [branch(q, k, v, w, r) for w, r in lists]
        with torch.no_grad():
            top = torch.stack([lse for _, lse in parts]).max(0)[0]
            weights = [torch.exp(lse - top) for _, lse in parts]
            total = torch.stack(weights).sum(0)
            weights = [weight / total for weight in weights]
        out: Any = 0
        for (part, _), weight in zip(parts, weights, strict=True):
            out = out + part * weight.type_as(part)
        return out.permute(0, 2, 1, 3).reshape(q.shape)

    return attend


def rewritten(torch: Any, lists: Lists) -> Callable:
    """The same numbers with half as many kernels: results go to their places at once."""

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

        out, lse = flash(torch, *(gather(x) for x in (q, k, v)))

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


def flash(torch: Any, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    """(out, lse) of torch's flash kernel, `[segments, N, rows, H]` and `[segments, N, rows]`."""
    scale = 1 / math.sqrt(q.shape[-1])
    if q.is_cuda:
        run = torch.ops.aten._scaled_dot_product_flash_attention
        return run(q, k, v, 0.0, False, False, scale=scale)[:2]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, False, scale=scale
    )[:2]
