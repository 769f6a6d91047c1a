"""The file of a matrix, written as its cells come in: whenever a run ends, the file is whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tpcheck.api.matrix import Cell
from tpcheck.cli.many import Outcome
from tpcheck.cli.terminal import write_whole
from tpcheck.errors import TpcheckError
from tpcheck.families.upstream import judged
from tpcheck.report.matrix_data import judged_json, whole_json


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
