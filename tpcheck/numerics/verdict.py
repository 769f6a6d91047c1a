"""Joins the answers of all TP groups into one verdict. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tpcheck.core.check_names import ON_REQUEST
from tpcheck.core.findings import CheckResult, Coverage, Finding, Verdict
from tpcheck.numerics.evidence import MarginsByModule, WayOutcome, modules_of, worst_by_module


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
        compared_only: What alone was compared, as in `CheckOutcome`.
    """

    check: str
    step: int
    margins: Mapping[str, float]
    findings: tuple[Finding, ...]
    not_compared: Mapping[str, str]
    by_module: MarginsByModule = field(default_factory=dict)
    compared_only: str = ""

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


def forbids_training(start: GroupAnswer) -> bool:
    """Return whether steps would mean nothing: the ranks are not one TP model, and may even wait for each other."""
    return any(answer.findings and answer.check in _FATAL for answer in start.answers)


GROUPS_CHECK = "groups_match_topology"
_FATAL = (GROUPS_CHECK, "parameters_are_sharded")
_OUTPUTS_CHECK, _GRADIENTS_CHECK = "outputs_match_reference", "gradients_match_reference"


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
    groups = _without_causes_of_other_replicas(groups)
    answers = [answer for group in groups for answer in group.answers if answer.step <= last_step]
    findings = tuple(replace(finding, again=again) for finding in _merge_groups(answers))
    coverage = _coverage(answers, last_step, steps)
    checks = _results(answers)
    message = None
    if not findings and not any(check.says_something for check in checks):
        exception = next((f" but {check.compared_only}" for check in checks if check.compared_only), "")
        why = next(iter(coverage.not_compared.values()), "no check applies")
        message = f"nothing was compared{exception}: {why}"
    return Verdict(
        verdict="failed" if findings else "skipped" if message is not None else "passed",
        subject=subject,
        environment=environment,
        findings=findings,
        checks=checks,
        coverage=coverage,
        seconds=seconds,
        message=message,
        notes=notes,
        modules=modules_of(worst_by_module(*(answer.by_module for answer in answers))),
    )


def _without_causes_of_other_replicas(groups: Sequence[GroupAnswer]) -> Sequence[GroupAnswer]:
    """Return the answers with the gradients that are wrong since another replica's activations are.

    Gradients of parameters are averaged over DP: in a TP group whose own activations are right, those of all parameters
    follow from what is wrong in another group.
    """
    sources = [
        {answer.step: answer.check for answer in reversed(group.answers) if _of_activations(answer)} for group in groups
    ]
    joined = []
    for group, own in zip(groups, sources, strict=True):
        others = {step: check for of_group in sources for step, check in of_group.items()}
        answers = (
            replace(answer, findings=tuple(_following(each, others[answer.step]) for each in answer.findings))
            if answer.check == _GRADIENTS_CHECK and answer.step in others and answer.step not in own
            else answer
            for answer in group.answers
        )
        joined.append(replace(group, answers=tuple(answers)))
    return joined


def _of_activations(answer: CheckAnswer) -> bool:
    """Return whether an activation, or the gradient of one, is wrong, and does not follow from another check."""
    return answer.check in (_OUTPUTS_CHECK, _GRADIENTS_CHECK) and any(
        "parameter" not in finding.where and "follows_from" not in finding.evidence for finding in answer.findings
    )


def _following(finding: Finding, check: str) -> Finding:
    evidence = {key: value for key, value in finding.evidence.items() if key not in ("inputs_agree", "advice")}
    return replace(finding, cause=None, evidence={**evidence, "follows_from": check})


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
    compared_subject = {answer.check for answer in answers if answer.margins and not answer.compared_only}
    compared_only = {
        answer.check: answer.compared_only
        for answer in answers
        if answer.compared_only and answer.check not in compared_subject
    }
    return tuple(replace(result, compared_only=compared_only.get(check)) for check, result in results.items())


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
