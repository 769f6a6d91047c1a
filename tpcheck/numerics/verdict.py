"""Runs every check on the evidence of each TP group, explains what fails, and joins the results into one verdict."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tpcheck.core.findings import CheckResult, Coverage, Finding, Verdict
from tpcheck.numerics.checks import ON_REQUEST, START_CHECKS, STEP_CHECKS
from tpcheck.numerics.error_map import error_map
from tpcheck.numerics.evidence import (
    CheckOutcome,
    Evidence,
    MarginsByModule,
    Suspect,
    WayOutcome,
    modules_of,
    worst_by_module,
)
from tpcheck.numerics.hypotheses import explain

# Findings of one cause are one mistake where these are the same, too.
_SAME_MISTAKE_KEYS = ("factors", "rounded_to", "note", "story", "gradient_ratio", "weight_ratio", "momentum_ratio")
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
    shown = tuple(str(finding.evidence.get(name)) for name in _SAME_MISTAKE_KEYS) if finding.cause is not None else ()
    return finding.check, finding.where.get("phase"), finding.cause, tuple(finding.where.get("ranks", ())), shown


def _merge_findings(findings: Sequence[Finding]) -> Finding:
    first, *others = findings
    if not others:
        return first
    names = [str(finding.where["parameter"]) for finding in others]
    also = [name for each in findings for name in each.evidence.get("also", ()) if name != first.where["parameter"]]
    return replace(first, evidence={**first.evidence, "also": list(dict.fromkeys([*names, *also]))})


@dataclass(frozen=True, slots=True)
class CheckAnswer:
    """The result of one check at one moment, explained.

    Attributes:
        check: Its name.
        step: Number of the step; -1 for the start.
        margins: Observed / allowed error of every comparison, by name.
        findings: What failed, joined by mistake.
        not_compared: Why something could not be compared, by name.
        by_module: The worst of the margins by the phase and module that they are of, as in `CheckOutcome`.
    """

    check: str
    step: int
    margins: Mapping[str, float]
    findings: tuple[Finding, ...]
    not_compared: Mapping[str, str]
    by_module: MarginsByModule = field(default_factory=dict)

    def with_way(self, outcome: WayOutcome) -> CheckAnswer:
        """Add the result of one way that the check tries."""
        return replace(
            self,
            margins={**self.margins, **outcome.margins},
            findings=(*self.findings, *outcome.findings),
            not_compared={**self.not_compared, **outcome.not_compared},
        )


@dataclass(frozen=True, slots=True)
class GroupAnswer:
    """The results of all checks for one TP group, in their order.

    Attributes:
        answers: One for each check and moment.
        last_step: The last step that was compared: after a step with findings, later ones mean nothing.
    """

    answers: tuple[CheckAnswer, ...] = field(default_factory=tuple)
    last_step: int = -1


def start_answer(evidence: Evidence, checks: Sequence[str]) -> GroupAnswer:
    """Run the named checks of what there is before the first step."""
    answers = [_answer(name, -1, check(evidence)) for name, check in START_CHECKS.items() if name in checks]
    if any(answer.findings for answer in answers if answer.check == _GROUPS):
        answers = [_without_causes_of_shards(answer) for answer in answers]
    return GroupAnswer(tuple(_with_consequences(answers, _wrong_from_the_start(answers), first=None)))


def forbids_training(start: GroupAnswer) -> bool:
    """Return whether steps would mean nothing: the ranks are not one TP model, and may even wait for each other."""
    return any(answer.findings and answer.check in _FATAL for answer in start.answers)


_GROUPS = "groups_match_topology"
_FATAL = (_GROUPS, "parameters_are_sharded")


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
    return GroupAnswer(tuple(answers), last_step)


def _answer(check: str, step: int, outcome: CheckOutcome) -> CheckAnswer:
    findings = group_findings([_finding(suspect, is_first=not index) for index, suspect in enumerate(outcome.suspects)])
    return CheckAnswer(check, step, outcome.margins, findings, outcome.not_compared, outcome.by_module)


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
        evidence |= {**explanation.evidence, "cause_error": explanation.residual}
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
        replace(finding, cause=None, evidence={**finding.evidence, "follows_from": _GROUPS})
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


def verdict(
    groups: Sequence[GroupAnswer],
    *,
    steps: int,
    subject: Mapping[str, Any],
    environment: Mapping[str, str],
    again: str | None,
    seconds: float,
    notes: tuple[str, ...] = (),
) -> Verdict:
    """Return the verdict over all TP groups, without the steps after the first one at which any group failed."""
    last_step = min(group.last_step for group in groups)
    answers = [answer for group in groups for answer in group.answers if answer.step <= last_step]
    findings = tuple(replace(finding, again=again) for finding in _merge_groups(answers))
    coverage = _coverage(answers, last_step, steps)
    message = None
    if not findings and not coverage.compared:
        message = "nothing was compared: " + next(iter(coverage.not_compared.values()), "no check applies")
    return Verdict(
        verdict="failed" if findings else "skipped" if message is not None else "passed",
        subject=subject,
        environment=environment,
        findings=findings,
        checks=_results(answers),
        coverage=coverage,
        seconds=seconds,
        message=message,
        notes=notes,
        modules=modules_of(worst_by_module(*(answer.by_module for answer in answers))),
    )


def _merge_groups(answers: Sequence[CheckAnswer]) -> list[Finding]:
    """Return the findings in the order of the checks; those of several groups about one tensor are merged."""
    merged: dict[tuple[Any, ...], Finding] = {}
    order = list(dict.fromkeys((answer.step, answer.check) for answer in answers))
    for answer in sorted(answers, key=lambda answer: order.index((answer.step, answer.check))):
        for finding in answer.findings:
            subject = (finding.check, *(str(finding.where.get(key)) for key in _WHERE_KEYS))
            known = merged.get(subject)
            merged[subject] = finding if known is None else _merge_two_groups(known, finding)
    return list(merged.values())


_WHERE_KEYS = ("phase", "step", "module", "parameter", "field")


def _merge_two_groups(first: Finding, second: Finding) -> Finding:
    worse, better = (second, first) if second.margin > first.margin else (first, second)
    ranks = sorted({*first.where.get("ranks", ()), *second.where.get("ranks", ())})
    where = {key: value for key, value in worse.where.items() if key != "dp_rank"}
    also = [*worse.evidence.get("also", ())]
    also += [named for named in better.evidence.get("also", ()) if named not in also]
    evidence = {**worse.evidence, "also": also} if also else worse.evidence
    return replace(worse, where={**where, "ranks": ranks}, evidence=evidence)


def _results(answers: Sequence[CheckAnswer]) -> tuple[CheckResult, ...]:
    results: dict[str, CheckResult] = {}
    for answer in answers:
        check, margins = answer.check, answer.margins
        known = results.get(check, CheckResult(check, 0, 0.0))
        compared = known.compared + len(margins)
        worst_at = max(margins, key=margins.__getitem__, default=None)
        if worst_at is not None and margins[worst_at] > known.worst_margin:
            at = worst_at if answer.step < 0 else f"{worst_at}, step {answer.step}"
            results[check] = CheckResult(check, compared, margins[worst_at], at)
        else:
            results[check] = replace(known, compared=compared)
    return tuple(results.values())


def _coverage(answers: Sequence[CheckAnswer], last_step: int, steps: int) -> Coverage:
    compared = sum(len(answer.margins) for answer in answers)
    not_compared: dict[str, str] = {}
    for answer in answers:
        moment = "" if answer.step < 0 else f"step {answer.step}: "
        not_compared |= {f"{answer.check}: {moment}{name}": why for name, why in answer.not_compared.items()}
    earlier = "the model at the start" if last_step < 0 else f"step {last_step}"
    differs = any(answer.findings and answer.check not in ON_REQUEST for answer in answers)
    for step in range(last_step + 1, steps) if differs else ():
        not_compared[f"step {step}"] = (
            f"{earlier} already differs, so differences in later steps would only follow from it"
        )
    return Coverage(compared, compared + len(not_compared), not_compared)
