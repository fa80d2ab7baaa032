"""Times of this library's implementations on this machine, beside dense attention."""

import dataclasses
import functools
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from dilax._types import FLOAT_DTYPES, UnsupportedError, refuse
from dilax.block_sparse import block_sparse_attention
from dilax.dilated import dilated_attention
from dilax.pattern_config import SparsePatternConfig, as_pattern
from dilax.patterns import Pattern
from dilax.select import IMPLEMENTATIONS
from dilax.spec import DilatedSpec

DENSE_BYTES = 2**31  # dense attention whose logits need more than this is left out


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What to time.

    Args:
        lengths: Sequence lengths T.
        segment_lengths: Segment length W of each branch, in tokens.
        dilation_rates: Dilation rate R of each branch.
        batch_size: B.
        num_heads: N, query heads.
        num_kv_heads: K, key and value heads; None for N.
        head_dim: H.
        dtype: Of queries, keys and values; float64 is timed with jax_enable_x64, set or not.
        causal: A query sees no key after it.
        pattern: Also time block-sparse attention with this preset or type of pattern.
        sparsity_ratio: Of a type of pattern: the share of admissible blocks kept.
        backward: Also time forward and backward together.
        repeats: Timed calls per row; their median counts.

    Raises:
        ValueError: an argument is wrong.

    Example:
        >>> BenchConfig(lengths=(512,)).dilation_rates
        (1, 2, 4, 8)
    """

    lengths: tuple[int, ...] = (4096, 16384)
    segment_lengths: tuple[int, ...] = (1024, 2048, 4096, 8192)
    dilation_rates: tuple[int, ...] = (1, 2, 4, 8)
    batch_size: int = 1
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int = 64
    dtype: str = "float32"
    causal: bool = True
    pattern: str | None = None
    sparsity_ratio: float | None = None
    backward: bool = True
    repeats: int = 5

    def __post_init__(self):
        DilatedSpec(self.segment_lengths, self.dilation_rates)
        if not self.lengths or min(self.lengths) < 1:
            raise refuse("lengths", "positive ints", self.lengths)
        for name in ("batch_size", "num_heads", "head_dim", "repeats"):
            if getattr(self, name) < 1:
                raise refuse(name, "a positive int", getattr(self, name))
        if self.dtype not in FLOAT_DTYPES:
            raise refuse("dtype", " or ".join(FLOAT_DTYPES), self.dtype)
        self.blocks()
        if self.head_dim % 8 or self.head_dim > 256:
            raise refuse("head_dim", "a multiple of 8 up to 256", self.head_dim)
        kv_heads = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        if kv_heads < 1 or self.num_heads % kv_heads:
            raise refuse("num_kv_heads", f"a divisor of num_heads={self.num_heads}", kv_heads)

    def blocks(self) -> Pattern | None:
        """The block pattern to time, if there is one."""
        if self.sparsity_ratio is None:
            return None if self.pattern is None else as_pattern("pattern", self.pattern)
        if self.pattern is None:
            raise refuse("sparsity_ratio", "None without a pattern", self.sparsity_ratio)
        return SparsePatternConfig(self.pattern, self.sparsity_ratio).pattern()


@dataclasses.dataclass(frozen=True)
class Row:
    """One time, or the reason why there is none.

    Example:
        >>> Row("dilated, xla", 4096, "forward", 0.004, 1_024_000.0, None).reason is None
        True
    """

    name: str
    length: int
    work: str
    seconds: float | None
    tokens_per_second: float | None
    reason: str | None


def machine() -> dict[str, Any]:
    """What the times were taken on.

    Example:
        >>> sorted(machine())
        ['cores', 'device', 'jax', 'jaxlib', 'platform', 'python']
    """
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "python": platform.python_version(),
    }


def measure(config: BenchConfig) -> Iterator[Row]:
    """A row per length, implementation and kind of work, as each one is done.

    Example:
        >>> config = BenchConfig((64,), (16, 64), (1, 4), num_heads=2, head_dim=8, repeats=1)
        >>> [row.work for row in measure(config) if row.name == "dilated, xla"]
        ['forward', 'forward+backward']
    """
    for length in config.lengths:
        for name, attend in _contestants(config, length):
            for work in ("forward", "forward+backward") if config.backward else ("forward",):
                yield _row(config, name, length, work, attend)


def _contestants(config: BenchConfig, length: int) -> Iterator[tuple[str, Any]]:
    """(name, function of query, key and value, or the reason why there is none)."""
    for implementation in IMPLEMENTATIONS:

        def dilated(q, k, v, implementation=implementation):
            return dilated_attention(
                q,
                k,
                v,
                config.segment_lengths,
                config.dilation_rates,
                is_causal=config.causal,
                implementation=implementation,
            )

        yield f"dilated, {implementation}", dilated
    if (pattern := config.blocks()) is not None:
        for implementation in IMPLEMENTATIONS:
            sparse = functools.partial(
                block_sparse_attention,
                pattern=pattern,
                is_causal=config.causal,
                implementation=implementation,
            )
            yield f"blocks, {implementation}", sparse
    logits = config.batch_size * config.num_heads * length**2
    size = logits * max(4, jnp.dtype(config.dtype).itemsize)
    if jax.default_backend() == "cpu" and size > DENSE_BYTES:
        yield "dense, jax.nn", f"its logits need {size / 2**30:.1f} GiB"
    else:

        def dense(q, k, v):
            return jax.nn.dot_product_attention(q, k, v, is_causal=config.causal)

        yield "dense, jax.nn", dense


def _row(config: BenchConfig, name: str, length: int, work: str, attend: Any) -> Row:
    if isinstance(attend, str):
        return Row(name, length, work, None, None, attend)
    if config.dtype == "float64":  # without it JAX would make float32 of it
        with jax.enable_x64(True):
            return _timed(config, name, length, work, attend)
    return _timed(config, name, length, work, attend)


def _timed(config: BenchConfig, name: str, length: int, work: str, attend: Callable) -> Row:
    shapes = [config.num_heads] + [config.num_kv_heads or config.num_heads] * 2
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [
        jax.random.normal(key, (config.batch_size, length, heads, config.head_dim), config.dtype)
        for key, heads in zip(keys, [*shapes, config.num_heads], strict=True)
    ]
    try:
        compiled = jax.jit(_job(attend, work)).lower(*arrays).compile()
    except UnsupportedError as error:
        reasons = "; ".join(", ".join(why) for why in error.reasons.values())
        return Row(name, length, work, None, None, reasons)
    seconds = median(lambda: compiled(*arrays), config.repeats)
    return Row(name, length, work, seconds, config.batch_size * length / seconds, None)


def _job(attend: Callable, work: str) -> Callable:
    """The function to time, of query, key, value and the output's cotangent."""
    if work == "forward":
        return lambda q, k, v, _: attend(q, k, v)

    def both(q, k, v, cotangent):
        out, pullback = jax.vjp(attend, q, k, v)
        return out, pullback(cotangent)

    return both


def median(job: Callable[[], Any], repeats: int) -> float:
    """Median seconds of a call that gives arrays, after one that does not count.

    Example:
        >>> median(lambda: jnp.ones(2), 3) > 0
        True
    """
    jax.block_until_ready(job())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(job())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
