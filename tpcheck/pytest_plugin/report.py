"""How a run over ranks looks in pytest's report: one exception of the type that was raised, sections, tracebacks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from tpcheck.core.errors import RankFailure, RankOutcome
from tpcheck.pytest_plugin.exceptions import traceback_at, unpacked
from tpcheck.pytest_plugin.messages import BodyFailed
from tpcheck.world.failures import one_line

_ATTRIBUTE = "tpcheck_origin"


@dataclass(frozen=True, slots=True)
class Origin:
    """The failed run that an exception in pytest's process stands for, and the rank whose exception it is."""

    failure: RankFailure
    outcome: RankOutcome
    num_notes: int = 0  # that the exception brought along from its rank

    @property
    def details(self) -> BodyFailed | None:
        """What that rank told; None where it died or hung."""
        return self.outcome.details if isinstance(self.outcome.details, BodyFailed) else None


def exception_of(failure: RankFailure) -> BaseException:
    """Return what to raise in pytest's process; `origin_of` leads back from it.

    The culprit's own exception where there is one: `xfail(raises=...)` and Hypothesis go by its type. A rank that
    skips or xfails decides only where no rank failed by itself.
    """
    deciding = _deciding(failure)
    details = deciding.details
    error: BaseException | None = None
    if isinstance(details, BodyFailed):
        error = _skip_or_xfail(failure, details) or unpacked(details.exception)
        if error is not None:
            error = error.with_traceback(traceback_at(details.places))
    error = failure if error is None else error
    error.__dict__[_ATTRIBUTE] = Origin(failure, deciding, len(getattr(error, "__notes__", ())))
    return error


def origin_of(error: BaseException) -> Origin | None:
    """Return what the exception stands for, None where it was raised in pytest's own process."""
    origin = error.__dict__.get(_ATTRIBUTE)
    return origin if isinstance(origin, Origin) else None


def _deciding(failure: RankFailure) -> RankOutcome:
    first = failure.outcomes[failure.first]
    if not isinstance(first.details, BodyFailed) or first.details.verdict == "failed":
        return first
    return next((outcome for outcome in failure.outcomes if _failed_by_itself(outcome)), first)


def _failed_by_itself(outcome: RankOutcome) -> bool:
    details = outcome.details
    return isinstance(details, BodyFailed) and details.verdict == "failed" and not details.is_victim


def _skip_or_xfail(failure: RankFailure, details: BodyFailed) -> BaseException | None:
    """Return a skip or an xfail that names its ranks."""
    if details.verdict == "failed":
        return None
    reason = f"{details.reason} ({_ranks(failure, details)})"
    kind = pytest.skip.Exception if details.verdict == "skipped" else pytest.xfail.Exception
    return kind(reason)


def _ranks(failure: RankFailure, details: BodyFailed) -> str:
    same = [
        str(outcome.rank)
        for outcome in failure.outcomes
        if isinstance(outcome.details, BodyFailed)
        if (outcome.details.verdict, outcome.details.reason) == (details.verdict, details.reason)
    ]
    if len(same) == len(failure.outcomes):
        return "every rank"
    return f"rank {same[0]}" if len(same) == 1 else f"ranks {', '.join(same)}"


def captured_sections(
    outcomes: Iterable[RankOutcome], excinfo: pytest.ExceptionInfo[BaseException] | None
) -> list[tuple[str, str]]:
    """Return what ranks printed, under titles that --show-capture and JUnit sort by."""
    if excinfo is not None and isinstance(excinfo.value, RankFailure):
        return []  # its message holds them
    return [
        (f"Captured {name} rank {outcome.rank}", text)
        for outcome in outcomes
        for name, text in (("stdout", outcome.stdout), ("stderr", outcome.stderr))
        if text.strip()
    ]


def failure_repr(excinfo: pytest.ExceptionInfo[BaseException], own: Any) -> Any:
    """Return what to show for the exception; `own` is what pytest made of it."""
    error = excinfo.value
    origin = origin_of(error)
    if origin is None:
        return _with_members(error, own)
    if origin.details is None:  # a rank died or hung: there is only what the others saw of it
        return excinfo.getrepr(style="value")
    shown = origin.details.longrepr
    _add_notes(shown, _new_notes(error, origin))
    shown.addsection(_title(origin), _others(origin))
    return shown


def _with_members(error: BaseException, own: Any) -> Any:
    """Add what ranks told, where Hypothesis found several failures and made a group of them."""
    for member in getattr(error, "exceptions", ()):
        origin = origin_of(member)
        if origin is not None and origin.details is not None and hasattr(own, "addsection"):
            _add_notes(origin.details.longrepr, _new_notes(member, origin))
            own.addsection(_title(origin), f"{origin.details.longrepr}\n{_others(origin)}")
    return own


def _new_notes(error: BaseException, origin: Origin) -> list[str]:
    """Return the notes that came to the exception in pytest's process: in one, Hypothesis tells the failing example."""
    notes: list[str] = getattr(error, "__notes__", [])
    return notes[origin.num_notes :]


def _add_notes(shown: Any, notes: Iterable[str]) -> None:
    """Add notes where pytest shows those it knows of: below the exception's message."""
    entries = shown.reprtraceback.reprentries
    lines: list[str] = getattr(entries[-1], "lines", []) if entries else []
    lines += [f"E   {line}" for note in notes for line in note.splitlines()]


def _title(origin: Origin) -> str:
    return f"rank {origin.outcome.rank} of {len(origin.failure.outcomes)} {origin.outcome.state}; the others"


def _others(origin: Origin) -> str:
    return "\n".join(
        f"rank {outcome.rank}: {one_line(outcome, origin.outcome)}"
        for outcome in origin.failure.outcomes
        if outcome is not origin.outcome
    )
