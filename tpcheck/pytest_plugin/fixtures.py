"""The fixtures `tp_rank` and `tp_spawn`, and the fixtures that cannot be sent to ranks."""

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
from tpcheck.pytest_plugin.options import options_of, world_factory
from tpcheck.pytest_plugin.run_on_rank import ImportThenCall
from tpcheck.world.channel import dumps
from tpcheck.world.rank import Rank
from tpcheck.world.world import World

# The settings that pytest's import hook and assertion introspection read; older versions of pytest lack some.
_INI = (
    *("assertion_text_diff_style", "consider_namespace_packages", "enable_assertion_pass_hook", "python_files"),
    *("truncation_limit_chars", "truncation_limit_lines", "verbosity_assertions"),
)
_pickled_key = pytest.StashKey[bytes]()


def pickled_settings(config: pytest.Config) -> bytes:
    """Return the pickled `PytestSettings` of the session, always the same bytes."""
    if _pickled_key not in config.stash:
        terminal = config.pluginmanager.get_plugin("terminalreporter")
        settings = PytestSettings(
            rootpath=str(config.rootpath),
            invocation_dir=str(config.invocation_params.dir),
            options={name: value for name, value in vars(config.option).items() if _is_plain(value)},
            ini=_ini(config),
            rewritten=_rewritten(config),
            has_markup=terminal is not None and bool(terminal._tw.hasmarkup),
        )
        config.stash[_pickled_key] = dumps(settings)
    return config.stash[_pickled_key]


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
    """Return whether plain pickle can restore the value, which excludes most objects of other plugins."""
    try:
        return bool(pickle.loads(pickle.dumps(value)) == value)
    except Exception:
        return False


def test_reference(item: pytest.Function) -> TestReference | None:
    """Return where the test is, None where its name does not resolve to it, as for a function defined in a function."""
    module = item.getparent(pytest.Module)
    if module is None or not isinstance(module.obj, ModuleType):
        return None
    names = [*(item.cls.__qualname__.split(".") if item.cls is not None else ()), item.originalname]
    try:
        resolved: Any = reduce(getattr, names, module.obj)
    except AttributeError:
        return None
    if resolved is not item.function:
        return None
    return TestReference(imports_of(item), qualname=".".join(names), has_instance=has_instance(item))


test_reference.__test__ = False  # type: ignore[attr-defined]  # pytest collects functions of this name


def imports_of(item: pytest.Item) -> tuple[ModuleFile, ...]:
    """Return the modules that ranks import as pytest does, before they load anything else of the test."""
    module = item.getparent(pytest.Module)
    if module is None or not isinstance(module.obj, ModuleType):
        return ()
    return (*_conftests(item), ModuleFile(str(module.path), module.obj.__name__))


def has_instance(item: pytest.Function) -> bool:
    """Return whether the test is a method of an instance, not a function or a static or class method."""
    return inspect.ismethod(item.obj) and not isinstance(item.obj.__self__, type)


def _conftests(item: pytest.Item) -> tuple[ModuleFile, ...]:
    """Return the conftests that ranks import before the test module, outermost first.

    With `--import-mode=importlib` all of them, because the import system does not find them by name. Otherwise those
    that explain comparisons: a conftest may be slow, and the import system finds the others when they are needed.
    """
    is_by_path = item.config.getoption("importmode") == "importlib"
    conftests = [
        ModuleFile(plugin.__file__, plugin.__name__)
        for plugin in item.config.pluginmanager.get_plugins()
        if isinstance(plugin, ModuleType)
        and plugin.__file__ is not None
        and Path(plugin.__file__).name == "conftest.py"
        if Path(plugin.__file__).parent in item.path.parents
        if is_by_path or hasattr(plugin, "pytest_assertrepr_compare")
    ]
    return tuple(sorted(conftests, key=lambda conftest: len(conftest.path)))


_OUTPUT = "it sees the output of pytest's process; the output of ranks is captured, and shown if the test fails"
_PROCESS = "it changes pytest's process; make changes inside the body, as with `pytest.MonkeyPatch.context()`"
_SESSION = "it belongs to pytest's process, and the body runs in others"

# Some of these pickle, and would have no effect on ranks.
CONTROLLER_ONLY_FIXTURES: Mapping[str, str] = {
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

_RANK_ATTRIBUTES = {"rank", "topology", *(name for name in dir(Rank) if not name.startswith("_"))}


class RankPlaceholder:
    """Stands for the rank in pytest's process, which is none."""

    def __getattr__(self, name: str) -> NoReturn:
        if name not in _RANK_ATTRIBUTES:
            raise AttributeError(name)  # pickle and Hypothesis look up special attributes of any object
        raise UsageError(
            f"tp_rank.{name}",
            self,
            "use inside the body of a test marked `@pytest.mark.tpcheck(tp=2)`; fixtures run in pytest's process",
        )

    def __reduce__(self) -> NoReturn:
        raise UsageError("tp_rank", self, "an argument of the test itself, not part of another value")

    def __repr__(self) -> str:
        return "<tp_rank>"


@pytest.fixture(scope="session")  # Hypothesis rejects function-scoped fixtures: they serve all examples
def tp_rank() -> RankPlaceholder:
    """This process's place in the world: a `tpcheck.Rank`. The test is marked `@pytest.mark.tpcheck(tp=2)`."""
    return RankPlaceholder()


@pytest.fixture
def tp_spawn(request: pytest.FixtureRequest) -> Iterator[Callable[..., World]]:
    """Return a factory of worlds: `tp_spawn(tp=2, dp=1, timeout=60)`. They are closed when the test ends.

    It takes the arguments of the marker, and `env`. The test itself runs in pytest's process.
    """
    options = options_of(request.config)
    import_then_call = ImportThenCall(pickled_settings(request.config), imports_of(request.node))
    with ExitStack() as worlds:

        def spawn_world(*, env: Mapping[str, str] | None = None, **arguments: Any) -> World:
            world = worlds.enter_context(world_factory(arguments, options)(env=env))
            world.run = partial(world.run, import_then_call)  # type: ignore[method-assign]  # the same signature
            return world

        yield spawn_world
