"""Cases of the Pallas kernels, for the interpreter's and the GPU's tests, and what is refused."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilax import dropout, xla_attention
from dilax.spec import DilatedSpec, branches_of
from pallas_kernels import config, flash
from pallas_kernels.compat import interpreting
from pallas_kernels.support import tile_columns
from tests.compare import assert_within, error

H100 = "NVIDIA H100 80GB HBM3"


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """One call of `flash.attend`."""

    name: str
    w: tuple[int, ...]
    r: tuple[int, ...]
    T: int
    S: int | None = None
    B: int = 1
    N: int = 2
    K: int | None = None
    H: int = 64
    causal: bool = False
    combine: str = "lse"
    head_offset: str = "interleaved"
    starts: tuple[int, int] = (0, 0)
    traced: bool = False
    ids: bool = False
    positions: bool = False  # a token order: those of queries and keys are shuffled apart
    rate: float = 0.0
    carry: bool = False
    dtype: str = "bfloat16"
    scale: float | None = None
    deterministic: bool = False
    tiles_of: int | None = None  # forward tiles of segments with so many rows
    apart: float = 0.0  # mean of query and, negated, of key: logits lie far below 0

    @property
    def branches(self) -> tuple:
        spec = DilatedSpec(self.w, self.r)
        return branches_of(spec, self.N, self.combine, self.head_offset)

    def arrays(self) -> tuple[tuple, tuple]:
        """((query, key, value, carry), (do, dlse)) in numpy float32, rounded to the dtype."""
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        S, K = self.S or self.T, self.K or self.N

        def draw(*shape: int, mean: float = 0.0) -> np.ndarray:
            drawn = rng.normal(mean, size=shape)
            return np.asarray(jnp.asarray(drawn, self.dtype), np.float32)

        carry = None
        if self.carry:
            lse = np.float32(rng.normal(size=(self.B, self.T, self.N)) + 4)
            lse[:, ::3] = -np.inf
            carry = (np.float32(rng.normal(size=(self.B, self.T, self.N, self.H))), lse)
        q = draw(self.B, self.T, self.N, self.H, mean=self.apart)
        k, v = draw(self.B, S, K, self.H, mean=-self.apart), draw(self.B, S, K, self.H)
        dlse = np.float32(rng.normal(size=(self.B, self.T, self.N)))
        return (q, k, v, carry), (draw(*q.shape), dlse)

    def options(self) -> dict[str, Any]:
        """Options that both implementations take."""
        rng = np.random.default_rng(zlib.crc32(f"{self.name} ids".encode()))
        options = {"branches": self.branches, "is_causal": self.causal, "scale": self.scale}
        if self.ids:
            for name, n in (("q_segment_ids", self.T), ("kv_segment_ids", self.S or self.T)):
                ids = np.sort(rng.integers(0, 4, (self.B, n)), axis=1)
                options[name] = jnp.asarray(np.where(ids == 0, 0, ids), jnp.int32)
        if self.positions:
            for name, n in (("q_positions", self.T), ("kv_positions", self.S or self.T)):
                order = [rng.permutation(n) for _ in range(self.B)]
                options[name] = jnp.asarray(np.stack(order), jnp.int32)
        if self.rate:
            options |= {
                "dropout_rate": self.rate,
                "dropout_seed": jnp.asarray([11, 22], jnp.uint32),
            }
        return options


def _run(
    case: KernelCase, attend: Any, dtype: Any, starts: Any, repeats: int = 0, **extra: Any
) -> dict[str, Any]:
    """out, lse and all gradients for random cotangents; equal bits in `repeats` more runs."""
    (q, k, v, carry), (do, dlse) = case.arrays()
    stats = jnp.float64 if dtype == jnp.float64 else jnp.float32
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    carry = None if carry is None else tuple(jnp.asarray(x, stats) for x in carry)

    def run(q: Any, k: Any, v: Any, carry: Any, starts: Any) -> Any:
        def f(q: Any, k: Any, v: Any, carry: Any) -> Any:
            return attend(
                q,
                k,
                v,
                carry=carry,
                q_start=starts[0],
                k_start=starts[1],
                **case.options(),
                **extra,
            )

        result, pull = jax.vjp(f, q, k, v, carry)
        out, lse = result
        d_lse = jnp.where(lse > -jnp.inf, jnp.asarray(dlse, lse.dtype), 0)
        cotangents = (jnp.asarray(do, out.dtype), d_lse)
        dq, dk, dv, d_carry = pull(jax.tree.unflatten(jax.tree.structure(result), cotangents))
        return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "carry": d_carry}

    jitted = jax.jit(run, static_argnums=4) if starts is None else jax.jit(run)
    arguments = (q, k, v, carry, case.starts if starts is None else starts)
    first = jax.tree.map(np.asarray, jitted(*arguments))
    for _ in range(repeats):
        # Something else in memory between runs: what a kernel forgets to write would show.
        jnp.full((1 << 24,), jnp.nan, jnp.float32).block_until_ready()
        again = jax.tree.map(np.asarray, jitted(*arguments))
        for a, b in zip(*map(jax.tree.leaves, (first, again)), strict=True):
            assert a.tobytes() == b.tobytes()
    return first


def run_kernel(case: KernelCase, repeats: int = 0) -> dict[str, Any]:
    """What the kernels give for a case."""
    starts = tuple(jnp.int32(s) for s in case.starts) if case.traced else None
    extra: dict[str, Any] = {"keep": dropout, "deterministic": case.deterministic}
    if case.tiles_of:
        sizes = (
            tile_columns(case.H, interpreting()),
            jnp.dtype(case.dtype).itemsize,
            case.tiles_of,
        )
        tiles = config.forward_blocks(*sizes, causal=case.causal, marks=0)
        extra["tiles"] = {"forward": tiles}
    return _run(case, flash.attend, jnp.dtype(case.dtype), starts, repeats, **extra)


def check(case: KernelCase) -> None:
    """The kernels err at most 3 times as much as the XLA path in the same dtype."""

    def xla(q: Any, k: Any, v: Any, **options: Any) -> Any:
        carry = options.pop("carry")
        carry = None if carry is None else xla_attention.Partial(*carry)
        return xla_attention.attend(q, k, v, carry=carry, **options)

    actual = run_kernel(case)
    # On the CPU, where compiling takes less time than on a GPU.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        baseline = _run(case, xla, jnp.dtype(case.dtype), None)
        with jax.enable_x64(True):
            exact = jax.tree.map(np.asarray, _run(case, xla, jnp.float64, None))
    if not case.carry:
        # The XLA path leaves out in float32; a user gets it in the dtype of query.
        baseline["out"] = baseline["out"].astype(case.dtype)
    # The maximum and the sum of a row are kept in base 2, so that what is float32 throughout may
    # be a few units in the last place further off.
    trees = [(x.pop("lse"), x.pop("carry")) for x in (actual, baseline, exact)]
    for a, b, e in zip(*map(jax.tree.leaves, trees), strict=True):
        assert error(a, e) <= max(2e-6, 3 * error(b, e))
    assert_within(actual, baseline, exact)


def test_unsupported_lists_every_reason():
    x = jax.ShapeDtypeStruct((1, 128, 2, 20), jnp.float32)
    reasons = flash.unsupported(
        x, x, x, branches=((3, 64, 0, (0, 1)),), scale=-1.0, dropout_rate=0.1, device_kind="TPU v4"
    )
    text = " | ".join(reasons)
    for part in ("TPU v4", "float32", "20", "scale", "dropout_rate", "43 branches"):
        assert part in text, (part, text)


def test_supported_call_has_no_reason():
    x = jax.ShapeDtypeStruct((1, 128, 2, 48), jnp.bfloat16)
    assert flash.unsupported(x, x, x, branches=((64, 2, 0, (0, 1)),), device_kind=H100) == ()


@pytest.mark.parametrize(
    ("shapes", "options", "said"),
    [
        ({"key": (1, 64, 3, 16), "value": (1, 64, 3, 16)}, {}, "multiple of the 3 key heads"),
        ({"value": (1, 60, 2, 16)}, {}, "value (1, 60, 2, 16)"),
        ({"key": (2, 64, 2, 16)}, {}, "key (2, 64, 2, 16)"),
        ({"query": (1, 64, 16)}, {}, "wanted [B, T, N, H]"),
        ({}, {"q_segment_ids": np.zeros((1, 60), np.int32)}, "q_segment_ids (1, 60)"),
        ({}, {"q_positions": np.zeros((2, 64), np.int32)}, "q_positions (2, 64)"),
        ({}, {"kv_positions": np.zeros((1, 64), np.int32)}, "kv_positions without q_positions"),
        ({}, {"carry": (np.zeros((1, 64, 4, 8)), np.zeros((1, 64, 4)))}, "carry[0] (1, 64, 4, 8)"),
        ({}, {"branches": ((64, 1, 1, (0,) * 4),)}, "heads 1 to 4"),
        ({}, {"q_start": -5}, "starts -5 and 0"),
        ({}, {"scale": float("inf")}, "scale inf"),
        ({}, {"dropout_rate": 1.0}, "dropout_rate 1.0"),
        ({}, {"out_dtype": "float64"}, "out_dtype float64"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_a_kernel_would_read_wrong_is_refused(shapes, options, said):
    shapes = {"query": (1, 64, 4, 16), "key": (1, 64, 2, 16), "value": (1, 64, 2, 16)} | shapes
    arrays = {name: jax.ShapeDtypeStruct(x, jnp.bfloat16) for name, x in shapes.items()}
    options = {"branches": ((64, 1, 0, (0,) * 4),), "device_kind": H100} | options
    assert any(said in reason for reason in flash.unsupported(**arrays, **options))


def test_attend_raises_the_reasons():
    x = jnp.ones((1, 16, 1, 16), jnp.float32)
    with pytest.raises(ValueError, match="float32"):
        flash.attend(x, x, x, branches=((16, 1, 0, (0,)),))
