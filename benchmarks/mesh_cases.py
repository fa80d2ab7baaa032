"""Cases of attention of a sequence on a mesh: their inputs, programs, plans and oracle."""

import dataclasses
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.plain_ring import attend_plainly
from benchmarks.rows import exact_row, keys_of, relative
from dilax.sharded import link_of, plan_of
from dilax.sharded_local import XLA, choose_local
from dilax.spec import as_spec, branches_of, within
from sharding.attention import Setup, attend
from sharding.mesh import local_positions

AXIS, HOSTS = "sequence", "hosts"
LONGNET = ((2048, 4096, 8192, 16384, 32768), (1, 2, 4, 8, 16))
GIGAPATH = ((1024, 5792, 32768, 185363, 1048576), (1, 2, 4, 8, 16))
GIGAPATH_8M = ((1024, 9742, 92682, 881744, 8388608), (1, 2, 4, 8, 16))


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention; length is that of the whole sequence, `per_device` that of a device's part.

    hosts: above 1 the sequence lies on two mesh axes, so many hosts and the devices in each, and
    the plan takes messages between hosts as slow, though here they are not.
    """

    name: str
    lists: tuple[tuple[int, ...], tuple[int, ...]] | None  # None: dense
    per_device: int | None = None
    length: int | None = None
    causal: bool = False
    layout: str = "contiguous"
    method: str | None = None
    heads: int = 16
    head_dim: int = 128
    plain: bool = False  # all keys and values travel; forward only
    hosts: int = 1

    def tokens(self, devices: int) -> int:
        """T of the whole sequence."""
        return self.length or (self.per_device or 0) * devices


CASES = (
    Case("longnet", LONGNET, length=1 << 20),
    Case("gigapath", GIGAPATH, length=1 << 20),
    Case("gigapath-ring", GIGAPATH, length=1 << 20, method="ring"),
    Case("gigapath-plain", GIGAPATH, length=1 << 20, method="ring", plain=True),
    Case("dense", None, per_device=32768, method="ring"),
    Case("dense-zigzag", None, per_device=32768, causal=True, layout="zigzag", method="ring"),
    Case("dense-contiguous", None, per_device=32768, causal=True, method="ring"),
    Case("dense-two-level", None, per_device=32768, hosts=2),
    Case("gigapath-two-level", GIGAPATH, length=1 << 20, hosts=2),
    Case("longnet-8M", LONGNET, length=1 << 23),
    Case("gigapath-8M", GIGAPATH_8M, length=1 << 23),
)


def tiny(case: Case) -> Case:
    """The same at a size for emulated devices."""
    lists = None
    if case.lists:
        lists = tuple(max(w // 1024, 4) for w in case.lists[0]), case.lists[1]
    small = case.length // 4096 if case.length else None
    part = 64 if case.per_device else None
    return dataclasses.replace(
        case, lists=lists, length=small, per_device=part, heads=4, head_dim=16
    )


def values(salt: int, position: Any, head: Any, dim: Any, dtype: Any, xp: Any = jnp) -> Any:
    """Numbers in [-sqrt(3), sqrt(3)) that depend on where they are, the same on every machine."""
    u32 = xp.uint32
    x = position.astype(u32) * u32(0x9E3779B1) + head.astype(u32) * u32(0x85EBCA77)
    x = x + dim.astype(u32) * u32(0xC2B2AE3D) + u32(salt * 0x27D4EB2F % 2**32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = (x ^ (x >> u32(shift))) * u32(factor)
    unit = (x >> u32(8)).astype(xp.float32) * xp.float32(2**-24)
    return ((unit - xp.float32(0.5)) * xp.float32(12**0.5)).astype(dtype)


def inputs(case: Case, length: int, axis: Any, dtype: Any, count: int = 4) -> Any:
    """query, key, value and the cotangent of out, of this device's positions."""
    place = jnp.arange(length, dtype=jnp.int32)
    if axis is not None:
        place = local_positions(length, axis, case.layout)
    return inputs_at(case, place, dtype, count)


def inputs_at(case: Case, place: jax.Array, dtype: Any, count: int = 4) -> Any:
    """The same of the rows at these positions."""
    head, dim = jnp.arange(case.heads), jnp.arange(case.head_dim)
    at = place[None, :, None, None], head[None, None, :, None], dim[None, None, None]
    return tuple(values(salt, *at, dtype) for salt in range(count))


