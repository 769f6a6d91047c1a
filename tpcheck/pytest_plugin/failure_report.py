"""How a run over ranks looks in pytest's report: one exception of the type that a rank raised, sections, tracebacks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from tpcheck.core.errors import RankFailure, RankOutcome
from tpcheck.pytest_plugin.messages import BodyFailed, traceback_through, unpickle_exception
from tpcheck.world.failures import one_line

_ATTRIBUTE = "tpcheck_origin"


@dataclass(frozen=True, slots=True)
class FailedRun:
    """The failed run that an exception in pytest's process represents, and the rank that decided its verdict."""

    failure: RankFailure
    outcome: RankOutcome
    num_notes: int = 0  # of the exception as the rank raised it

    @property
    def details(self) -> BodyFailed | None:
        """How the body raised on that rank, None where the rank died or hung."""
        return self.outcome.details if isinstance(self.outcome.details, BodyFailed) else None


def exception_of(failure: RankFailure) -> BaseException:
    """Return the exception to raise in pytest's process; `origin_of` returns the failure from it.

    It is the exception that the rank raised, where there is one: `xfail(raises=...)` and Hypothesis use its type. A
    skip or xfail counts only if no rank failed by itself.
    """
    outcome = _deciding_outcome(failure)
    error: BaseException | None = None
    if isinstance(outcome.details, BodyFailed):
        error = _skip_or_xfail(failure, outcome.details) or unpickle_exception(outcome.details.exception)
        if error is not None:
            error = error.with_traceback(traceback_through(outcome.details.frames))
    error = failure if error is None else error
    error.__dict__[_ATTRIBUTE] = FailedRun(failure, outcome, len(getattr(error, "__notes__", ())))
    return error


def origin_of(error: BaseException) -> FailedRun | None:
    """Return the failed run that the exception represents, None where it was raised in pytest's process."""
    origin = error.__dict__.get(_ATTRIBUTE)
    return origin if isinstance(origin, FailedRun) else None


def _deciding_outcome(failure: RankFailure) -> RankOutcome:
    first = failure.outcomes[failure.first]
    if not isinstance(first.details, BodyFailed) or first.details.verdict == "failed":
        return first
    return next((outcome for outcome in failure.outcomes if _failed_by_itself(outcome)), first)


def _failed_by_itself(outcome: RankOutcome) -> bool:
    details = outcome.details
    return isinstance(details, BodyFailed) and details.verdict == "failed" and not details.is_communication


def _skip_or_xfail(failure: RankFailure, details: BodyFailed) -> BaseException | None:
    """Return a skip or an xfail that names its ranks."""
    if details.verdict == "failed":
        return None
    reason = f"{details.reason} ({_ranks(failure, details)})"
    return pytest.skip.Exception(reason) if details.verdict == "skipped" else pytest.xfail.Exception(reason)


def _ranks(failure: RankFailure, details: BodyFailed) -> str:
    ranks = [
        str(outcome.rank)
        for outcome in failure.outcomes
        if isinstance(outcome.details, BodyFailed)
        if (outcome.details.verdict, outcome.details.reason) == (details.verdict, details.reason)
    ]
    if len(ranks) == len(failure.outcomes):
        return "every rank"
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(ranks)}"


def captured_sections(
    outcomes: Iterable[RankOutcome], excinfo: pytest.ExceptionInfo[BaseException] | None
) -> list[tuple[str, str]]:
    """Return what ranks printed, under titles that --show-capture and JUnit recognise."""
    if excinfo is not None and isinstance(excinfo.value, RankFailure):
        return []  # its message contains them
    return [
        (f"Captured {name} rank {outcome.rank}", text)
        for outcome in outcomes
        for name, text in (("stdout", outcome.stdout), ("stderr", outcome.stderr))
        if text.strip()
    ]


def failure_repr(excinfo: pytest.ExceptionInfo[BaseException], longrepr: Any) -> Any:
    """Return what pytest shows for the exception; `longrepr` is what it would show without this plugin."""
    error = excinfo.value
    origin = origin_of(error)
    if origin is None:
        return _with_rank_sections(error, longrepr)
    if origin.details is None:  # a rank died or hung
        return excinfo.getrepr(style="value")
    rank_longrepr = origin.details.longrepr
    _add_notes(rank_longrepr, error, origin)
    rank_longrepr.addsection(_title(origin), _other_ranks(origin))
    return rank_longrepr


def _with_rank_sections(error: BaseException, longrepr: Any) -> Any:
    """Add each rank's report where Hypothesis found several failures and raised an exception group."""
    for member in getattr(error, "exceptions", ()):
        origin = origin_of(member)
        if origin is not None and origin.details is not None and hasattr(longrepr, "addsection"):
            _add_notes(origin.details.longrepr, member, origin)
            longrepr.addsection(_title(origin), f"{origin.details.longrepr}\n{_other_ranks(origin)}")
    return longrepr


def _add_notes(longrepr: Any, error: BaseException, origin: FailedRun) -> None:
    """Add the notes of pytest's process, such as Hypothesis's falsifying example, below the message as pytest does."""
    notes: list[str] = getattr(error, "__notes__", [])[origin.num_notes :]
    entries = longrepr.reprtraceback.reprentries
    lines: list[str] = getattr(entries[-1], "lines", []) if entries else []
    lines += [f"E   {line}" for note in notes for line in note.splitlines()]


def _title(origin: FailedRun) -> str:
    return f"rank {origin.outcome.rank} of {len(origin.failure.outcomes)} {origin.outcome.state}; other ranks"


def _other_ranks(origin: FailedRun) -> str:
    return "\n".join(
        f"rank {outcome.rank}: {one_line(outcome, origin.outcome)}"
        for outcome in origin.failure.outcomes
        if outcome is not origin.outcome
    )
