"""Draws examples, runs them, and shrinks those that fail. Hypothesis draws and shrinks; nothing here runs on a rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from tpcheck.core.errors import TpcheckError
from tpcheck.lab.fuzz.results import Found, Outcome, Searched

if TYPE_CHECKING:
    from hypothesis import settings
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
    """Run so many examples, and shrink the first failure of each kind. Ctrl-C keeps what there is."""
    start = time.monotonic()
    runs = _Runs(run, limits, told)
    found: list[Found] = []
    interrupted = False
    try:
        while runs.num_left > 0 and (failure := _first_failure(examples, runs, seed=limits.seed + len(found))):
            found.append(Found(failure.outcome, run(failure.example), runs.first))
            runs.set_aside(failure.outcome.kind)
    except KeyboardInterrupt:
        interrupted = True
        if runs.last is not None:
            found.append(Found(runs.last, runs.last, runs.first))
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
    """An example failed."""

    def __init__(self, example: Any, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.example = example
        self.outcome = outcome


@dataclass
class _Runs(Generic[Example]):
    """Runs each example once, and remembers how it ended.

    The first failure of a new kind is the one that is shrunk: until that has ended no other kind counts, or one bug
    would be shrunk into another.

    Attributes:
        first: The command of the failure that is shrunk, as it was drawn.
        last: How the smallest example so far of that kind ended.
    """

    run: Callable[[Example], Outcome]
    limits: Limits
    told: Told
    outcomes: list[Outcome] = field(default_factory=list)
    first: str = ""
    last: Outcome | None = None
    num_shrinking: int = 0
    cut_short: bool = False
    _memory: dict[str, Outcome] = field(default_factory=dict)
    _aside: set[str] = field(default_factory=set)
    _deadline: float = 0.0

    @property
    def num_left(self) -> int:
        """How many examples are still to be run."""
        return self.limits.examples - sum(outcome.status != "refused" for outcome in self.outcomes)

    def set_aside(self, kind: str) -> None:
        """Let failures of a kind pass from now on: its smallest example is known."""
        self._aside.add(kind)
        self.last = None

    def test(self, example: Example) -> None:
        """Return where the example is right, and tell hypothesis where it is not.

        Raises:
            _Failure: It failed.
        """
        from hypothesis import reject

        outcome = self._outcome(example)
        if outcome.status == "refused":
            reject()
        if outcome.is_bad and outcome.kind not in self._aside and self._is_wanted(outcome):
            raise _Failure(example, outcome)

    def _is_wanted(self, outcome: Outcome) -> bool:
        if self.last is None:
            self.first = outcome.command
            self._deadline = time.monotonic() + self.limits.shrink_seconds
        elif outcome.kind != self.last.kind:
            return False
        self.last = outcome
        return True

    def _outcome(self, example: Example) -> Outcome:
        key = repr(example)
        if key not in self._memory:
            if self.last is not None and time.monotonic() > self._deadline:
                self.cut_short = True
                return Outcome("passed")  # what is not known to fail is no smaller example
            self._memory[key] = self._new(example)
        return self._memory[key]

    def _new(self, example: Example) -> Outcome:
        outcome = self.run(example)
        if self.last is None:
            self.outcomes.append(outcome)
        else:
            self.num_shrinking += 1
        self.told(outcome, shrinking=self.last is not None)
        return outcome


def _first_failure(examples: SearchStrategy[Example], runs: _Runs[Example], *, seed: int) -> _Failure | None:
    """Draw until something fails that is not set aside, and return its smallest example."""
    import hypothesis
    from hypothesis.errors import Unsatisfiable

    @hypothesis.seed(seed)
    @_quiet(runs.num_left)
    @hypothesis.given(examples)
    def test(example: Example) -> None:
        runs.test(example)

    try:
        with _no_litter():
            test()
    except _Failure as failure:
        return failure
    except Unsatisfiable:  # every one was refused
        return None
    return None


def _quiet(num_examples: int) -> settings:
    from hypothesis import HealthCheck, Phase, Verbosity, settings

    return settings(
        max_examples=num_examples,
        phases=(Phase.generate, Phase.shrink),
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )


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
