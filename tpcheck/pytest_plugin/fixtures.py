"""The fixtures `tp_rank` and `tp_spawn`, and which fixtures of others cannot follow a test to its ranks."""

from __future__ import annotations

import inspect
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import partial, reduce
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest

from tpcheck.core.errors import UsageError
from tpcheck.pytest_plugin.messages import ModuleFile, PytestSettings, TestReference
from tpcheck.pytest_plugin.options import options_of, world_request
from tpcheck.pytest_plugin.rank_body import Caller
from tpcheck.world.channel import dumps
from tpcheck.world.rank import Rank
from tpcheck.world.world import World

# What the import hook and the explanations of asserts ask for; older versions of pytest lack some.
_INI = (
    *("assertion_text_diff_style", "consider_namespace_packages", "enable_assertion_pass_hook", "python_files"),
    *("truncation_limit_chars", "truncation_limit_lines", "verbosity_assertions"),
)
_pickled_key = pytest.StashKey[bytes]()


def pickled_settings(config: pytest.Config) -> bytes:
    """Return the pickled `PytestSettings` of the session, made once."""
    if _pickled_key not in config.stash:
        config.stash[_pickled_key] = dumps(_settings(config))
    return config.stash[_pickled_key]


def _settings(config: pytest.Config) -> PytestSettings:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    return PytestSettings(
        rootpath=str(config.rootpath),
        invocation_dir=str(config.invocation_params.dir),
        options={name: value for name, value in vars(config.option).items() if _is_plain(value)},
        ini=_ini(config),
        rewritten=_rewritten(config),
        has_markup=terminal is not None and bool(terminal._tw.hasmarkup),
    )


def _ini(config: pytest.Config) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in _INI:
        with suppress(KeyError, ValueError):
            values[name] = config.getini(name)
    return values


def _rewritten(config: pytest.Config) -> tuple[str, ...]:
    """Return what conftests and plugins registered with `pytest.register_assert_rewrite`."""
    hooks = [finder for finder in sys.meta_path if getattr(finder, "config", None) is config]
    return tuple(sorted({name for hook in hooks for name in getattr(hook, "_must_rewrite", ())}))


def _is_plain(value: object) -> bool:
    """Tell whether ranks can load the value: by plain pickle, which reaches for no code of other plugins."""
    try:
        return bool(pickle.loads(pickle.dumps(value)) == value)
    except Exception:
        return False


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


_OUTPUT = "it sees what pytest's process prints; what ranks print is captured, and shown when the test fails"
_PROCESS = "it changes pytest's process; make changes inside the body, as with `pytest.MonkeyPatch.context()`"
_SESSION = "it belongs to pytest's process, and the body runs in others"

# Some of these would pickle, and then quietly do nothing of use.
STAY_BEHIND: Mapping[str, str] = {
    **dict.fromkeys(("capfd", "capfdbinary", "caplog", "capsys", "capsysbinary", "capteesys"), _OUTPUT),
    **dict.fromkeys(("mocker", "monkeypatch"), _PROCESS),
    "recwarn": "it sees the warnings of pytest's process; use `pytest.warns` inside the body",
    **dict.fromkeys(
        (
            *("cache", "pytestconfig", "pytester", "record_property", "record_testsuite_property"),
            *("record_xml_attribute", "request", "subtests", "testdir", "tp_spawn"),
        ),
        _SESSION,
    ),
}

_OF_A_RANK = {"rank", "topology", *(name for name in dir(Rank) if not name.startswith("_"))}


class RankPlaceholder:
    """Stands for the rank in pytest's process, where there is none."""

    def __getattr__(self, name: str) -> NoReturn:
        if name not in _OF_A_RANK:
            raise AttributeError(name)  # what pickle, Hypothesis and others look for in any object
        raise UsageError(
            f"tp_rank.{name}",
            self,
            "use inside the body of a test marked `@pytest.mark.tpcheck(tp=2)`; fixtures run in pytest's own process",
        )

    def __reduce__(self) -> NoReturn:
        raise UsageError("tp_rank", self, "an argument of the test itself, not a part of another value")

    def __repr__(self) -> str:
        return "<tp_rank>"


@pytest.fixture(scope="session")  # Hypothesis takes offence at fixtures that are made once for all its examples
def tp_rank() -> RankPlaceholder:
    """This process's place in the world: `tpcheck.Rank`. The test is marked `@pytest.mark.tpcheck(tp=2)`."""
    return RankPlaceholder()


@pytest.fixture
def tp_spawn(request: pytest.FixtureRequest) -> Iterator[Callable[..., World]]:
    """Return a factory of worlds: `tp_spawn(tp=2, dp=1, timeout=60)`; they are closed when the test ends.

    It takes what the marker takes, and `env`, and is for tests that themselves run in pytest's process.
    """
    options = options_of(request.config)
    caller = Caller(pickled_settings(request.config), imports_of(request.node))
    with ExitStack() as worlds:

        def spawn_world(*, env: Mapping[str, str] | None = None, **arguments: Any) -> World:
            world = worlds.enter_context(world_request(arguments, options).open(env))
            world.run = partial(world.run, caller)  # type: ignore[method-assign]  # called as before
            return world

        yield spawn_world