@dataclasses.dataclass(frozen=True)
class Run:
    """One case on the first `devices` devices."""

    case: Case
    length: int
    devices: int
    implementation: str | None
    dtype: Any

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """The devices as one axis, or as two."""
        kinds = (jax.sharding.AxisType.Auto,) * len(self.sizes)
        names = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        devices = jax.devices()[: self.devices]
        return jax.make_mesh(self.sizes, names, axis_types=kinds, devices=devices)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Devices along each mesh axis of the sequence, the outermost first."""
        hosts = self.case.hosts
        return (self.devices,) if hosts == 1 else (hosts, self.devices // hosts)

    @property
    def axis(self) -> str | tuple[str, ...]:
        """The mesh axis of the sequence, or both."""
        return AXIS if self.case.hosts == 1 else (HOSTS, AXIS)

    @property
    def branches(self) -> tuple:
        """Those of the case, over all positions."""
        spec = as_spec(*(self.case.lists or ((self.length,), (1,))))
        every = branches_of(spec, self.case.heads, "lse", "interleaved")
        return tuple(within(branch, self.length) for branch in every)

    @functools.cached_property
    def plan(self) -> Any:
        """Who sends what."""
        case = self.case
        return plan_of(
            self.branches,
            (1, self.length, case.heads, case.heads, case.head_dim),
            self.dtype,
            devices=self.devices,
            layout=case.layout,
            is_causal=case.causal,
            method=case.method,
            link=link_of(self.sizes),
        )

    def place(self, f: Callable, count: int) -> Callable:
        """f of `count` arrays [1, T, N, H] under shard_map."""
        part = jax.P(None, self.axis)
        return jax.shard_map(
            f, mesh=self.mesh, in_specs=(part,) * count, out_specs=part, check_vma=False
        )

    def arrays(self, count: int) -> tuple[jax.Array, ...]:
        """query, key, value and the cotangent of out, made where they lie."""
        n = self.length // self.devices
        make = self.place(lambda: inputs(self.case, n, self.axis, self.dtype, count), 0)
        return jax.jit(make)()

    def attend(self, messages: Any) -> Callable:
        """(query, key, value) -> out of this device's rows, inside the shard_map."""

        def one(q, k, v):
            scale = self.case.head_dim**-0.5
            args = self.axis, None, None, self.case.causal, scale, 0.0, messages
            run = attend_plainly if self.case.plain else attend
            return run(Setup(self.plan, self._local(q), *args), q, k, v)[0].astype(q.dtype)

        return one

    def _local(self, x: Any) -> Any:
        options = self.plan, self.case.head_dim**-0.5, (None, None), 0.0
        return choose_local(self.implementation, x, x, x, *options)

    @property
    def chosen(self) -> str:
        """The implementation that runs on each device."""
        shape = (1, self.length // self.devices, self.case.heads, self.case.head_dim)
        x = jax.ShapeDtypeStruct(shape, self.dtype)
        return "xla" if self._local(x) is XLA else "pallas"

    def gradients(self, messages: Any) -> Callable:
        """(query, key, value, cotangent) -> gradients of the first three, inside the shard_map."""
        return lambda q, k, v, do: jax.vjp(self.attend(messages), q, k, v)[1](do)

    def program(self, backward: bool, messages: Any) -> Callable:
        """What is timed, of whole arrays: out, or with backward the gradients."""
        if backward:
            return self.place(self.gradients(messages), 4)
        return self.place(self.attend(messages), 3)


def oracle(run: Run, position: int, head: int) -> tuple[np.ndarray, np.ndarray]:
    """out and the gradient of the query of one row, in float64."""
    dim, one = np.arange(run.case.head_dim)[None], np.array([[head]])
    place = keys_of(run.branches, position, head, run.length, run.case.causal)[:, None]

    def rows(salt: int, at: np.ndarray) -> np.ndarray:
        return values(salt, at, one, dim, run.dtype, np)

    q, do = (rows(salt, np.array([[position]]))[0] for salt in (0, 3))
    return exact_row(q, do, rows(1, place), rows(2, place))


def worst_error(run: Run, result: jax.Array, gradient: bool, samples: int = 4) -> float:
    """The largest relative error of rows sampled in every device's part."""
    rng, rows = np.random.default_rng(0), []
    starts = run.plan.token_starts
    for shard in result.addressable_shards:
        n = shard.data.shape[1]
        device = (shard.index[1].start or 0) // n
        size = n // starts.shape[1]
        for _ in range(samples):
            row, head = int(rng.integers(n)), int(rng.integers(run.case.heads))
            position = int(starts[device, row // size]) + row % size
            found = np.asarray(shard.data[0, row, head], np.float64)
            rows.append((position, head, found))

    def error(one: tuple) -> float:
        position, head, found = one
        return relative(found, oracle(run, position, head)[int(gradient)])

    with ThreadPoolExecutor() as pool:
        return max(pool.map(error, rows))


def sums_error(run: Run, gradients: tuple[jax.Array, ...]) -> float:
    """How far the gradients of keys and values, which messages bring back, are from two sums.

    Of each head: every row's probabilities sum to 1, so the values' gradients sum to the cotangents
    of out; logits are products, so the sum of key * gradient is that of query * gradient.
    """
    n = run.length // run.devices
    size = math.gcd(n, 1 << 14)  # of a piece, whose numbers in float32 take little memory

    def sums(*gradients):
        place = local_positions(n, run.axis, run.case.layout)

        def of_piece(i):
            rows = lax.dynamic_slice_in_dim(place, i * size, size)
            cut = [lax.dynamic_slice_in_dim(x, i * size, size, 1) for x in gradients]
            numbers = *cut, *inputs_at(run.case, rows, run.dtype)
            dq, dk, dv, q, k, _, do = (x.astype(jnp.float32) for x in numbers)
            pairs = (dv, (k * dk).sum(-1, keepdims=True)), (do, (q * dq).sum(-1, keepdims=True))
            return [jnp.concatenate(pair, -1).sum(1, keepdims=True) for pair in pairs]

        return [x.sum(0) for x in lax.map(of_piece, jnp.arange(n // size))]

    found, wanted = (
        np.asarray(x, np.float64).sum(1) for x in jax.jit(run.place(sums, 3))(*gradients)
    )
    return max(
        relative(found[..., part], wanted[..., part]) for part in (slice(-1), slice(-1, None))
    )


def useful_flops(run: Run) -> float:
    """Forward FLOPs that the mathematics needs, on all devices."""
    total = 0.0
    for w, r, _, offsets in run.branches:
        whole, rest = divmod(run.length, w)
        total += 4 * run.case.head_dim * len(offsets) * (whole * w * w + rest * rest) / r**2
    return total / (2 if run.case.causal else 1)
