"""Which implementation is taken, with reasons; kernels that are wrong, absent or shadowed."""

import functools
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import pytest

import dilax
from dilax import UnsupportedError, dropout, reference, select, xla_attention
from dilax.patterns import LocalWindow
from tests.compare import assert_exact

H100 = "NVIDIA H100 80GB HBM3"
X = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.bfloat16)
OPTIONS = {"branches": ((8, 1, 0, (0, 0)),), "is_causal": True, "scale": 0.25}


def kernels(calls, reasons=()):
    """A stand-in for pallas_kernels.flash that computes in XLA and notes what it was given."""

    def attend(query, key, value, *, keep, **options):
        calls.append(keep)
        return xla_attention.attend(query, key, value, **options)

    def unsupported(query, key, value, *, device_kind, keep, **options):
        calls.append((device_kind, options["branches"]))
        return reasons

    return types.SimpleNamespace(attend=attend, unsupported=unsupported)


@pytest.fixture
def on_gpu(monkeypatch):
    device = types.SimpleNamespace(platform="gpu", device_kind=H100)
    monkeypatch.setattr(select, "device_of", lambda x: device)


def test_on_a_cpu_xla_runs_and_pallas_says_why_not():
    assert select.choose(None, X, X, X, **OPTIONS) is xla_attention.attend
    assert select.choose("xla", X, X, X, **OPTIONS) is xla_attention.attend
    with pytest.raises(UnsupportedError, match=r"pallas: .*Hopper.*the device is a cpu") as caught:
        select.choose("pallas", X, X, X, **OPTIONS)
    assert set(caught.value.reasons) == {"pallas"}


@pytest.mark.parametrize("name", ["triton", "", "XLA", 0, ("xla",)])
def test_unknown_implementations_are_refused(name):
    with pytest.raises(ValueError, match=r"^implementation: wanted None or one of"):
        select.choose(name, X, X, X, **OPTIONS)


def block_calls(**options):
    """Calls with blocks that no kernel takes, each a function without arguments."""
    pattern, auto = LocalWindow(0.5, block_size=96), jax.sharding.AxisType.Auto
    x = jax.ShapeDtypeStruct((1, 384, 4, 16), jnp.float32)
    mesh = jax.sharding.AbstractMesh((2,), ("sequence",), axis_types=(auto,))
    part = jax.P(None, "sequence")
    whole = functools.partial(dilax.block_sparse_attention, pattern=pattern, **options)
    inside = functools.partial(whole, segment_lengths=(96, 384), dilation_rates=(1, 2))
    sharded = functools.partial(
        dilax.sharded_block_sparse_attention, pattern=pattern, axis_name="sequence", **options
    )
    sharded = jax.shard_map(sharded, mesh=mesh, in_specs=(part,) * 3, out_specs=part)
    created = {"embed_dim": 64, "num_heads": 4, "block_size": 100}
    said = {"seq_len": 384, "pattern": pattern, "segment_lengths": None}
    return {
        "whole": lambda: jax.eval_shape(whole, x, x, x),
        "inside": lambda: jax.eval_shape(inside, x, x, x),
        "sharded": lambda: jax.eval_shape(sharded, x, x, x),
        "adaptive": lambda: dilax.AdaptiveAttention(4, 16, block_size=100, **options),
        "created": lambda: dilax.create_block_sparse_attention("adaptive", **created, **options),
        "explained": lambda: dilax.explain("block_sparse", **said, **options),
        "routed": lambda: dilax.explain("adaptive", seq_len=384, block_size=100, **options),
    }


@pytest.mark.newest
@pytest.mark.parametrize("name", block_calls())
def test_blocks_that_no_kernel_takes_need_xla_by_name(name):
    for options in ({}, {"implementation": "pallas"}):
        with pytest.raises(ValueError, match=r"^block_size: wanted 64 or a multiple of 128, or"):
            block_calls(**options)[name]()
    block_calls(implementation="xla")[name]()


def test_a_config_has_blocks_that_a_kernel_takes():
    assert dilax.SparsePatternConfig(block_size=384).block_size == 384
    for size in (96, 192, 64.0, True, -128):
        with pytest.raises(ValueError, match=r"^block_size: wanted 64 or a multiple of 128, got"):
            dilax.SparsePatternConfig(block_size=size)


