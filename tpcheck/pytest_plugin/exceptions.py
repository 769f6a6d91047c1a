"""Exceptions that keep their type on the way from a rank, with a traceback through the rank's lines."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType, TracebackType
from typing import Any

from tpcheck.pytest_plugin.messages import FrameLocation
from tpcheck.world.channel import dumps_or_none, loads_or_none


@dataclass(frozen=True, slots=True)
class _ExceptionParts:
    """An exception that does not pickle, such as one whose constructor takes more than its `args`."""

    cls: type[BaseException]
    args: tuple[Any, ...]
    attributes: dict[str, Any]

    def rebuild(self) -> BaseException:
        error: BaseException = self.cls.__new__(self.cls, *self.args)
        error.args = self.args
        vars(error).update(self.attributes)
        return error


def pickle_exception(error: BaseException) -> bytes:
    """Return the exception as bytes; arguments that do not pickle become their `repr`, such attributes are dropped."""
    pickled = dumps_or_none(error)
    if pickled is not None:
        return pickled
    args = tuple(arg if dumps_or_none(arg) is not None else repr(arg) for arg in error.args)
    attributes = {name: value for name, value in vars(error).items() if dumps_or_none(value) is not None}
    return dumps_or_none(_ExceptionParts(type(error), args, attributes)) or b""


def unpickle_exception(pickled: bytes) -> BaseException | None:
    """Return the exception, None where its type does not load in this process."""
    loaded = loads_or_none(pickled)
    try:
        error = loaded.rebuild() if isinstance(loaded, _ExceptionParts) else loaded
    except Exception:
        return None
    return error if isinstance(error, BaseException) else None


def traceback_through(frames: Iterable[FrameLocation]) -> TracebackType | None:
    """Return a traceback through these frames, outermost first.

    Hypothesis distinguishes failures by type and innermost line. If every failure were raised at the same line of
    tpcheck, two bugs would be one to it, and shrinking would move from one to the other.
    """
    traceback: TracebackType | None = None
    for frame in reversed(tuple(frames)):
        traceback = _prepend(frame, traceback)
    return traceback


def _prepend(frame: FrameLocation, rest: TracebackType | None) -> TracebackType | None:
    try:
        exec(_raising_code(frame), {"__name__": "__tpcheck_rank__", "__file__": frame.filename})
    except LookupError:
        here = sys.exc_info()[2]
        raised_at = here.tb_next if here is not None else None
        if raised_at is not None:
            return TracebackType(rest, raised_at.tb_frame, raised_at.tb_lasti, frame.lineno)
    return rest


def _raising_code(frame: FrameLocation) -> CodeType:
    code = compile("raise LookupError", frame.filename, "exec")
    return code.replace(co_name=frame.function, co_firstlineno=frame.lineno)
