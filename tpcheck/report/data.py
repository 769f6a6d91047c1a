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
        "subject": _json(verdict.subject),
        "environment": _json(verdict.environment),
        "findings": [_finding(finding) for finding in verdict.findings],
        "checks": [
            {
                "check": check.check,
                "compared": check.compared,
                "worst_margin": _json(check.worst_margin),
                "worst_at": check.worst_at,
            }
            for check in verdict.checks
        ],
        "coverage": {
            "compared": verdict.coverage.compared,
            "total": verdict.coverage.total,
            "missed": _json(verdict.coverage.missed),
        },
        "message": verdict.message,
        "seconds": _json(verdict.seconds),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "check": finding.check,
        "where": _json(finding.where),
        "observed": _json(finding.observed),
        "allowed": _json(finding.allowed),
        "margin": _json(finding.margin),
        "cause": finding.cause,
        "evidence": _json(finding.evidence),
        "again": finding.again,
    }


def _json(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _json(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_json(inner) for inner in value)
    if isinstance(value, Iterable):
        return [_json(inner) for inner in value]
    return str(value)
