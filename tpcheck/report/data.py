"""A verdict as JSON of schema 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

from tpcheck.records import Finding, Verdict

SCHEMA = 1


def as_data(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as plain JSON values. Infinities and NaN, which JSON does not have, become null."""
    return {
        "schema": SCHEMA,
        "verdict": verdict.verdict,
        "subject": plain_json(verdict.subject),
        "environment": plain_json(verdict.environment),
        "findings": [_finding(finding) for finding in verdict.findings],
        "checks": [
            {
                "check": check.check,
                "compared": check.compared,
                "worst_margin": plain_json(check.worst_margin),
                "worst_at": check.worst_at,
            }
            for check in verdict.checks
        ],
        "coverage": {
            "compared": verdict.coverage.compared,
            "total": verdict.coverage.total,
            "missed": plain_json(verdict.coverage.missed),
        },
        "message": verdict.message,
        "seconds": plain_json(verdict.seconds),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "check": finding.check,
        "where": plain_json(finding.where),
        "observed": plain_json(finding.observed),
        "allowed": plain_json(finding.allowed),
        "margin": plain_json(finding.margin),
        "cause": finding.cause,
        "evidence": plain_json(finding.evidence),
        "again": finding.again,
    }


def plain_json(value: Any) -> Any:
    """Return a value as JSON has it; infinities and NaN, which it does not have, become null."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain_json(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(plain_json(inner) for inner in value)
    if isinstance(value, Iterable):
        return [plain_json(inner) for inner in value]
    return str(value)
