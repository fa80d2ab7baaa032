"""A sequence on a mesh: the answer, the log-sum-exp and all gradients of one device.

The local attention is `tests.dense_local`, which compiles quickly; some cases run the real one.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dilax
from dilax import reference, sharded
from sharding.mesh import from_layout, to_layout
from tests.compare import error
from tests.dense_local import DENSE

EXACT = 1e-12
AXES = ("data", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class Placed:
    """One call on a mesh (data, sequence, tensor)."""

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    mesh: tuple[int, int, int] = (1, 4, 1)
    layout: str = "contiguous"
    causal: bool = False
    method: str | tuple[str | None, ...] | None = None
    N: int = 4
    K: int = 4
    T: int = 32
    combine: str = "lse"
    ids: bool = False
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """What differs from the defaults."""
        said = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return "-".join(said).replace(" ", "")

    def options(self) -> dict:
        """Options that one device and the mesh take alike."""
        drops = {"dropout_key": jax.random.key(3), "deterministic": False}
        return {
            "segment_lengths": self.segment_lengths,
            "dilation_rates": self.dilation_rates,
            "is_causal": self.causal,
            "combine": self.combine,
            "dropout_rate": self.dropout,
            **(drops if self.dropout else {}),
        }

    def arrays(self) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
        """query, key, value and the cotangents of out and lse; segment ids, if there are any."""
        rng = np.random.default_rng(0)
        B, T, N, K, H = 2, self.T, self.N, self.K, 8
        q, do = rng.normal(size=(2, B, T, N, H))
        k, v = rng.normal(size=(2, B, T, K, H))
        ids = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
        ids[:, -3:] = 0
        return (q, k, v, do, rng.normal(size=(B, T, N))), (ids,) if self.ids else ()


def on_mesh(case: Placed, axis_type=jax.sharding.AxisType.Auto, **more):
    """out, lse, dq, dk, dv in the order of positions, and the function that gave them."""
    mesh = jax.make_mesh(case.mesh, AXES, axis_types=(axis_type,) * 3)
    part, rows = jax.P(*AXES), jax.P(*AXES[:2])

    def attend(q, k, v, *ids):
        return dilax.sharded_dilated_attention(
            q,
            k,
            v,
            **case.options(),
            q_segment_ids=ids[0] if ids else None,
            axis_name="sequence",
            layout=case.layout,
            method=case.method,
            head_axis="tensor" if case.mesh[2] > 1 else None,
            batch_axis="data" if case.mesh[0] > 1 else None,
            return_lse=True,
            **more,
        )

    specs = (part,) * 3 + (rows,) * case.ids
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(part, part))

    def run(q, k, v, do, dl, *ids):
        result, vjp = jax.vjp(lambda *x: mapped(*x, *ids), q, k, v)
        return *result, *vjp((do, dl))

    run = jax.jit(run)
    arrays, ids = case.arrays()
    placed = [to_layout(x, case.mesh[1], case.layout) for x in (*arrays, *ids)]
    specs = (part,) * 5 + (rows,) * case.ids
    placed = [
        jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip(placed, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        found = run(*placed)
    return [from_layout(np.asarray(x), case.mesh[1], case.layout) for x in found]


@functools.cache
def _on_one_device(case: Placed):
    arrays, ids = case.arrays()
    q, k, v, do, dl = map(jnp.asarray, arrays)
    attend = functools.partial(
        reference.dilated_attention, **case.options(), q_segment_ids=ids[0] if ids else None
    )
    result, vjp = jax.vjp(attend, q, k, v)
    return [np.asarray(x) for x in (*result, *vjp((do, dl)))]


def check(case: Placed, **more) -> None:
    """The mesh gives what the oracle gives on one device, to 1e-12."""
    one = dataclasses.replace(case, mesh=(1, 1, 1), layout="contiguous", method=None)
    errors = [error(a, b) for a, b in zip(on_mesh(case, **more), _on_one_device(one), strict=True)]
    assert max(errors) <= EXACT, dict(zip(("out", "lse", "dq", "dk", "dv"), errors, strict=True))


LISTS = {
    "dense": ((32,), (1,)),
    "geometric": ((4, 16, 32), (1, 2, 4)),
    "gigapath": ((4, 11, 32), (1, 2, 4)),
    "unaligned": ((5, 7, 23), (1, 2, 3)),
}
MESHES = ((1, 2, 1), (1, 4, 1), (1, 8, 1), (2, 2, 2))
TABLE = [
    Placed(*LISTS[name], mesh, layout, causal, K=K, ids=ids)
    for name, mesh, layout, causal, (K, ids) in itertools.product(
        LISTS, MESHES, ("contiguous", "zigzag"), (False, True), ((4, False), (2, False), (2, True))
    )
]

METHODS = [
    Placed((32,), (1,), method="all_gather", causal=True, layout="zigzag"),
    Placed((8, 16), (1, 2), method="all_to_all", causal=True, N=8, ids=True, dropout=0.3),
    Placed((16, 32), (2, 4), method="all_to_all", layout="zigzag", causal=True, dropout=0.3),
    Placed((32,), (4,), method="hybrid", N=2, K=2, layout="zigzag", causal=True, dropout=0.3),
    Placed((32,), (2,), method="hybrid", N=8, K=2, ids=True),
    Placed((16, 32), (2, 4), method=("ring", "all_gather"), dropout=0.3, K=2),
    Placed((4, 11, 32), (1, 2, 3), (2, 2, 2), causal=True, dropout=0.3, K=2, ids=True),
    Placed((4, 32), (1, 4), (1, 2, 2), combine="heads", causal=True, layout="zigzag"),
    Placed((4, 11, 32), (1, 2, 3), combine="heads", K=2, dropout=0.3),
]


@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
def test_every_method(case, x64, monkeypatch):
    monkeypatch.setattr(sharded, "XLA", DENSE)
    check(case)