def test_kernels_run_where_they_can(monkeypatch, on_gpu, x64):
    calls = []
    monkeypatch.setattr(select, "sibling", lambda name: kernels(calls))
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 12, 2, 8), jnp.float64)
    spec, drop = ([6, 12], [1, 2]), {"dropout_rate": 0.3, "deterministic": False}
    exact, _ = reference.dilated_attention(q, k, v, *spec, **drop, dropout_key=jax.random.key(1))
    for implementation in (None, "pallas"):
        out = dilax.dilated_attention(
            q, k, v, *spec, **drop, dropout_key=jax.random.key(1), implementation=implementation
        )
        assert_exact(out, exact)
    assert calls == [(H100, ((6, 1, 0, (0, 0)), (12, 2, 0, (0, 1)))), dropout] * 2


def test_reasons_of_kernels_are_passed_on(monkeypatch, on_gpu):
    monkeypatch.setattr(select, "sibling", lambda name: kernels([], ("too big", "too small")))
    assert select.choose(None, X, X, X, **OPTIONS) is xla_attention.attend
    with pytest.raises(UnsupportedError, match=r"query bfloat16\[1,8,2,16\].*too big, too small"):
        select.choose("pallas", X, X, X, **OPTIONS)


def test_an_error_inside_the_kernels_is_seen(monkeypatch, on_gpu):
    def broken(*arrays, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(
        select, "sibling", lambda name: types.SimpleNamespace(unsupported=broken, attend=broken)
    )
    with pytest.raises(RuntimeError, match="a bug"):
        select.choose(None, X, X, X, **OPTIONS)


def test_missing_absl_is_a_reason(monkeypatch, on_gpu):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "absl" else found(name, *a)
    )
    assert select.choose(None, X, X, X, **OPTIONS) is xla_attention.attend
    with pytest.raises(UnsupportedError, match="absl-py"):
        select.choose("pallas", X, X, X, **OPTIONS)


def test_missing_kernels_are_a_reason(monkeypatch, on_gpu):
    monkeypatch.setattr(select, "sibling", lambda name: None)
    with pytest.raises(UnsupportedError, match="no kernel"):
        select.choose("pallas", X, X, X, **OPTIONS)


@pytest.mark.kernel
def test_the_real_kernels_state_their_reasons():
    """Asked about a GPU that is not there: the real package is found and answers."""
    assert select.unsupported("pallas", X, X, X, device_kind=H100, **OPTIONS) == ()
    single = jax.ShapeDtypeStruct(X.shape, jnp.float32)
    reasons = select.unsupported(
        "pallas", single, single, single, device_kind="NVIDIA A100-SXM4-80GB", **OPTIONS
    )
    assert any("A100" in why for why in reasons)
    assert any("float32" in why for why in reasons)
    assert select.load("pallas").keywords == {"keep": dropout}


def forget(monkeypatch, package):
    """Unload a package for one test."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("package", ["pallas_kernels", "sharding"])
@pytest.mark.parametrize("form", ["{}.py", "{}/__init__.py"])
def test_a_shadowing_package_is_named(package, form, monkeypatch, tmp_path):
    shadow = tmp_path / form.format(package)
    shadow.parent.mkdir(exist_ok=True)
    shadow.write_text("raise AssertionError('the wrong package was imported')")
    forget(monkeypatch, package)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"comes first on sys\.path") as caught:
        select.sibling(f"{package}.flash")
    assert str(shadow) in str(caught.value)
    assert caught.value.path == str(shadow)


def test_siblings_are_found_or_absent():
    found = select.sibling("sharding")
    assert found is not None
    assert found.__name__ == "sharding"
    assert select.sibling("sharding.no_such_module") is None
    assert select.sibling("no_such_package_anywhere.flash") is None


def test_the_device_is_that_of_the_array_or_the_default():
    first, second = jax.devices()[:2]
    assert select.device_of(jax.device_put(jnp.ones(2), second)) == second
    assert select.device_of(X) == first
    seen = []
    trace = jax.make_jaxpr(lambda x: seen.append(select.device_of(x)) or x)
    trace(jnp.ones(2))
    with jax.default_device(second):
        assert select.device_of(X) == second
        trace(jnp.ones(3))
    assert seen == [first, second]
