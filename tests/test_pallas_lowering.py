"""Every supported kind of call lowers for CUDA, without a GPU; tuned ones compile without spills.

Lowering runs on plain jaxlib and finds wrong shapes, layouts and shared memory overflows. The full
compile needs the `aot` dependency group and runs with `-m aot`.
"""

import collections
import dataclasses
import importlib.metadata
import itertools
import os
import platform
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dilax import dropout
from pallas_kernels import config, flash, launches, schedule, visits, work_lists
from pallas_kernels.marks import Kinds

pytestmark = pytest.mark.kernel

PAIR = ((256, 1, 0, (0, 0)), (512, 2, 0, (0, 1)))


def lower(T, H, branches=PAIR, N=2, K=2, S=None, dtype="bfloat16", grad=True, **options):
    """The lowered text of attend, with its gradients, for a GPU that is not there."""
    q = jax.ShapeDtypeStruct((1, T, N, H), dtype)
    k = jax.ShapeDtypeStruct((1, S or T, K, H), dtype)
    array = {name: x for name, x in options.items() if isinstance(x, jax.ShapeDtypeStruct | tuple)}
    fixed = {name: x for name, x in options.items() if name not in array}

    def run(q, k, v, array):
        def attend(q, k, v):
            return flash.attend(q, k, v, branches=branches, **array, **fixed)

        if not grad:
            return attend(q, k, v)
        result, pull = jax.vjp(attend, q, k, v)
        return result, pull(jax.tree.map(jnp.ones_like, result))

    return jax.jit(run).trace(q, k, k, array).lower(lowering_platforms=("cuda",)).as_text()


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def partial(T, H, N=2):
    return tuple(jax.ShapeDtypeStruct((1, T, N, *h), jnp.float32) for h in ((H,), ()))


CALLS = {
    "causal": {"T": 512, "H": 128, "is_causal": True},
    "causal, two passes": {"T": 512, "H": 128, "is_causal": True, "deterministic": True},
    "three, two passes": {"T": 512, "H": 64, "deterministic": True},
    "three warpgroups": {"T": 4500, "H": 64, "branches": ((1 << 20, 1, 0, (0, 0)),)},
    "groups of branches": {"T": 1024, "H": 128},
    "ragged gqa": {"T": 333, "H": 48, "K": 1, "dtype": "float16"},
    "boxes": {"T": 1003, "S": 778, "H": 40, "K": 1, "dtype": "float16"},
    "boxes of a series": {"T": 330, "H": 24, "is_causal": True},
    "boxes, two passes": {"T": 330, "H": 56, "deterministic": True},
    "boxes continue": {"T": 331, "H": 48, "carry": partial(331, 48)},
    "cross": {"T": 100, "S": 300, "H": 64, "q_start": 50, "k_start": 9},
    "nothing visible": {"T": 100, "H": 64, "k_start": 1000, "is_causal": True},
    "traced starts": {"T": 256, "H": 64, "q_start": ints(), "k_start": ints()},
    "rates that do not divide segments": {
        "T": 333,
        "H": 64,
        "branches": ((100, 3, 0, (0, 1)), (160, 1, 0, (0, 0))),
    },
    "carry and ids": {
        "T": 256,
        "H": 128,
        "carry": partial(256, 128),
        "q_segment_ids": ints(1, 256),
    },
    "positions, ids": {
        "T": 256,
        "S": 300,
        "H": 128,
        "is_causal": True,
        "q_positions": ints(1, 256),
        "kv_positions": ints(1, 300),
        "q_segment_ids": ints(1, 256),
        "kv_segment_ids": ints(1, 300),
    },
}
DROPS = {
    "dropout_rate": 0.1,
    "keep": dropout,
    "dropout_seed": jax.ShapeDtypeStruct((2,), jnp.uint32),
}
CALLS |= {
    "dropout": {"T": 256, "H": 64, **DROPS},
    "positions": {"T": 256, "H": 128, "is_causal": True, "q_positions": ints(1, 256), **DROPS},
}


@pytest.mark.parametrize("name", CALLS)
def test_lowers_for_cuda(name):
    text = lower(**CALLS[name])
    # At H=128 there is room for one mark in one pass.
    passes = 2 if "two passes" in name or name == "positions, ids" else 1
    assert "dilated_forward" in text
    assert ("dilated_gradients" in text) == (passes == 1)
    assert ("dilated_keys_gradient" in text) == (passes == 2)


