"""Runs the cells of a matrix, tells of each as it comes, and of all at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tpcheck.cli.results import Files, tell
from tpcheck.cli.terminal import BAD_USAGE, note, side_by_side, speaks, told, write_whole
from tpcheck.core.environment import num_cores
from tpcheck.core.errors import TpcheckError, UsageError
from tpcheck.core.findings import Verdict
from tpcheck.lab.known import Judged, judged
from tpcheck.lab.matrix.cells import Cell, done_before, judged_json, versions, whole_json
from tpcheck.lab.matrix.report import row_line, widths_of
from tpcheck.report.report import Report
from tpcheck.world.attach import is_launched

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
    cells: Sequence[Cell], verify: Verify, jobs: int, *, skips: Refusal = lambda error: False
) -> Iterator[Outcome]:
    """Yield outcomes as they are reached, with at most `jobs` at a time.

    Args:
        skips: Whether a cell that cannot be run for this reason is skipped; else it is bad usage.
    """
    return side_by_side([partial(_outcome, cell, verify, skips) for cell in cells], jobs)


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


def _outcome(cell: Cell, verify: Verify, skips: Refusal) -> Outcome:
    start = time.monotonic()
    try:
        report = verify(cell)
    except UsageError as error:
        refused = skips(error)
        verdict = Verdict("skipped" if refused else "error", cell.subject, {}, message=str(error))
        return Outcome(cell, _with_versions(Report(verdict), cell), bad_usage=not refused, refused=refused)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        seconds = time.monotonic() - start
        report = Report(Verdict("error", cell.subject, {}, seconds=seconds, message=message))
    return Outcome(cell, _with_versions(report, cell))


def _with_versions(report: Report, cell: Cell) -> Report:
    """Add the backend's versions where it crashed before it could tell them."""
    verdict = report.verdict
    if cell.options.backend_name in verdict.environment:
        return report
    return Report(replace(verdict, environment={**versions(cell.options.backend_name), **verdict.environment}))


class Journal:
    """Writes outcomes into a file, in the order of the cells.

    Args:
        path: The file, or None for no file.
        cells: All cells of the run.
    """

    def __init__(self, path: Path | None, cells: Sequence[Cell]) -> None:
        self._path = path
        self._cells = cells
        self._reports: dict[Cell, str] = {}
        self._verdicts: set[str] = set()
        self.error: TpcheckError | None = None

    def kept(self, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
        """Yield the outcomes again, each when it is in the file."""
        for outcome in outcomes:
            self.add(outcome)
            yield outcome

    def add(self, outcome: Outcome) -> None:
        """Write an outcome; a file that cannot be written is told at the end, and ends no run."""
        verdict = outcome.report.verdict
        self._reports[outcome.cell] = judged_json(judged(verdict))
        self._verdicts.add(verdict.verdict)
        self.write()

    def write(self) -> None:
        if self._path is None:
            return
        reports = [self._reports[cell] for cell in self._cells if cell in self._reports]
        try:
            write_whole(self._path, whole_json(reports, self._verdicts, len(self._cells) - len(reports)))
            self.error = None
        except TpcheckError as error:
            self.error = error


INTERRUPTED = 130  # what shells say of a command that Ctrl-C ended


@dataclass(frozen=True, slots=True)
class Matrix:
    """What is run.

    Attributes:
        cells: Every cell.
        all_families: The families were not named, so one that cannot be built is skipped.
        held: Results are held against the register of known upstream bugs.
        fresh: What a file of an earlier run holds is run again.
    """

    cells: tuple[Cell, ...]
    all_families: bool = False
    held: bool = False
    fresh: bool = False

    @property
    def is_one(self) -> bool:
        return len(self.cells) == 1

    def skips(self, error: UsageError) -> bool:
        """Return whether a cell that cannot be run for this reason is skipped, being one combination of many."""
        several = len(self.cells) > len({cell.family for cell in self.cells})
        return self.all_families or (several and error.name != "family")

    def judged(self, outcome: Outcome) -> Judged:
        row = judged(outcome.report.verdict)
        return row if self.held or row.standing == "known" else Judged(row.verdict)


def run_matrix(matrix: Matrix, verify: Verify, files: Files, *, jobs: int | None, verbose: bool) -> int:
    """Run every cell that no earlier run has run, tell of all, and return the exit status."""
    before = _earlier(matrix, files)
    journal = Journal(files.json if speaks() and not matrix.is_one else None, matrix.cells)
    outcomes = {outcome.cell: outcome for outcome in before}
    for outcome in before:
        journal.add(outcome)
    todo = [cell for cell in matrix.cells if cell not in outcomes]
    running = run_all(todo, verify, _side_by_side(jobs, todo), skips=matrix.skips)
    try:
        for outcome in journal.kept(_with_progress(running, matrix, todo)):
            outcomes[outcome.cell] = outcome
    except KeyboardInterrupt:
        if matrix.is_one or not speaks():
            raise
        kept = f"; {files.json} holds them, and the same command goes on with it" if files.json else ""
        note(f"tpcheck: interrupted after {len(outcomes)} of {len(matrix.cells)} cells{kept}")
        return INTERRUPTED
    return _finished([outcomes[cell] for cell in matrix.cells], matrix, files, journal, verbose)


def _finished(outcomes: list[Outcome], matrix: Matrix, files: Files, journal: Journal, verbose: bool) -> int:
    rows = [matrix.judged(outcome) for outcome in outcomes]
    status = exit_status(outcomes, rows, held=matrix.held)
    if not speaks():
        return status
    if matrix.is_one and (outcomes[0].bad_usage or outcomes[0].refused):
        note(f"tpcheck: {outcomes[0].report.verdict.message}")
        return status
    whole = tell(rows, files, verbose=verbose, held=matrix.held)
    if journal.error is not None:
        note(f"tpcheck: {journal.error}")
    elif all(outcome.refused for outcome in outcomes):
        note("tpcheck: nothing could be run")
    return status if whole and journal.error is None else BAD_USAGE


def _earlier(matrix: Matrix, files: Files) -> list[Outcome]:
    """Return what an earlier run has left in the file, and say so."""
    if files.json is None or matrix.is_one or matrix.fresh or is_launched():
        return []
    stored = done_before(files.json, matrix.cells)
    if stored:
        note(f"{len(stored)} of {len(matrix.cells)} cells are in {files.json} already; --fresh runs them again")
    return [Outcome(cell, Report(verdict), refused=verdict.verdict == "skipped") for cell, verdict in stored.items()]


def _with_progress(outcomes: Iterable[Outcome], matrix: Matrix, todo: list[Cell]) -> Iterator[Outcome]:
    """Tell of each outcome as it comes; of a single one the report is enough."""
    if matrix.is_one or not todo or not speaks():
        yield from outcomes
        return
    widths = widths_of([cell.subject for cell in todo])
    yield from told(
        outcomes,
        len(todo),
        name=lambda outcome: outcome.cell.family,
        line=lambda outcome: str(row_line(matrix.judged(outcome), widths)),
    )


def _side_by_side(jobs: int | None, todo: list[Cell]) -> int:
    """Return how many worlds fit the cores, whose ranks wait for each other half of the time; a launcher has one."""
    if is_launched() or not todo:
        return 1
    largest = max(cell.options.topology.world_size for cell in todo)
    return jobs or max(1, 2 * num_cores() // largest)
