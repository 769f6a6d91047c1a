"""How a rank finds the test that pytest collected: by name where it can be imported, else by value."""

from __future__ import annotations

import inspect
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tpcheck.pytest_plugin.messages import ModuleFile, TestReference


def test_reference(item: pytest.Function) -> TestReference | None:
    """Return where the test is; None where a name does not lead to it, as for functions made by functions."""
    module = item.getparent(pytest.Module)
    if module is None or not isinstance(module.obj, ModuleType):
        return None
    names = [*(item.cls.__qualname__.split(".") if item.cls is not None else ()), item.originalname]
    try:
        found: Any = reduce(getattr, names, module.obj)
    except AttributeError:
        return None
    if found is not item.function:
        return None
    return TestReference(imports_of(item), qualname=".".join(names), has_instance=has_instance(item))


test_reference.__test__ = False  # type: ignore[attr-defined]  # its name looks like a test's


def imports_of(item: pytest.Item) -> tuple[ModuleFile, ...]:
    """Return the modules that ranks import as pytest does, before anything of the test is loaded there."""
    module = item.getparent(pytest.Module)
    if module is None or not isinstance(module.obj, ModuleType):
        return ()
    return (*_conftests(item), ModuleFile(str(module.path), module.obj.__name__))


def has_instance(item: pytest.Function) -> bool:
    """Tell whether the test is a method of an instance, rather than a function or a static or class method."""
    return inspect.ismethod(item.obj) and not isinstance(item.obj.__self__, type)


def _conftests(item: pytest.Item) -> tuple[ModuleFile, ...]:
    """Return the conftests that ranks have to import themselves, outermost first.

    All of them under `importlib`, where the import system would not find them by name. Otherwise those that explain
    comparisons; the rest is imported by whoever needs it, because a conftest may be slow.
    """
    is_by_path = item.config.getoption("importmode") == "importlib"
    found = [
        ModuleFile(plugin.__file__, plugin.__name__)
        for plugin in item.config.pluginmanager.get_plugins()
        if isinstance(plugin, ModuleType)
        and plugin.__file__ is not None
        and Path(plugin.__file__).name == "conftest.py"
        if Path(plugin.__file__).parent in item.path.parents
        if is_by_path or hasattr(plugin, "pytest_assertrepr_compare")
    ]
    return tuple(sorted(found, key=lambda conftest: len(conftest.path)))