@pytest.mark.parametrize("head_dim", [16, 24, 72, 112, 160, 232, 256])
def test_head_sizes_lower(head_dim):
    text = lower(256, head_dim, branches=PAIR[:1])
    assert "dilated_forward" in text
    assert ("dilated_gradients" in text) == (head_dim <= 64)
    assert ("dilated_keys_gradient" in text) == (head_dim > 64)


def test_work_lists_cover_every_tile_once():
    offsets = tuple(tuple(n % r for n in range(4)) for r in (1, 2, 4))
    plan = schedule.Launch(
        rates=(1, 2, 4),
        lengths=(512, 512, 512),
        offsets=offsets,
        numbers=(0, 1, 2),
        phases=(None, None, None),
        stride=4,
        home=3000,
        away=3000,
        home_start=0,
        away_start=0,
        causal=False,
        transposed=False,
        block_home=128,
        block_away=128,
    )
    table = work_lists.work_lists(plan, batch=2, ctas=7, row_bytes=256, group=1, skip_empty=False)
    codes = np.concatenate([row[1 : 1 + row[0, 0], 0] for row in table])
    assert sorted(codes) == list(range(2 * plan.tiles * 4 * 4))
    work = np.array([row[1 : 1 + row[0, 0], 2].sum() for row in table])
    assert work.max() <= 1.15 * work.mean()


PLACES = [
    # w, r, T, S, starts, causal
    (64, 2, 300, 300, (0, 0), False),
    (96, 4, 200, 333, (77, 30), True),
    (25, 3, 150, 150, (0, 0), False),
    (25, 3, 150, 150, (0, 0), True),
    (30, 4, 190, 100, (11, 60), True),
    (3, 5, 70, 70, (0, 0), False),
    (100, 7, 230, 260, (41, 0), False),
]


