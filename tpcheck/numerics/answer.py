"""Asks every check of the evidence of each TP group, explains what fails, and joins the answers into one verdict."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tpcheck.core.findings import CheckResult, Coverage, Finding, Verdict
from tpcheck.numerics.checks import START_CHECKS, STEP_CHECKS
from tpcheck.numerics.evidence import CheckOutcome, Evidence, Suspect
from tpcheck.numerics.hypotheses.explain import explain

_STORIES = ("factors", "rounded_to", "note", "story", "gradient_ratio", "weight_ratio", "momentum_ratio")
_UNEXPLAINED = 4  # findings without a cause that are told one by one


def grouped(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return the findings with those of one story as one, which names the others in its evidence.

    Only findings about parameters are joined. Those of the gradients that no cause explains may be as many mistakes:
    they stay apart where they are few.
    """
    by_story: dict[Hashable, list[Finding]] = {}
    unexplained = sum(1 for one in findings if one.cause is None and _is_of_parameter(one))
    for place, finding in enumerate(findings):
        alone = not _is_of_parameter(finding) or (_stands_alone(finding) and unexplained <= _UNEXPLAINED)
        by_story.setdefault(place if alone else _story(finding), []).append(finding)
    return tuple(_joined(of_one) for of_one in by_story.values())


def _is_of_parameter(finding: Finding) -> bool:
    return "parameter" in finding.where and "field" not in finding.where


def _stands_alone(finding: Finding) -> bool:
    return finding.cause is None and finding.where.get("phase") == "backward"


def _story(finding: Finding) -> Hashable:
    told = tuple(str(finding.evidence.get(name)) for name in _STORIES) if finding.cause is not None else ()
    return (finding.check, finding.where.get("phase"), finding.cause, tuple(finding.where.get("ranks", ())), told)


def _joined(findings: Sequence[Finding]) -> Finding:
    first, *rest = findings
    if not rest:
        return first
    names = [str(one.where["parameter"]) for one in rest]
    known = [name for one in findings for name in one.evidence.get("also", ()) if name != first.where["parameter"]]
    return replace(first, evidence={**first.evidence, "also": list(dict.fromkeys([*names, *known]))})


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
        cause=explanation.cause.slug if explanation is not None else None,
        evidence=evidence,
    )


def verdict(
    groups: Sequence[GroupAnswer],
    *,
    steps: int,
    subject: Mapping[str, Any],
    environment: Mapping[str, str],
    again: str | None,
    seconds: float,
) -> Verdict:
    """Return the verdict over all TP groups.

    What fails in consequence is dropped: steps after the first one at which any group failed.
    """
    last_step = min(group.last_step for group in groups)
    answers = [one for group in groups for one in group.answers if one.step <= last_step]
    findings = tuple(replace(finding, again=again) for finding in _merged(answers))
    return Verdict(
        verdict="failed" if findings else "passed",
        subject=subject,
        environment=environment,
        findings=findings,
        checks=_results(answers),
        coverage=_coverage(answers, last_step, steps),
        seconds=seconds,
    )


def _merged(answers: Sequence[CheckAnswer]) -> list[Finding]:
    """Return the findings in the order of the checks, those of several groups about one place as one."""
    merged: dict[tuple[Any, ...], Finding] = {}
    order = list(dict.fromkeys((one.step, one.check) for one in answers))
    for one in sorted(answers, key=lambda one: order.index((one.step, one.check))):
        for finding in one.findings:
            place = (finding.check, *(str(finding.where.get(key)) for key in _PLACE))
            known = merged.get(place)
            merged[place] = finding if known is None else _both(known, finding)
    return list(merged.values())


_PLACE = ("phase", "step", "module", "parameter", "field")


def _both(first: Finding, second: Finding) -> Finding:
    worse = second if second.margin > first.margin else first
    ranks = sorted({*first.where.get("ranks", ()), *second.where.get("ranks", ())})
    where = {key: value for key, value in worse.where.items() if key != "dp_rank"}
    also = [*worse.evidence.get("also", ())]
    also += [named for named in (first if worse is second else second).evidence.get("also", ()) if named not in also]
    evidence = {**worse.evidence, "also": also} if also else worse.evidence
    return replace(worse, where={**where, "ranks": ranks}, evidence=evidence)


def _results(answers: Sequence[CheckAnswer]) -> tuple[CheckResult, ...]:
    results: dict[str, CheckResult] = {}
    for one in answers:
        known = results.get(one.check, CheckResult(one.check, 0, 0.0))
        compared = known.compared + len(one.margins)
        worst_at = max(one.margins, key=one.margins.__getitem__, default=None)
        if worst_at is not None and one.margins[worst_at] > known.worst_margin:
            at = worst_at if one.step < 0 else f"{worst_at}, step {one.step}"
            results[one.check] = CheckResult(one.check, compared, one.margins[worst_at], at)
        else:
            results[one.check] = replace(known, compared=compared)
    return tuple(results.values())


def _coverage(answers: Sequence[CheckAnswer], last_step: int, steps: int) -> Coverage:
    compared = sum(len(one.margins) for one in answers)
    missed: dict[str, str] = {}
    for one in answers:
        moment = "" if one.step < 0 else f"step {one.step}: "
        missed.update({f"{one.check}: {moment}{name}": why for name, why in one.missed.items()})
    earlier = "the model at the start" if last_step < 0 else f"step {last_step}"
    for step in range(last_step + 1, steps):
        missed[f"step {step}"] = f"{earlier} already differs, so later steps mean nothing"
    return Coverage(compared, compared + len(missed), missed)
