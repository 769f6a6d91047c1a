"""The cells of a matrix, run one by one or side by side: a crash of one never ends the others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tpcheck.api.matrix import Cell, Common, subject, versions
from tpcheck.cli.side_by_side import side_by_side
from tpcheck.errors import UsageError
from tpcheck.families.upstream import Judged
from tpcheck.records import Verdict
from tpcheck.report import Report

Verify = Callable[[Cell], Report]
Refusal = Callable[[UsageError], bool]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the verification of one cell ended.

    Attributes:
        cell: Which one.
        report: Its report; a crash has one, too.
        bad_usage: The options did not fit this cell, and it was asked for by name.
        refused: The options did not fit this cell, and it is one combination of many.
    """

    cell: Cell
    report: Report
    bad_usage: bool = False
    refused: bool = False


def run_all(
    cells: Sequence[Cell], verify: Verify, common: Common, jobs: int, *, skips: Refusal = lambda error: False
) -> Iterator[Outcome]:
    """Yield outcomes as they are reached, with at most `jobs` at a time.

    Args:
        skips: Whether a cell that cannot be run for this reason is skipped; else it is bad usage.
    """
    return side_by_side([partial(_outcome, cell, verify, common, skips) for cell in cells], jobs)


def exit_status(outcomes: Sequence[Outcome], rows: Sequence[Judged], *, held: bool) -> int:
    """Return 2 if the options did not fit some cell (or any), else 1 after findings, else 3 after a crash, else 0.

    Args:
        held: Whether what the register of known bugs expects is no finding, and what it does not expect is one.
    """
    if any(outcome.bad_usage for outcome in outcomes) or all(outcome.refused for outcome in outcomes):
        return 2
    telling = [row for row in rows if not (held and row.standing == "known")]
    verdicts = {row.verdict.verdict for row in telling}
    gone = held and any(row.standing == "gone" for row in telling)
    return 1 if gone or "failed" in verdicts else 3 if "error" in verdicts else 0


def _outcome(cell: Cell, verify: Verify, common: Common, skips: Refusal) -> Outcome:
    start = time.monotonic()
    try:
        report = verify(cell)
    except UsageError as error:
        refused = skips(error)
        verdict = Verdict("skipped" if refused else "error", subject(cell, common), {}, message=str(error))
        return Outcome(cell, _with_versions(Report(verdict), cell), bad_usage=not refused, refused=refused)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        report = Report(Verdict("error", subject(cell, common), {}, seconds=seconds, message=message))
    return Outcome(cell, _with_versions(report, cell))


def _with_versions(report: Report, cell: Cell) -> Report:
    """Add the backend's versions where it crashed before it could tell them."""
    verdict = report.verdict
    if cell.backend in verdict.environment:
        return report
    return Report(replace(verdict, environment={**versions(cell.backend), **verdict.environment}))
