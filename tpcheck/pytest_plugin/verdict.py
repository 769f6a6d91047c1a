"""What a failed run means to pytest: one exception, of the type that the body raised."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tpcheck.errors import RankFailure, RankOutcome
from tpcheck.pytest_plugin.exceptions import traceback_at, unpacked
from tpcheck.pytest_plugin.messages import BodyFailed

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
