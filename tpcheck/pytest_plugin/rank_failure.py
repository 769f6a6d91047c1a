"""What a rank tells of the exception that ended a body: pytest's own account of it, made where the frames are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any, Literal

import pytest
from _pytest._code import Traceback, filter_traceback

from tpcheck.pytest_plugin.exceptions import packed
from tpcheck.pytest_plugin.messages import BodyFailed, Place, RankWarning
from tpcheck.world.communication import is_communication


def body_failed(
    error: BaseException,
    *,
    function: Callable[..., Any] | None,
    config: pytest.Config | None,
    warnings: tuple[RankWarning, ...],
) -> BodyFailed:
    """Return the account. `function` and `config` are None where the rank did not get as far as that."""
    excinfo = pytest.ExceptionInfo.from_exception(error)
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None

    def visible(info: pytest.ExceptionInfo[BaseException]) -> Traceback:
        return _visible(info, code)

    return BodyFailed(
        verdict=_verdict(error),
        reason=str(getattr(error, "msg", None) or ""),
        is_victim=is_communication(error),
        longrepr=_longrepr(excinfo, visible, config),
        exception=packed(error),
        places=tuple(Place(str(entry.path), entry.lineno + 1, entry.name) for entry in visible(excinfo)),
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
    """Return what `Item.repr_failure` would; it needs a collected item, and ranks collect nothing."""
    style: Any = config.getoption("tbstyle") if config is not None else "auto"
    is_full = config is not None and config.getoption("fulltrace")
    verbosity = config.get_verbosity() if config is not None else 0
    if is_communication(excinfo.value):
        # The victim of another rank, as a rule, whose account is not shown; it ends in torch, and to pick statements
        # out of those large files takes 0.1 s.
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
    """Return the traceback from the test's function on, without hidden frames."""
    entries = list(excinfo.traceback)
    start = next((index for index, entry in enumerate(entries) if entry.frame.code.raw is code), None)
    trace = Traceback(entries[start:]) if start is not None else excinfo.traceback.filter(filter_traceback)
    return trace.filter(excinfo) or Traceback(entries[-1:])


def _shortened(trace: Traceback, style: str) -> Traceback:
    """Return the traceback with only its ends at length, as pytest shows it unless told otherwise."""
    if style != "auto" or len(trace) <= 2:
        return trace
    return Traceback((trace[0], *(entry.with_repr_style("short") for entry in trace[1:-1]), trace[-1]))
