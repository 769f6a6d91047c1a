"""Many verdicts as JUnit XML: a known bug is skipped, one that is gone fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tpcheck.families.upstream import Judged
from tpcheck.records import Finding, Verdict
from tpcheck.report.junit import as_junit
from tpcheck.report.matrix import surprise

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
