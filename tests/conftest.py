"""Settings of every test: eight CPU devices, short compilations, strict jax, fixed seeds."""

import gc
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

gc.set_threshold(50_000)  # traces are many small objects: look for cycles less often

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
    """What needs a GPU or its compiler, and the long table of placements, run if -m names them."""
    for marker in ("aot", "gpu", "mesh_table"):
        if marker in (config.option.markexpr or ""):
            continue
        unasked = {item for item in items if item.get_closest_marker(marker)}
        config.hook.pytest_deselected(items=list(unasked))
        items[:] = [item for item in items if item not in unasked]
