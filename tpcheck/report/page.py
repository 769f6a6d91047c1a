"""What pages share: their frame, rows of trees, findings as lists of terms, what was not compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tpcheck.core.findings import Coverage, Finding, Verdict
from tpcheck.report import words
from tpcheck.report.charts import shortened
from tpcheck.report.findings import finding_lines, place
from tpcheck.report.table import Cell, Table
from tpcheck.report.words import as_text

LONGEST_TEXT = 12_000  # characters of a finding or a message
_MOST_REASONS, _MOST_NAMES = 40, 20  # of what was not compared


def frame(verdict: Verdict, checks: Table) -> dict[str, Any]:
    """Return what a page about one report says around its contents, as `page_layout.html` takes it."""
    return {
        "verdict": verdict.verdict,
        "message": (verdict.message or "").strip()[:LONGEST_TEXT],
        "checks": checks,
        "coverage": coverage_text(verdict.coverage),
        "not_compared": list(_not_compared(verdict.coverage)),
        "environment": verdict.environment,
        "seconds": f"{verdict.seconds:.1f}",
    }


@dataclass(frozen=True, slots=True)
class TreeRow:
    """A row of a tree.

    Attributes:
        level: How far it is from the root.
        name, path: Its last part, and all of it.
        look: Class of the row.
        cells: Of the columns after the first.
        has_children: Whether rows of higher levels follow.
        is_open: Whether those are shown at first.
        is_pointed: Whether the row is the first wrong one.
    """

    level: int
    name: str
    path: str
    look: str
    cells: tuple[Cell, ...]
    has_children: bool = False
    is_open: bool = True
    is_pointed: bool = False


@dataclass(frozen=True, slots=True)
class ShownFinding:
    """A finding as a page lists it: its check, its place, the moment of the run, and its lines by label."""

    check: str
    place: str
    moment: str
    lines: tuple[tuple[str, str], ...]


def shown_finding(finding: Finding, subject: Mapping[str, Any]) -> ShownFinding:
    """Return a finding with the lines that a terminal shows, by label."""
    lines: list[tuple[str, str]] = []
    for line in list(finding_lines(finding, subject))[1:]:  # the first has check and place
        label, text = line.spans[-2][0].strip(), line.spans[-1][0]
        if label:
            lines.append((label, text[:LONGEST_TEXT]))
        else:
            lines[-1] = lines[-1][0], f"{lines[-1][1]}\n{text}"[:LONGEST_TEXT]
    return ShownFinding(finding.check, shortened(place(finding), 300), words.phase(finding.where), tuple(lines))


def finding_text(finding: Finding, verdict: Verdict) -> str:
    """Return a finding as in the terminal, cut where it is very long."""
    text = as_text(finding_lines(finding, verdict.subject))
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "… (--json has all of it)"


def _not_compared(coverage: Coverage) -> Iterator[tuple[str, str]]:
    """Yield each reason why something was not compared, with the names of what was not."""
    missed = sorted(coverage.not_compared.items(), key=lambda item: (item[1], item[0]))
    groups = [(why, [shortened(name) for name, _ in group]) for why, group in groupby(missed, key=lambda item: item[1])]
    for why, names in groups[:_MOST_REASONS]:
        yield shortened(why, 600), words.join_truncated(names, _MOST_NAMES)
    if len(groups) > _MOST_REASONS:
        yield f"{len(groups) - _MOST_REASONS} more reasons", "--json has them"


def first_place(first: Finding) -> str:
    """Return where the first finding is, when, on which ranks, and its likely cause."""
    ranks = words.ranks_at(first.where) if first.where.get("ranks") else ""
    at = ", ".join(part for part in (words.phase(first.where), ranks) if part)
    cause = f"; likely cause: {first.cause}" if first.cause else ""
    return f"First wrong place: {shortened(place(first))}" + (f" ({at})" if at else "") + cause


def coverage_text(coverage: Coverage) -> str:
    """Return how many tensors were compared."""
    return f"{coverage.compared} of {words.pluralize(coverage.total, 'tensor')} compared"
