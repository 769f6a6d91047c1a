"""All answers of one run, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tpcheck.records.finding import Finding

VerdictName = Literal["passed", "failed", "error", "skipped"]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many tensors could be compared, of how many there were.

    Attributes:
        compared: Tensors that were compared.
        total: Tensors that should have been.
        missed: What could not be compared, and why, by name.
    """

    compared: int = 0
    total: int = 0
    missed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check did, passed or not.

    Attributes:
        check: Name of the check.
        compared: How many tensors (groups, norms) it compared; 0 means that it could not say anything.
        worst_margin: Largest observed / allowed error over them; 0 for an exact check that passed.
        worst_at: Name of the tensor with that margin.
    """

    check: str
    compared: int
    worst_margin: float
    worst_at: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one run over one subject.

    Attributes:
        verdict: `passed`, `failed` (findings), `error` (the system under test crashed) or `skipped`.
        subject: What was run: family, backend, topology, dtype, options.
        environment: Versions by package name.
        findings: Failed checks, the most telling first.
        checks: Every check that ran.
        coverage: What was compared.
        seconds: Wall time.
        message: The backend's own message for `error`, the reason for `skipped`.
    """

    verdict: VerdictName
    subject: Mapping[str, Any]
    environment: Mapping[str, str]
    findings: tuple[Finding, ...] = ()
    checks: tuple[CheckResult, ...] = ()
    coverage: Coverage = field(default_factory=Coverage)
    seconds: float = 0.0
    message: str | None = None
