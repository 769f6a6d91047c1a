"""Searches one family for a configuration in which the sharded model differs from the unsharded one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tpcheck.core.environment import package_versions
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import Verdict
from tpcheck.core.reproduce import verify_command
from tpcheck.core.topology import Topology
from tpcheck.families.build import small_model
from tpcheck.lab.fuzz.draws import Bounds, Drawn, family_examples
from tpcheck.lab.fuzz.judge import REFUSALS, TELLING, in_general
from tpcheck.lab.fuzz.results import Outcome, SearchResult
from tpcheck.lab.fuzz.search import Limits, OnOutcome, require_hypothesis, search
from tpcheck.lab.known import explained
from tpcheck.lab.matrix.report import summary_line
from tpcheck.model.verify import verify_family
from tpcheck.report.data import printable

if TYPE_CHECKING:
    from tpcheck.backends.interface import Backend

# The message of a `BackendError`: the phase and the exception.
_BLAMED = re.compile(r"^[^,\n]+, (?P<phase>[^:\n]+): (?P<error>\w+): (?P<text>.*)", re.DOTALL)
_REFUSING = "sharding the model"


@dataclass(frozen=True, slots=True)
class Common:
    """What all examples of a search have in common; see `verify_family`.

    Attributes:
        known: A registered upstream bug is no finding.
    """

    backend: str | Backend = "deepspeed"
    steps: int = 2
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    ignore_plan: bool = False
    timeout: float = 120.0
    known: bool = True

    @property
    def backend_name(self) -> str:
        return self.backend if isinstance(self.backend, str) else self.backend.name


def fuzz_family(family: str, bounds: Bounds, common: Common, limits: Limits, on_outcome: OnOutcome) -> SearchResult:
    """Draw configurations of a family within the bounds, verify each, and shrink what fails.

    Raises:
        UsageError: No such family or backend, or a bound is wrong.
        TpcheckError: hypothesis is not installed.
    """
    require_hypothesis()
    examples = family_examples(family, bounds, common.backend, common.settings, common.config)

    def run(drawn: Drawn) -> Outcome:
        return outcome_of(family, drawn, common)

    searched = search(examples, run, limits, on_outcome)
    asked = {"family": family, "backend": common.backend_name, "examples": limits.examples, "seed": limits.seed}
    return replace(searched, subject={**asked, **bounds.as_dict()}, environment=_versions(common.backend))


def outcome_of(family: str, drawn: Drawn, common: Common) -> Outcome:
    """Verify one configuration, and return its outcome."""
    subject = _subject(family, drawn, common)
    command = verify_command(subject) or str(printable(subject))
    try:
        small_model(family, drawn.settings)  # before a world is started: most refusals are of the model
        verdict = _verdict(family, drawn, common)
    except UsageError as error:
        return Outcome("refused", reason=in_general(str(error)), command=command)
    if verdict.verdict == "failed":
        return _failed(verdict, command, common)
    return _crashed(verdict, command, common) if verdict.verdict == "error" else Outcome("passed", command=command)


def _verdict(family: str, drawn: Drawn, common: Common) -> Verdict:
    return verify_family(
        family,
        topology=Topology(tp=drawn.tp, dp=drawn.dp),
        backend=common.backend,
        dtype=drawn.dtype,
        steps=common.steps,
        zero_stage=drawn.zero,
        config=drawn.config,
        seed=common.seed,
        settings=drawn.settings,
        batch=drawn.batch,
        ignore_plan=common.ignore_plan,
        timeout=common.timeout,
    ).verdict


def _subject(family: str, drawn: Drawn, common: Common) -> dict[str, Any]:
    return {
        "family": family,
        "backend": common.backend_name,
        "tp": drawn.tp,
        "dp": drawn.dp,
        "zero": drawn.zero,
        "dtype": drawn.dtype,
        "steps": common.steps,
        "seed": common.seed,
        "settings": drawn.settings,
        "config": drawn.config,
        "batch": drawn.batch,
        "ignore_plan": common.ignore_plan,
    }


def _failed(verdict: Verdict, command: str, common: Common) -> Outcome:
    if common.known and (bug := explained(verdict)):
        return Outcome("known", bug.name, bug.what, command, verdict)
    return Outcome("failed", f"failed {verdict.findings[0].check}", summary_line(verdict), command, verdict)


def _crashed(verdict: Verdict, command: str, common: Common) -> Outcome:
    """Return the outcome of a crash: a known bug, a refusal, or a finding."""
    verdict = replace(verdict, environment={**_versions(common.backend), **verdict.environment})
    if common.known and (bug := explained(verdict)):
        return Outcome("known", bug.name, bug.what, command, verdict)
    blamed = _BLAMED.match(verdict.message or "")
    if blamed is None:
        return Outcome("error", "error of a rank", summary_line(verdict), command, verdict)
    if blamed["phase"] == _REFUSING and blamed["error"] in REFUSALS:
        return Outcome("refused", reason=in_general(verdict.message or ""), command=command)
    kind = f"error {blamed['phase']} {blamed['error']} {in_general(blamed['text'])[:TELLING]}"
    return Outcome("error", kind, summary_line(verdict), command, verdict)


def _versions(backend: str | Backend) -> dict[str, str]:
    from tpcheck.backends.registry import load_backend

    return {**package_versions(), **load_backend(backend).versions()}
