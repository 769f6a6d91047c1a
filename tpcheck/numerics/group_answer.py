"""Runs every check on the evidence of one TP group, and explains what fails."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from tpcheck.core.causes import Cause
from tpcheck.core.findings import Finding
from tpcheck.numerics.checks import START_CHECKS, STEP_CHECKS
from tpcheck.numerics.error_map import error_map
from tpcheck.numerics.evidence import CheckOutcome, Evidence, Suspect
from tpcheck.numerics.hypotheses import explain
from tpcheck.numerics.verdict import GROUPS_CHECK, CheckAnswer, GroupAnswer

# Findings of one cause are one mistake where these are the same, too.
_SAME_MISTAKE_KEYS = ("factors", "rounded_to", "note", "story", "gradient_ratio", "weight_ratio", "momentum_ratio")
# Of one such mistake each parameter has ratios of its own.
_DIFFER_BY_PARAMETER = frozenset({Cause.OPTIMIZER_SEES_ONE_SHARD.slug, Cause.CLIPPED_PER_GROUP.slug})
_MOST_UNEXPLAINED = 4  # findings without a cause that are not joined: they may be as many mistakes


def group_findings(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Join the findings of one mistake into one, which names the other parameters in its evidence.

    Only findings about parameters are joined. Those of gradients that no cause explains may be as many mistakes: they
    are not joined where they are few.
    """
    by_mistake: dict[Hashable, list[Finding]] = {}
    num_unexplained = sum(1 for finding in findings if finding.cause is None and _is_of_parameter(finding))
    for number, finding in enumerate(findings):
        is_unexplained_gradient = finding.cause is None and finding.where.get("phase") == "backward"
        stays_apart = is_unexplained_gradient and num_unexplained <= _MOST_UNEXPLAINED
        mistake = number if stays_apart or not _is_of_parameter(finding) else _mistake_key(finding)
        by_mistake.setdefault(mistake, []).append(finding)
    return tuple(_merge_findings(of_mistake) for of_mistake in by_mistake.values())


def _is_of_parameter(finding: Finding) -> bool:
    return "parameter" in finding.where and "field" not in finding.where


def _mistake_key(finding: Finding) -> Hashable:
    are_alike_for_all = finding.cause is not None and finding.cause not in _DIFFER_BY_PARAMETER
    shown = tuple(str(finding.evidence.get(name)) for name in _SAME_MISTAKE_KEYS) if are_alike_for_all else ()
    return finding.check, finding.where.get("phase"), finding.cause, tuple(finding.where.get("ranks", ())), shown


def _merge_findings(findings: Sequence[Finding]) -> Finding:
    first, *others = findings
    if not others:
        return first
    names = [str(finding.where["parameter"]) for finding in others]
    also = [name for each in findings for name in each.evidence.get("also", ()) if name != first.where["parameter"]]
    return replace(first, evidence={**first.evidence, "also": list(dict.fromkeys([*names, *also]))})


def start_answer(evidence: Evidence, checks: Sequence[str]) -> GroupAnswer:
    """Run the named checks of what there is before the first step."""
    answers = [_answer(name, -1, check(evidence)) for name, check in START_CHECKS.items() if name in checks]
    if any(answer.findings for answer in answers if answer.check == GROUPS_CHECK):
        answers = [_without_causes_of_shards(answer) for answer in answers]
    return GroupAnswer(tuple(_with_consequences(answers, _wrong_from_the_start(answers), first=None)))


def full_answer(start: GroupAnswer, evidence: Evidence, checks: Sequence[str]) -> GroupAnswer:
    """Add to `start` the results of the named checks for the steps, up to the first that fails."""
    answers = list(start.answers)
    last_step = -1
    for step in range(len(evidence.reference)):
        last_step = step
        of_step = [_answer(name, step, check(evidence, step)) for name, check in STEP_CHECKS.items()]
        first = next((answer.check for answer in of_step if answer.findings), None)
        of_step = _with_consequences(of_step, _wrong_from_the_start(start.answers), first)
        answers.extend(answer for answer in of_step if answer.check in checks)
        if first is not None:
            break
    return GroupAnswer(tuple(advised_once(answers)), last_step)


