"""Shows and writes the results when everything has run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tpcheck.cli.terminal import note, reporting_write_errors, show, write_atomically
from tpcheck.core.errors import TpcheckError
from tpcheck.lab.known import JudgedVerdict
from tpcheck.lab.matrix.report import matrix_html, matrix_junit, matrix_lines, matrix_markdown, standing_lines
from tpcheck.report.report import Report
from tpcheck.report.text import FINDINGS_SHOWN, verdict_lines
from tpcheck.report.words import Line


def summary_path(asked_for: Path | None) -> Path | None:
    """Return the file of the summary: the one asked for, or that of a GitHub step, or None."""
    github = os.environ.get("GITHUB_STEP_SUMMARY")
    return asked_for or (Path(github) if github else None)


def append(path: Path, text: str) -> None:
    """Append text to a file.

    Raises:
        TpcheckError: It could not be written.
    """
    with reporting_write_errors(str(path)), path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


@dataclass(frozen=True, slots=True)
class Files:
    """The files to write, in addition to standard output.

    Attributes:
        json: One report; the file of a matrix is written while it runs.
        summary: Markdown, appended to the file, as GitHub's step summary needs it.
    """

    json: Path | None = None
    junit: Path | None = None
    html: Path | None = None
    summary: Path | None = None


def write_results(rows: Sequence[JudgedVerdict], files: Files, *, verbose: bool, with_register: bool) -> bool:
    """Show the rows and write the files; return whether everything could be written.

    Args:
        with_register: Whether findings that the register of known bugs expects are left out.
    """
    is_written = write_all(
        _lines(rows, verbose, with_register),
        (files.json if len(rows) == 1 else None, Report(rows[0].verdict).to_json),
        (files.junit, lambda: matrix_junit(rows)),
        (files.html, lambda: matrix_html(rows)),
    )
    is_appended = files.summary is None or _succeeds(partial(append, files.summary, matrix_markdown(rows)))
    return is_written and is_appended


def write_report(report: Report, files: Files, *, verbose: bool) -> bool:
    """Show one report and write its files; return whether everything could be written."""
    lines = verdict_lines(report.verdict, findings_shown=None if verbose else FINDINGS_SHOWN)
    return write_all(lines, (files.json, report.to_json), (files.junit, report.to_junit), (files.html, report.to_html))


def write_all(lines: Iterable[Line], *files: tuple[Path | None, Callable[[], str]]) -> bool:
    """Show the lines and write each text that has a path, also after one has failed; return whether all succeeded."""
    writes = [partial(show, lines), *(partial(_write, *file) for file in files)]
    succeeded = [_succeeds(write) for write in writes]
    return all(succeeded)


def _write(path: Path | None, to_text: Callable[[], str]) -> None:
    if path is not None:
        write_atomically(path, to_text())


def _succeeds(write: Callable[[], None]) -> bool:
    try:
        write()
    except TpcheckError as error:
        note(f"tpcheck: {error}")
        return False
    return True


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
