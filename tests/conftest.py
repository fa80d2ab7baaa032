"""Settings of every test: eight CPU devices, short compilations, strict jax, fixed seeds."""

import os

# Compile time dominates these tests; the optimiser of LLVM does not change what they check.
_FLAG = "--xla_backend_optimization_level"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=0".strip()

# Several processes share a GPU under xdist.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

if "--xla_force_host_platform_device_count" not in os.environ["XLA_FLAGS"]:
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("dilax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("dilax")


@pytest.fixture
def x64():
    """float64 for one test, without a trace in the next."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.default_rng(20230705)


def pytest_collection_modifyitems(config, items):
    """The table of placements is long: it runs when -m names it."""
    if "mesh_table" in (config.option.markexpr or ""):
        return
    table = [item for item in items if item.get_closest_marker("mesh_table")]
    config.hook.pytest_deselected(items=table)
    items[:] = [item for item in items if item not in table]
