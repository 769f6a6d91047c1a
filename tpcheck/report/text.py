"""A verdict as text: its subject, its findings, every check that ran, and the tensors that were not compared."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby

from tpcheck.core.findings import Coverage, Finding, Verdict
from tpcheck.report import checkpoints, words
from tpcheck.report.findings import finding_lines, is_consequence
from tpcheck.report.table import Cell, Column, Outcome, Row, Table, table_lines
from tpcheck.report.words import Line, labelled, plain

FINDINGS_SHOWN = 5
_NAMES_SHOWN = 3
STYLES = {"passed": "bold green", "failed": "bold red", "error": "bold magenta", "skipped": "bold yellow"}
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours of a backend's message, which an issue cannot show
_MESSAGE_HEADS = {"error": "The system under test crashed. Its own message:", "skipped": "Nothing was run:"}


def verdict_lines(verdict: Verdict, *, findings_shown: int | None = FINDINGS_SHOWN) -> Iterator[Line]:
    """Yield the lines of a verdict; `findings_shown` None shows all of them."""
    yield head_line(verdict)
    if verdict.message:
        yield from _message(verdict)
    yield from checkpoints.explanation_lines(verdict)
    shown = _most_severe(verdict.findings, findings_shown)
    for finding in shown:
        yield Line()
        yield from finding_lines(finding, verdict.subject)
    rest = len(verdict.findings) - len(shown)
    if rest:
        yield Line()
        yield plain(f"and {rest} more; --json has them all", "dim")
    if verdict.checks:
        yield Line()
        yield from table_lines(checks_table(verdict))
    yield Line()
    yield from _foot(verdict)


def head_line(verdict: Verdict) -> Line:
    """Return the verdict, the subject and its options."""
    options = ", ".join(words.options(verdict.subject))
    return Line(
        (
            (verdict.verdict, STYLES[verdict.verdict]),
            (f"  {words.name(verdict.subject)}", "bold"),
            (f"  {options}", ""),
        )
    )


def _message(verdict: Verdict) -> Iterator[Line]:
    yield Line()
    yield plain(_MESSAGE_HEADS.get(verdict.verdict, "Note:"))
    for line in _ANSI.sub("", verdict.message or "").strip("\n").splitlines():
        yield plain(f"  {line}")


def _most_severe(findings: Sequence[Finding], number: int | None) -> list[Finding]:
    """Return at most `number` findings: before others the first of each check, last those that follow from another."""
    stories = checkpoints.group_by_explanation(findings)
    of_stories = {id(group[0]) for group in stories}
    number = len(stories) if stories and number is not None else number
    seen: set[str] = set()
    ranks = []
    for finding in findings:
        repeated = finding.check in seen and id(finding) not in of_stories
        ranks.append((is_consequence(finding), repeated))
        seen.add(finding.check)
    order = sorted(range(len(findings)), key=lambda index: ranks[index])
    return [findings[index] for index in sorted(order[:number])]


def checks_table(verdict: Verdict) -> Table:
    """Return the table of every check that ran."""
    columns = ("check", False), ("verdict", False), ("compared", True), ("worst margin", True), ("at", False)
    rows = []
    for check in verdict.checks:
        margins = [finding.margin for finding in verdict.findings if finding.check == check.check]
        name, style = ("failed", "red") if margins else ("passed", "green")
        if not check.compared and not margins:
            name, style = "nothing", "yellow"  # a check with nothing to compare has not passed
        margin = words.margin(max(check.worst_margin, *margins, 0.0)) if check.compared else ""
        cells = (
            Cell(check.check),
            Cell(name, style),
            Cell(f"{check.compared}"),
            Cell(margin),
            Cell(check.worst_at or ""),
        )
        outcome: Outcome = "failure" if margins else "passed" if check.compared else "skipped"
        rows.append(Row(cells, outcome=outcome, is_expected=not margins))
    return Table(tuple(Column(*column) for column in columns), tuple(rows), title="Checks", has_heading=True, indent=2)


def _foot(verdict: Verdict) -> Iterator[Line]:
    if verdict.coverage.total:
        yield from labelled("coverage", "\n".join(_coverage(verdict.coverage)))
    versions = ", ".join(f"{package} {version}" for package, version in sorted(verdict.environment.items()))
    if versions:
        yield from labelled("versions", versions)
    yield from labelled("seconds", f"{verdict.seconds:.1f}")


def _coverage(coverage: Coverage) -> Iterator[str]:
    yield f"{coverage.compared} of {words.pluralize(coverage.total, 'tensor')} compared"
    missed = sorted(coverage.not_compared.items(), key=lambda item: (item[1], item[0]))
    for reason, group in groupby(missed, key=lambda item: item[1]):
        yield f"not compared, {reason}: {words.join_truncated([name for name, _ in group], _NAMES_SHOWN)}"
