"""What pytest's process and the ranks send each other about one test: the call, its outcome, exceptions, warnings."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from functools import reduce
from importlib import import_module
from types import TracebackType
from typing import Any, Literal

from tpcheck.world.channel import dumps_or_none, loads_or_none


class Placeholder(Enum):
    """Stands in the arguments of a test for what only exists on a rank."""

    RANK = "rank"


@dataclass(frozen=True, slots=True)
class ModuleFile:
    """A module that pytest imported by its path, and its name."""

    path: str
    name: str


@dataclass(frozen=True, slots=True)
class TestReference:
    """Where a rank finds the test: it imports the module as pytest did, and looks the names up.

    Attributes:
        imports: Modules to import; the last one defines the test.
        qualname: Names to look up in it, the test's class included, with dots.
        has_instance: The test is a method, called on a new instance.
    """

    __test__ = False  # pytest collects classes of this name

    imports: tuple[ModuleFile, ...]
    qualname: str
    has_instance: bool


@dataclass(frozen=True, slots=True)
class PytestSettings:
    """What a rank needs of pytest's configuration to import modules and explain asserts as pytest does.

    Attributes:
        invocation_dir: Paths are shown relative to it.
        options: Command line options by destination, those that pickle.
        ini: Settings, as resolved.
        rewritten: Modules and packages beyond test files whose asserts are rewritten.
        has_markup: pytest's terminal shows colours.
    """

    rootpath: str
    invocation_dir: str
    options: dict[str, Any]
    ini: dict[str, Any]
    rewritten: tuple[str, ...]
    has_markup: bool


@dataclass(frozen=True, slots=True)
class WarningFilter:
    """One entry of `warnings.filters`; the category by name, because a rank may not have its module."""

    action: str
    message: str
    category: tuple[str, str]
    module: str
    lineno: int


@dataclass(frozen=True, slots=True)
class BodyCall:
    """One call of a test's body.

    Pickled parts are loaded after the test's module is imported, which may define what they contain.

    Attributes:
        settings: Pickled `PytestSettings`; the same bytes in every call of a session.
        test: Where the function is, None where `function` contains it.
        function: Pickled function, None where `test` names it.
        arguments: Pickled, by name.
        attributes: Pickled attributes of the test's instance.
    """

    nodeid: str
    settings: bytes
    filters: tuple[WarningFilter, ...]
    test: TestReference | None
    function: bytes | None
    arguments: bytes
    attributes: bytes


@dataclass(frozen=True, slots=True)
class RankWarning:
    """A warning that the body issued."""

    category: tuple[str, str]
    message: str
    filename: str
    lineno: int


@dataclass(frozen=True, slots=True)
class BodyPassed:
    """The body returned on one rank.

    Attributes:
        returned: Type of what it returned, None where it returned None.
    """

    rank: int
    warnings: tuple[RankWarning, ...]
    returned: str | None


@dataclass(frozen=True, slots=True)
class FrameLocation:
    filename: str
    lineno: int
    function: str


@dataclass(frozen=True, slots=True)
class BodyFailed:
    """How the body raised on one rank; sent as the `tpcheck_details` of its exception.

    Attributes:
        verdict: What pytest makes of such an exception.
        reason: The reason of a skip or xfail.
        is_communication: The exception only says that another rank failed or is missing.
        longrepr: pytest's representation of the exception (`ExceptionRepr`).
        exception: The exception as `pickle_exception` returns it.
        frames: The frames that the traceback shows, outermost first.
    """

    verdict: Literal["failed", "skipped", "xfailed"]
    reason: str
    is_communication: bool
    longrepr: Any
    exception: bytes
    frames: tuple[FrameLocation, ...]
    warnings: tuple[RankWarning, ...]


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
        code = compile("raise LookupError", frame.filename, "exec")
        code = code.replace(co_name=frame.function, co_firstlineno=frame.lineno)
        try:
            exec(code, {"__name__": "__tpcheck_rank__", "__file__": frame.filename})
        except LookupError as error:
            raised_at = error.__traceback__.tb_next if error.__traceback__ is not None else None
            if raised_at is not None:
                traceback = TracebackType(traceback, raised_at.tb_frame, raised_at.tb_lasti, frame.lineno)
    return traceback


def current_filters() -> tuple[WarningFilter, ...]:
    """Return the filters in effect: while a test runs, those of pytest, its options and marks."""
    return tuple(
        WarningFilter(action, _pattern(message), (category.__module__, category.__qualname__), _pattern(module), lineno)
        for action, message, category, module, lineno in warnings.filters
        if isinstance(category, type)  # a tuple only where code appended to the list itself
    )


@contextmanager
def recorded_warnings(filters: Iterable[WarningFilter]) -> Iterator[list[warnings.WarningMessage]]:
    """Apply the filters, and record the warnings that pass them."""
    with warnings.catch_warnings(record=True) as log:
        warnings.resetwarnings()
        for entry in filters:
            category = _category(entry.category, may_import=True)
            if category is not None:
                action: Any = entry.action  # a Literal to mypy, a str in `warnings.filters`
                warnings.filterwarnings(action, entry.message, category, entry.module, entry.lineno, append=True)
        yield log


def as_rank_warnings(log: Iterable[warnings.WarningMessage]) -> tuple[RankWarning, ...]:
    return tuple(
        RankWarning(
            (entry.category.__module__, entry.category.__qualname__), str(entry.message), entry.filename, entry.lineno
        )
        for entry in log
    )


def reissue_warnings(rank_warnings: Iterable[RankWarning]) -> None:
    """Issue the warnings of ranks in this process, each once however many ranks issued it."""
    for warning in dict.fromkeys(rank_warnings):
        category = _category(warning.category, may_import=False)
        text = warning.message if category else f"{warning.category[1]}: {warning.message}"
        warnings.warn_explicit(text, category or UserWarning, warning.filename, warning.lineno)


def _category(name: tuple[str, str], *, may_import: bool) -> type[Warning] | None:
    """Return the class; pytest's process imports no module (torch, say) to find the class of a warning."""
    module, qualname = name
    try:
        holder = import_module(module) if may_import else sys.modules[module]
        category = reduce(getattr, qualname.split("."), holder)
    except Exception:
        return None
    return category if isinstance(category, type) and issubclass(category, Warning) else None


def _pattern(pattern: Any) -> str:
    """Return the regular expression as text; `warnings.filters` contains None, a string or a compiled pattern."""
    if pattern is None:
        return ""
    return pattern if isinstance(pattern, str) else str(pattern.pattern)
