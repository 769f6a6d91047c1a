"""What runs on a rank: a minimal pytest that imports test modules and explains asserts, and the body of a test."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from functools import cache, reduce
from pathlib import Path
from types import CodeType, MethodType, ModuleType, SimpleNamespace
from typing import Any, Literal, cast

import pytest
from _pytest._code import Traceback, filter_traceback
from _pytest.assertion import install_importhook, pytest_runtest_protocol
from _pytest.assertion.rewrite import AssertionRewritingHook
from _pytest.config import Config, PytestPluginManager, create_terminal_writer
from _pytest.python import importtestmodule

from tpcheck.pytest_plugin.messages import (
    BodyCall,
    BodyFailed,
    BodyPassed,
    FrameLocation,
    ModuleFile,
    Placeholder,
    PytestSettings,
    RankWarning,
    as_rank_warnings,
    pickle_exception,
    recorded_warnings,
)
from tpcheck.world.channel import loads
from tpcheck.world.failures import is_communication
from tpcheck.world.rank import Rank

# The plugins whose options and hooks these imports need: a complete pytest takes 5 ms more on every rank.
_PLUGINS = ("main", "python", "assertion", "terminal")


@cache  # one per process, however many examples it runs: settings are the same bytes throughout a session
def rank_config(pickled: bytes) -> pytest.Config:
    """Return a configuration like that of pytest's process, and install its import hook."""
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
        pytest.xfail = lambda *_, **__: None  # type: ignore[assignment]  # as pytest_configure does
    _explain_comparisons(config)
    return config


@cache
def bare_config() -> Config:
    """Return the configuration without the settings of a session. The forkserver creates it, and ranks inherit it."""
    config = Config(PytestPluginManager())
    for name in _PLUGINS:
        config.pluginmanager.import_plugin(name)
    return config


def import_as_pytest_does(file: ModuleFile, config: pytest.Config) -> ModuleType:
    """Return the test module or conftest, imported in the mode and under the name of pytest's process."""
    path, name = file.path, file.name
    imported = sys.modules.get(name)
    if imported is not None and imported.__file__ == path:
        return imported
    _mark_for_rewriting([name])  # a file on the command line is rewritten whatever its name
    module: ModuleType = importtestmodule(Path(path), config)
    if module.__name__ != name:
        raise ImportError(
            f"{path} is {name!r} in pytest's process and {module.__name__!r} on a rank", name=name, path=path
        )
    if hasattr(module, "pytest_assertrepr_compare"):
        config.pluginmanager.register(module)
    return module


def _mark_for_rewriting(names: Iterable[str]) -> None:
    """Do what `mark_rewrite` does, without its loop over `sys.modules`.

    The loop changes the reference count of every module's name, so that a forked rank copies that memory: 5 ms.
    """
    for finder in sys.meta_path:
        if isinstance(finder, AssertionRewritingHook):
            finder._must_rewrite.update(name for name in names if name not in sys.modules)


def _add_terminal(config: Config, *, has_markup: bool) -> None:
    writer = create_terminal_writer(config, sys.stdout)
    writer.hasmarkup = has_markup
    config.pluginmanager.register(SimpleNamespace(_tw=writer), "terminalreporter")  # diffs get their colours from it


def _explain_comparisons(config: Config) -> None:
    """Make asserts explain comparisons, with the hook that pytest wraps around every test."""
    around_a_test = pytest_runtest_protocol(SimpleNamespace(ihook=config.hook, config=config))  # type: ignore[arg-type]
    next(around_a_test)
    config.add_cleanup(around_a_test.close)  # a reference: garbage collection of it removes the hook


def body_failed(
    error: BaseException,
    *,
    function: Callable[..., Any] | None,
    config: pytest.Config | None,
    warnings: tuple[RankWarning, ...],
) -> BodyFailed:
    """Return how the body raised. `function` and `config` are None if the rank raised before it had them."""
    excinfo = pytest.ExceptionInfo.from_exception(error)
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None

    def visible(info: pytest.ExceptionInfo[BaseException]) -> Traceback:
        return _visible(info, code)

    return BodyFailed(
        verdict=_verdict(error),
        reason=str(getattr(error, "msg", None) or ""),
        is_communication=is_communication(error),
        longrepr=_longrepr(excinfo, visible, config),
        exception=pickle_exception(error),
        frames=tuple(FrameLocation(str(entry.path), entry.lineno + 1, entry.name) for entry in visible(excinfo)),
        warnings=warnings,
    )


def _verdict(error: BaseException) -> Literal["failed", "skipped", "xfailed"]:
    if isinstance(error, pytest.skip.Exception):
        return "skipped"
    # pytest.xfail itself may have been replaced, under --runxfail
    return "xfailed" if type(error).__name__ == "XFailed" else "failed"


