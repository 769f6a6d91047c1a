"""Many verdicts as text, Markdown, HTML and JUnit, and the table of families in the documentation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

from tpcheck.core.causes import Cause
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import Finding, Verdict
from tpcheck.lab.known import Judged, KnownBug, judged, register
from tpcheck.lab.matrix.cells import stored_verdicts
from tpcheck.report import words
from tpcheck.report.findings import place
from tpcheck.report.junit import as_junit
from tpcheck.report.pages import page
from tpcheck.report.text import STYLES, verdict_lines
from tpcheck.report.words import Line, as_text, labelled, plain

NOT_SHARDED = "not sharded"
LABELS = ("passed", "failed", NOT_SHARDED, "error", "skipped")
SIGNS = {"passed": "✓", "failed": "✗", NOT_SHARDED: "∅", "error": "!", "skipped": "·"}
_LABEL_STYLES = {**STYLES, NOT_SHARDED: STYLES["failed"]}
_STANDING_STYLES = {"known": "dim", "new": "bold red", "gone": "bold red"}
_MESSAGE_WIDTH = 100
_REGISTER = "tpcheck/families/known.toml"


def matrix_lines(rows: Sequence[Judged]) -> Iterator[Line]:
    """Yield one line for each cell, the number of each verdict, and what the register did not expect."""
    widths = widths_of([row.verdict.subject for row in rows], [label(row.verdict) for row in rows])
    for row in rows:
        yield row_line(row, widths)
    yield Line()
    yield plain(counts(rows), "bold")
    unexpected = [row for row in rows if row.standing in ("new", "gone")]
    if unexpected:
        yield Line()
    for row in unexpected:
        yield from labelled(row.standing, surprise(row), "red")


def standing_lines(row: Judged) -> Iterator[Line]:
    """Yield what the register of known bugs says of a verdict."""
    if row.standing == "known" and row.bug is not None:
        see = "; ".join(part for part in (row.bug.link, row.bug.script) if part)
        yield from labelled("upstream", f"{row.bug.name}: {row.bug.what}" + (f"\n{see}" if see else ""))
    elif row.standing:
        yield from labelled(row.standing, surprise(row), "red")


def row_line(row: Judged, widths: tuple[int, int, int] = (0, 0, 7)) -> Line:
    """Return a cell with the first thing to know about it; `widths` are of name, configuration and verdict."""
    name_width, layout_width, label_width = widths
    verdict, text = row.verdict, label(row.verdict)
    layout = f"{configuration(verdict.subject):<{layout_width}}  " if layout_width else ""
    return Line(
        (
            (f"{words.name(verdict.subject):<{name_width}}  {layout}", ""),
            (f"{text:<{label_width}}", _LABEL_STYLES[text]),
            (f"  {verdict.seconds:6.1f} s  {gist(verdict)}", ""),
            *([(f"  {_standing(row)}", _STANDING_STYLES[row.standing])] if row.standing else []),
        )
    )


def widths_of(subjects: Sequence[Mapping[str, Any]], labels: Sequence[str] = ()) -> tuple[int, int, int]:
    """Return the widths that fit these; a configuration that all have in common needs no column."""
    layouts = {configuration(subject) for subject in subjects}
    return (
        max((len(words.name(subject)) for subject in subjects), default=0),
        max(map(len, layouts)) if len(layouts) > 1 else 0,
        max([7, *map(len, labels)]),
    )


def counts(rows: Sequence[Judged]) -> str:
    """Return `3 passed, 1 failed (1 known)`."""
    number = Counter(label(row.verdict) for row in rows)
    known = Counter(label(row.verdict) for row in rows if row.standing == "known")
    parts = [f"{number[name]} {name}" + (f" ({known[name]} known)" if known[name] else "") for name in LABELS]
    return ", ".join(part for part, name in zip(parts, LABELS, strict=True) if number[name])


def label(verdict: Verdict) -> str:
    """Return the verdict in a word or two: a model that TP silently left whole is `not sharded`."""
    first = next(iter(verdict.findings), None)
    left_whole = first is not None and first.check == "parameters_are_sharded" and first.cause == Cause.NOT_SHARDED.slug
    return NOT_SHARDED if left_whole else verdict.verdict


def configuration(subject: Mapping[str, Any]) -> str:
    """Return what tells the cells of one family apart: `deepspeed, tp=2, zero=1`."""
    dtype = subject.get("dtype", "float64")
    return ", ".join([*words.layout(subject), *([str(dtype)] if dtype != "float64" else [])])


def gist(verdict: Verdict) -> str:
    """Return the first thing to know about a verdict."""
    if verdict.findings:
        first = verdict.findings[0]
        return f"{first.check}  {place(first)}" + (f"  {first.cause}" if first.cause else "")
    if verdict.message:
        lines = [line.strip() for line in verdict.message.splitlines() if line.strip()]
        return shorten(lines[0], _MESSAGE_WIDTH, placeholder=" ...") if lines else ""
    worst = max((check for check in verdict.checks if check.compared), key=lambda c: c.worst_margin, default=None)
    return "" if worst is None else f"worst margin {words.margin(worst.worst_margin)}  {worst.check}"


def surprise(row: Judged) -> str:
    """Return the sentence of a cell that the register did not expect."""
    name = f"{words.name(row.verdict.subject)} ({configuration(row.verdict.subject)})"
    if row.standing == "gone":
        assert row.bug is not None
        return (
            f"{name} passed, and {row.bug.name} is registered for these versions: {row.bug.what} "
            f"If it is mended, say so in the versions of {_REGISTER}."
        )
    if row.bug is not None:
        return f"{name}: {label(row.verdict)}, otherwise than {row.bug.name} in {_REGISTER} says: {row.bug.what}"
    return f"{name}: {label(row.verdict)}, and no entry of {_REGISTER} says so"


def _standing(row: Judged) -> str:
    return f"known: {row.bug.name}" if row.standing == "known" and row.bug else row.standing


_IN_TABLES = str.maketrans({"|": "\\|", "\n": " ", "<": "&lt;", ">": "&gt;"})


def matrix_markdown(rows: Sequence[Judged]) -> str:
    """Return what a CI server shows beside a job: counts, what is unexpected, and what did not pass."""
    lines = ["### tpcheck", "", f"{counts(rows)}", ""]
    lines += [f"- **{row.standing}** {_cell(surprise(row))}" for row in rows if row.standing in ("new", "gone")]
    told = [row for row in rows if row.verdict.verdict != "passed" or row.standing]
    if told:
        lines += ["", "| family | configuration | verdict | |", "| --- | --- | --- | --- |", *map(_told_row, told)]
    return "\n".join([*lines, "", f"{versions(rows)}", ""]) + "\n"


def families_markdown(rows: Sequence[Judged]) -> Iterator[str]:
    """Yield the lines of a table with a row for each family and a column for each configuration."""
    columns = list(dict.fromkeys(configuration(row.verdict.subject) for row in rows))
    by_family: dict[str, dict[str, Judged]] = {}
    for row in rows:
        by_family.setdefault(words.name(row.verdict.subject), {})[configuration(row.verdict.subject)] = row
    yield "| family | " + " | ".join(columns) + " |"
    yield "| --- |" + " --- |" * len(columns)
    for family, cells in by_family.items():
        yield f"| {family} | " + " | ".join(_short(cells.get(column)) for column in columns) + " |"


def versions(rows: Sequence[Judged]) -> str:
    """Return the versions of all rows in a line: `torch 2.13.0, transformers 5.23.0`."""
    found: dict[str, set[str]] = {}
    for row in rows:
        for package, number in row.verdict.environment.items():
            found.setdefault(package, set()).add(number)
    return ", ".join(f"{package} {' and '.join(sorted(numbers))}" for package, numbers in sorted(found.items()))


def _short(row: Judged | None) -> str:
    if row is None:
        return ""
    text = label(row.verdict)
    sign = f"{SIGNS[text]} {text}"
    if row.verdict.verdict == "passed":
        return sign
    named = f" ({row.bug.name})" if row.standing == "known" and row.bug is not None else ""
    if row.verdict.findings:
        first = row.verdict.findings[0]
        return _cell(f"{sign}{named}: {first.cause or first.check}")
    return _cell(f"{sign}{named}") if named else _cell(f"{sign}: {gist(row.verdict)}")


def _told_row(row: Judged) -> str:
    subject: Mapping[str, object] = row.verdict.subject
    text = label(row.verdict)
    standing = f", {row.standing}" if row.standing else ""
    return (
        f"| {_cell(words.name(subject))} | {_cell(configuration(subject))} | {SIGNS[text]} {text}{standing} "
        f"| {_cell(gist(row.verdict))} |"
    )


def _cell(text: str) -> str:
    return text.translate(_IN_TABLES)


_FINDINGS_SHOWN = 5


@dataclass(frozen=True, slots=True)
class _Cell:
    """What the page shows of one cell.

    Attributes:
        label, sign: The verdict as a word, and as a sign beside its colour.
        standing: What the register of known bugs says, in a word.
        short: The first thing to know, in a few words.
        backend: What sharded the model, for the filter.
        text: The whole report.
        index: The number of its column.
    """

    label: str
    sign: str
    standing: str
    short: str
    backend: str
    text: str
    index: int


def matrix_html(rows: Sequence[Judged]) -> str:
    """Return the page; filters by family, verdict and backend are a few lines of JavaScript inside."""

    columns = list(dict.fromkeys(configuration(row.verdict.subject) for row in rows))
    families: dict[str, list[_Cell | None]] = {}
    for row in rows:
        index = columns.index(configuration(row.verdict.subject))
        cells = families.setdefault(words.name(row.verdict.subject), [None] * len(columns))
        cells[index] = _html_cell(row, index)
    number = {name: sum(label(row.verdict) == name for row in rows) for name in LABELS}
    return page(
        "matrix.html",
        columns=columns,
        families=families,
        counts=counts(rows),
        labels=[(name, SIGNS[name], number[name]) for name in LABELS if number[name]],
        backends=sorted({str(row.verdict.subject.get("backend", "")) for row in rows}),
        versions=versions(rows),
        seconds=sum(row.verdict.seconds for row in rows),
        unexpected=sum(row.standing in ("new", "gone") for row in rows),
    )


def _html_cell(row: Judged, index: int) -> _Cell:
    lines = [*verdict_lines(row.verdict, findings_shown=_FINDINGS_SHOWN), *standing_lines(row)]
    subject: Any = row.verdict.subject
    text = label(row.verdict)
    return _Cell(
        text, SIGNS[text], row.standing, _html_short(row), str(subject.get("backend", "")), as_text(lines), index
    )


def _html_short(row: Judged) -> str:
    if row.verdict.findings:
        first = row.verdict.findings[0]
        return first.cause or first.check
    return gist(row.verdict).removeprefix("worst ").split("  ")[0]


GONE = "known_bug_shows"  # the test case of a bug that does not


def matrix_junit(rows: Sequence[Judged]) -> str:
    """Return an XML document that CI servers read."""
    return as_junit(_as_told(row) for row in rows)


def _as_told(row: Judged) -> Verdict:
    verdict = row.verdict
    if row.standing == "known" and row.bug is not None:
        message = f"known upstream bug {row.bug.name}: {row.bug.what}"
        return replace(verdict, verdict="skipped", findings=(), checks=(), message=message)
    if row.standing == "gone":
        finding = Finding(GONE, {"field": surprise(row)}, observed=1.0, allowed=0.0)
        return replace(verdict, verdict="failed", findings=(finding,))
    return verdict


def table_lines(path: Path) -> Iterator[Line]:
    """Yield a page of Markdown: what was run, how it went by configuration, every family, and the known bugs.

    Raises:
        UsageError: The file holds no verdicts.
    """
    rows = [judged(verdict) for verdict in stored_verdicts(path)]
    if not rows:
        raise UsageError("table", str(path), "a file that `tpcheck verify --json` has written")
    return (plain(line) for line in _page(rows, path))


def _page(rows: Sequence[Judged], path: Path) -> Iterator[str]:
    yield from ["# What works, by family", ""]
    yield f"Made with `tpcheck families --table {path}` from what `tpcheck verify --all --json {path}` wrote"
    yield from [f"({versions(rows)}).", ""]
    for name in dict.fromkeys(configuration(row.verdict.subject) for row in rows if row.verdict.subject.get("tp")):
        own = [row for row in rows if configuration(row.verdict.subject) == name]
        yield f"- {name}: {len(own)} families, {counts(own)}"
    yield from ["", "A name in brackets is that of a known bug, below.", ""]
    yield from families_markdown(rows)
    yield from ["", "## Known upstream bugs", ""]
    for bug in register():
        yield from _entry(bug)


def _entry(bug: KnownBug) -> Iterator[str]:
    silent = "silent" if bug.verdict == "failed" else "loud"
    see = [*([f"[reported]({bug.link})"] if bug.link else []), *([f"`{bug.script}` shows it"] if bug.script else [])]
    yield f"- **{bug.name}** ({silent}; {bug.backend}): {bug.what} `{bug.again}`" + (
        f"; {', '.join(see)}" if see else ""
    )
