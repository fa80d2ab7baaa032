"""A sequence on a mesh: the answer, the log-sum-exp and all gradients of one device.

The local attention is `tests.dense_local`, which compiles quickly; some cases run the real one.
"""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dilax
from dilax import reference, sharded, sharded_local, tile_loop
from dilax.spec import branches_of
from sharding.mesh import from_layout, to_layout
from tests.compare import error
from tests.dense_local import DENSE, KERNEL

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
    ordered: bool = False

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

    def arrays(self) -> tuple[tuple[np.ndarray, ...], dict[str, np.ndarray]]:
        """query, key, value and the cotangents of out and lse; segment ids and positions."""
        rng = np.random.default_rng(0)
        B, T, N, K, H = 2, self.T, self.N, self.K, 8
        q, do = rng.normal(size=(2, B, T, N, H))
        k, v = rng.normal(size=(2, B, T, K, H))
        ids = np.sort(rng.integers(1, 4, (B, T)), axis=1).astype(np.int32)
        ids[:, -3:] = 0
        places = np.stack([rng.permutation(T) for _ in range(B)]).astype(np.int32)
        rows = {"q_segment_ids": ids} if self.ids else {}
        rows |= {"q_positions": places} if self.ordered else {}
        return (q, k, v, do, rng.normal(size=(B, T, N))), rows


