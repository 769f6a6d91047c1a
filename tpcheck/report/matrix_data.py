"""Many verdicts as one JSON file that is written as they come, and read again by a run that goes on with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import inf
from pathlib import Path
from typing import Any

from tpcheck.families.upstream import Judged
from tpcheck.records import CheckResult, Coverage, Finding, Verdict
from tpcheck.report.data import SCHEMA, as_data

_WORST_FIRST = ("failed", "error", "passed", "skipped")


def judged_json(judged: Judged) -> str:
    """Return one verdict of many as JSON, with what the register of known bugs says of it."""
    data = as_data(judged.verdict)
    if judged.standing:
        data["upstream"] = {"standing": judged.standing, "bug": judged.bug.name if judged.bug else None}
    return json.dumps(data, indent=1, allow_nan=False)


def whole_json(reports: Iterable[str], verdicts: Iterable[str], pending: int) -> str:
    """Return the file of many verdicts, of which `pending` are still to come."""
    reached = set(verdicts)
    worst = next((name for name in _WORST_FIRST if name in reached), "skipped")
    head = f'"schema": {SCHEMA},\n"verdict": "{worst}",\n"pending": {pending},\n'
    return "{\n" + head + '"reports": [\n' + ",\n".join(reports) + "\n]}\n"


def stored_verdicts(path: Path) -> list[Verdict]:
    """Return the verdicts that a file holds; none if there is no such file, or it is no report."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return [verdict_of(one) for one in data.get("reports", [data])]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return []


def verdict_of(data: Mapping[str, Any]) -> Verdict:
    """Return the verdict that `as_data` made this of.

    Raises:
        KeyError: It is no verdict.
    """
    return Verdict(
        verdict=data["verdict"],
        subject=data["subject"],
        environment=data["environment"],
        findings=tuple(_finding(one) for one in data["findings"]),
        checks=tuple(
            CheckResult(one["check"], one["compared"], _number(one["worst_margin"]), one["worst_at"])
            for one in data["checks"]
        ),
        coverage=Coverage(**data["coverage"]),
        seconds=data["seconds"],
        message=data["message"],
    )


def _finding(data: Mapping[str, Any]) -> Finding:
    return Finding(
        check=data["check"],
        where=data["where"],
        observed=_number(data["observed"]),
        allowed=_number(data["allowed"]),
        cause=data["cause"],
        evidence=data["evidence"],
        again=data["again"],
    )


def _number(value: float | None) -> float:
    return inf if value is None else value
