"""A small pytest on the rank: enough to import test modules as pytest does, and to explain asserts as it does."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from _pytest.assertion import install_importhook, pytest_runtest_protocol
from _pytest.assertion.rewrite import AssertionRewritingHook
from _pytest.config import Config, PytestPluginManager, create_terminal_writer
from _pytest.python import importtestmodule

from tpcheck.pytest_plugin.messages import ModuleFile, PytestSettings
from tpcheck.world.pickling import loads

# The plugins whose options and hooks the functions above ask for: a whole pytest takes 5 ms more on every rank.
_PLUGINS = ("main", "python", "assertion", "terminal")


@cache  # one pytest per process, however many examples it runs; settings are the same bytes throughout a session
def rank_config(pickled: bytes) -> pytest.Config:
    """Return a configuration like that of pytest's own process; its import hook is in place from here on."""
    settings: PytestSettings = loads(pickled)
    config = bare_config()
    config.invocation_params = Config.InvocationParams(args=(), plugins=None, dir=Path(settings.invocation_dir))
    vars(config.option).update(settings.options)
    config._inicache.update(settings.ini)
    config._rootpath = Path(settings.rootpath)
    _add_terminal(config, has_markup=settings.has_markup)
    if config.getoption("assertmode") == "rewrite":
        install_importhook(config)
        _mark_for_rewriting(settings.rewritten)
    if config.getoption("runxfail"):
        pytest.xfail = _no_xfail  # type: ignore[assignment]  # as pytest_configure does
    _explain_comparisons(config)
    return config


@cache
def bare_config() -> Config:
    """Return the configuration before it knows the session. The template makes it, and ranks inherit it."""
    config = Config(PytestPluginManager())
    for name in _PLUGINS:
        config.pluginmanager.import_plugin(name)
    return config


def import_as_pytest_does(file: ModuleFile, config: pytest.Config) -> ModuleType:
    """Return the test module or conftest, imported in the mode and under the name of pytest's process."""
    path, name = file.path, file.name
    found = sys.modules.get(name)
    if found is not None and found.__file__ == path:
        return found
    _mark_for_rewriting([name])  # a file named on the command line is rewritten whatever it is called
    module: ModuleType = importtestmodule(Path(path), config)
    if module.__name__ != name:
        raise ImportError(f"{path} is {name!r} in pytest's process, and {module.__name__!r} here", name=name, path=path)
    if hasattr(module, "pytest_assertrepr_compare"):
        config.pluginmanager.register(module)
    return module


def _mark_for_rewriting(names: Iterable[str]) -> None:
    """Do what `mark_rewrite` does, without its walk over `sys.modules`.

    That writes to the memory of every module's name, which a forked rank then has to copy: 5 ms.
    """
    for finder in sys.meta_path:
        if isinstance(finder, AssertionRewritingHook):
            finder._must_rewrite.update(name for name in names if name not in sys.modules)


def _add_terminal(config: Config, *, has_markup: bool) -> None:
    writer = create_terminal_writer(config, sys.stdout)
    writer.hasmarkup = has_markup
    config.pluginmanager.register(SimpleNamespace(_tw=writer), "terminalreporter")  # diffs ask it for colours


def _explain_comparisons(config: Config) -> None:
    """Give asserts their explanation, by the code that does it around every test of an ordinary session."""
    around_a_test = pytest_runtest_protocol(SimpleNamespace(ihook=config.hook, config=config))  # type: ignore[arg-type]
    next(around_a_test)
    config.add_cleanup(around_a_test.close)  # kept: an abandoned generator would undo it


def _no_xfail(*_args: object, **_kwargs: object) -> None:
    """Do nothing, under --runxfail."""