def on_mesh(case: Placed, axis_type=jax.sharding.AxisType.Auto, **more):
    """out, lse, dq, dk, dv in the order of positions, and the function that gave them."""
    mesh = jax.make_mesh(case.mesh, AXES, axis_types=(axis_type,) * 3)
    part, (arrays, rows) = jax.P(*AXES), case.arrays()

    def attend(q, k, v, *others):
        return dilax.sharded_dilated_attention(
            q,
            k,
            v,
            **case.options(),
            **dict(zip(rows, others, strict=True)),
            axis_name="sequence",
            layout=case.layout,
            method=case.method,
            head_axis="tensor" if case.mesh[2] > 1 else None,
            batch_axis="data" if case.mesh[0] > 1 else None,
            return_lse=True,
            **more,
        )

    specs = (part,) * 3 + (jax.P(*AXES[:2]),) * len(rows)
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=(part, part))

    def run(q, k, v, do, dl, *others):
        result, vjp = jax.vjp(lambda *x: mapped(*x, *others), q, k, v)
        return *result, *vjp((do, dl))

    run = jax.jit(run)
    placed = [to_layout(x, case.mesh[1], case.layout) for x in (*arrays, *rows.values())]
    specs = (part,) * 5 + specs[3:]
    placed = [
        jax.device_put(x, jax.NamedSharding(mesh, s)) for x, s in zip(placed, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        found = run(*placed)
    return [from_layout(np.asarray(x), case.mesh[1], case.layout) for x in found]


@functools.cache
def _on_one_device(case: Placed):
    arrays, rows = case.arrays()
    q, k, v, do, dl = map(jnp.asarray, arrays)
    attend = functools.partial(reference.dilated_attention, **case.options(), **rows)

    @jax.jit
    def run(q, k, v, do, dl):
        result, vjp = jax.vjp(attend, q, k, v)
        return *result, *vjp((do, dl))

    return [np.asarray(x) for x in run(q, k, v, do, dl)]


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
    Placed((8, 16), (1, 2), (1, 2, 1), method="all_to_all", causal=True, ids=True, dropout=0.3),
    Placed((32,), (4,), method="hybrid", N=2, K=2, layout="zigzag", causal=True, dropout=0.3),
    Placed((16, 32), (2, 4), method=("ring", "all_gather"), dropout=0.3, K=2),
    Placed((11, 32), (2, 3), (2, 2, 2), causal=True, dropout=0.3, K=2, ids=True),
    Placed((4, 32), (1, 4), (1, 2, 2), combine="heads", causal=True, layout="zigzag"),
    Placed((8, 11, 32), (2, 3, 2), causal=True, dropout=0.3, ids=True, ordered=True),
]


@pytest.mark.parametrize("case", METHODS, ids=lambda case: case.name)
def test_every_method(case, x64, monkeypatch):
    monkeypatch.setattr(sharded_local, "XLA", DENSE)
    check(case)


HASHED = [
    Placed((4, 16, 32), (2, 1, 1), (2, 2, 1), causal=True, dropout=0.3, K=2, method="ring"),
    Placed((32,), (1,), (1, 2, 1), "zigzag", causal=True, dropout=0.3, method="ring"),
]


@pytest.mark.parametrize("case", HASHED, ids=lambda case: case.name)
def test_dropout_of_a_local_attention_that_hashes_itself(case, x64, monkeypatch):
    monkeypatch.setattr(sharded_local, "XLA", KERNEL)
    check(case)


@pytest.mark.mesh_table
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_table(case, x64, monkeypatch):
    monkeypatch.setattr(sharded_local, "XLA", DENSE)
    check(case)


@pytest.mark.parametrize("case", [TABLE[i] for i in (40, 106)], ids=lambda case: case.name)
def test_part_of_the_table(case, x64, monkeypatch):
    assert len(TABLE) >= 150
    # Messages and calls take turns, as they do with the kernels.
    monkeypatch.setattr(sharded_local, "XLA", DENSE._replace(alone=True))
    check(case)


def test_the_attention_of_xla(x64, monkeypatch):
    """The real local attention in several tiles: traced starts, dropout bits, ids, unaligned."""
    for name in ("_QUERY_TILE", "_KEY_TILE", "_CAUSAL_TILE"):
        monkeypatch.setattr(tile_loop, name, 4)
    case = Placed((5,), (2,), (1, 2, 1), causal=True, K=2, ids=True, dropout=0.3, T=16)
    check(case, implementation="xla")


def compiled(case: Placed, dtype=np.float32):
    """The forward program of a case and its plan."""
    mesh = jax.make_mesh(case.mesh, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    part = jax.P(*AXES)
    attend = functools.partial(
        dilax.sharded_dilated_attention,
        **case.options(),
        axis_name="sequence",
        layout=case.layout,
        method=case.method,
    )
    if case.ordered:
        places = jnp.arange(case.T // case.mesh[1], dtype=jnp.int32)
        attend = functools.partial(attend, q_positions=places, kv_positions=places + 1)
    if case.ids:
        ids = jnp.ones((2, case.T // case.mesh[1]), jnp.int32)
        attend = functools.partial(attend, q_segment_ids=ids)
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(part,) * 3, out_specs=part)
    q, k, v = (x.astype(dtype) for x in case.arrays()[0][:3])
    text = jax.jit(mapped).lower(q, k, v).compile().as_text() or ""
    T, itemsize = case.T, np.dtype(dtype)
    spec = dilax.DilatedSpec(case.segment_lengths, case.dilation_rates)
    plan = sharded.plan_of(
        branches_of(spec, case.N, case.combine, "interleaved"),
        (2, T, case.N, case.K, 8),
        itemsize,
        devices=case.mesh[1],
        layout=case.layout,
        is_causal=case.causal and not case.ordered,
        method=case.method,
        packed=case.ids,
        ordered=case.ordered,
    )
    return text, plan


def received(text: str) -> int:
    """Bytes that one device receives in a compiled program, from the shapes of its collectives."""
    total = 0
    kinds = "collective-permute|all-gather|all-to-all"
    for result, _, rest in re.findall(rf"= (.*?) ({kinds})(?:-start)?\((.*)", text):
        size = sum(
            {"f32": 4, "s32": 4, "f64": 8}[dtype]
            * math.prod(map(int, filter(None, dims.split(","))))
            for dtype, dims in re.findall(r"(f32|s32|f64)\[([\d,]*)\]", result)
        )
        groups = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
        if groups:
            parts = len(groups[1].split(","))
            size = size * (parts - 1) // parts
        total += size
    return total


MOVES = [
    Placed((16, 32), (2, 4), method="ring", K=2),
    Placed((32,), (1,), (1, 2, 1), "zigzag", True, method="ring", K=2),
    Placed((32,), (2,), method="all_gather", K=1),
    Placed((32,), (4,), method="all_to_all"),
    Placed((32,), (2,), method="hybrid", N=2, K=2),
    Placed((16, 32), (2, 4), method="ring", K=2, ids=True),
    Placed((11,), (3,), causal=True, ordered=True),
    Placed((32,), (4,), method="all_to_all", causal=True, ordered=True),
]


@pytest.mark.parametrize("case", MOVES, ids=lambda case: case.name)
def test_the_program_moves_what_the_plan_says(case, monkeypatch):
    monkeypatch.setattr(sharded_local, "XLA", DENSE)
    text, plan = compiled(case)
    assert plan.bytes > 0
    assert received(text) == plan.bytes
    methods = {branch.method for branch in plan.branches}
    assert ("all-gather" in text) == ("all_gather" in methods)
    assert ("all-to-all" in text) == bool(methods & {"all_to_all", "hybrid"})


def test_no_message_where_everything_is_local(monkeypatch):
    monkeypatch.setattr(sharded_local, "XLA", DENSE)
    text, plan = compiled(Placed((4, 8), (1, 2)))
    assert plan.bytes == plan.messages == 0
    assert not re.search("collective-permute|all-gather|all-to-all|all-reduce", text)


def test_zigzag_balances_causal_work():
    def balance(layout):
        branches = ((1 << 16, 4, 0, (0, 1, 2, 3)),)
        sizes = (1, 1 << 16, 4, 4, 64)
        plan = sharded.plan_of(
            branches, sizes, "bfloat16", devices=8, layout=layout, is_causal=True
        )
        return plan.balance

    assert balance("zigzag") == pytest.approx(1.0)


def test_each_level_of_the_tokens_has_its_speed():
    """Groups of four devices are a host: only what is wider gets slower, and nothing else."""
    branches = tuple((w, 1, 0, (0,) * 8) for w in (1 << 15, 1 << 16))
    sizes = (1, 1 << 16, 8, 8, 64)
    one, two, all_slow = (
        sharded.plan_of(branches, sizes, "bfloat16", devices=8, method="ring", link=link)
        for link in (
            sharded.link_of((8,)),
            sharded.link_of((2, 4), (5, 340)),
            sharded.link_of((2, 4), 5),
        )
    )
    assert one.bytes == two.bytes == all_slow.bytes > 0
    near, far = two.branches
    assert (near.group, near.exposed) == (4, one.branches[0].exposed)
    assert one.branches[1].exposed < far.exposed <= all_slow.branches[1].exposed
    with pytest.raises(ValueError, match="gigabytes_per_second: wanted one number, or one for ea"):
        sharded.link_of((2, 4), (1, 2, 3))


def attend_on(axis="sequence", mesh=("sequence",), T=32, **options):
    """A call on a mesh of four devices, traced only."""
    devices = jax.make_mesh(
        (4,) + (1,) * (len(mesh) - 1), mesh, axis_types=(jax.sharding.AxisType.Auto,) * len(mesh)
    )
    part = jax.P(None, mesh[0])
    x = jax.ShapeDtypeStruct((1, T, 4, 8), jnp.float32)
    options = {"segment_lengths": [8, 32], "dilation_rates": [1, 2]} | options
    attend = functools.partial(dilax.sharded_dilated_attention, axis_name=axis, **options)
    mapped = jax.shard_map(attend, mesh=devices, in_specs=(part,) * 3, out_specs=part)
    return jax.eval_shape(mapped, x, x, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": "rows"}, r"axis_name: wanted axes of the shard_map .*sequence.*, got 'rows'"),
        ({"axis": 3}, "axis_name: wanted the name of a mesh axis"),
        ({"ring_size": 8}, "ring_size: wanted None or 4, the devices along"),
        ({"layout": "striped"}, "layout: wanted 'contiguous' or 'zigzag', got 'striped'"),
        ({"method": "star"}, "method: wanted 'local' or 'ring'"),
        ({"method": ("ring",)}, "method: wanted one for each of 2 branches"),
        ({"method": "local"}, "method: .*got 'local': segments of 32 reach beyond the 8 tokens"),
        ({"T": 36, "layout": "zigzag"}, "36 tokens on 4 devices: wanted a multiple of 8.* to 40"),
        (
            {"method": "all_to_all", "segment_lengths": [8, 31]},
            "method: .*got 'all_to_all': .*not aligned",
        ),
        ({"head_axis": "tensor"}, "head_axis: wanted axes of the shard_map"),
        ({"implementation": "cuda"}, "implementation: wanted"),
    ],
)
def test_refused_before_anything_is_computed(options, message):
    with pytest.raises(ValueError, match=message):
        attend_on(**options)


def test_outside_a_shard_map():
    x = jnp.ones((1, 8, 2, 8))
    with pytest.raises(ValueError, match="there is none"):
        dilax.sharded_dilated_attention(x, x, x, [8], [1], axis_name="sequence")
