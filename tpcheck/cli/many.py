"""Many verifications: a crash of one never ends the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from tpcheck.cli.side_by_side import side_by_side
from tpcheck.errors import UsageError
from tpcheck.records import Verdict
from tpcheck.report import Report

Verify = Callable[[str], Report]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the verification of one family ended.

    Attributes:
        family: Its name.
        report: Its report; a crash has one, too.
        bad_usage: The options did not fit this family.
    """

    family: str
    report: Report
    bad_usage: bool = False


def run_all(families: Sequence[str], verify: Verify, jobs: int) -> Iterator[Outcome]:
    """Yield outcomes as they are reached, with at most `jobs` at a time."""
    return side_by_side([partial(_outcome, family, verify) for family in families], jobs)


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """Return 2 if the options did not fit some family, else 1 after findings, else 3 after a crash, else 0."""
    verdicts = {outcome.report.verdict.verdict for outcome in outcomes}
    if any(outcome.bad_usage for outcome in outcomes):
        return 2
    return 1 if "failed" in verdicts else 3 if "error" in verdicts else 0


def _outcome(family: str, verify: Verify) -> Outcome:
    start = time.monotonic()
    try:
        return Outcome(family, verify(family))
    except Exception as error:
        message = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
        verdict = Verdict("error", {"family": family}, {}, seconds=time.monotonic() - start, message=message)
        return Outcome(family, Report(verdict), bad_usage=isinstance(error, UsageError))