@pytest.mark.parametrize(("w", "r", "T", "S", "starts", "causal"), PLACES)
@pytest.mark.parametrize(("transposed", "known"), [(False, True), (True, True), (True, False)])
def test_visits_see_what_the_definition_says(w, r, T, S, starts, causal, transposed, known):
    heads = 3
    offsets = tuple(n % r for n in range(heads))
    q_start, k_start = starts if known else (None, None)
    call = flash.Call(
        branches=((w, r, 0, offsets),),
        causal=causal,
        scale=1.0,
        q_start=q_start,
        k_start=k_start,
        rate=0.0,
        keep=None,
        out_dtype=None,
        marks=Kinds(),
        device_kind="",
        interpret=False,
        deterministic=True,
    )
    plan = launches.launch_of(call, heads, T, S, config.Blocks(64, 1, 1), transposed)
    plan = dataclasses.replace(plan, block_home=16, block_away=16)
    table = np.asarray(schedule.geometry(plan, jnp.asarray(starts)))
    mask, seen = schedule.participation(plan), np.zeros((heads, T, S), np.int64)
    home_start = starts[transposed]
    for branch, rate in enumerate(plan.rates):
        for residue, tile in np.ndindex(table.shape[1:3]):
            first, steps, home_shift, away_shift, away_residue, limit, origin, local, count = table[
                branch, residue, tile
            ].tolist()
            row = np.arange(tile * 16, tile * 16 + 16)
            away = np.arange(first, first + 16 * steps)
            v = visits.running_visit(
                plan, branch, count, home_shift=0, away_shift=0, limit=limit, origin=origin
            )
            dilated = row * (plan.stride // rate) + home_shift
            low, high = (
                np.asarray(x)[:, None] for x in visits.row_bounds(plan, v, dilated.astype(np.int32))
            )
            found = (away + away_shift >= low) & (away + away_shift < high) & (away < limit)
            home = row * plan.stride + local
            assert (dilated * rate + origin == home + home_start).all()
            there = np.minimum(away * rate + away_residue, plan.away - 1)
            found &= (home < plan.home)[:, None]
            rows = np.minimum(home, plan.home - 1)
            for head in range(heads):
                if mask[head, residue] >> branch & 1:
                    target = seen[head].T if transposed else seen[head]
                    np.add.at(target, (rows[:, None], there[None]), found)
    q, k = starts[0] + np.arange(T)[:, None], starts[1] + np.arange(S)
    for head, offset in enumerate(offsets):
        wanted = (q // w == k // w) & (q % w % r == offset) & (k % w % r == offset)
        wanted &= (q >= k) | (not causal)
        np.testing.assert_array_equal(seen[head], wanted)


@pytest.mark.parametrize(("head_dim", "forward"), [(64, 2), (128, 1)])
def test_causal_branches_share_programs(head_dim, forward):
    """Four launches forward, and four of the gradients, which are one program."""
    lists = ((256, 1), (512, 2), (1024, 4), (2048, 8))
    branches = tuple((w, r, 0, tuple(n % r for n in range(4))) for w, r in lists)
    options = {"N": 4, "K": 4, "branches": branches, "is_causal": True}
    for grad in (False, True):
        text = lower(2048, head_dim, grad=grad, **options)
        assert text.count("custom_call @mosaic_gpu") == forward + grad


FIVE = tuple(
    (w, r, 0, tuple(n % r for n in range(16)))
    for w, r in ((1024, 1), (5792, 2), (32768, 4), (185363, 8), (1 << 20, 16))
)


def moved(text):
    """Shapes that arrays `[B, T, N, H]` are padded or cut to, and the ones they had."""
    lines = re.findall(r"stablehlo\.(?:pad|slice).* : \(tensor<(.*?)>.*-> tensor<(.*?)>", text)
    return sorted(shapes for shapes in lines if shapes[0].count("x") == 4)


def test_small_heads_need_no_padding():
    """Rows of a residue that are no multiple of 8, columns that are no power of 2."""
    options = {"H": 48, "N": 16, "K": 16, "branches": FIVE, "dtype": "float16"}
    assert moved(lower(10000, grad=False, **options)) == []
    # A sum of its own, cut where it is rounded.
    cut = ("1x10112x16x48xf16", "1x10000x16x48xf16")
    assert moved(lower(10000, **options)) == [cut]
    # To whole rows of the common stride, which a view needs.
    padded = [("1x9999x16x48xf16", "1x10000x16x48xf16"), ("1x10000x16x48xf16", "1x9999x16x48xf16")]
    assert set(moved(lower(9999, grad=False, **options))) == set(padded)


def test_blocks_fit_for_every_supported_head_size():
    for head_dim, marks in itertools.product(range(16, 257, 16), (1, 2)):
        for size in (2, 4):
            assert config.forward_blocks(head_dim, size, 2048, causal=True, marks=marks)
            assert config.keys_blocks(head_dim, marks=marks, out_bytes=size)
        assert config.queries_blocks(head_dim, marks=marks)


AOT = """
import jax, jax.numpy as jnp, sys
from jax.experimental import topologies
from pallas_kernels import flash
target = '''{target}'''
topology = topologies.get_topology_desc(
    platform="cuda", target_config=target, topology="1x1x1"
)
mesh = topologies.make_mesh(topology, (1,), ("x",))
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
x = jax.ShapeDtypeStruct((1, 8192, 2, {H}), jnp.bfloat16, sharding=sharding)
branches = ((2048, 1, 0, (0, 0)), (4096, 2, 0, (0, 1)))
f = lambda q, k, v: flash.attend(q, k, v, branches=branches, is_causal={causal})[0]
total = lambda *x: f(*x).astype(jnp.float32).sum()
jax.jit(jax.grad(total, (0, 1, 2)) if {backward} else f).lower(x, x, x).compile()
"""
# Bytes a thread that the assembler may keep in memory, (H, causal, backward): scalars, and what the
# steps with masks of the fused backward do not hold.
SPILLS = {
    (64, False, True): 28,
    (64, True, True): 84,
    (128, False, False): 16,
    (128, True, False): 56,
    (128, False, True): 52,
    (128, True, True): 56,
}
TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" name: "NVIDIA H100 80GB HBM3" device_address_bits: 64
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def compiled(head_dim, causal, backward, dump):
    """What a compilation for an H100 prints; dump: PTX or PTXAS."""
    code = AOT.format(target=TARGET, H=head_dim, causal=causal, backward=backward)
    # The group's ptxas first: XLA prefers one on PATH, and another release spills differently.
    ptxas = importlib.metadata.distribution("nvidia-cuda-nvcc").locate_file("nvidia/cu13/bin")
    settings = {
        "JAX_PLATFORMS": "cpu",
        f"MOSAIC_GPU_DUMP_{dump}": "1",
        "PATH": f"{ptxas}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": ".",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | settings,
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    return log


COMPILES = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="the aot dependency group is for Linux on x86-64",
)


@pytest.mark.aot
@COMPILES
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_compiles_for_an_h100_without_spills(head_dim, causal, backward):
    log = compiled(head_dim, causal, backward, "PTXAS")
    assert "bytes spill stores" in log
    spilled = [int(part.split()[-1]) for part in log.split(" bytes spill stores")[:-1]]
    assert max(spilled) <= SPILLS.get((head_dim, causal, backward), 0), log[-3000:]
    assert not re.search(r"C751\d", log)  # products one after the other


@pytest.mark.aot
@COMPILES
def test_products_have_the_columns_of_heads():
    """Of 64 in shared memory: 3 of 4 steps of sums over 40, 5 of 8 groups of results."""
    log = compiled(40, False, True, "PTX")
    found = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16", log)
    counts = collections.Counter(map(int, found))
    assert counts.pop(40)
    # Scores and, backward, the gradients of probabilities: of 128 or 256 rows at once.
    assert counts
    assert not any(rows % 128 or count % 3 for rows, count in counts.items())


@pytest.mark.parametrize("transform", ["vmap", "remat", "scan", "shard_map"])
def test_transforms_lower(transform):
    x = jax.ShapeDtypeStruct((2, 1, 256, 2, 64), jnp.bfloat16)
    mesh = jax.sharding.AbstractMesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def attend(q, k, v):
        return flash.attend(q, k, v, branches=PAIR, is_causal=True)[0].astype(q.dtype)

    def run(q, k, v):
        match transform:
            case "vmap":
                return jax.vmap(attend)(q, k, v)
            case "remat":
                return jax.checkpoint(attend)(q[0], k[0], v[0])
            case "scan":
                step = lambda x, kv: (attend(x, *kv), None)  # noqa: E731
                return jax.lax.scan(step, q[0], (k, v))[0]
        spec = jax.sharding.PartitionSpec("x")
        mapped = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        return mapped(q[:, 0], k[:, 0], v[:, 0])

    grad = jax.grad(lambda *x: run(*x).astype(jnp.float32).sum(), (0, 1, 2))
    text = jax.jit(grad).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "dilated_gradients" in text


@pytest.mark.parametrize("deterministic", [True, False])
def test_examples_of_a_jitted_function_lower_in_64_bits(deterministic, x64):
    """The rule for examples traces a kernel once more, where 64-bit integers are the default."""
    x = jax.ShapeDtypeStruct((2, 1, 256, 2, 64), jnp.bfloat16)

    def total(*arrays):
        out, _ = flash.attend(*arrays, branches=PAIR, is_causal=True, deterministic=deterministic)
        return out.astype(jnp.float32).sum()

    examples = jax.jit(jax.vmap(jax.jit(jax.grad(total, (0, 1, 2)))))
    text = examples.trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert "custom_call @mosaic_gpu" in text


def test_each_iteration_of_a_loop_has_its_own_empty_arrays():
    """One that they share would be copied before each kernel that updates it."""
    x = jax.ShapeDtypeStruct((1, 1024, 2, 128), jnp.bfloat16)
    branches = ((256, 1, 0, (0, 0)), (512, 2, 0, (0, 1)))

    def total(q, k, v):
        def layer(x, _):
            return flash.attend(x, k, v, branches=branches, is_causal=True)[0], None

        return jax.lax.scan(layer, q, length=3)[0].astype(jnp.float32).sum()

    def primitives(jaxpr, inside):
        """(name, whether it lies in a loop) of all equations."""
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name, inside
            for inner in jax.tree.leaves(list(eqn.params.values())):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from primitives(inner, inside or eqn.primitive.name == "scan")

    found = collections.Counter(primitives(jax.jit(jax.grad(total)).trace(x, x, x).jaxpr, False))
    assert found["empty", False] == 0
    assert found["empty", True] == 4  # out and lse, gradients of keys and values


def test_shard_map_that_checks_is_refused():
    x = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)
    auto = (jax.sharding.AxisType.Auto,)
    mesh, spec = jax.sharding.AbstractMesh((2,), ("x",), axis_types=auto), jax.P("x")
    mapped = jax.shard_map(
        lambda q: flash.attend(q, q, q, branches=PAIR)[0], mesh=mesh, in_specs=spec, out_specs=spec
    )
    with pytest.raises(ValueError, match="check_vma=False"):
        jax.jit(mapped).trace(x)
