"""Checks of what a step leaves behind: weights and buffers, moments and masters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.checks.suspects import DECAYED_OR_NOT
from tpcheck.numerics.sketch import Sketch
from tpcheck.runs.comparing.comparisons import Comparison
from tpcheck.runs.comparing.exact_checks import (
    differing_options,
    optimizer_of,
    options_as_evidence,
    options_finding,
    weights_moved,
)
from tpcheck.runs.comparing.full_tensors import explain_in_full
from tpcheck.runs.comparing.run_findings import STATES, UPDATES, Answer, exact_finding, finding_at, joined
from tpcheck.runs.comparing.sketch_causes import explain, sees_one_shard, share_of
from tpcheck.runs.comparing.state_causes import (
    distance_from_masters,
    has_unlike_replicas,
    replaced_state,
    stale_masters,
)
from tpcheck.runs.comparing.step_context import StepContext, judge
from tpcheck.runs.trace.wholes import sketch_of_whole

# ---- weights and buffers


def updates_match(context: StepContext, gradients: Answer) -> Answer:
    """Compare weights and buffers after the step."""
    number, comparer = context.number, context.comparer
    comparer.not_compared = {}
    differing = differing_options(comparer, context.step)
    if not all(step.has_update for step in (*context.step.actual.values(), *context.step.expected.values())):
        return Answer(UPDATES, number, not_compared={"weights": "no optimizer step followed these calls"})
    moved = weights_moved(number, context.around, context.actual)
    comparisons = comparer.stored(
        context.around.actual_after, context.around.expected_after, ("weight", "buffer"), scale=context.scale
    )
    not_compared = dict(comparer.not_compared)
    if not context.is_update_judged:
        given = {
            each.label: "weights before the step were not recorded, so what is different is given"
            for each in comparisons
        }
        return Answer.of(UPDATES, number, comparisons, moved.findings, {**not_compared, **given}, comparisons)
    has_gradient = {each.name for each in gradients.comparisons if each.kind == "gradient"}
    judged = judge(context, comparisons)
    comparisons, wrong = judged.comparisons, judged.wrong
    not_compared |= judged.reasons
    undecayed = [each for each in wrong if each.kind == "weight" and has_gradient and each.name not in has_gradient]
    for each in undecayed:
        if not any(label.endswith(each.name) for label in gradients.not_compared):
            not_compared[each.label] = DECAYED_OR_NOT
    wrong = [each for each in wrong if each not in undecayed]
    findings = list(moved.findings)
    stale_names = {name for each in findings for name in (each.where["parameter"], *each.evidence["also"])}
    explained_otherwise = [each for each in wrong if each.name not in stale_names]
    gradients_agree = not gradients.findings
    for each in explained_otherwise:
        explanation, evidence = _explain_update(context, each, differing, gradients_agree)
        findings.append(finding_at(UPDATES, number, each, explanation, context.measured, evidence=evidence))
    findings = joined(findings)
    if differing and not findings and not context.measured.replays and gradients_agree:
        findings = [options_finding(number, differing)]
    elif differing and not findings:
        not_compared[f"options of {next(iter(differing))}"] = (
            f"the optimizers' options differ ({_phrase(differing)}), and the updates agree"
        )
    answer = Answer.of(UPDATES, number, comparisons, findings, not_compared, [*undecayed, *judged.rerouted])
    return replace(answer, margins={**answer.margins, **moved.margins})


def _phrase(differing: Mapping[str, Mapping[str, Any]]) -> str:
    options = next(iter(differing.values()))
    return ", ".join(f"{name} {actual} and {expected}" for name, (actual, expected) in options.items())


def _explain_update(
    context: StepContext, comparison: Comparison, differing: Mapping[str, Mapping[str, Any]], gradients_agree: bool
) -> tuple[Explanation | None, dict[str, Any]]:
    """Return the cause of a wrong weight, and what its move is beside the expected one."""
    evidence: dict[str, Any] = {}
    ratio = _update_ratio(context, comparison)
    if ratio is not None:
        evidence["update_ratio"] = float(f"{ratio:.6g}")
    of_parameter = differing.get(comparison.name)
    explanation = explain(context.suspect(comparison))
    if explanation is None and gradients_agree:
        explanation = explain_in_full(context.full, comparison, (comparison,))
    if explanation is not None or not gradients_agree or comparison.kind != "weight":
        return explanation, evidence
    if of_parameter:
        shown = options_as_evidence({comparison.name: of_parameter})
        return Explanation(Cause.OPTIONS_DIFFER, evidence=shown), evidence
    optimizer = optimizer_of(context.comparer, context.step.actual, comparison.name)
    for test in (
        partial(stale_masters, context.around.actual_before, comparison.name, comparison.actual.label),
        partial(sees_one_shard, optimizer, comparison.actual),
        partial(replaced_state, context.comparer, context.step, context.around, comparison.name),
        partial(_replicas_drifted, comparison),
    ):
        found = test()
        if found is not None:
            return found, evidence
    if optimizer:
        evidence["optimizer"] = optimizer
    return None, evidence


def _before(context: StepContext, comparison: Comparison) -> tuple[Sketch, Sketch] | None:
    """Return the weights of both runs before the step; None where they were not recorded."""
    found = []
    sides = (
        (context.around.actual_before, comparison.actual),
        (context.around.expected_before, comparison.expected),
    )
    for table, whole in sides:
        weight = sketch_of_whole(table.get(("weight", comparison.name, "", 0), {}), whole.label)
        if weight is None:
            return None
        found.append(weight)
    return found[0], found[1]


def _update_ratio(context: StepContext, comparison: Comparison) -> float | None:
    """Return the share of the expected move that the weight moved by; None where there is no move."""
    before = _before(context, comparison) if comparison.kind == "weight" and not comparison.is_of_norms else None
    if before is None:
        return None
    worst = max(zip(comparison.errors, comparison.actual.variants, strict=True), key=lambda each: each[0])[1]
    return share_of(worst.sketch - before[0], comparison.expected.sketch - before[1]) or None


def _replicas_drifted(comparison: Comparison) -> Explanation | None:
    """Some replicas are right and others are wrong, although their gradients agree."""
    allowed = comparison.allowed or 0.0
    right = [error <= allowed for error in comparison.errors]
    return Explanation(Cause.REPLICA_DRIFT) if any(right) and not all(right) else None


# ---- optimizer states


def states_match(context: StepContext, gradients: Answer) -> Answer:
    """Compare moments and masters after the step."""
    number, comparer = context.number, context.comparer
    comparer.not_compared = {}
    around = context.around
    comparisons = comparer.stored(around.actual_after, around.expected_after, ("state", "master"), scale=context.scale)
    not_compared = dict(comparer.not_compared)
    if not context.is_update_judged:
        given = {
            each.label: "states before the step were not recorded, so what is different is given"
            for each in comparisons
        }
        return Answer.of(STATES, number, comparisons, (), {**not_compared, **given}, comparisons)
    findings = []
    judged = judge(context, comparisons)
    comparisons, wrong = judged.comparisons, judged.wrong
    not_compared |= judged.reasons
    differing = differing_options(comparer, context.step)
    for each in wrong:
        explanation = explain(context.suspect(each))
        if explanation is None and not gradients.findings and each.name in differing:
            shown = options_as_evidence({each.name: differing[each.name]})
            explanation = Explanation(Cause.OPTIONS_DIFFER, evidence=shown)
        if explanation is None and not gradients.findings:
            tests: tuple[Callable[[], Explanation | None], ...] = (
                partial(replaced_state, comparer, context.step, around, each.name),
                partial(stale_masters, around.actual_after, each.name, each.actual.label),
                partial(_replicas_drifted, each),
            )
            explanation = next((found for test in tests if (found := test()) is not None), None)
        findings.append(finding_at(STATES, number, each, explanation, context.measured))
    return Answer.of(STATES, number, comparisons, joined(findings), not_compared, judged.rerouted)


def weights_are_masters(context: StepContext) -> Answer:
    """Compare the actual run's weights with its own masters after the step: a weight is its master, rounded.

    What changes masters behind a step shows in the weights only after the next one. What the expected run does, too, is
    not asked for, nor what differs between replicas, which is a finding by itself.
    """
    around, readings = context.around, context.comparer.readings
    margins: dict[str, float] = {}
    stale: dict[str, Explanation | None] = {}
    for name in dict.fromkeys(key[1] for key in around.actual_after if key[0] == "master"):
        label, label_e = readings.get(name, ("", ""))
        found = distance_from_masters(around.actual_after, name, label)
        if found is None or not isfinite(found[0]) or has_unlike_replicas(around.actual_after, name, label):
            continue
        gap, allowed = found
        if gap > allowed:
            if stale_masters(around.expected_after, name, label_e) is not None:
                continue
            stale[name] = stale_masters(around.actual_after, name, label)
        margins[f"{name} and its master"] = gap / allowed
    if not stale:
        return Answer(STATES, context.number, margins)
    first, *others = stale
    where = {"phase": "update", "step": context.number, "parameter": first}
    evidence = {"also": others, "first_of": len(stale)}
    counted = ("parameter", "is not its master, rounded", "are not their masters, rounded")
    return Answer(
        STATES, context.number, margins, (exact_finding(STATES, where, len(stale), counted, stale[first], evidence),)
    )
