"""What importing costs and needs: no device, no flax below the modules, no training tools."""

import ast
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dilax

ROOT = Path(dilax.__file__).parent
MODULES = sorted(info.name for info in pkgutil.walk_packages(dilax.__path__, "dilax."))
# The functional core: arrays in, arrays out, jax alone.
CORE = (
    "_types", "block_entries", "block_lists", "block_loop", "block_sparse", "checks", "dilate",
    "dilated", "dropout", "partial", "pattern", "pattern_config", "patterns", "reference", "spec",
    "tile", "tile_loop", "union", "xla_attention",
)  # fmt: skip
# What only the command line and training need. Flax itself imports absl, optax and rich.
OPTIONAL = ("grain", "matplotlib", "orbax", "safetensors", "tqdm", "tyro")


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """A fresh Python that imports the library under test and nothing of this one."""
    paths = [str(ROOT.parent), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120
    )


def test_importing_touches_no_device():
    """With a platform that does not exist, the first touch of a device raises."""
    code = "import jax, importlib\n" + "".join(
        f"importlib.import_module({name!r})\n" for name in MODULES if "__main__" not in name
    )
    touch = "try: jax.devices()\nexcept RuntimeError: print('untouched')"
    result = run(code + touch, JAX_PLATFORMS="no_such_platform")
    assert result.stdout.strip() == "untouched", result.stderr


BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
"""


def test_the_library_needs_no_training_tools():
    code = BLOCK.format(blocked=OPTIONAL) + (
        "import dilax\n"
        "x = __import__('jax').numpy.ones((1, 8, 2, 8))\n"
        "print(dilax.dilated_attention(x, x, x, [4, 8], [1, 2]).shape)"
    )
    result = run(code)
    assert result.stdout.strip() == "(1, 8, 2, 8)", result.stderr


@pytest.mark.parametrize("name", CORE)
def test_the_core_needs_jax_alone(name):
    """No import statement of the core, at any depth, reaches for flax or a room above."""
    allowed = {"jax", "numpy", "dilax", *sys.stdlib_module_names}
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module)
            if node.module == "dilax":
                imported |= {f"dilax.{alias.name}" for alias in node.names}
    assert {x.partition(".")[0] for x in imported} <= allowed
    inside = {x.split(".")[1] for x in imported if x.startswith("dilax.")}
    assert inside <= {*CORE, "select"}
    assert not any("_src" in x for x in imported)


def test_import_errors_are_not_swallowed():
    result = run(BLOCK.format(blocked=("jax",)) + "import dilax")
    assert result.returncode
    assert "jax is blocked" in result.stderr
