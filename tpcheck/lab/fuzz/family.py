"""Searches one family for a configuration in which the sharded model differs from the unsharded one."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from tpcheck.core.environment import package_versions
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import Verdict
from tpcheck.families.build import small_model
from tpcheck.lab.fuzz.draws import Bounds, family_examples
from tpcheck.lab.fuzz.judge import REFUSALS, TELLING, in_general
from tpcheck.lab.fuzz.results import Outcome, SearchResult
from tpcheck.lab.fuzz.search import Limits, OnOutcome, require_hypothesis, search
from tpcheck.lab.known import explained
from tpcheck.lab.matrix.report import summary_line
from tpcheck.model.options import RunOptions
from tpcheck.model.verify import verify_family
from tpcheck.report.json_values import printable

if TYPE_CHECKING:
    from tpcheck.backends.interface import Backend

# The message of a `BackendError`: the phase and the exception.
_BLAMED = re.compile(r"^[^,\n]+, (?P<phase>[^:\n]+): (?P<error>\w+): (?P<text>.*)", re.DOTALL)
_REFUSING = "sharding the model"


def fuzz_family(
    family: str, bounds: Bounds, common: RunOptions, limits: Limits, on_outcome: OnOutcome, *, known: bool = True
) -> SearchResult:
    """Draw options within the bounds for a family, verify each, and shrink what fails.

    Args:
        common: The options that are not drawn.
        known: A registered upstream bug is no finding.

    Raises:
        UsageError: No such family or backend, or a bound is wrong.
        TpcheckError: hypothesis is not installed.
    """
    require_hypothesis()
    examples = family_examples(family, bounds, common)

    def run(drawn: RunOptions) -> Outcome:
        return outcome_of(family, drawn, known=known)

    searched = search(examples, run, limits, on_outcome)
    asked = {"family": family, "backend": common.backend_name, "examples": limits.examples, "seed": limits.seed}
    return replace(searched, subject={**asked, **bounds.as_dict()}, environment=_versions(common.backend))


def outcome_of(family: str, options: RunOptions, *, known: bool = True) -> Outcome:
    """Verify one choice of options, and say what its verdict means in a search."""
    command = options.command(family) or str(printable(options.subject(family)))
    try:
        small_model(family, options.settings)  # here, since most refusals are of the model, and worlds take their time
        verdict = verify_family(family, **options.keywords()).verdict
    except UsageError as error:
        return Outcome("refused", reason=in_general(str(error)), command=command)
    if verdict.verdict not in ("failed", "error"):
        return Outcome("passed", command=command)
    verdict = replace(verdict, environment={**_versions(options.backend), **verdict.environment})
    if known and (bug := explained(verdict)):
        return Outcome("known", bug.name, bug.what, command, verdict)
    return _failed(verdict, command) if verdict.verdict == "failed" else _crashed(verdict, command)


def _failed(verdict: Verdict, command: str) -> Outcome:
    return Outcome("failed", f"failed {verdict.findings[0].check}", summary_line(verdict), command, verdict)


def _crashed(verdict: Verdict, command: str) -> Outcome:
    """Return what a crash is: a refusal that says so, or a finding."""
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
