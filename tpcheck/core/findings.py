"""Findings, coverage and the verdict of a run, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference that a check found.

    Attributes:
        check: Name of the check, such as `gradients_match_reference`.
        where: Place of the difference; the keys that apply among `phase`, `step`, `module`, `parameter`, `field`,
            `ranks`, `nodes` (the ranks on each, in a run over several) and `index`.
        observed: Observed error. Relative Frobenius error where the oracle is calibrated; number of differing
            elements (or tensors, ranks) where it is exact.
        allowed: Largest error that passes, in the unit of `observed`; 0 where the oracle is exact.
        cause: Slug of the tested explanation, or None.
        evidence: Numbers and short texts behind `observed` and `cause`, JSON-able, by name.
        again: A command that reproduces the finding.
    """

    check: str
    where: Mapping[str, Any]
    observed: float
    allowed: float
    cause: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    again: str | None = None

    @property
    def margin(self) -> float:
        """Observed error divided by the allowed one; below 1 passes."""
        if self.allowed:
            return self.observed / self.allowed
        return inf if self.observed else 0.0


def with_nodes(finding: Finding, node_of: Mapping[int, str]) -> Finding:
    """Return the finding with the names of its ranks' nodes in `where`, if the run is on several.

    Example:
        >>> finding = Finding("replicas_agree", {"ranks": [2, 3]}, 1, 0)
        >>> with_nodes(finding, {0: "node-a", 1: "node-a", 2: "node-b", 3: "node-b"}).where["nodes"]
        {'node-b': [2, 3]}
    """
    if len(set(node_of.values())) < 2:
        return finding
    nodes: dict[str, list[int]] = {}
    for rank in finding.where.get("ranks", ()):
        nodes.setdefault(node_of.get(rank, "unknown node"), []).append(rank)
    return replace(finding, where={**finding.where, "nodes": nodes}) if nodes else finding


VerdictName = Literal["passed", "failed", "error", "skipped"]


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many tensors were compared, of how many.

    Attributes:
        compared: Tensors that were compared.
        total: Tensors that should have been.
        not_compared: Why something could not be compared, by name.
    """

    compared: int = 0
    total: int = 0
    not_compared: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of one check, passed or not.

    Attributes:
        check: Name of the check.
        compared: How many tensors (groups, norms) it compared; a check that compared none says nothing.
        worst_margin: Largest observed / allowed error over them; 0 for an exact check that passed.
        worst_at: Name of the tensor with that margin.
        compared_only: What alone was compared, such as `buffers`, where nothing was of what the check is about; else
            None.
    """

    check: str
    compared: int
    worst_margin: float
    worst_at: str | None = None
    compared_only: str | None = None

    @property
    def says_something(self) -> bool:
        """Whether anything was compared of what the check is about."""
        return self.compared > 0 and self.compared_only is None


MarginPhase = Literal["forward", "backward", "weights"]


@dataclass(frozen=True, slots=True)
class ModuleMargins:
    """The worst margins of one module over all steps and TP groups.

    Attributes:
        module: Name as in `named_modules`; empty for the model itself, whose forward margin includes the loss.
        forward: Of its outputs; None where none was compared.
        backward: Of the gradients of its outputs, inputs and parameters; None where none was compared.
        weights: Of compared runs: of its parameters, buffers and optimizer state, before and after steps.
    """

    module: str
    forward: float | None = None
    backward: float | None = None
    weights: float | None = None


INTERNAL_ERROR = "tpcheck itself failed, not the system under test. Please report it with this traceback:"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one run over one subject.

    Attributes:
        verdict: `passed`, `failed` (findings), `error` (the system under test crashed, or tpcheck did) or `skipped`.
        subject: Family, backend, topology, dtype and options of the run.
        environment: Versions by package name.
        findings: Failed checks, the most telling first.
        checks: Every check that ran.
        modules: The margins of every module that was called, in the order of the forward pass.
        coverage: How much was compared.
        seconds: Wall time.
        message: The backend's own message for `error`, or `INTERNAL_ERROR` and a traceback; the reason for `skipped`.
        notes: What of the user's model or configuration took no part, in sentences.
    """

    verdict: VerdictName
    subject: Mapping[str, Any]
    environment: Mapping[str, str]
    findings: tuple[Finding, ...] = ()
    checks: tuple[CheckResult, ...] = ()
    coverage: Coverage = field(default_factory=Coverage)
    seconds: float = 0.0
    message: str | None = None
    notes: tuple[str, ...] = ()
    modules: tuple[ModuleMargins, ...] = ()

    @property
    def is_internal_error(self) -> bool:
        """Whether tpcheck itself failed."""
        return (self.message or "").startswith(INTERNAL_ERROR)
