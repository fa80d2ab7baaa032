"""The wheel, built and installed elsewhere: what it holds, and that it computes."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SMOKE = """
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import dilax, pallas_kernels, sharding
from dilax import longnet, reference

site, checkout = map(Path, sys.argv[1:])
assert checkout.resolve() not in [Path(entry).resolve() for entry in sys.path], sys.path
jax.config.update("jax_enable_x64", True)


def close(actual, exact):
    actual, exact = np.asarray(actual), np.asarray(exact)
    assert actual.dtype == np.float64 and actual.shape == exact.shape
    assert np.abs(actual - exact).max() <= 1e-10 * np.abs(exact).max()


q, k, v, cotangent = jax.random.normal(jax.random.key(0), (4, 1, 21, 2, 8), "float64")
other = cotangent[..., 0]


def attend(q, k, v):
    return dilax.dilated_attention(q, k, v, [16], [1], is_causal=True, return_lse=True)


def exactly(q, k, v):
    return reference.dilated_attention(q, k, v, [16], [1], is_causal=True)


results = []
for f in (attend, exactly):
    out, pull = jax.vjp(jax.jit(f), q, k, v)
    results.append([*out, *pull((cotangent, other))])
for actual, exact in zip(*results, strict=True):
    close(actual, exact)

layer = dilax.MultiheadDilatedAttention(16, 2, [16], [2], rngs=nnx.Rngs(0))
y = nnx.jit(lambda m, x: m(x, is_causal=True))(layer, jnp.ones((1, 21, 16), "float32"))
assert y.shape == (1, 21, 16) and bool(jnp.isfinite(y).all()) and bool((y != 0).any())

config = longnet.LongNetConfig(16, 2, 1, 24, (16,), (2,), vocab_size=11)
model = longnet.LongNetLM(config, rngs=nnx.Rngs(0))
logits = nnx.jit(model)(jnp.arange(9, dtype="int32")[None])
assert logits.shape == (1, 9, 11) and bool(jnp.isfinite(logits).all()) and bool(logits.std() > 0)

# Last, when everything that is imported late is here.
ours = ("dilax", "pallas_kernels", "sharding")
for name, module in sorted(sys.modules.items()):
    if name.split(".")[0] in ours:
        assert Path(module.__file__).is_relative_to(site), module.__file__
print("computed")
"""


def python(folder, site, *arguments):
    """Run this interpreter in `folder`, with the packages of `site` before all others.

    -S, because the checkout may be installed as editable: a .pth file would bring it in.
    """
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *others])}
    command = [sys.executable, "-S", *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", str(folder)]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_wheel_holds_the_three_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    info = {top for top in tops if top.endswith(".dist-info")}
    assert tops - info == {"dilax", "pallas_kernels", "sharding"}
    for package in ("dilax", "pallas_kernels", "sharding"):
        assert f"{package}/py.typed" in names
        assert f"{package}/__init__.py" in names
    assert wheel.name.startswith("dilax_attention-")
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_holds_every_source_file(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("dilax", "pallas_kernels", "sharding"):
        for path in (ROOT / package).rglob("*.py"):
            assert path.relative_to(ROOT).as_posix() in names


def test_installed_elsewhere_it_computes(site, tmp_path):
    done = python(tmp_path, site, "-c", SMOKE, str(site), str(ROOT))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "computed"


def test_installed_command_runs(site, tmp_path):
    done = python(tmp_path, site, str(site / "bin" / "dilax"), "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dilax-attention ")


def test_a_shadowed_sibling_is_named(site, tmp_path):
    """A user's own sharding.py beside the script comes before ours: the error says which file."""
    (tmp_path / "sharding.py").write_text("")
    code = "from dilax.select import sibling; sibling('sharding')"
    done = python(tmp_path, site, "-c", code)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: sharding: ")
    assert str(tmp_path / "sharding.py") in last