def advised_once(answers: Sequence[CheckAnswer]) -> list[CheckAnswer]:
    """Leave an advice to the first finding that has it: a wrong norm is one in the step on each parameter, too."""
    given: set[object] = set()

    def without_repeated(finding: Finding) -> Finding:
        advice = finding.evidence.get("advice")
        if advice not in given:
            given.update([advice] if advice else [])
            return finding
        return replace(finding, evidence={key: value for key, value in finding.evidence.items() if key != "advice"})

    return [replace(answer, findings=tuple(map(without_repeated, answer.findings))) for answer in answers]


def _answer(check: str, step: int, outcome: CheckOutcome) -> CheckAnswer:
    findings = group_findings([_finding(suspect, is_first=not index) for index, suspect in enumerate(outcome.suspects)])
    return CheckAnswer(
        check,
        step,
        outcome.margins,
        findings,
        outcome.not_compared,
        outcome.by_module,
        outcome.compared_only,
    )


def _finding(suspect: Suspect, *, is_first: bool) -> Finding:
    """Return a suspect as a finding; the first of a check shows where in its tensor the error lies."""
    explanation = explain(suspect)
    tiles = error_map(suspect) if is_first else None
    evidence = {
        **suspect.evidence,
        **suspect.facts_as_evidence(),
        **(tiles.as_evidence() if tiles is not None else {}),
    }
    if explanation is not None:
        advice = explanation.cause.advise_training(explanation.evidence)
        evidence |= {**({"advice": advice} if advice else {}), **explanation.evidence}
        evidence["cause_error"] = explanation.residual
    return Finding(
        check=suspect.check,
        where=suspect.where,
        observed=suspect.observed,
        allowed=suspect.allowed,
        cause=explanation.cause.slug if explanation is not None else None,
        evidence=evidence,
    )


def _wrong_from_the_start(answers: Sequence[CheckAnswer]) -> dict[str, str]:
    """Return the modules whose parameters or buffers are wrong before the first step, with the check that found it."""
    checks: dict[str, str] = {}
    for finding in (finding for answer in answers for finding in answer.findings):
        for module in (_module(finding), *map(_module_of_name, finding.evidence.get("also", ()))):
            checks.setdefault(module, finding.check)
    checks.pop("", None)  # which is no module in particular
    return checks


def _without_causes_of_shards(answer: CheckAnswer) -> CheckAnswer:
    """Return weights without their causes: layers that gather over a wrong group put shards together wrongly."""
    if answer.check != "weights_match_reference":
        return answer
    findings = (
        replace(finding, cause=None, evidence={**finding.evidence, "follows_from": GROUPS_CHECK})
        for finding in answer.findings
    )
    return replace(answer, findings=tuple(findings))


def _module(finding: Finding) -> str:
    parameter = str(finding.where.get("parameter", ""))
    return str(finding.where.get("module", parameter.rpartition(".")[0]))


def _module_of_name(named: str | Mapping[str, str]) -> str:
    """Return the module of a parameter, or of a parameter or buffer whose kind is given beside its name."""
    return (named if isinstance(named, str) else named["name"]).rpartition(".")[0]


def _with_consequences(
    answers: Sequence[CheckAnswer], wrong_from_the_start: Mapping[str, str], first: str | None
) -> list[CheckAnswer]:
    """Name the earlier check that accounts for a finding without a cause, where there is one.

    The first check of a step that fails accounts for all after it; what is wrong in a module from the start accounts
    for the findings of other checks in that module.
    """

    def marked(finding: Finding) -> Finding:
        source = wrong_from_the_start.get(_module(finding)) if first in (None, finding.check) else first
        if finding.cause is not None or source is None or (first is None and source == finding.check):
            return finding
        return replace(finding, evidence={**finding.evidence, "follows_from": source})

    return [replace(answer, findings=tuple(map(marked, answer.findings))) for answer in answers]
