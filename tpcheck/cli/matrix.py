"""Runs the cells of a matrix, tells of each as it comes, and of all at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tpcheck.api.matrix import Cell, Common, done_before, subject
from tpcheck.cli.journal import Journal
from tpcheck.cli.many import Outcome, Verify, exit_status, run_all
from tpcheck.cli.progress import told
from tpcheck.cli.results import Files, tell
from tpcheck.cli.terminal import BAD_USAGE, note, speaks
from tpcheck.environment import num_cores
from tpcheck.errors import UsageError
from tpcheck.families.upstream import Judged, judged
from tpcheck.report import Report
from tpcheck.report.matrix import row_line, widths_of
from tpcheck.world.attach import is_launched

INTERRUPTED = 130  # what shells say of a command that Ctrl-C ended


@dataclass(frozen=True, slots=True)
class Matrix:
    """What is run.

    Attributes:
        cells: Every cell.
        common: What they have in common.
        all_families: The families were not named, so one that cannot be built is skipped.
        held: Results are held against the register of known upstream bugs.
        fresh: What a file of an earlier run holds is run again.
    """

    cells: tuple[Cell, ...]
    common: Common
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
    running = run_all(todo, verify, matrix.common, _side_by_side(jobs, todo), skips=matrix.skips)
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
    stored = done_before(files.json, matrix.cells, matrix.common)
    if stored:
        note(f"{len(stored)} of {len(matrix.cells)} cells are in {files.json} already; --fresh runs them again")
    return [Outcome(cell, Report(verdict), refused=verdict.verdict == "skipped") for cell, verdict in stored.items()]


def _with_progress(outcomes: Iterable[Outcome], matrix: Matrix, todo: list[Cell]) -> Iterator[Outcome]:
    """Tell of each outcome as it comes; of a single one the report is enough."""
    if matrix.is_one or not todo or not speaks():
        yield from outcomes
        return
    widths = widths_of([subject(cell, matrix.common) for cell in todo])
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
    largest = max(cell.topology.world_size for cell in todo)
    return jobs or max(1, 2 * num_cores() // largest)
