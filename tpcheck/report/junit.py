"""Verdicts as JUnit XML: one suite for each subject, one test case for each check."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tpcheck.core.findings import Finding, Verdict
from tpcheck.report import words
from tpcheck.report.findings import finding_lines, place
from tpcheck.report.table import Case, Outcome, junit_xml
from tpcheck.report.text import verdict_lines
from tpcheck.report.words import as_text


def as_junit(verdicts: Iterable[Verdict]) -> str:
    """Return an XML document that CI servers read."""
    return junit_xml(
        (" ".join([words.name(verdict.subject), *words.layout(verdict.subject)]), verdict.seconds, [*_cases(verdict)])
        for verdict in verdicts
    )


def _cases(verdict: Verdict) -> Iterator[Case]:
    if verdict.verdict in ("error", "skipped"):
        outcome: Outcome = "error" if verdict.verdict == "error" else "skipped"
        first_line = next(iter((verdict.message or verdict.verdict).strip().splitlines()), verdict.verdict)
        yield Case(outcome, outcome, first_line, as_text(verdict_lines(verdict)), verdict.seconds)
        return
    compared = {check.check: check.compared for check in verdict.checks}
    for check in dict.fromkeys([*compared, *(finding.check for finding in verdict.findings)]):
        findings = [finding for finding in verdict.findings if finding.check == check]
        if findings:
            yield Case(check, "failure", _headline(findings), _details(findings, verdict))
        elif compared[check]:
            yield Case(check)
        else:
            yield Case(check, "skipped", "nothing to compare")


def _headline(findings: Sequence[Finding]) -> str:
    rest = f" and {len(findings) - 1} more" if len(findings) > 1 else ""
    return f"{place(findings[0])}{rest}"


def _details(findings: Sequence[Finding], verdict: Verdict) -> str:
    return "\n".join(as_text(finding_lines(finding, verdict.subject)) for finding in findings)
