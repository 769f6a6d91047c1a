"""What pytest's process and the ranks send to each other about one test."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal


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
