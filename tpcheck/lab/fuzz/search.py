"""Draws examples with hypothesis, runs them, and shrinks those that fail."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from tpcheck.core.environment import package_versions
from tpcheck.core.errors import TpcheckError, UsageError
from tpcheck.core.topology import Topology
from tpcheck.lab.fuzz.results import Outcome, SearchResult, ShrunkFailure
from tpcheck.model.options import COMMON_DTYPES, ZERO_STAGES

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

    from tpcheck.backends.interface import Backend

Example = TypeVar("Example")
SHRINK_SECONDS = 300.0


class OnOutcome(Protocol):
    """A callback for each outcome."""

    def __call__(self, outcome: Outcome, *, shrinking: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a search.

    Attributes:
        examples: Number of examples to run; up to ten times as many that are refused do not count.
        seed: Equal seeds draw equal examples.
        shrink_seconds: Time limit of shrinking one failure.
    """

    examples: int = 200
    seed: int = 0
    shrink_seconds: float = SHRINK_SECONDS

    def __post_init__(self) -> None:
        if self.examples < 1:
            raise UsageError("examples", self.examples, "a positive integer")
        if not 0 <= self.seed < 2**31:
            raise UsageError("seed", self.seed, f"an integer from 0 to {2**31 - 1}")
        if not self.shrink_seconds >= 0:
            raise UsageError("shrink_seconds", self.shrink_seconds, "seconds, 0 or more")


@dataclass(frozen=True, slots=True)
class Bounds:
    """The values to draw for each option; a failure shrinks towards the first."""

    tp: tuple[int, ...] = (2, 4)
    dp: tuple[int, ...] = (1, 2)
    zero: tuple[int, ...] = ZERO_STAGES
    dtype: tuple[str, ...] = COMMON_DTYPES

    @classmethod
    def of(cls, *, tp: Sequence[int], dp: Sequence[int], zero: Sequence[int], dtype: Sequence[str]) -> Bounds:
        """Return bounds of values that `verify` accepts.

        Raises:
            UsageError: A value is invalid.
        """
        for size in (*tp, *dp):
            Topology(tp=size)
        for stage in zero:
            if stage not in ZERO_STAGES:
                raise UsageError("zero", stage, ZERO_STAGES)
        for name in dtype:
            if name not in COMMON_DTYPES:
                raise UsageError("dtype", name, COMMON_DTYPES)
        return cls(tuple(tp), tuple(dp), tuple(zero), tuple(dtype))

    def as_dict(self) -> dict[str, Any]:
        return {name: list(values) for name, values in asdict(self).items()}


def search(
    examples: SearchStrategy[Example], run: Callable[[Example], Outcome], limits: Limits, on_outcome: OnOutcome
) -> SearchResult:
    """Run examples up to the limits, and shrink the first failure of each kind. Ctrl-C keeps the results so far."""
    start = time.monotonic()
    runs = _Runs(run, limits, on_outcome)
    found: list[ShrunkFailure] = []
    interrupted = False
    try:
        while runs.num_left > 0 and (failure := _first_failure(examples, runs, seed=limits.seed + len(found))):
            found.append(ShrunkFailure(failure.outcome, run(failure.example), runs.first))
            runs.ignore(failure.outcome.kind)
    except KeyboardInterrupt:
        interrupted = True
        if runs.last is not None:
            found.append(ShrunkFailure(runs.last, runs.last, runs.first))
    return SearchResult(
        subject={},
        outcomes=tuple(runs.outcomes),
        found=tuple(found),
        num_shrinking=runs.num_shrinking,
        cut_short=runs.cut_short,
        interrupted=interrupted,
        seconds=time.monotonic() - start,
    )


def require_hypothesis() -> None:
    """Check that hypothesis is installed.

    Raises:
        TpcheckError: hypothesis is not installed.
    """
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise TpcheckError("fuzz needs hypothesis: pip install 'tpcheck[fuzz]'") from error


