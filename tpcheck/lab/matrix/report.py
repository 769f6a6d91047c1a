"""Many verdicts as one table, and the page of families in the documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from tpcheck.core.causes import Cause
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import Finding, Verdict
from tpcheck.lab.known import JudgedVerdict, KnownBug, judge, register
from tpcheck.lab.matrix.cells import stored_verdicts
from tpcheck.report import words
from tpcheck.report.findings import place
from tpcheck.report.report import STYLES, as_junit, verdict_lines
from tpcheck.report.table import (
    Cell,
    Column,
    Outcome,
    Row,
    Table,
    markdown_text,
    row_line,
    table_lines,
    table_markdown,
    tables_html,
)
from tpcheck.report.words import Line, as_text, labelled, plain

NOT_SHARDED = "not sharded"
LABELS = ("passed", "failed", NOT_SHARDED, "error", "skipped")
SIGNS = {"passed": "✓", "failed": "✗", NOT_SHARDED: "∅", "error": "!", "skipped": "·"}
_LABEL_STYLES = {**STYLES, NOT_SHARDED: STYLES["failed"]}
_STANDING_STYLES = {"known": "dim", "new": "bold red", "gone": "bold red", "": ""}
_OUTCOMES: Mapping[str, Outcome] = {"failed": "failure", "error": "error", "skipped": "skipped"}
_MESSAGE_WIDTH = 100
_REGISTER = "tpcheck/lab/known.toml"
_COLUMNS = (
    Column("family"),
    Column("configuration"),
    Column("verdict", width=7),
    Column("seconds", right=True, width=8),
    Column("summary"),
    Column("register"),
)


def matrix_lines(rows: Sequence[JudgedVerdict]) -> Iterator[Line]:
    """Yield one line for each cell, the number of each verdict, and what the register of known bugs did not expect."""
    yield from table_lines(_table(rows))
    yield Line()
    yield plain(counts(rows), "bold")
    unexpected = [row for row in rows if row.standing in ("new", "gone")]
    if unexpected:
        yield Line()
    for row in unexpected:
        yield from labelled(row.standing, unexpected_message(row), "red")


def standing_lines(row: JudgedVerdict) -> Iterator[Line]:
    """Yield what the register of known bugs says of a verdict."""
    if row.standing == "known" and row.bug is not None:
        see = "; ".join(part for part in (row.bug.link, row.bug.script) if part)
        yield from labelled("upstream", f"{row.bug.name}: {row.bug.what}" + (f"\n{see}" if see else ""))
    elif row.standing:
        yield from labelled(row.standing, unexpected_message(row), "red")


def progress_line(row: JudgedVerdict, subjects: Iterable[Mapping[str, Any]]) -> Line:
    """Return the line of one cell, aligned with those of all `subjects`."""
    placeholders = [JudgedVerdict(Verdict("passed", subject, {})) for subject in subjects]
    table = _table(placeholders)
    of_row = _row(row, with_configuration=any(cells.cells[1].text for cells in table.rows))
    return row_line(of_row, _COLUMNS, Table(_COLUMNS, (of_row, *table.rows)).widths)


def _table(rows: Sequence[JudgedVerdict], *, details: bool = False) -> Table:
    """Return a table of the cells; the configuration is left out where all of them share one, unless with details."""
    differ = len({configuration(row.verdict.subject) for row in rows}) > 1
    return Table(_COLUMNS, tuple(_row(row, with_configuration=differ or details, details=details) for row in rows))


def _row(row: JudgedVerdict, *, with_configuration: bool = True, details: bool = False) -> Row:
    verdict, text = row.verdict, label(row.verdict)
    report = as_text([*verdict_lines(verdict), *standing_lines(row)]) if details else ""
    return Row(
        cells=(
            Cell(words.name(verdict.subject)),
            Cell(configuration(verdict.subject) if with_configuration else ""),
            Cell(f"{SIGNS[text]} {text}" if details else text, _LABEL_STYLES[text]),
            Cell(f"{verdict.seconds:.1f} s"),
            Cell(summary_line(verdict)),
            Cell(_standing(row), _STANDING_STYLES[row.standing]),
        ),
        outcome=_OUTCOMES.get(verdict.verdict, "passed"),
        details=report,
        seconds=verdict.seconds,
        is_expected=row.standing == "known" or (not row.standing and verdict.verdict in ("passed", "skipped")),
    )


def counts(rows: Sequence[JudgedVerdict]) -> str:
    """Return `3 passed, 1 failed (1 known)`."""
    number = Counter(label(row.verdict) for row in rows)
    known = Counter(label(row.verdict) for row in rows if row.standing == "known")
    parts = [f"{number[name]} {name}" + (f" ({known[name]} known)" if known[name] else "") for name in LABELS]
    return ", ".join(part for part, name in zip(parts, LABELS, strict=True) if number[name])


def label(verdict: Verdict) -> str:
    """Return the verdict, or `not sharded` where the backend silently left the model whole."""
    first = next(iter(verdict.findings), None)
    left_whole = first is not None and first.check == "parameters_are_sharded" and first.cause == Cause.NOT_SHARDED.slug
    return NOT_SHARDED if left_whole else verdict.verdict


def configuration(subject: Mapping[str, Any]) -> str:
    """Return the options in which cells of one family differ: `deepspeed, tp=2, zero=1`."""
    dtype = subject.get("dtype", "float64")
    return ", ".join([*words.layout(subject), *([str(dtype)] if dtype != "float64" else [])])


def summary_line(verdict: Verdict) -> str:
    """Return the first finding, the first line of the message, or the worst margin."""
    if verdict.findings:
        first = verdict.findings[0]
        return f"{first.check}  {place(first)}" + (f"  {first.cause}" if first.cause else "")
    if verdict.message:
        lines = [line.strip() for line in verdict.message.splitlines() if line.strip()]
        return shorten(lines[0], _MESSAGE_WIDTH, placeholder=" ...") if lines else ""
    worst = max((check for check in verdict.checks if check.compared), key=lambda c: c.worst_margin, default=None)
    return "" if worst is None else f"worst margin {words.margin(worst.worst_margin)}  {worst.check}"


def unexpected_message(row: JudgedVerdict) -> str:
    """Return a sentence about a cell that the register did not expect."""
    name = f"{words.name(row.verdict.subject)} ({configuration(row.verdict.subject)})"
    if row.standing == "gone":
        assert row.bug is not None
        return (
            f"{name} passed, but {row.bug.name} is registered for these versions: {row.bug.what} "
            f"If it is fixed, limit its versions in {_REGISTER}."
        )
    if row.bug is not None:
        return f"{name}: {label(row.verdict)}, but not as {row.bug.name} in {_REGISTER} describes: {row.bug.what}"
    return f"{name}: {label(row.verdict)}, and no entry of {_REGISTER} describes this"


def _standing(row: JudgedVerdict) -> str:
    return f"known: {row.bug.name}" if row.standing == "known" and row.bug else row.standing


def matrix_markdown(rows: Sequence[JudgedVerdict]) -> str:
    """Return the summary of a CI job: counts, what was unexpected, and the cells that did not pass."""
    lines = ["### tpcheck", "", counts(rows), ""]
    lines += [f"- **{row.standing}** {markdown_text(unexpected_message(row))}" for row in rows
              if row.standing in ("new", "gone")]  # fmt: skip
    listed = [row for row in rows if row.verdict.verdict != "passed" or row.standing]
    if listed:
        columns = Column("family"), Column("configuration"), Column("verdict"), Column("summary")
        lines += ["", *table_markdown(Table(columns, tuple(map(_markdown_row, listed))))]
    return "\n".join([*lines, "", versions(rows), ""]) + "\n"


def _markdown_row(row: JudgedVerdict) -> Row:
    subject, text = row.verdict.subject, label(row.verdict)
    verdict = f"{SIGNS[text]} {text}" + (f", {row.standing}" if row.standing else "")
    texts = words.name(subject), configuration(subject), verdict, summary_line(row.verdict)
    return Row(tuple(map(Cell, texts)))


def families_table(rows: Sequence[JudgedVerdict]) -> Table:
    """Return a table with a row for each family and a column for each configuration."""
    columns = list(dict.fromkeys(configuration(row.verdict.subject) for row in rows))
    by_family: dict[str, dict[str, JudgedVerdict]] = {}
    for row in rows:
        by_family.setdefault(words.name(row.verdict.subject), {})[configuration(row.verdict.subject)] = row
    return Table(
        (Column("family"), *map(Column, columns)),
        tuple(
            Row((Cell(family), *(Cell(_short(cells.get(column))) for column in columns)))
            for family, cells in by_family.items()
        ),
    )


def versions(rows: Sequence[JudgedVerdict]) -> str:
    """Return the versions of all rows in a line: `torch 2.13.0, transformers 5.23.0`."""
    by_package: dict[str, set[str]] = {}
    for row in rows:
        for package, number in row.verdict.environment.items():
            by_package.setdefault(package, set()).add(number)
    return ", ".join(f"{package} {' and '.join(sorted(numbers))}" for package, numbers in sorted(by_package.items()))


def _short(row: JudgedVerdict | None) -> str:
    if row is None:
        return ""
    text = label(row.verdict)
    verdict = f"{SIGNS[text]} {text}"
    if row.verdict.verdict == "passed":
        return verdict
    bug = f" ({row.bug.name})" if row.standing == "known" and row.bug is not None else ""
    if row.verdict.findings:
        first = row.verdict.findings[0]
        return f"{verdict}{bug}: {first.cause or first.check}"
    return f"{verdict}{bug}" if bug else f"{verdict}: {summary_line(row.verdict)}"


def matrix_html(rows: Sequence[JudgedVerdict]) -> str:
    """Return a page with a row for each cell, whose report opens, and filters."""
    unexpected = sum(row.standing in ("new", "gone") for row in rows)
    seconds = sum(row.verdict.seconds for row in rows)
    subtitle = f"{versions(rows)}; {seconds:.0f} seconds of runs"
    if unexpected:
        subtitle += f"; {unexpected} unexpected according to the register of known bugs"
    return tables_html(f"tpcheck: {counts(rows)}", subtitle, [_table(rows, details=True)])


GONE = "known_bug_shows"  # the test case of a registered bug that does not show


def matrix_junit(rows: Sequence[JudgedVerdict]) -> str:
    """Return an XML document that CI servers read: known bugs are skipped, and a bug that is gone fails."""
    return as_junit(_with_register(row) for row in rows)


def _with_register(row: JudgedVerdict) -> Verdict:
    verdict = row.verdict
    if row.standing == "known" and row.bug is not None:
        message = f"known upstream bug {row.bug.name}: {row.bug.what}"
        return replace(verdict, verdict="skipped", findings=(), checks=(), message=message)
    if row.standing == "gone":
        finding = Finding(GONE, {"field": unexpected_message(row)}, observed=1.0, allowed=0.0)
        return replace(verdict, verdict="failed", findings=(finding,))
    return verdict


def families_page(path: Path) -> Iterator[Line]:
    """Yield a page of Markdown: what was run, counts by configuration, every family, and the known bugs.

    Raises:
        UsageError: The file contains no verdicts.
    """
    rows = [judge(verdict) for verdict in stored_verdicts(path)]
    if not rows:
        raise UsageError("table", str(path), "a file that `tpcheck verify --json` has written")
    return (plain(line) for line in _page(rows))


def _page(rows: Sequence[JudgedVerdict]) -> Iterator[str]:
    yield from ["# What works, by family", ""]
    yield "Made with `tpcheck families --table matrix.json` from the file of `tpcheck verify --all --json matrix.json`"
    yield from [f"({versions(rows)}).", ""]
    for name in dict.fromkeys(configuration(row.verdict.subject) for row in rows if row.verdict.subject.get("tp")):
        in_configuration = [row for row in rows if configuration(row.verdict.subject) == name]
        yield f"- {name}: {len(in_configuration)} families, {counts(in_configuration)}"
    yield from ["", "A name in parentheses is that of a known bug, below.", ""]
    yield from table_markdown(families_table(rows))
    yield from ["", "## Known upstream bugs", ""]
    for bug in register():
        yield from _entry(bug)


def _entry(bug: KnownBug) -> Iterator[str]:
    silent = "silent" if bug.verdict == "failed" else "loud"
    see = [*([f"[reported]({bug.link})"] if bug.link else []), *([f"`{bug.script}` shows it"] if bug.script else [])]
    yield f"- **{bug.name}** ({silent}; {bug.backend}): {bug.what} `{bug.again}`" + (
        f"; {', '.join(see)}" if see else ""
    )
