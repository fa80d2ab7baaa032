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

import jax, numpy as np
import dilax, pallas_kernels, sharding
from dilax import reference

for package in (dilax, pallas_kernels, sharding):
    assert Path(package.__file__).is_relative_to(sys.argv[1]), package.__file__
q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 21, 2, 8))
out = dilax.dilated_attention(q, k, v, [4, 16], [1, 2], is_causal=True)
exact, _ = reference.dilated_attention(q, k, v, [4, 16], [1, 2], is_causal=True)
np.testing.assert_allclose(out, exact, atol=1e-5)
print("computed")
"""


def python(folder, site, *arguments):
    """Run this interpreter in `folder`, with the packages of `site` before all others."""
    environ = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environ, capture_output=True, text=True
    )


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
    done = python(tmp_path, site, "-c", SMOKE, str(site))
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