def versions_with(backend: str | Backend) -> dict[str, str]:
    """Return the versions by package that a search with this backend depends on."""
    from tpcheck.backends.registry import load_backend

    return {**package_versions(), **load_backend(backend).versions()}


class _Failure(Exception):
    """An example failed."""

    def __init__(self, example: Any, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.example = example
        self.outcome = outcome


@dataclass
class _Runs(Generic[Example]):
    """Runs each example once, and caches its outcome.

    The first failure of a new kind is shrunk; meanwhile other kinds count as passed, or one bug would be shrunk into
    another.

    Attributes:
        first: The command of the failure before it was shrunk.
        last: The outcome of the smallest example so far; None while no failure is being shrunk.
    """

    run: Callable[[Example], Outcome]
    limits: Limits
    on_outcome: OnOutcome
    outcomes: list[Outcome] = field(default_factory=list)
    first: str = ""
    last: Outcome | None = None
    num_shrinking: int = 0
    cut_short: bool = False
    _cache: dict[str, Outcome] = field(default_factory=dict)
    _ignored_kinds: set[str] = field(default_factory=set)
    _deadline: float = 0.0

    @property
    def num_left(self) -> int:
        """Number of examples still to run."""
        return self.limits.examples - sum(outcome.status != "refused" for outcome in self.outcomes)

    def ignore(self, kind: str) -> None:
        """Ignore failures of a kind from now on: its smallest example is known."""
        self._ignored_kinds.add(kind)
        self.last = None

    def test(self, example: Example) -> None:
        """Run an example; reject one that is refused.

        Raises:
            _Failure: The example failed in the way that is being shrunk, or in a new way.
        """
        from hypothesis import reject

        outcome = self._outcome(example)
        if outcome.status == "refused":
            reject()
        if outcome.is_bad and outcome.kind not in self._ignored_kinds and self._is_to_be_shrunk(outcome):
            raise _Failure(example, outcome)

    def _is_to_be_shrunk(self, outcome: Outcome) -> bool:
        if self.last is None:
            self.first = outcome.command
            self._deadline = time.monotonic() + self.limits.shrink_seconds
        elif outcome.kind != self.last.kind:
            return False
        self.last = outcome
        return True

    def _outcome(self, example: Example) -> Outcome:
        key = repr(example)
        if key not in self._cache:
            if self.last is not None and time.monotonic() > self._deadline:
                self.cut_short = True
                return Outcome("passed")  # an example that was not run is no smaller failure
            self._cache[key] = self._new(example)
        return self._cache[key]

    def _new(self, example: Example) -> Outcome:
        outcome = self.run(example)
        if self.last is None:
            self.outcomes.append(outcome)
        else:
            self.num_shrinking += 1
        self.on_outcome(outcome, shrinking=self.last is not None)
        return outcome


def _first_failure(examples: SearchStrategy[Example], runs: _Runs[Example], *, seed: int) -> _Failure | None:
    """Draw until an example fails in a kind that is not ignored, and return its smallest example."""
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings
    from hypothesis import seed as with_seed
    from hypothesis.errors import Unsatisfiable

    @with_seed(seed)
    @settings(
        max_examples=runs.num_left,
        phases=(Phase.generate, Phase.shrink),
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
    )
    @given(examples)
    def test(example: Example) -> None:
        runs.test(example)

    try:
        with _storage_in_a_temporary_folder():
            test()
    except _Failure as failure:
        return failure
    except Unsatisfiable:  # all were refused
        return None
    return None


@contextmanager
def _storage_in_a_temporary_folder() -> Iterator[None]:
    """Keep hypothesis from creating its folder in the working directory."""
    from hypothesis import configuration

    before = configuration.storage_directory(intent_to_write=False).home_directory
    with TemporaryDirectory(prefix="tpcheck-fuzz-") as folder:
        configuration.set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            configuration.set_hypothesis_home_dir(Path(before))
