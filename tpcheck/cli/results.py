"""Shows and writes the results when everything has run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tpcheck.cli.terminal import note, show, write_atomically
from tpcheck.core.errors import TpcheckError
from tpcheck.lab.known import JudgedVerdict
from tpcheck.lab.matrix import matrix_html, matrix_junit, matrix_lines, matrix_markdown, standing_lines
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
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as error:
        raise TpcheckError(f"{path} cannot be written: {error.strerror or error}") from error


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
    writes = [lambda: show(_lines(rows, verbose, with_register))]
    if files.json and len(rows) == 1:
        json, text = files.json, Report(rows[0].verdict).to_json()
        writes.append(lambda: write_atomically(json, text))
    if files.junit:
        junit = files.junit
        writes.append(lambda: write_atomically(junit, matrix_junit(rows)))
    if files.html:
        html = files.html
        writes.append(lambda: write_atomically(html, matrix_html(rows)))
    if files.summary:
        summary = files.summary
        writes.append(lambda: append(summary, matrix_markdown(rows)))
    return all_written(writes)


def write_report(report: Report, files: Files, *, verbose: bool) -> bool:
    """Show one report and write its files; return whether everything could be written."""
    writes = [lambda: show(verdict_lines(report.verdict, findings_shown=None if verbose else FINDINGS_SHOWN))]
    texts = (files.json, report.to_json), (files.junit, report.to_junit), (files.html, report.to_html)
    writes += [partial(_write, path, to_text) for path, to_text in texts if path is not None]
    return all_written(writes)


def _write(path: Path, to_text: Callable[[], str]) -> None:
    write_atomically(path, to_text())


def all_written(writes: Sequence[Callable[[], None]]) -> bool:
    """Call every function, also after one has failed, and return whether all succeeded."""
    succeeded = [_succeeds(write) for write in writes]
    return all(succeeded)


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
