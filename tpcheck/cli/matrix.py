"""Runs the cells of a matrix, reports each as it completes, and all of them at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

from tpcheck.cli.terminal import (
    BAD_USAGE,
    INTERRUPTED,
    Files,
    append,
    is_reporting_rank,
    note,
    phases_shown,
    run_concurrently,
    succeeds,
    with_progress,
    write_all,
    write_atomically,
)
from tpcheck.core.environment import num_cores
from tpcheck.core.errors import TpcheckError, UsageError
from tpcheck.core.findings import Verdict
from tpcheck.lab.known import JudgedVerdict, judge
from tpcheck.lab.matrix import (
    Cell,
    done_before,
    judged_json,
    matrix_html,
    matrix_junit,
    matrix_lines,
    matrix_markdown,
    num_other_results,
    progress_line,
    standing_lines,
    versions,
    whole_json,
)
from tpcheck.report.report import FINDINGS_SHOWN, Report, verdict_lines
from tpcheck.report.words import Line, as_text
from tpcheck.world.attach import is_launched

Verify = Callable[[Cell], Report]
Refusal = Callable[[UsageError], bool]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the verification of one cell ended.

    Attributes:
        cell: The cell.
        report: Its report, also after a crash.
        bad_usage: The options are invalid for this cell, which the user asked for by name.
        refused: The options are invalid for this cell, one combination of many: it is skipped.
    """

    cell: Cell
    report: Report
    bad_usage: bool = False
    refused: bool = False


def run_all(
    cells: Sequence[Cell], verify: Verify, jobs: int, *, skips: Refusal = lambda error: False
) -> Iterator[Outcome]:
    """Yield outcomes in the order of completion, with at most `jobs` cells at a time.

    Args:
        skips: Whether a cell with this error is skipped; otherwise it is bad usage.
    """
    return run_concurrently([partial(_outcome, cell, verify, skips) for cell in cells], jobs)


def exit_status(outcomes: Sequence[Outcome], rows: Sequence[JudgedVerdict], *, with_register: bool) -> int:
    """Return 2 for bad usage of a cell or a matrix without runs, else 1 for findings, 3 for a crash, or 0.

    Args:
        with_register: Whether the register decides: a known bug is no finding, and a known bug that is gone is one.
    """
    if any(outcome.bad_usage for outcome in outcomes) or all(outcome.refused for outcome in outcomes):
        return 2
    counted = [row for row in rows if not (with_register and row.standing == "known")]
    verdicts = {row.verdict.verdict for row in counted}
    gone = with_register and any(row.standing == "gone" for row in counted)
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
    """Add the versions of a backend that crashed before it could report them."""
    verdict = report.verdict
    if cell.options.backend_name in verdict.environment:
        return report
    return Report(replace(verdict, environment={**versions(cell.options.backend_name), **verdict.environment}))


class Journal:
    """Writes the outcomes so far into a file, in the order of the cells.

    Args:
        path: The file; None writes nothing.
        cells: All cells of the run.
    """

    def __init__(self, path: Path | None, cells: Sequence[Cell]) -> None:
        self._path = path
        self._cells = cells
        self._reports: dict[Cell, str] = {}
        self._verdicts: set[str] = set()
        self.error: TpcheckError | None = None

    def add(self, outcome: Outcome) -> None:
        """Write an outcome. A file that cannot be written does not end the run; `error` is reported at the end."""
        if self._path is None:
            return
        verdict = outcome.report.verdict
        self._reports[outcome.cell] = judged_json(judge(verdict))
        self._verdicts.add(verdict.verdict)
        reports = [self._reports[cell] for cell in self._cells if cell in self._reports]
        self.error = None
        try:
            write_atomically(self._path, whole_json(reports, self._verdicts, len(self._cells) - len(reports)))
        except TpcheckError as error:
            self.error = error


@dataclass(frozen=True, slots=True)
class Matrix:
    """The cells to run, and how to treat their results.

    Attributes:
        cells: Every cell.
        all_families: The families were not named, so one that cannot be built is skipped.
        with_register: Results are compared with the register of known upstream bugs.
        fresh: What a file of an earlier run holds is run again.
    """

    cells: tuple[Cell, ...]
    all_families: bool = False
    with_register: bool = False
    fresh: bool = False

    @property
    def is_single(self) -> bool:
        return len(self.cells) == 1

    def skips(self, error: UsageError) -> bool:
        """Return whether a cell with this error is skipped, as one combination of many."""
        several = len(self.cells) > len({cell.family for cell in self.cells})
        return self.all_families or (several and error.name != "family")

    def judge(self, outcome: Outcome) -> JudgedVerdict:
        row = judge(outcome.report.verdict)
        return row if self.with_register or row.standing == "known" else JudgedVerdict(row.verdict)


