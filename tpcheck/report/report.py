"""The report of one run: as text, JSON, JUnit and on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpcheck.core.errors import BackendError, Mismatch
from tpcheck.core.findings import Finding, Verdict
from tpcheck.report import words
from tpcheck.report.findings import finding_lines, place
from tpcheck.report.json_values import verdict_json
from tpcheck.report.table import Cell, Column, Outcome, Row, Table, junit_xml, tables_html
from tpcheck.report.text import FINDINGS_SHOWN, checks_table, head_line, verdict_lines
from tpcheck.report.words import as_rich, as_text

if TYPE_CHECKING:
    from rich.text import Text


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

    @property
    def passed(self) -> bool:
        """Whether every check ran and agreed; a skipped run has not passed."""
        return self.verdict.verdict == "passed"

    @property
    def findings(self) -> tuple[Finding, ...]:
        return self.verdict.findings

    def to_text(self, *, findings: int | None = FINDINGS_SHOWN) -> str:
        """Return plain text for an issue, with at most `findings` findings; None shows all."""
        return as_text(verdict_lines(self.verdict, findings_shown=findings))

    def to_data(self) -> dict[str, Any]:
        """Return the report as plain JSON values, schema 1."""
        return verdict_json(self.verdict)

    def to_json(self) -> str:
        """Return the report as a JSON text, schema 1."""
        return json.dumps(self.to_data(), indent=2, allow_nan=False) + "\n"

    def to_junit(self) -> str:
        """Return the report as JUnit XML, one test case for each check."""
        return as_junit([self.verdict])

    def to_html(self) -> str:
        """Return one HTML page with every finding and every check; it needs no other file."""
        verdict = self.verdict
        versions = ", ".join(f"{package} {version}" for package, version in sorted(verdict.environment.items()))
        subtitle = "; ".join(part for part in (verdict.message, versions, f"{verdict.seconds:.1f} seconds") if part)
        return tables_html(str(head_line(verdict)), subtitle, [self._findings_table(), checks_table(verdict)])

    def _findings_table(self) -> Table:
        columns = Column("check"), Column("where"), Column("margin", right=True), Column("cause")
        rows = (
            Row(
                (
                    Cell(finding.check),
                    Cell(place(finding)),
                    Cell(words.margin(finding.margin)),
                    Cell(finding.cause or "unknown"),
                ),
                outcome="failure",
                details=as_text(finding_lines(finding, self.verdict.subject)),
                is_expected=False,
            )
            for finding in self.findings
        )
        return Table(columns, tuple(rows), title="Findings")

    def raise_if_failed(self) -> None:
        """Raise an error unless the run passed or was skipped.

        Raises:
            Mismatch: A check failed.
            BackendError: The system under test crashed.
        """
        if self.verdict.verdict == "failed":
            raise Mismatch(self.to_text(), self)
        if self.verdict.verdict == "error":
            raise BackendError(self.to_text())

    def __str__(self) -> str:
        return self.to_text()

    def __rich__(self) -> Text:
        return as_rich(verdict_lines(self.verdict))


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
    compared = {check.check: check.compared for check in verdict.checks}
    for check in dict.fromkeys([*compared, *(finding.check for finding in verdict.findings)]):
        findings = [finding for finding in verdict.findings if finding.check == check]
        if findings:
            rest = f" and {len(findings) - 1} more" if len(findings) > 1 else ""
            details = "\n".join(as_text(finding_lines(finding, verdict.subject)) for finding in findings)
            yield Row(name=check, outcome="failure", message=f"{place(findings[0])}{rest}", details=details)
        elif compared[check]:
            yield Row(name=check)
        else:
            yield Row(name=check, outcome="skipped", message="nothing to compare")
