"""The cells of a matrix, and the file of their verdicts. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

from tpcheck.core.environment import package_versions
from tpcheck.core.findings import CheckResult, Coverage, Finding, Verdict
from tpcheck.core.topology import Topology
from tpcheck.lab.known import JudgedVerdict
from tpcheck.report.data import SCHEMA, as_data

_WORST_FIRST = ("failed", "error", "passed", "skipped")


def judged_json(judged: JudgedVerdict) -> str:
    """Return one verdict of a matrix as JSON, with its entry in the register of known bugs."""
    data = as_data(judged.verdict)
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
    """Return the verdict of the data that `as_data` returned.

    Raises:
        KeyError: The data is no verdict.
    """
    coverage = data["coverage"]
    return Verdict(
        verdict=data["verdict"],
        subject=data["subject"],
        environment=data["environment"],
        findings=tuple(_finding(finding) for finding in data["findings"]),
        checks=tuple(
            CheckResult(check["check"], check["compared"], _number(check["worst_margin"]), check["worst_at"])
            for check in data["checks"]
        ),
        coverage=Coverage(coverage["compared"], coverage["total"], coverage["missed"]),
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
    """One family in one configuration."""

    family: str
    backend: str = "deepspeed"
    tp: int = 2
    dp: int = 1
    zero: int = 0
    dtype: str = "float64"

    @property
    def topology(self) -> Topology:
        return Topology(tp=self.tp, dp=self.dp)


@dataclass(frozen=True, slots=True)
class Common:
    """What all cells of a matrix have in common; see `verify_family`."""

    steps: int = 2
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    checks: Sequence[str] | None = None
    ignore_plan: bool = False
    timeout: float = 600.0
    batch: str | None = None


def cells(
    families: Sequence[str],
    *,
    backends: Sequence[str] = ("deepspeed",),
    tp: Sequence[int] = (2,),
    dp: Sequence[int] = (1,),
    zero: Sequence[int] = (0,),
    dtypes: Sequence[str] = ("float64",),
) -> tuple[Cell, ...]:
    """Return every combination, those of one family together, each once.

    Raises:
        UsageError: A size is not a positive integer.
    """
    made = tuple(dict.fromkeys(Cell(*values) for values in product(families, backends, tp, dp, zero, dtypes)))
    for cell in made:
        cell.topology  # noqa: B018 - it checks the sizes
    return made


def arguments(cell: Cell, common: Common) -> dict[str, Any]:
    """Return the keyword arguments of `verify_family` for a cell."""
    return {
        "topology": cell.topology,
        "backend": cell.backend,
        "dtype": cell.dtype,
        "zero_stage": cell.zero,
        "steps": common.steps,
        "config": common.config,
        "checks": common.checks,
        "seed": common.seed,
        "settings": common.settings,
        "ignore_plan": common.ignore_plan,
        "timeout": common.timeout,
        **({} if common.batch is None else {"batch": common.batch}),
    }


def subject(cell: Cell, common: Common) -> dict[str, Any]:
    """Return what the report of a cell says of its subject, before there is one."""
    return {
        "family": cell.family,
        "backend": cell.backend,
        "tp": cell.tp,
        "dp": cell.dp,
        "zero": cell.zero,
        "dtype": cell.dtype,
        "steps": common.steps,
        "seed": common.seed,
        "config": dict(common.config or {}),
        "ignore_plan": common.ignore_plan,
        **({"checks": list(common.checks)} if common.checks is not None else {}),
        "settings": dict(common.settings),
        **({} if common.batch is None else {"batch": common.batch}),
    }


def versions(backend: str) -> dict[str, str]:
    """Return the versions that a run with this backend depends on, without importing it."""
    found = package_versions()
    for package in (backend, backend.partition("-")[0]):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def done_before(path: Path, wanted: Sequence[Cell], common: Common) -> dict[Cell, Verdict]:
    """Return the verdicts that a file of an earlier run holds of these cells, with the same options and versions."""
    stored = {_key(verdict.subject): verdict for verdict in stored_verdicts(path)}
    keys = {cell: _key(subject(cell, common)) for cell in wanted}
    found = {cell: stored[key] for cell, key in keys.items() if key is not None and key in stored}
    return {cell: verdict for cell, verdict in found.items() if _is_current(verdict, cell)}


def _is_current(verdict: Verdict, cell: Cell) -> bool:
    now = versions(cell.backend)
    return all(verdict.environment.get(package) == number for package, number in now.items())


def _key(of: Mapping[str, Any]) -> str | None:
    """Return a key that equal subjects share.

    None for a subject with an object: a report contains only its text, which does not identify it.
    """
    try:
        return json.dumps(of, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None
