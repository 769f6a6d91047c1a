"""What pytest's process and the ranks say to each other about one test."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal


class Argument(Enum):
    """Stands in a body's arguments for what only the rank itself has."""

    RANK = "rank"


@dataclass(frozen=True, slots=True)
class ModuleFile:
    """A module that pytest imported by its path, and the name it has there."""

    path: str
    name: str


@dataclass(frozen=True, slots=True)
class TestReference:
    """Where a rank finds the test: it imports the module as pytest did, and looks the names up.

    Attributes:
        imports: Modules to import, the test's own last.
        qualname: Names to look up in it, the test's class included, with dots.
        has_instance: The test is a method, called on an instance of its own.
    """

    __test__ = False  # its name looks like a test class

    imports: tuple[ModuleFile, ...]
    qualname: str
    has_instance: bool


@dataclass(frozen=True, slots=True)
class PytestSettings:
    """What a rank needs to know of pytest's configuration, to import and explain as pytest does.

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
    """One entry of `warnings.filters`; the category by name, because ranks may lack its module."""

    action: str
    message: str
    category: tuple[str, str]
    module: str
    lineno: int


@dataclass(frozen=True, slots=True)
class Body:
    """One call of a test's body.

    Pickled parts are loaded only when the test's module is there, which may define what is in them.

    Attributes:
        settings: Pickled `PytestSettings`; the same bytes in every call of a session.
        test: Where the function is, or None: then `function` holds it by value.
        function: Pickled function, None where `test` says where it is.
        arguments: Pickled, by name.
        instance: Pickled attributes of the test's instance.
    """

    nodeid: str
    settings: bytes
    filters: tuple[WarningFilter, ...]
    test: TestReference | None
    function: bytes | None
    arguments: bytes
    instance: bytes


@dataclass(frozen=True, slots=True)
class RankWarning:
    """A warning that a body gave."""

    category: tuple[str, str]
    message: str
    filename: str
    lineno: int


@dataclass(frozen=True, slots=True)
class BodyPassed:
    """The body of one rank came to its end.

    Attributes:
        returned: Type of what it returned, where that is not None.
    """

    rank: int
    warnings: tuple[RankWarning, ...]
    returned: str | None


@dataclass(frozen=True, slots=True)
class Place:
    filename: str
    lineno: int
    function: str


@dataclass(frozen=True, slots=True)
class BodyFailed:
    """How the body of one rank ended otherwise; travels as its exception's `tpcheck_details`.

    Attributes:
        verdict: What pytest makes of such an exception.
        reason: What was said to skip or xfail.
        is_victim: It only says that another rank went away.
        longrepr: pytest's own representation of it (`ExceptionRepr`).
        exception: Pickled `ExceptionParts`.
        places: The frames that a reader sees, outermost first.
    """

    verdict: Literal["failed", "skipped", "xfailed"]
    reason: str
    is_victim: bool
    longrepr: Any
    exception: bytes
    places: tuple[Place, ...]
    warnings: tuple[RankWarning, ...]
