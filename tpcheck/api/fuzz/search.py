"""Draws examples, runs them, and shrinks those that fail. Hypothesis draws and shrinks; nothing here runs on a rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from tpcheck.errors import TpcheckError
from tpcheck.records.fuzzed import Found, Outcome, Searched

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Example = TypeVar("Example")
SHRINK_SECONDS = 300.0


class Told(Protocol):
    """Is handed every outcome as it comes."""

    def __call__(self, outcome: Outcome, *, shrinking: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a search goes on.

    Attributes:
        examples: How many examples are run; those that are refused do not count, up to ten times as many.
        seed: Equal seeds draw equal examples.
        shrink_seconds: After so many seconds of shrinking the smallest example so far is taken.
    """

    examples: int = 200
    seed: int = 0
    shrink_seconds: float = SHRINK_SECONDS


def search(
    examples: SearchStrategy[Example], run: Callable[[Example], Outcome], limits: Limits, told: Told
) -> Searched:
    """Run examples until there are enough or one fails, and shrink what fails. Ctrl-C keeps what there is."""
    start = time.monotonic()
    runs = _Runs(run, limits, told)
    smallest, interrupted = _smallest(examples, runs, limits)
    found = []
    for example, outcome in smallest.values():
        again = outcome if interrupted else run(example)
        found.append(Found(outcome, again, runs.first[outcome.kind]))
    return Searched(
        subject={},
        outcomes=tuple(runs.outcomes),
        found=tuple(found),
        num_shrinking=runs.num_shrinking,
        cut_short=runs.cut_short,
        interrupted=interrupted,
        seconds=time.monotonic() - start,
    )


def require_hypothesis() -> None:
    """Check that examples can be drawn.

    Raises:
        TpcheckError: hypothesis is not installed.
    """
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise TpcheckError("fuzz needs hypothesis: pip install 'tpcheck[fuzz]'") from error


class _Failure(Exception):
    """An example failed; hypothesis tells failures apart by the class of what is raised, so each kind has one."""

    def __init__(self, example: Any, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.example = example
        self.outcome = outcome


@dataclass
class _Runs(Generic[Example]):
    """Runs each example once, remembers how it ended, and ends shrinking in time.

    Attributes:
        first: The command of the first failure of each kind.
        last: The last failure of each kind, and its example: shrinking goes from larger to smaller ones.
    """

    run: Callable[[Example], Outcome]
    limits: Limits
    told: Told
    outcomes: list[Outcome] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)
    last: dict[str, tuple[Example, Outcome]] = field(default_factory=dict)
    num_shrinking: int = 0
    cut_short: bool = False
    _memory: dict[str, Outcome] = field(default_factory=dict)
    _classes: dict[str, type[_Failure]] = field(default_factory=dict)
    _deadline: float | None = None

    def test(self, example: Example) -> None:
        """Return where the example is right, and tell hypothesis where it is not.

        Raises:
            _Failure: It failed.
        """
        from hypothesis import reject

        outcome = self._outcome(example)
        if outcome.status == "refused":
            reject()
        if outcome.is_bad:
            kind = self._classes.setdefault(outcome.kind, type("_FailureOfAKind", (_Failure,), {}))
            raise kind(example, outcome)

    def _outcome(self, example: Example) -> Outcome:
        key = repr(example)
        if key not in self._memory:
            if self._deadline is not None and time.monotonic() > self._deadline:
                self.cut_short = True
                return Outcome("passed")  # what is not known to fail is no smaller example
            self._memory[key] = self._new(example)
        return self._memory[key]

    def _new(self, example: Example) -> Outcome:
        outcome = self.run(example)
        shrinking = self._deadline is not None
        if shrinking:
            self.num_shrinking += 1
        else:
            self.outcomes.append(outcome)
        self.told(outcome, shrinking=shrinking)
        if outcome.is_bad:
            self.first.setdefault(outcome.kind, outcome.command)
            self.last[outcome.kind] = (example, outcome)
            if self._deadline is None:
                self._deadline = time.monotonic() + self.limits.shrink_seconds
        return outcome


def _smallest(
    examples: SearchStrategy[Example], runs: _Runs[Example], limits: Limits
) -> tuple[dict[str, tuple[Example, Outcome]], bool]:
    """Return the smallest failing example of each kind with its outcome, and whether Ctrl-C ended the search."""
    from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
    from hypothesis.errors import Unsatisfiable

    quiet = settings(
        max_examples=limits.examples,
        phases=(Phase.generate, Phase.shrink),
        database=None,
        deadline=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )

    @seed(limits.seed)
    @quiet
    @given(examples)
    def test(example: Example) -> None:
        runs.test(example)

    try:
        with _no_litter():
            test()
    except KeyboardInterrupt:
        return runs.last, True
    except Unsatisfiable:  # every one was refused
        return {}, False
    except BaseException as error:
        failures = list(_failures(error))
        if not failures:
            raise
        return {one.outcome.kind: (one.example, one.outcome) for one in failures}, False
    return {}, False


def _failures(error: BaseException) -> Iterator[_Failure]:
    if isinstance(error, _Failure):
        yield error
    for one in getattr(error, "exceptions", ()):  # an exception group
        yield from _failures(one)


@contextmanager
def _no_litter() -> Iterator[None]:
    """Keep hypothesis from leaving its folder where the user stands."""
    from hypothesis import configuration

    before = configuration.storage_directory(intent_to_write=False).home_directory
    with TemporaryDirectory(prefix="tpcheck-fuzz-") as folder:
        configuration.set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(Path(before))
