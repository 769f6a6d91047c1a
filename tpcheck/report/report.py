"""The report of one run: as text, JSON, JUnit and on a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tpcheck.core.causes import guide_of
from tpcheck.core.errors import BackendError, InternalError, Mismatch
from tpcheck.core.findings import CheckResult, Coverage, Finding, Verdict
from tpcheck.core.guides import Guide
from tpcheck.report import checkpoints, words
from tpcheck.report.checkpoint_page import StoredTensors, checkpoint_page
from tpcheck.report.findings import finding_lines, is_consequence, place
from tpcheck.report.json_values import json_text, verdict_json
from tpcheck.report.model_tree import model_table
from tpcheck.report.run_page import picture_json, run_page
from tpcheck.report.run_picture import RunComparison
from tpcheck.report.table import Cell, Column, Outcome, Row, Table, junit_xml, table_lines
from tpcheck.report.verdict_page import verdict_page
from tpcheck.report.words import Line, as_rich, as_text, labelled, plain

if TYPE_CHECKING:
    from rich.text import Text


FINDINGS_SHOWN = 5
_NAMES_SHOWN = 3
_WIDTH = 108  # of text beside a label
STYLES = {"passed": "bold green", "failed": "bold red", "error": "bold magenta", "skipped": "bold yellow"}
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colours of a backend's message, which an issue cannot show
_MESSAGE_HEADS = {"error": "The system under test crashed. Its own message:", "skipped": "Nothing was run:"}
_UNDECIDED_HEAD = "Nothing is claimed:"  # of what was compared


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a run.

    Example:
        >>> report = Report(Verdict("skipped", {"family": "llama"}, {}, message="two ranks need two GPUs"))
        >>> report.passed, report.findings
        (False, ())
        >>> print(report.to_text(), end="")
        skipped  llama
        <BLANKLINE>
        Nothing was run:
          two ranks need two GPUs
        <BLANKLINE>
          seconds   0.0
    """

    verdict: Verdict
    picture: RunComparison | StoredTensors | None = None  # of two recorded runs, or of two checkpoints

    @property
    def passed(self) -> bool:
        """Whether every check ran and agreed; a skipped run has not passed."""
        return self.verdict.verdict == "passed"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What differs, in the order of the checks; empty where all agree, and where nothing could be compared."""
        return self.verdict.findings

    def to_text(self, *, findings: int | None = FINDINGS_SHOWN) -> str:
        """Return plain text for an issue, with at most `findings` findings; None shows all."""
        return as_text(verdict_lines(self.verdict, findings_shown=findings))

    def to_line(self, *, printed_on: int) -> str:
        """Return the first finding in one line, for a rank that leaves the whole report to another one."""
        first = self.findings[0]
        step = first.where.get("step")
        parts = [
            f"{first.check} {place(first)}".strip(),
            *([] if step is None else [f"at step {step}"]),
            *([f"on {words.ranks_at(first.where)}"] if first.where.get("ranks") else []),
            f"({first.cause or 'cause unknown'})",
        ]
        more = "" if len(self.findings) == 1 else f", and {len(self.findings) - 1} more"
        return f"tpcheck: {' '.join(parts)}{more}; rank {printed_on} prints the report"

    def to_data(self) -> dict[str, Any]:
        """Return the report as plain JSON values, schema 1."""
        data = verdict_json(self.verdict)
        if not isinstance(self.picture, RunComparison):
            return data
        return {**data, "picture": picture_json(self.verdict, self.picture)}

    def to_json(self) -> str:
        """Return the report as a JSON text, schema 1."""
        return json_text(self.to_data()) + "\n"

    def to_junit(self) -> str:
        """Return the report as JUnit XML, one test case for each check."""
        return as_junit([self.verdict])

    def to_html(self, *, upstream: str = "") -> str:
        """Return one HTML page that needs no other file: findings, the model as a tree, checks, coverage.

        Args:
            upstream: What the register of known upstream bugs says of the run, to be shown below the verdict.
        """
        checks = _checks_table(self.verdict)
        if isinstance(self.picture, RunComparison):
            return run_page(self.verdict, self.picture, checks)
        if self.picture is not None:
            return checkpoint_page(self.verdict, self.picture, checks)
        return verdict_page(self.verdict, checks, upstream)

    def raise_if_failed(self) -> None:
        """Raise an error unless the run passed or was skipped.

        Raises:
            Mismatch: A check failed.
            BackendError: The system under test crashed.
            InternalError: tpcheck itself failed.
        """
        if self.verdict.verdict == "failed":
            raise Mismatch(self.to_text(), self)
        if self.verdict.verdict == "error":
            raise (InternalError if self.verdict.is_internal_error else BackendError)(self.to_text())

    def __str__(self) -> str:
        return self.to_text()

    def __rich__(self) -> Text:
        return as_rich(verdict_lines(self.verdict))


def verdict_lines(verdict: Verdict, *, findings_shown: int | None = FINDINGS_SHOWN) -> Iterator[Line]:
    """Yield the lines of a verdict; `findings_shown` None shows all of them."""
    yield _head_line(verdict)
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
        yield from table_lines(_checks_table(verdict))
    model = model_table(verdict)
    if model.rows:
        yield Line()
        yield from table_lines(model)
    yield Line()
    yield from _foot(verdict, shown)


def _head_line(verdict: Verdict) -> Line:
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
    is_undecided = verdict.verdict == "skipped" and bool(verdict.checks)
    lines = _ANSI.sub("", verdict.message or "").strip("\n").splitlines()
    if verdict.is_internal_error:
        yield plain(lines.pop(0))
    else:
        yield plain(_UNDECIDED_HEAD if is_undecided else _MESSAGE_HEADS.get(verdict.verdict, "Note:"))
    for line in lines:
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


def _checks_table(verdict: Verdict) -> Table:
    """Return the table of every check that ran."""
    columns = ("check", False), ("verdict", False), ("compared", True), ("worst margin", True), ("at", False)
    rows = []
    for check in verdict.checks:
        margins = [finding.margin for finding in verdict.findings if finding.check == check.check]
        name, style = ("failed", "red") if margins else ("passed", "green")
        if not check.says_something and not margins:
            name, style = "nothing", "yellow"  # a check with nothing to compare has not passed
        elif _only_follows(check, verdict):
            name, style = "follows", "yellow"
        margin = words.margin(max(check.worst_margin, *margins, 0.0)) if check.compared else ""
        cells = (
            Cell(check.check),
            Cell(name, style),
            Cell(f"{check.compared}"),
            Cell(margin),
            Cell(_beside(check) or check.worst_at or ""),
        )
        passed = check.says_something and not _only_follows(check, verdict)
        outcome: Outcome = "failure" if margins else "passed" if passed else "skipped"
        rows.append(Row(cells, outcome=outcome, is_expected=not margins))
    return Table(tuple(Column(*column) for column in columns), tuple(rows), title="Checks", has_heading=True, indent=2)


def _beside(check: CheckResult) -> str:
    """Return what alone was compared, where nothing was of what the check is about."""
    return f"{check.compared_only} alone" if check.compared_only else ""


def _only_follows(check: CheckResult, verdict: Verdict) -> bool:
    """Return whether a check differs without a finding of its own: another check's covers what it saw."""
    return check.worst_margin > 1 and all(finding.check != check.check for finding in verdict.findings)


