"""An exception made ready to travel from a rank to the controller."""

from __future__ import annotations

import traceback
from types import TracebackType
from typing import Any

from tpcheck.world.communication import is_communication
from tpcheck.world.messages import Failure
from tpcheck.world.pickling import dumps, loads

_OWN_MODULES = "tpcheck.world.rank_main"


def failure_of(error: BaseException) -> Failure:
    """Return all that can be told of the exception; nothing it does when it is printed or pickled can raise here."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    details = getattr(error, "tpcheck_details", None)
    return Failure(
        error_type=name,
        error=_text(error),
        traceback=_traceback(error),
        is_communication=is_communication(error),
        exception=_pickled(error),
        details=None if details is None else _pickled(details),
    )


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:
        return f"<its own str() raised {type(broken).__name__}>"


def _traceback(error: BaseException) -> str:
    try:
        lines = traceback.format_exception(type(error), error, _without_own_frames(error.__traceback__))
    except Exception:
        lines = traceback.format_tb(error.__traceback__)
    return "".join(lines)


def _without_own_frames(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames that called the user's function; keep all where there are no others."""
    link = trace
    while link is not None and link.tb_frame.f_globals.get("__name__") == _OWN_MODULES:
        link = link.tb_next
    return link or trace


def _pickled(value: Any) -> bytes | None:
    """Return the value as bytes that are known to load again, else None."""
    try:
        pickled = dumps(value)
        loads(pickled)
    except Exception:
        return None
    return pickled
