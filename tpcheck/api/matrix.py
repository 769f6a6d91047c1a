"""Many verifications: which there are, what is known of them already, and how one of them is run. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

from tpcheck.environment import package_versions
from tpcheck.records import Verdict
from tpcheck.report.matrix_data import stored_verdicts
from tpcheck.topology import Topology


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
    """Return the versions that a run under this backend depends on, without importing it."""
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
    """Return what two subjects that are the same have in common.

    None for a subject that holds an object: a report has only its text, which does not tell whether it is the same.
    """
    try:
        return json.dumps(of, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return None
