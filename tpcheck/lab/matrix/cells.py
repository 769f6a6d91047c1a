"""The cells of a matrix, and the file of their verdicts. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

from tpcheck.core.environment import package_versions
from tpcheck.core.findings import CheckResult, Coverage, Finding, Verdict
from tpcheck.core.topology import Topology
from tpcheck.lab.known import JudgedVerdict
from tpcheck.model.options import DEFAULTS, RunOptions
from tpcheck.report.json_values import SCHEMA, verdict_json

_WORST_FIRST = ("failed", "error", "passed", "skipped")


def judged_json(judged: JudgedVerdict) -> str:
    """Return one verdict of a matrix as JSON, with its entry in the register of known bugs."""
    data = verdict_json(judged.verdict)
    if judged.standing:
        data["upstream"] = {"standing": judged.standing, "bug": judged.bug.name if judged.bug else None}
    return json.dumps(data, indent=1, allow_nan=False)


def whole_json(reports: Iterable[str], verdicts: Iterable[str], pending: int) -> str:
    """Return the text of a file of verdicts; `pending` counts those that are still missing."""
    reached = set(verdicts)
    worst = next((name for name in _WORST_FIRST if name in reached), "skipped")
    head = f'"schema": {SCHEMA},\n"verdict": "{worst}",\n"pending": {pending},\n'
    return "{\n" + head + '"reports": [\n' + ",\n".join(reports) + "\n]}\n"


def stored_verdicts(path: Path) -> list[Verdict]:
    """Return the verdicts in a file; none if the file does not exist or is no report."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return [verdict_of(report) for report in data.get("reports", [data])]
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return []


def verdict_of(data: Mapping[str, Any]) -> Verdict:
    """Return the verdict of the data that `verdict_json` returned.

    Raises:
        KeyError: The data is no verdict.
    """
    return Verdict(
        verdict=data["verdict"],
        subject=data["subject"],
        environment=data["environment"],
        findings=tuple(_finding(finding) for finding in data["findings"]),
        checks=tuple(
            CheckResult(check["check"], check["compared"], _number(check["worst_margin"]), check["worst_at"])
            for check in data["checks"]
        ),
        coverage=Coverage(*(data["coverage"][key] for key in ("compared", "total", "missed"))),
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


@dataclass(frozen=True, slots=True)
class Cell:
    """One family under one choice of options."""

    family: str
    options: RunOptions = DEFAULTS

    @property
    def subject(self) -> dict[str, Any]:
        """What the report of this cell says of the run."""
        return self.options.subject(self.family)


def cells(
    families: Sequence[str],
    common: RunOptions = DEFAULTS,
    *,
    backend: Sequence[str] = (str(DEFAULTS.backend),),
    tp: Sequence[int] = (DEFAULTS.topology.tp,),
    dp: Sequence[int] = (DEFAULTS.topology.dp,),
    zero: Sequence[int] = (DEFAULTS.zero_stage,),
    dtype: Sequence[str] = (DEFAULTS.dtype,),
) -> tuple[Cell, ...]:
    """Return every combination, those of one family together, each once; the other options are those of `common`.

    Raises:
        UsageError: A size is not a positive integer.
    """
    combinations = product(families, backend, tp, dp, zero, dtype)
    return tuple(
        Cell(
            family,
            replace(common, backend=name, topology=Topology(tp=tp_size, dp=dp_size), zero_stage=stage, dtype=precision),
        )
        for family, name, tp_size, dp_size, stage, precision in dict.fromkeys(combinations)
    )


def versions(backend: str) -> dict[str, str]:
    """Return the versions that a run with this backend depends on, without importing it."""
    found = package_versions()
    for package in (backend, backend.partition("-")[0]):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def done_before(path: Path, wanted: Sequence[Cell]) -> dict[Cell, Verdict]:
    """Return the verdicts that a file of an earlier run holds of these cells, with the same options and versions."""
    stored = {_key(verdict.subject): verdict for verdict in stored_verdicts(path)}
    keys = {cell: _key(cell.subject) for cell in wanted}
    found = {cell: stored[key] for cell, key in keys.items() if key is not None and key in stored}
    return {cell: verdict for cell, verdict in found.items() if _is_current(verdict, cell)}


def _is_current(verdict: Verdict, cell: Cell) -> bool:
    now = versions(cell.options.backend_name)
    return all(verdict.environment.get(package) == number for package, number in now.items())


def _key(of: Mapping[str, Any]) -> str | None:
    """Return a key that equal subjects share.

    None for a subject with an object: a report contains only its text, which does not identify it.
    """
    try:
        return json.dumps(of, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None
