"""One model of a table, and a renderer for each format: text, Markdown, HTML, JUnit, JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal
from xml.etree import ElementTree as ET

from tpcheck.report.templates import render
from tpcheck.report.words import Line, labelled, plain

GAP = "  "  # between columns
Outcome = Literal["passed", "failure", "error", "skipped"]  # as JUnit names them


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell: a text with a rich style, empty for none, and a link to a web page."""

    text: str
    style: str = ""
    link: str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        title: Its heading in Markdown and HTML, and in text where the table has a heading.
        right: Whether it is aligned to the right.
        width: Its least width in text.
    """

    title: str
    right: bool = False
    width: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One row.

    Attributes:
        cells: One for each column; none where it is a case of JUnit alone.
        name: Its name in JUnit.
        group: The heading that it is listed under; rows of one group are adjacent.
        notes: Lines below the row.
        outcome: How it counts in JUnit, and in the filter of the page.
        message: Why it has not passed.
        details: A longer text that the page shows on demand.
        seconds: Wall time, where it is known.
        is_expected: Whether the page may hide it.
    """

    cells: tuple[Cell, ...] = ()
    name: str = ""
    group: str = ""
    notes: tuple[Line, ...] = ()
    outcome: Outcome = "passed"
    message: str = ""
    details: str = ""
    seconds: float | None = None
    is_expected: bool = True


@dataclass(frozen=True, slots=True)
class Table:
    """A table.

    Attributes:
        columns: Its columns.
        rows: Its rows, those of one group together.
        title: What it shows.
        totals: What it comes to: a label, and a text with its style.
        has_heading: Whether the text begins with the titles of the columns.
        indent: How many spaces precede a row in text.
    """

    columns: tuple[Column, ...]
    rows: tuple[Row, ...] = ()
    title: str = ""
    totals: tuple[tuple[str, Cell], ...] = ()
    has_heading: bool = False
    indent: int = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of each column in text; 0 for a column that is empty in every row."""
        texts = list(zip(*([cell.text for cell in row.cells] for row in self.rows), strict=True))
        widths = []
        for number, column in enumerate(self.columns):
            longest = max(map(len, texts[number]), default=0) if texts else 0
            heading = len(column.title) if self.has_heading and longest else 0
            widths.append(max(longest, heading, column.width if longest else 0))
        return tuple(widths)


def row_line(row: Row, columns: Sequence[Column], widths: Sequence[int], indent: int) -> Line:
    """Return a row as a line of text, each cell padded to the width of its column; columns of width 0 are left out."""
    spans = [(" " * indent, "")] if indent else []
    visible = [number for number, width in enumerate(widths) if width]
    for number in visible:
        cell, width = row.cells[number], widths[number]
        gap = GAP if number != visible[0] else ""
        padded = f"{cell.text:>{width}}" if columns[number].right else f"{cell.text:<{width}}"
        spans.append((gap + (padded if number != visible[-1] or columns[number].right else cell.text), cell.style))
    return Line(tuple(spans))


def table_lines(table: Table) -> Iterator[Line]:
    """Yield the heading, the rows with their notes below their groups, and the totals; an empty line between groups."""
    widths = table.widths
    if table.has_heading:
        heading = Row(tuple(Cell(column.title, "dim") for column in table.columns))
        yield row_line(heading, table.columns, widths, table.indent)
    for number, (group, rows) in enumerate(groupby(table.rows, key=lambda row: row.group)):
        if number:
            yield Line()
        if group:
            yield plain(group, "bold")
        for row in rows:
            yield row_line(row, table.columns, widths, table.indent)
            yield from row.notes
    for label, cell in table.totals:
        yield from labelled(label, cell.text, cell.style)


_IN_MARKDOWN = str.maketrans({"|": "\\|", "\n": " ", "<": "&lt;", ">": "&gt;"})


def markdown_text(text: str) -> str:
    """Return text that Markdown shows unchanged in a cell."""
    return text.translate(_IN_MARKDOWN)


def table_markdown(table: Table) -> Iterator[str]:
    """Yield the lines of a Markdown table; a link becomes one, groups, notes and details are left out."""
    yield f"| {' | '.join(column.title for column in table.columns)} |"
    yield f"| {' | '.join('---:' if column.right else '---' for column in table.columns)} |"
    for row in table.rows:
        cells = (f"[{markdown_text(cell.text)}]({cell.link})" if _is_web(cell.link) else markdown_text(cell.text)
                 for cell in row.cells)  # fmt: skip
        yield f"| {' | '.join(cells)} |"


def _is_web(link: str | None) -> bool:
    return link is not None and link.startswith("https://")


_OPEN_DETAILS = 3  # a page with no more than this many reports shows them opened


def tables_html(title: str, subtitle: str, tables: Sequence[Table]) -> str:
    """Return one page that needs no other file: totals, filters, rows whose details open, links to web pages."""
    details = [row.details for table in tables for row in table.rows if row.details]
    return render(
        "table.html",
        title=title,
        subtitle=subtitle,
        tables=tables,
        groupby=groupby,
        group_of=lambda row: row.group,
        is_web=_is_web,
        is_short=len(details) <= _OPEN_DETAILS,
    )


# XML 1.0 cannot represent other control characters, such as the colours in a backend's message.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit_xml(suites: Iterable[tuple[str, float, Sequence[Row]]], name: str = "tpcheck") -> str:
    """Return an XML document that CI servers read, of suites: their name, their seconds, a row for each case."""
    root = ET.Element("testsuites", name=name)
    for suite_name, seconds, cases in suites:
        counts = {
            outcome: sum(case.outcome == outcome for case in cases) for outcome in ("failure", "error", "skipped")
        }
        suite = ET.SubElement(
            root,
            "testsuite",
            name=_xml(suite_name),
            tests=str(len(cases)),
            failures=str(counts["failure"]),
            errors=str(counts["error"]),
            skipped=str(counts["skipped"]),
            time=f"{seconds:.3f}",
        )
        for case in cases:
            element = ET.SubElement(suite, "testcase", classname=_xml(suite_name), name=_xml(case.name))
            if case.seconds is not None:
                element.set("time", f"{case.seconds:.3f}")
            if case.outcome != "passed":
                ET.SubElement(element, case.outcome, message=_xml(case.message)).text = _xml(case.details) or None
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _xml(text: str) -> str:
    return _NOT_XML.sub("?", text)


def table_suites(table: Table) -> Iterator[tuple[str, float, Sequence[Row]]]:
    """Yield the groups of a table as suites of JUnit, with a case for each row."""
    for group, rows in groupby(table.rows, key=lambda row: row.group):
        cases = list(rows)
        yield group, sum(case.seconds or 0.0 for case in cases), cases


def rows_json(head: Mapping[str, Any], **rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a JSON document of single values, one a line, then lists of rows, one row a line."""
    parts = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in head.items()]
    for key, listed in rows.items():
        lines = ",\n".join(json.dumps(row, allow_nan=False) for row in listed)
        parts.append(f"{json.dumps(key)}: [\n{lines}\n]" if listed else f"{json.dumps(key)}: []")
    return "{\n" + ",\n".join(parts) + "\n}\n"
