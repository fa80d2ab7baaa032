"""Every public function says what it does, and its example runs."""

import doctest
import importlib
import inspect
import pkgutil
import types

import pytest

import dilax

MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages(dilax.__path__, "dilax.")
    if not info.name.endswith("__main__")
)


def public(module: types.ModuleType) -> dict[str, object]:
    """Functions and classes that a module defines under a name without an underscore."""
    return {
        name: x
        for name, x in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(x) or inspect.isclass(x))
        and x.__module__ == module.__name__
    }


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert failed == 0


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    module = importlib.import_module(name)
    assert inspect.getdoc(module), name
    silent = [n for n, x in public(module).items() if not (x.__doc__ or "").strip()]
    assert not silent


def test_every_exported_name_has_an_example():
    exported = {n: x for n, x in vars(dilax).items() if not n.startswith("_")}
    functions = {n: x for n, x in exported.items() if inspect.isfunction(x)}
    assert "dilated_attention" in functions
    assert not [n for n, x in functions.items() if ">>>" not in (x.__doc__ or "")]
