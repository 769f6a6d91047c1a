"""What is shown and written when everything has run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpcheck.cli.terminal import note, show, write_whole
from tpcheck.core.errors import TpcheckError
from tpcheck.lab.known import Judged
from tpcheck.lab.matrix.report import matrix_html, matrix_junit, matrix_lines, matrix_markdown, standing_lines
from tpcheck.report.report import Report
from tpcheck.report.text import FINDINGS_SHOWN, verdict_lines
from tpcheck.report.words import Line


def summary_path(asked_for: Path | None) -> Path | None:
    """Return where a summary goes: where the user says, else where GitHub does, else nowhere."""
    of_github = os.environ.get("GITHUB_STEP_SUMMARY")
    return asked_for or (Path(of_github) if of_github else None)


def add_to(path: Path, text: str) -> None:
    """Add text to the end of a file.

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
    """Where results are written, beside standard output.

    Attributes:
        json: A report, or a file of many that has been written as they came.
        summary: Markdown, which is added to what the file holds: GitHub's step summary is such a file.
    """

    json: Path | None = None
    junit: Path | None = None
    html: Path | None = None
    summary: Path | None = None


def tell(rows: Sequence[Judged], files: Files, *, verbose: bool, held: bool) -> bool:
    """Show the rows, and write the files that were asked for; return whether all of that could be written.

    Args:
        held: Whether what the register of known bugs expects is no news.
    """
    writes = [lambda: show(_lines(rows, verbose, held))]
    if files.json and len(rows) == 1:
        json, text = files.json, Report(rows[0].verdict).to_json()
        writes.append(lambda: write_whole(json, text))
    if files.junit:
        junit = files.junit
        writes.append(lambda: write_whole(junit, matrix_junit(rows)))
    if files.html:
        html = files.html
        writes.append(lambda: write_whole(html, matrix_html(rows)))
    if files.summary:
        summary = files.summary
        writes.append(lambda: add_to(summary, matrix_markdown(rows)))
    return all_written(writes)


def tell_one(report: Report, *, verbose: bool, json_path: Path | None, junit_path: Path | None) -> bool:
    """Show one report, and write the files that were asked for; return whether all of that could be written."""
    writes = [lambda: show(verdict_lines(report.verdict, findings_shown=None if verbose else FINDINGS_SHOWN))]
    if json_path:
        writes.append(lambda: write_whole(json_path, report.to_json()))
    if junit_path:
        writes.append(lambda: write_whole(junit_path, report.to_junit()))
    return all_written(writes)


def all_written(writes: Sequence[Callable[[], None]]) -> bool:
    """Do every one of the writes, whatever became of the others, and return whether all could be done."""
    written = [_succeeds(write) for write in writes]
    return all(written)


def _succeeds(write: Callable[[], None]) -> bool:
    try:
        write()
    except TpcheckError as error:
        note(f"tpcheck: {error}")
        return False
    return True


def _lines(rows: Sequence[Judged], verbose: bool, held: bool) -> Iterator[Line]:
    """Yield the one report whole; of several, those that are news (all with `verbose`) and a table."""
    several = len(rows) > 1
    for row in rows:
        is_news = row.verdict.verdict in ("failed", "error") and not (held and row.standing == "known")
        if verbose or not several or is_news:
            yield from verdict_lines(row.verdict, findings_shown=None if verbose else FINDINGS_SHOWN)
            if several:
                yield Line()
    if several:
        yield from matrix_lines(rows)
    elif rows[0].standing:
        yield from standing_lines(rows[0])
