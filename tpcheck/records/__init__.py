"""Immutable evidence: what a run found, and what it ran."""

from tpcheck.records.finding import Finding
from tpcheck.records.verdict import CheckResult, Coverage, Verdict, VerdictName

__all__ = ["CheckResult", "Coverage", "Finding", "Verdict", "VerdictName"]
