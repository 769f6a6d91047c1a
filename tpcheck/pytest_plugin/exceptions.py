"""Exceptions that keep their type on the way from a rank, with a traceback that names the rank's own lines."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import CodeType, TracebackType
from typing import Any

from tpcheck.pytest_plugin.messages import Place
from tpcheck.world.channel import dumps, loads, loads_or_none


@dataclass(frozen=True, slots=True)
class _Parts:
    """An exception whose own way to pickle fails, as with a constructor that wants more than `args`."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    attributes: dict[str, Any]

    def assembled(self) -> BaseException:
        error: BaseException = self.kind.__new__(self.kind, *self.args)
        error.args = self.args
        vars(error).update(self.attributes)
        return error


def packed(error: BaseException) -> bytes:
    """Return the exception as bytes, whole where it pickles and in parts where it does not."""
    pickled = _pickled(error)
    if pickled is not None:
        return pickled
    args = tuple(arg if _pickled(arg) is not None else repr(arg) for arg in error.args)
    attributes = {name: value for name, value in vars(error).items() if _pickled(value) is not None}
    return _pickled(_Parts(type(error), args, attributes)) or b""


def unpacked(pickled: bytes) -> BaseException | None:
    """Return the exception, None where its type is not to be had here."""
    found = loads_or_none(pickled)
    try:
        error = found.assembled() if isinstance(found, _Parts) else found
    except Exception:
        return None
    return error if isinstance(error, BaseException) else None


def traceback_at(places: Iterable[Place]) -> TracebackType | None:
    """Return a traceback through these places, outermost first.

    Hypothesis tells failures apart by type and innermost line. Raised in one and the same place of tpcheck, two bugs
    would be one to it, and shrinking would slip from the one to the other.
    """
    link: TracebackType | None = None
    for place in reversed(tuple(places)):
        link = _link(place, link)
    return link


def _link(place: Place, after: TracebackType | None) -> TracebackType | None:
    try:
        exec(_raising_code(place), {"__name__": "__tpcheck_rank__", "__file__": place.filename})
    except LookupError:
        here = sys.exc_info()[2]
        there = here.tb_next if here is not None else None
        if there is not None:
            return TracebackType(after, there.tb_frame, there.tb_lasti, place.lineno)
    return after


def _raising_code(place: Place) -> CodeType:
    code = compile("raise LookupError", place.filename, "exec")
    return code.replace(co_name=place.function, co_firstlineno=place.lineno)


def _pickled(value: Any) -> bytes | None:
    """Return the value as bytes that are known to load again, else None."""
    try:
        pickled = dumps(value)
        loads(pickled)
    except Exception:
        return None
    return pickled
