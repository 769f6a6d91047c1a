"""Asks every check of the evidence of one TP group, and the causes of what fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from tpcheck.causes import explain
from tpcheck.checks import START_CHECKS, STEP_CHECKS, CheckOutcome
from tpcheck.records import Evidence, Finding, Suspect
from tpcheck.verification.grouping import grouped


@dataclass(frozen=True, slots=True)
class CheckAnswer:
    """What one check said at one moment: `step` is -1 for the start."""

    check: str
    step: int
    margins: Mapping[str, float]
    findings: tuple[Finding, ...]
    missed: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class GroupAnswer:
    """All that the checks said of one TP group, in the order in which they were asked.

    Attributes:
        answers: One for each check and moment.
        last_step: The last step that was compared: after a step with findings, nothing later means anything.
    """

    answers: tuple[CheckAnswer, ...] = field(default_factory=tuple)
    last_step: int = -1


def start_answer(evidence: Evidence, checks: Sequence[str]) -> GroupAnswer:
    """Ask the named checks of what there is before the first step."""
    answers = [_ask(name, -1, check(evidence)) for name, check in START_CHECKS.items() if name in checks]
    if any(one.findings for one in answers if one.check == _GROUPS):
        answers = [_of_wrong_groups(one) for one in answers]
    return GroupAnswer(tuple(_with_consequences(answers, _wrong_from_the_start(answers), first=None)))


def forbids_training(start: GroupAnswer) -> bool:
    """Return whether steps would mean nothing: the ranks are not one TP model, and may even wait for each other."""
    return any(one.findings and one.check in _FATAL for one in start.answers)


_GROUPS = "groups_match_topology"
_FATAL = (_GROUPS, "parameters_are_sharded")


def full_answer(start: GroupAnswer, evidence: Evidence, checks: Sequence[str]) -> GroupAnswer:
    """Add to `start` what the named checks say of the steps, one by one until one fails."""
    answers = list(start.answers)
    last_step = -1
    for step in range(len(evidence.reference)):
        last_step = step
        of_step = [_ask(name, step, check(evidence, step)) for name, check in STEP_CHECKS.items()]
        first = next((one.check for one in of_step if one.findings), None)
        of_step = _with_consequences(of_step, _wrong_from_the_start(start.answers), first)
        answers.extend(one for one in of_step if one.check in checks)
        if any(one.findings for one in of_step):
            break
    return GroupAnswer(tuple(answers), last_step)


def _ask(check: str, step: int, outcome: CheckOutcome) -> CheckAnswer:
    findings = grouped([_finding(suspect) for suspect in outcome.suspects])
    return CheckAnswer(check, step, outcome.margins, findings, outcome.missed)


def _wrong_from_the_start(answers: Sequence[CheckAnswer]) -> dict[str, str]:
    """Return the modules whose parameters or buffers are wrong before the first step, and which check said so first."""
    found: dict[str, str] = {}
    for finding in (finding for one in answers for finding in one.findings):
        for module in (_module(finding), *map(_module_of_name, finding.evidence.get("also", ()))):
            found.setdefault(module, finding.check)
    found.pop("", None)  # which is no module in particular
    return found


def _of_wrong_groups(answer: CheckAnswer) -> CheckAnswer:
    """Take back what is said of shards: layers that gather over another group tell wrongly how these lie."""
    if answer.check != "weights_match_reference":
        return answer
    findings = (replace(one, cause=None, evidence={**one.evidence, "follows_from": _GROUPS}) for one in answer.findings)
    return replace(answer, findings=tuple(findings))


def _module(finding: Finding) -> str:
    parameter = str(finding.where.get("parameter", ""))
    return str(finding.where.get("module", parameter.rpartition(".")[0]))


def _module_of_name(named: str | Mapping[str, str]) -> str:
    """Return the module of a parameter, or of a parameter or buffer whose kind is given beside its name."""
    return (named if isinstance(named, str) else named["name"]).rpartition(".")[0]


def _with_consequences(
    answers: Sequence[CheckAnswer], from_the_start: Mapping[str, str], first: str | None
) -> list[CheckAnswer]:
    """Mark what an earlier check already accounts for, where no cause of its own was found.

    The first check of a step that fails accounts for all after it; what a module holds from the start accounts for what
    other checks say of that module.
    """

    def marked(finding: Finding) -> Finding:
        source = from_the_start.get(_module(finding)) if first in (None, finding.check) else first
        if finding.cause is not None or source is None or (first is None and source == finding.check):
            return finding
        return replace(finding, evidence={**finding.evidence, "follows_from": source})

    return [replace(one, findings=tuple(marked(finding) for finding in one.findings)) for one in answers]


def _finding(suspect: Suspect) -> Finding:
    explanation = explain(suspect)
    evidence = dict(suspect.evidence)
    if explanation is not None:
        evidence |= {**explanation.evidence, "cause_error": explanation.error}
    return Finding(
        check=suspect.check,
        where=suspect.where,
        observed=suspect.observed,
        allowed=suspect.allowed,
        cause=explanation.cause if explanation is not None else None,
        evidence=evidence,
    )
