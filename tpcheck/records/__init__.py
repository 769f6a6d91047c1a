"""Immutable evidence: what a run found, and what it ran."""

from tpcheck.records.evidence import Evidence, Isolated, RankFacts
from tpcheck.records.finding import Finding
from tpcheck.records.step import Step
from tpcheck.records.suspect import Suspect
from tpcheck.records.trace import TensorKey
from tpcheck.records.verdict import CheckResult, Coverage, Verdict, VerdictName

__all__ = [
    "CheckResult",
    "Coverage",
    "Evidence",
    "Finding",
    "Isolated",
    "RankFacts",
    "Step",
    "Suspect",
    "TensorKey",
    "Verdict",
    "VerdictName",
]