def _foot(verdict: Verdict, findings: Sequence[Finding]) -> Iterator[Line]:
    for label, text in words.target_facts(verdict.subject, verdict.notes):
        yield from labelled(label, textwrap.fill(text, _WIDTH, break_on_hyphens=False))
    if verdict.coverage.total:
        yield from labelled("coverage", "\n".join(_coverage(verdict.coverage)))
    versions = ", ".join(f"{package} {version}" for package, version in sorted(verdict.environment.items()))
    if versions:
        yield from labelled("versions", versions)
    yield from labelled("seconds", f"{verdict.seconds:.1f}")
    guides = [guide_of(finding.check, finding.cause) for finding in findings if not is_consequence(finding)]
    if verdict.verdict == "error" and not verdict.is_internal_error and "family" in verdict.subject:
        guides.append(Guide.WHICH_MODELS)
    urls = dict.fromkeys(guide.url for guide in guides if guide is not None)
    if urls:
        yield from labelled("read on", "\n".join(urls))


def _coverage(coverage: Coverage) -> Iterator[str]:
    yield f"{coverage.compared} of {words.pluralize(coverage.total, 'tensor')} compared"
    missed = sorted(coverage.not_compared.items(), key=lambda item: (item[1], item[0]))
    for reason, group in groupby(missed, key=lambda item: item[1]):
        yield f"not compared, {reason}: {words.join_truncated([name for name, _ in group], _NAMES_SHOWN)}"


def as_junit(verdicts: Iterable[Verdict]) -> str:
    """Return an XML document that CI servers read: one suite for each subject, one test case for each check."""
    return junit_xml(
        (" ".join([words.name(verdict.subject), *words.layout(verdict.subject)]), verdict.seconds, [*_cases(verdict)])
        for verdict in verdicts
    )


def _cases(verdict: Verdict) -> Iterator[Row]:
    if verdict.verdict in ("error", "skipped"):
        outcome: Outcome = "error" if verdict.verdict == "error" else "skipped"
        first_line = next(iter((verdict.message or verdict.verdict).strip().splitlines()), verdict.verdict)
        details = as_text(verdict_lines(verdict))
        yield Row(name=outcome, outcome=outcome, message=first_line, details=details, seconds=verdict.seconds)
        return
    checks = {check.check: check for check in verdict.checks}
    following = {check.check for check in verdict.checks if _only_follows(check, verdict)}
    for check in dict.fromkeys([*checks, *(finding.check for finding in verdict.findings)]):
        findings = [finding for finding in verdict.findings if finding.check == check]
        if findings:
            rest = f" and {len(findings) - 1} more" if len(findings) > 1 else ""
            details = "\n".join(as_text(finding_lines(finding, verdict.subject)) for finding in findings)
            yield Row(name=check, outcome="failure", message=f"{place(findings[0])}{rest}", details=details)
        elif check in following:
            yield Row(name=check, outcome="skipped", message="differs, which follows from what failed first")
        elif checks[check].says_something:
            yield Row(name=check)
        else:
            beside = _beside(checks[check])
            message = f"{beside} could be compared" if beside else "nothing to compare"
            yield Row(name=check, outcome="skipped", message=message)