def _longrepr(
    excinfo: pytest.ExceptionInfo[BaseException],
    visible: Callable[[pytest.ExceptionInfo[BaseException]], Traceback],
    config: pytest.Config | None,
) -> Any:
    """Return what `Item.repr_failure` returns, which needs a collected item: ranks collect no tests."""
    style: Any = config.getoption("tbstyle") if config is not None else "auto"
    is_full = config is not None and config.getoption("fulltrace")
    verbosity = config.get_verbosity() if config is not None else 0
    if is_communication(excinfo.value):
        # Most often the consequence of a failure on another rank, and not shown. The traceback ends in torch, and
        # finding statements in such large files takes 0.1 s.
        style = "native"
    elif isinstance(excinfo.value, pytest.fail.Exception) and not excinfo.value.pytrace:
        style = "value"
    return excinfo.getrepr(
        style="long" if is_full or style == "auto" else style,
        showlocals=config is not None and config.getoption("showlocals"),
        funcargs=True,
        abspath=config is None or Path.cwd() != config.invocation_params.dir,
        tbfilter=False if is_full else lambda info: _shortened(visible(info), style),
        truncate_locals=verbosity <= 1,
        chain=True,
    )


def _visible(excinfo: pytest.ExceptionInfo[BaseException], code: CodeType | None) -> Traceback:
    """Return the traceback from the test function inwards, without hidden frames."""
    entries = list(excinfo.traceback)
    start = next((index for index, entry in enumerate(entries) if entry.frame.code.raw is code), None)
    trace = Traceback(entries[start:]) if start is not None else excinfo.traceback.filter(filter_traceback)
    return trace.filter(excinfo) or Traceback(entries[-1:])


def _shortened(trace: Traceback, style: str) -> Traceback:
    """Return the traceback with only its first and last entry in full, as pytest shows it by default."""
    if style != "auto" or len(trace) <= 2:
        return trace
    return Traceback((trace[0], *(entry.with_repr_style("short") for entry in trace[1:-1]), trace[-1]))


class ImportThenCall:
    """Calls a function on a rank; being unpickled before that function, it imports the test module first."""

    def __init__(self, settings: bytes, imports: tuple[ModuleFile, ...]) -> None:
        self._settings = settings
        self._imports = imports

    def __call__(self, rank: Rank, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(rank, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _import_then_call, (self._settings, self._imports)


def _import_then_call(settings: bytes, imports: tuple[ModuleFile, ...]) -> ImportThenCall:
    config = rank_config(settings)
    for file in imports:
        import_as_pytest_does(file, config)
    return ImportThenCall(settings, imports)


ASYNC_MESSAGE = "async tests do not run on ranks: start the event loop inside the body, as with asyncio.run"


def run_body(rank: Rank, body: BodyCall) -> BodyPassed:
    """Call the test function on this rank; an exception gets a `BodyFailed` as its `tpcheck_details`."""
    __tracebackhide__ = True
    function: Callable[..., Any] | None = None
    config: pytest.Config | None = None
    with recorded_warnings(body.filters) as log:
        try:
            config = rank_config(body.settings)
            function = _load_function(body, config)
            arguments = loads(body.arguments)
            returned = function(
                **{name: rank if value is Placeholder.RANK else value for name, value in arguments.items()}
            )
            if hasattr(returned, "__await__") or hasattr(returned, "__aiter__"):
                pytest.fail(ASYNC_MESSAGE, pytrace=False)
        except BaseException as error:
            details = body_failed(error, function=function, config=config, warnings=as_rank_warnings(log))
            error.tpcheck_details = details  # type: ignore[attr-defined]  # exceptions accept any attribute
            raise
    return BodyPassed(rank.rank, as_rank_warnings(log), None if returned is None else repr(type(returned)))


def prepare(_rank: Rank, body: BodyCall) -> None:
    """Import what the body needs, so that the first example of a `@given` test takes as long as the others."""
    with recorded_warnings(body.filters):
        _load_function(body, rank_config(body.settings))


def _load_function(body: BodyCall, config: pytest.Config) -> Callable[..., Any]:
    """Return the test function without `@given`, bound to a new instance if it is a method."""
    __tracebackhide__ = True
    if body.function is not None:
        by_value: Callable[..., Any] = loads(body.function)
        return by_value
    assert body.test is not None
    modules = [import_as_pytest_does(file, config) for file in body.test.imports]
    *outer, name = body.test.qualname.split(".")
    holder: Any = reduce(getattr, outer, modules[-1])
    function: Any = getattr(holder, name)
    function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    if not body.test.has_instance:
        return cast("Callable[..., Any]", function)
    instance = holder()
    vars(instance).update(loads(body.attributes))
    return MethodType(function, instance)
