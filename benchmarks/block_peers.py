"""The block-sparse patterns that `gpu_blocks.py` measures, and the attentions it compares."""

import dataclasses
import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pallas_kernels import blocks

OURS = "dilax"
TWO = "dilax, deterministic"  # gradients by two passes
XLA = "dilax, XLA"
DENSE = "cuDNN dense"
WINDOW = "cuDNN window"
FLASH = "FlashAttention-3"
TOKAMAX = "tokamax"
FLEX = "FlexAttention"
WHOLE = (None, None)


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """Block lists with the fields that the kernels read, and how they are masked."""

    columns: Any
    counts: Any
    bands: tuple = (WHOLE,)
    band_index: Any = None
    block_size: int = 128
    is_causal: bool = False
    starts: Any = None
    longest: int | None = None

    def visible(self, heads: int, T: int, S: int, starts: tuple[int, int] = (0, 0)) -> np.ndarray:
        """bool [b, heads, T, S]: which pairs see each other."""
        b, n, rows, capacity = self.columns.shape
        size = self.block_size
        band = np.full((b, n, rows, -(-S // size)), -1)
        index = np.zeros_like(self.columns) if self.band_index is None else self.band_index
        valid = np.arange(capacity) < self.counts[..., None]
        b_, n_, row, _ = place = np.nonzero(valid)
        band[b_, n_, row, self.columns[place]] = index[place]
        band = np.repeat(np.repeat(band, size, 2), size, 3)[:, :, :T, :S]
        away = starts[0] + np.arange(T)[:, None] - starts[1] - np.arange(S)
        seen = np.zeros(band.shape, bool)
        for number, (left, right) in enumerate(self.bands):
            inside = np.ones(away.shape, bool)
            if left is not None:
                inside &= away <= left
            if right is not None:
                inside &= away >= -right
            seen |= (band == number) & inside
        if self.is_causal:
            seen &= away >= 0
        return np.repeat(seen, heads // n, axis=1)


def library(name: str) -> Any:
    """A module of dilax; where flax is missing, without what the package itself imports."""
    if importlib.util.find_spec("flax") is None and "dilax" not in sys.modules:
        package = types.ModuleType("dilax")
        package.__path__ = [str(Path(__file__).resolve().parent.parent / "dilax")]
        sys.modules["dilax"] = package
    return importlib.import_module(f"dilax.{name}")


def from_mask(mask: np.ndarray, **options: Any) -> Pattern:
    """The pattern of a boolean mask `[b, n, rows, columns]`."""
    counts = mask.sum(-1).astype(np.int32)
    columns = np.argsort(~mask, axis=-1, kind="stable")[..., : max(1, counts.max())]
    return Pattern(columns.astype(np.int32), counts, **options)


def random_blocks(
    rows: int, fraction: float, causal: bool = False, heads: int = 1, **options: Any
) -> Pattern:
    """Every row keeps the same fraction of its admissible blocks, its own always."""
    rng = np.random.default_rng(round(fraction * 1e4))
    mask = np.zeros((1, heads, rows, rows), bool)
    for head in range(heads):
        for row in range(rows):
            others = np.setdiff1d(np.arange(row + 1 if causal else rows), [row])
            count = min(max(1, round(fraction * (len(others) + 1))), len(others) + 1)
            mask[0, head, row, rng.choice(others, count - 1, replace=False)] = True
            mask[0, head, row, row] = True
    return from_mask(mask, is_causal=causal, **options)


def window(T: int, width: int, block_size: int = 128) -> Pattern:
    """The last `width` tokens, a query's own included, exact to the token."""
    rows = np.arange(-(-T // block_size))
    first = np.maximum(rows * block_size - width + 1, 0) // block_size
    mask = (rows[None] >= first[:, None]) & (rows[None] <= rows[:, None])
    pattern = from_mask(mask[None, None], block_size=block_size, is_causal=True)
    index = np.ones_like(pattern.columns)
    return dataclasses.replace(pattern, bands=(WHOLE, (width - 1, 0)), band_index=index)


def global_local(rows: int, globals_: int, near: int, **options: Any) -> Pattern:
    """Some first blocks see and are seen by all; the others see `near` blocks on each side."""
    row = np.arange(rows)
    mask = np.abs(row[:, None] - row) <= near
    mask[:globals_] = mask[:, :globals_] = True
    return from_mask(mask[None, None], **options)


def ours(
    pattern: Pattern, order: str = "longest_first", deterministic: bool | None = None
) -> Callable:
    """This library's kernels, lists known when compiling."""
    said = {"blocks": pattern, "is_causal": pattern.is_causal, "order": order}

    def attend(q: Any, k: Any, v: Any) -> Any:
        return blocks.attend(q, k, v, **said, deterministic=deterministic)[0]

    return attend


def xla(pattern: Pattern) -> Callable:
    """This library's XLA path."""
    lists = library("block_lists").BlockLists(
        pattern.columns, pattern.counts, pattern.bands, pattern.band_index, pattern.block_size
    )

    def attend(q: Any, k: Any, v: Any) -> Any:
        found = library("xla_attention").attend(q, k, v, blocks=lists, is_causal=pattern.is_causal)
        return found.out.astype(q.dtype)

    return attend


def cudnn(window_size: int | None = None) -> Callable:
    """Dense attention by cuDNN, or its causal sliding window."""
    if window_size is None:
        return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return lambda q, k, v: jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=True,
        local_window_size=(window_size - 1, 0),
        implementation="cudnn",
    )


def flash3(window_size: int) -> Callable:
    """FlashAttention-3's causal sliding window (package flash_attn3_jax)."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        from flash_attn3_jax import flash_mha

        return flash_mha(q, k, v, is_causal=True, window_size=(window_size - 1, 0))

    return attend


def tokamax(window_size: int) -> Callable:
    """tokamax's causal sliding window by its kernels for Hopper (package tokamax)."""

    def attend(q: Any, k: Any, v: Any) -> Any:
        from tokamax import dot_product_attention

        window = (window_size - 1, 0)
        return dot_product_attention(
            q, k, v, is_causal=True, local_window_size=window, implementation="mosaic"
        )

    return attend


def flex_mask(torch: Any, pattern: Pattern, T: int, width: int | None) -> Any:
    """The same pattern as a FlexAttention block mask: whole and partly masked blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    size, rows = pattern.block_size, pattern.columns.shape[2]
    columns = -(-T // size)
    valid = np.arange(pattern.columns.shape[-1]) < pattern.counts[..., None]
    mask = np.zeros((*pattern.columns.shape[:3], columns), bool)
    b, n, row, _ = place = np.nonzero(valid)
    mask[b, n, row, pattern.columns[place]] = True
    first, key = np.arange(rows)[:, None] * size, np.arange(columns) * size
    whole = np.ones((rows, columns), bool)
    if pattern.is_causal:
        whole &= key + size - 1 <= first
    if width is not None:
        whole &= key >= first + size - width

    def lists(x: np.ndarray) -> tuple[Any, Any]:
        order = np.argsort(~x, axis=-1, kind="stable").astype(np.int32)
        counts = x.sum(-1).astype(np.int32)
        return torch.tensor(counts, device="cuda"), torch.tensor(order, device="cuda")

    return BlockMask.from_kv_blocks(
        *lists(mask & ~whole),
        *lists(mask & whole),
        BLOCK_SIZE=size,
        mask_mod=_visible(pattern.is_causal, width),
    )


@functools.cache
def _visible(causal: bool, width: int | None) -> Callable:
    """FlexAttention's mask of pairs; always the same function, which it then compiles once."""

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        if not causal:
            return q >= 0
        return (q >= k) & (q - k < width) if width is not None else q >= k

    return visible
