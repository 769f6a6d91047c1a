"""The page of what works, by family (`docs/families.md`), from the files of one or several matrices.

It has a column for each backend, in the first layout of that backend in the files; what differs under other layouts is
listed below it, so that the page stays readable with many of them. Loads no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tpcheck.core.errors import UsageError
from tpcheck.lab.known import JudgedVerdict, KnownBug, judge, register
from tpcheck.lab.matrix import LABELS, SIGNS, configuration, label, stored_verdicts, summary_line, versions_line
from tpcheck.report import words
from tpcheck.report.table import Cell, Column, Row, Table, table_markdown
from tpcheck.report.words import Line, plain


def families_page(paths: Sequence[Path]) -> Iterator[Line]:
    """Yield a page of Markdown: counts by layout, every family, where layouts differ, and the known bugs.

    Args:
        paths: Files of verdicts. The first layout of a backend in them is that of its column.

    Raises:
        UsageError: A file contains no verdicts.
    """
    rows: list[JudgedVerdict] = []
    for path in paths:
        in_file = [judge(verdict) for verdict in stored_verdicts(path) if "backend" in verdict.subject]
        if not in_file:
            raise UsageError("table", str(path), "a file that `tpcheck verify --json` has written")
        rows += in_file
    return (plain(line) for line in _page(rows))


def _page(rows: Sequence[JudgedVerdict]) -> Iterator[str]:
    yield from ["# What works, by family", ""]
    yield "Made with `tpcheck families --table FILE` from the files of `tpcheck verify --all --json FILE`, one for each"
    yield from [f"backend and layout ({versions_line(rows)}).", ""]
    yield from table_markdown(counts_table(rows))
    yield from ["", "In parentheses: how many of them the register of known bugs expects.", ""]
    yield from ["## Every family", ""]
    yield "A name in parentheses is that of a known bug, below. A failure or an error without one"
    yield from ["has not been explained yet: it may be the backend's or tpcheck's.", ""]
    yield from table_markdown(families_table(rows))
    differences = differences_table(rows)
    if differences.rows:
        yield from ["", "## Where another layout differs", ""]
        yield from ["Verdicts unlike those above. What was run and is not listed has the verdict above.", ""]
        yield from table_markdown(differences)
    if partial := list(partly_run(rows)):
        yield from ["", "## What was not run", "", *partial]
    yield from ["", "## Known upstream bugs", ""]
    for bug in register():
        yield _entry(bug)


def counts_table(rows: Sequence[JudgedVerdict]) -> Table:
    """Return a table with a row for each backend and layout, and a column for each verdict."""
    number = Counter((_backend(row), _layout(row), label(row.verdict)) for row in rows)
    known = Counter((_backend(row), _layout(row), label(row.verdict)) for row in rows if row.standing == "known")

    def cells(backend: str, layout: str) -> Iterator[str]:
        yield from (backend, layout, str(sum(number[backend, layout, name] for name in LABELS)))
        for name in LABELS:
            expected = known[backend, layout, name]
            yield f"{number[backend, layout, name]}" + (f" ({expected})" if expected else "")

    return Table(
        tuple(map(Column, ("backend", "layout", "families", *LABELS))),
        tuple(
            Row(tuple(map(Cell, cells(backend, layout))))
            for backend, layouts in _layouts(rows).items()
            for layout in layouts
        ),
    )


def families_table(rows: Sequence[JudgedVerdict]) -> Table:
    """Return a table with a row for each family, and a column for each backend under the first of its layouts."""
    columns = [(backend, layouts[0]) for backend, layouts in _layouts(rows).items()]
    verdicts = _by_family(rows)
    return Table(
        (Column("family"), *(Column(f"{backend}, {layout}") for backend, layout in columns)),
        tuple(
            Row((Cell(family), *(Cell(_short(of_family.get(column))) for column in columns)))
            for family, of_family in verdicts.items()
        ),
    )


def differences_table(rows: Sequence[JudgedVerdict]) -> Table:
    """Return a table of verdicts unlike that of the same family and backend under the first layout of the backend.

    Layouts with one verdict share a row.
    """
    found = []
    for family, of_family in _by_family(rows).items():
        for backend, (first, *others) in _layouts(rows).items():
            usual = _short(of_family.get((backend, first)))
            layouts_of: dict[str, list[str]] = {}
            for layout in others:
                verdict = _short(of_family.get((backend, layout)))
                if verdict and verdict != usual:
                    layouts_of.setdefault(verdict, []).append(layout)
            found += [(family, backend, "; ".join(layouts), text) for text, layouts in layouts_of.items()]
    columns = Column("family"), Column("backend"), Column("layouts"), Column("verdict there")
    return Table(columns, tuple(Row(tuple(map(Cell, texts))) for texts in found))


def partly_run(rows: Sequence[JudgedVerdict]) -> Iterator[str]:
    """Yield for each layout that was not run for every family a line with those that it was run for, or was not."""
    by_family = _by_family(rows)
    for backend, layouts in _layouts(rows).items():
        for layout in layouts:
            run = [family for family, of_family in by_family.items() if (backend, layout) in of_family]
            others = [family for family in by_family if family not in run]
            if others:
                names = f"for {', '.join(run)}" if len(run) < len(others) else f"for all but {', '.join(others)}"
                yield f"- {backend}, {layout}: run {names}."


def _by_family(rows: Sequence[JudgedVerdict]) -> dict[str, dict[tuple[str, str], JudgedVerdict]]:
    by_family: dict[str, dict[tuple[str, str], JudgedVerdict]] = {}
    for row in rows:
        by_family.setdefault(words.name(row.verdict.subject), {})[_backend(row), _layout(row)] = row
    return by_family


def _layouts(rows: Sequence[JudgedVerdict]) -> dict[str, list[str]]:
    """Return the layouts of each backend, in the order of the rows."""
    layouts: dict[str, dict[str, None]] = {}
    for row in rows:
        layouts.setdefault(_backend(row), {})[_layout(row)] = None
    return {backend: list(of_backend) for backend, of_backend in layouts.items()}


def _backend(row: JudgedVerdict) -> str:
    return str(row.verdict.subject["backend"])


def _layout(row: JudgedVerdict) -> str:
    return configuration(row.verdict.subject).removeprefix(f"{_backend(row)}, ")


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


def _entry(bug: KnownBug) -> str:
    silent = "silent" if bug.verdict == "failed" else "loud"
    see = [*([f"[reported]({bug.link})"] if bug.link else []), *([f"`{bug.script}` shows it"] if bug.script else [])]
    shown = f"- **{bug.name}** ({silent}; {bug.backend}): {bug.what} `{bug.again}`"
    return f"{shown}; {', '.join(see)}" if see else shown