def run_matrix(matrix: Matrix, verify: Verify, files: Files, *, jobs: int | None, verbose: bool) -> int:
    """Run every cell that is not in the file of an earlier run, report all, and return the exit status."""
    if (lost := _num_lost(matrix, files)) > 0:
        results = "1 result" if lost == 1 else f"{lost} results"
        note(f"tpcheck: json={str(files.json)!r}: expected another file, or --fresh: it holds {results} of other runs")
        return BAD_USAGE
    before = _earlier(matrix, files)
    journal = Journal(files.json if is_reporting_rank() and not matrix.is_single else None, matrix.cells)
    outcomes = {outcome.cell: outcome for outcome in before}
    for outcome in before:
        journal.add(outcome)
    todo = [cell for cell in matrix.cells if cell not in outcomes]
    running = run_all(todo, verify, _num_workers(jobs, todo), skips=matrix.skips)
    try:
        for outcome in _with_progress(running, matrix, todo):
            journal.add(outcome)
            outcomes[outcome.cell] = outcome
    except KeyboardInterrupt:
        if matrix.is_single or not is_reporting_rank():
            raise
        saved = f"; {files.json} contains them, and the same command continues" if files.json else ""
        note(f"tpcheck: interrupted after {len(outcomes)} of {len(matrix.cells)} cells{saved}")
        return INTERRUPTED
    return _finished([outcomes[cell] for cell in matrix.cells], matrix, files, journal, verbose)


def _finished(outcomes: list[Outcome], matrix: Matrix, files: Files, journal: Journal, verbose: bool) -> int:
    rows = [matrix.judge(outcome) for outcome in outcomes]
    status = exit_status(outcomes, rows, with_register=matrix.with_register)
    if not is_reporting_rank():
        return status
    if matrix.is_single and (outcomes[0].bad_usage or outcomes[0].refused):
        note(f"tpcheck: {outcomes[0].report.verdict.message}")
        return status
    is_written = _write_results(rows, files, verbose=verbose, with_register=matrix.with_register)
    if journal.error is not None:
        note(f"tpcheck: {journal.error}")
    elif all(outcome.refused for outcome in outcomes):
        note("tpcheck: nothing could be run")
    return status if is_written and journal.error is None else BAD_USAGE


def _write_results(rows: Sequence[JudgedVerdict], files: Files, *, verbose: bool, with_register: bool) -> bool:
    """Show the rows and write the files; return whether everything could be written.

    Args:
        with_register: Whether findings that the register of known bugs expects are left out.
    """
    is_written = write_all(
        _lines(rows, verbose, with_register),
        (files.json if len(rows) == 1 else None, Report(rows[0].verdict).to_json),
        (files.junit, lambda: matrix_junit(rows)),
        (files.html, lambda: _page(rows)),
    )
    is_appended = files.summary is None or succeeds(partial(append, files.summary, matrix_markdown(rows)))
    return is_written and is_appended


def _page(rows: Sequence[JudgedVerdict]) -> str:
    """Return the page of a single run, or of a matrix."""
    if len(rows) > 1:
        return matrix_html(rows)
    return Report(rows[0].verdict).to_html(upstream=as_text(standing_lines(rows[0])).strip())


def _lines(rows: Sequence[JudgedVerdict], verbose: bool, with_register: bool) -> Iterator[Line]:
    """Yield a single report in full; of several, the unexpected ones (with `verbose` all) and the table."""
    several = len(rows) > 1
    for row in rows:
        is_unexpected = row.verdict.verdict in ("failed", "error") and not (with_register and row.standing == "known")
        if verbose or not several or is_unexpected:
            yield from verdict_lines(row.verdict, findings_shown=None if verbose else FINDINGS_SHOWN)
            if several:
                yield Line()
    if several:
        yield from matrix_lines(rows)
    elif rows[0].standing:
        yield from standing_lines(rows[0])


def _num_lost(matrix: Matrix, files: Files) -> int:
    """Return how many results of other runs the file of this one would replace."""
    return 0 if files.json is None or matrix.fresh else num_other_results(files.json, matrix.cells)


def _earlier(matrix: Matrix, files: Files) -> list[Outcome]:
    """Return the outcomes in the file of an earlier run, and note how many there are."""
    if files.json is None or matrix.is_single or matrix.fresh or is_launched():
        return []
    stored = done_before(files.json, matrix.cells)
    if stored:
        note(f"{len(stored)} of {len(matrix.cells)} cells are in {files.json} already; --fresh runs them again")
    return [Outcome(cell, Report(verdict), refused=verdict.verdict == "skipped") for cell, verdict in stored.items()]


def _with_progress(outcomes: Iterable[Outcome], matrix: Matrix, todo: list[Cell]) -> Iterator[Outcome]:
    """Yield the outcomes and report each as it completes; a single one has its report."""
    if not todo or not is_reporting_rank():
        yield from outcomes
        return
    if matrix.is_single:
        with phases_shown():
            yield from outcomes
        return
    numbers = count(1)
    yield from with_progress(
        outcomes,
        len(todo),
        name=lambda outcome: outcome.cell.family,
        line=lambda outcome: progress_line(next(numbers), len(todo), matrix.judge(outcome)),
    )


def _num_workers(jobs: int | None, todo: list[Cell]) -> int:
    """Return the number of concurrent worlds: two ranks a core, since ranks wait half of the time; 1 in a launcher."""
    if is_launched() or not todo:
        return 1
    largest = max(cell.options.topology.world_size for cell in todo)
    return jobs or max(1, 2 * num_cores() // largest)
