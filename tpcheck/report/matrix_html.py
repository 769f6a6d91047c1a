"""Many verdicts as one HTML page that needs nothing else: a row for each family, a cell for each configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tpcheck.families.upstream import Judged
from tpcheck.report import words
from tpcheck.report.lines import as_text
from tpcheck.report.matrix import LABELS, SIGNS, configuration, counts, gist, label, standing_lines
from tpcheck.report.matrix_markdown import versions
from tpcheck.report.pages import page
from tpcheck.report.text import verdict_lines

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
        cells[index] = _cell(row, index)
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


def _cell(row: Judged, index: int) -> _Cell:
    lines = [*verdict_lines(row.verdict, findings_shown=_FINDINGS_SHOWN), *standing_lines(row)]
    subject: Any = row.verdict.subject
    text = label(row.verdict)
    return _Cell(text, SIGNS[text], row.standing, _short(row), str(subject.get("backend", "")), as_text(lines), index)


def _short(row: Judged) -> str:
    if row.verdict.findings:
        first = row.verdict.findings[0]
        return first.cause or first.check
    return gist(row.verdict).removeprefix("worst ").split("  ")[0]
