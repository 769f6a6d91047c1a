"""Checks of one step by what rounding may do: outputs, their gradients, gradients of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from tpcheck.core.causes import Cause, Explanation
from tpcheck.core.findings import Finding
from tpcheck.core.name_maps import without_numbers
from tpcheck.numerics.sketch import distance
from tpcheck.numerics.tolerance import SAFETY_FACTOR
from tpcheck.runs.comparing.alignment import Run
from tpcheck.runs.comparing.backward_sums import at_sums_without_backward
from tpcheck.runs.comparing.comparisons import Comparer, Comparison, label_of, relative
from tpcheck.runs.comparing.low_precision import judged_among_neighbours, rerouted_among
from tpcheck.runs.comparing.norm_checks import clipped_otherwise
from tpcheck.runs.comparing.run_findings import GRADIENTS, OUTPUTS, Answer, finding_at, joined
from tpcheck.runs.comparing.sketch_causes import clip_factors, is_near, scaled
from tpcheck.runs.comparing.step_context import REROUTED, StepContext, judge, loss_scales
from tpcheck.runs.trace.wholes import Records, epsilon, total

# ---- outputs


def outputs_match(context: StepContext) -> Answer:
    """Compare the outputs of all modules, the loss among them."""
    context.comparer.doubtful, context.comparer.rerouted = [], set()
    comparisons, not_compared = _computed(context, "output")
    comparisons = judged_among_neighbours(comparisons, context.typical_noise)
    wrong = [each for each in comparisons if each.is_wrong]
    left_out, reasons = not_judged(context.comparer, wrong, comparisons)
    findings = _first_place(context, OUTPUTS, comparisons, [each for each in wrong if each not in left_out])
    return Answer.of(OUTPUTS, context.number, comparisons, findings, not_compared | reasons, left_out)


def doubtful_losses(context: StepContext, outputs: Answer) -> Answer:
    """Return the answer about outputs where gradients are wrong, too: with the losses that are wrong however read."""
    doubtful = context.comparer.doubtful
    findings = _first_place(context, OUTPUTS, doubtful, doubtful)
    labels = {label_of(each.key) for each in doubtful}
    not_compared = {name: reason for name, reason in outputs.not_compared.items() if name not in labels}
    return replace(outputs, findings=tuple(findings), not_compared=not_compared)


_PERMUTED = "its columns lie in another order over the ranks (a fused layer), as its norm and what follows from it show"


def not_judged(
    comparer: Comparer, wrong: Sequence[Comparison], comparisons: Sequence[Comparison]
) -> tuple[list[Comparison], dict[str, str]]:
    """Return the wrong tensors that are no mistakes, and why, by label."""
    permuted = permuted_among(wrong, comparisons)
    keys = {each.key for each in permuted}
    others = [each for each in comparisons if each.key not in keys]
    rerouted = rerouted_among(others, is_known=bool(comparer.rerouted))
    comparer.rerouted |= {each.name for each in rerouted if each.name}
    reasons = {each.label: _PERMUTED for each in permuted} | {each.label: REROUTED for each in rerouted}
    return [*permuted, *rerouted], reasons


def permuted_among(wrong: Sequence[Comparison], comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the wrong tensors of which only the guessed order of the ranks' shards is wrong.

    Where that is shown of a module, it holds for modules whose names differ in numbers alone.
    """
    shown = [each for each in wrong if may_be_permuted(each, comparisons)]
    patterns = {(without_numbers(each.name), each.part) for each in shown}
    return [each for each in wrong if keeps_norm(each) and (without_numbers(each.name), each.part) in patterns]


def keeps_norm(comparison: Comparison) -> bool:
    """Return whether how the ranks' shards lie in the whole is guessed, and the norm is the expected one."""
    actual, expected = comparison.actual, comparison.expected
    is_guess = "dim" in actual.label or "dim" in expected.label
    return is_guess and comparison.allowed is not None and abs(actual.norm - expected.norm) <= comparison.allowed


def has_doubtful_order(comparer: Comparer, comparison: Comparison) -> bool:
    """Return whether a module's weights lie in another order than shapes suggest, which its output may follow."""
    return keeps_norm(comparison) and any(name.rpartition(".")[0] == comparison.name for name in comparer.permuted)


def may_be_permuted(comparison: Comparison, comparisons: Sequence[Comparison]) -> bool:
    """Return whether the ranks' shards of a wrong tensor are guessed to be in order, and only that guess is wrong.

    The norm is the expected one, and the tensors of the module around it, and the next one, are right.
    """
    if not keeps_norm(comparison):
        return False
    position = [each.key for each in comparisons].index(comparison.key)
    following = [each for each in comparisons[position + 1 :] if "dim" not in each.actual.label]
    return bool(following) and not following[0].is_wrong


def _computed(context: StepContext, kind: str) -> tuple[list[Comparison], dict[str, str]]:
    comparer, shared = context.comparer, context.step.shared
    if shared is None:
        return [], {}
    comparer.not_compared = {}
    comparisons = comparer.computed(
        context.actual,
        context.expected,
        kind,
        shared,
        loss_scales(context.step),
        context.scale,
        context.num_calls,
        context.adds_up,
    )
    return comparisons, comparer.not_compared


def replicas_added_up(context: StepContext) -> tuple[int, int]:
    """Return for each run over how many replicas its loss is a sum, as `StepContext.adds_up`.

    Loops divide by the tokens of the replica and average gradients, or by those of all and sum them. Both are right,
    and the first gradient that comes back from the loss tells which it is. A loop that reduces gradients in the other
    way is found by its parameters' gradients, which are compared as they are. Without slices a loss that is scaled by
    mistake looks the same, so there the parameters' gradients have to tell, too.
    """
    shared = context.step.shared
    if shared is None or len(shared.actual) == len(shared.expected) == 1:
        return (1, 1)
    keyed = [key for key, records in context.expected.items() if key[0] == "output_gradient" and _is_keyed(records)]
    first = next((key for key in keyed if key in context.actual), None)
    if first is None:
        return (1, 1)
    only_first = replace(context, actual={first: context.actual[first]}, expected={first: context.expected[first]})
    errors: dict[tuple[int, int], float] = {}
    num_slices = (shared.actual_cp, shared.expected_cp)
    possible = [
        tuple(dict.fromkeys((1, number, len(replicas))))
        for number, replicas in zip(num_slices, (shared.actual, shared.expected), strict=True)
    ]
    for adds_up in ((actual, expected) for actual, expected in product(*possible)):
        for comparison in _computed(replace(only_first, adds_up=adds_up), "output_gradient")[0]:
            errors[adds_up] = comparison.relative

    def nearest(choices: Iterable[tuple[int, int]]) -> tuple[int, int]:
        return min(choices, key=lambda adds_up: errors[adds_up], default=(1, 1))  # the mean, if nothing tells

    def is_told_by_slices(adds_up: tuple[int, int]) -> bool:
        return all(number == 1 or slices > 1 for number, slices in zip(adds_up, num_slices, strict=True))

    found = nearest(errors)
    if is_told_by_slices(found) or _are_reduced_as_expected(context):
        return found
    return nearest(filter(is_told_by_slices, errors))


# Of gradients of n replicas a mean instead of the sum has a relative error of 1 - 1/n, at least twice this.
_NEARER_TO_RIGHT = 0.25


def _are_reduced_as_expected(context: StepContext) -> bool:
    """Return whether most parameters' gradients are about the expected ones, as they are or summed over replicas."""
    if context.step.shared is None or not context.step.shared.is_whole_step:
        return False
    compared = context.comparer.stored(context.actual, context.expected, ("gradient",), scale=context.scale)
    errors = [_error_if_summed(each) for each in compared if each.expected.norm and not each.is_of_norms]
    return 2 * sum(error < _NEARER_TO_RIGHT for error in errors) > len(errors)


def _error_if_summed(comparison: Comparison) -> float:
    """Return the relative error of a gradient; of its sum over the replicas where nothing has reduced it."""
    expected = comparison.expected
    wholes = [whole for whole in comparison.actual.by_group() if whole is not None]
    if all(distance(whole, wholes[0]) <= (comparison.allowed or 0.0) for whole in wholes):
        return comparison.relative
    return relative(distance(total(wholes), expected.sketch), expected.norm)


def _is_keyed(records: Records) -> bool:
    return any(-1 in reading.shape for record in records.values() for reading in record.readings)


def _first_place(
    context: StepContext, check: str, comparisons: Sequence[Comparison], wrong: Sequence[Comparison]
) -> list[Finding]:
    """Return the finding at the first wrong place, which lists what is wrong after it."""
    if not wrong:
        return []
    first = unreduced_before(comparisons, wrong[0]) or wrong[0]
    explanation = context.explain(first, comparisons)
    if explanation is None and has_doubtful_order(context.comparer, first):
        following = next((each for each in wrong if each.name != first.name), None)
        found = None if following is None else context.explain(following, comparisons)
        if following is not None and found is not None:  # then the order is that of a fused layer
            first, explanation = following, found
    if first is not wrong[0]:
        first = replace(first, terms_error=None)  # as replicas, which they were taken for by what follows
    followers = list(dict.fromkeys(each.name or "the model" for each in wrong if each.name != first.name))
    evidence: dict[str, Any] = {"first_of": len(wrong), **({"followed_by": followers} if followers else {})}
    if explanation is None:
        evidence["note"] = context.note_without_cause(first)
    return [finding_at(check, context.number, first, explanation, context.measured, evidence=evidence)]


def unreduced_before(comparisons: Sequence[Comparison], wrong: Comparison) -> Comparison | None:
    """Return the terms of a sum that nothing reduced before a wrong tensor: nothing after them, up to it, is right."""
    candidate = None
    for comparison in comparisons:
        if comparison.key == wrong.key:
            return candidate
        if comparison.is_reduced_later:
            candidate = candidate or comparison
        elif not comparison.is_wrong:
            candidate = None
    return None


# ---- gradients


def gradients_match(context: StepContext) -> Answer:
    """Compare gradients of outputs, then of parameters as the optimizer gets them."""
    number = context.number
    backward, not_compared = _computed(context, "output_gradient")
    backward = judged_among_neighbours(backward, context.typical_noise)
    wrong_backward = [each for each in backward if each.is_wrong]
    left_out, reasons = not_judged(context.comparer, wrong_backward, backward)
    not_compared |= reasons
    wrong_backward = [each for each in wrong_backward if each not in left_out]
    comparisons: list[Comparison] = []
    findings: list[Finding] = []
    if context.step.shared is not None and context.step.shared.is_whole_step:
        context.comparer.not_compared = {}
        comparisons = context.comparer.stored(context.actual, context.expected, ("gradient",), scale=context.scale)
        missing = _missing_gradients(context)
        not_compared |= {
            name: reason for name, reason in context.comparer.not_compared.items() if name not in missing.names
        }
        findings += at_sums_without_backward(
            missing.findings, backward, context.around.actual_after, context.run, context.expected
        )
    judged = judge(context, comparisons)
    comparisons, wrong = judged.comparisons, judged.wrong
    left_out = [*left_out, *judged.rerouted]
    not_compared |= judged.reasons
    factor = _common_factor(wrong_backward, backward)
    if factor is not None and comparisons and not wrong:
        scaled_together, wrong_backward = wrong_backward, []
        left_out = [*left_out, *scaled_together]
        not_compared |= {
            each.label: f"all are {factor:.6g} times the other run's, and the parameters' gradients agree: the loss is "
            "scaled in another place"
            for each in scaled_together
        }
    rounded = _factor_of_float32(wrong, comparisons)
    if rounded is not None:
        left_out, wrong = [*left_out, *wrong], []
        not_compared["factor of all gradients"] = (
            f"all are {rounded!r} times the other run's, as clipping by a norm in float32 rounds: how far weights and "
            "states are apart after it is given"
        )
    if wrong_backward:
        at_outputs = _first_place(context, GRADIENTS, backward, wrong_backward)
        shown: dict[str, Any] = {"parameters": [each.name for each in wrong]}
        if any("sum_in" in each.evidence for each in findings):
            shown |= {"follows_from": GRADIENTS, "note": "the branch whose gradients are missing is missing here, too"}
        findings += [replace(each, evidence={**each.evidence, **shown}) for each in at_outputs]
    elif wrong:
        findings += _wrong_gradients(context, wrong, comparisons)
    answer = Answer.of(GRADIENTS, number, [*backward, *comparisons], joined(findings), not_compared, left_out)
    return replace(answer, is_given=rounded is not None)


def _factor_of_float32(wrong: Sequence[Comparison], comparisons: Sequence[Comparison]) -> float | None:
    """Return the factor by which all gradients in float64 differ, where a norm in float32 rounds by as much."""
    if not wrong or len(wrong) < len(_larger_than_rounding(comparisons)):
        return None
    factors = [explain_scale(each) for each in wrong if each.expected.dtype == "float64"]
    known = [factor for factor in factors if factor is not None]
    if len(known) < len(wrong):
        return None
    limit = SAFETY_FACTOR * epsilon("float32")
    are_alike = all(abs(factor - 1) <= limit and abs(factor - known[0]) <= 1e-2 * abs(known[0] - 1) for factor in known)
    return known[0] if are_alike else None


def _larger_than_rounding(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the tensors that are no mere rounding, as the gradient of a bias of keys is: a factor shows on them."""
    return [each for each in comparisons if each.expected.norm > (each.allowed or 0.0)]


def _common_factor(wrong: Sequence[Comparison], comparisons: Sequence[Comparison]) -> float | None:
    """Return the factor by which all gradients of outputs differ; None where they differ otherwise, or some agree."""
    if not wrong or len(wrong) < len(_larger_than_rounding(comparisons)):
        return None
    factors = []
    for each in wrong:
        explanation = explain_scale(each)
        if explanation is None:
            return None
        factors.append(explanation)
    return factors[0] if max(factors) - min(factors) <= 1e-2 * abs(factors[0]) else None


def explain_scale(comparison: Comparison) -> float | None:
    """Return the one factor by which a tensor differs from the expected one, where nothing else does."""
    factors = clip_factors(comparison)
    if factors is None or max(factors.values()) - min(factors.values()) > 1e-2 * abs(max(factors.values())):
        return None
    return next(iter(factors.values()))


def _wrong_gradients(
    context: StepContext, wrong: Sequence[Comparison], comparisons: Sequence[Comparison]
) -> list[Finding]:
    """Return findings at parameters whose gradients are wrong although all gradients of outputs are right."""
    clipped = clipped_otherwise(context, wrong, comparisons)
    explanations = [clipped or context.explain(each, comparisons) for each in wrong]
    if not clipped:
        explanations = _scaled_together(context, wrong, comparisons, explanations)
    findings = []
    for each, explanation in zip(wrong, explanations, strict=True):
        evidence = {} if explanation else {"note": context.note_without_cause(each)}
        findings.append(finding_at(GRADIENTS, context.number, each, explanation, context.measured, evidence=evidence))
    return findings


def _scaled_together(
    context: StepContext,
    wrong: Sequence[Comparison],
    comparisons: Sequence[Comparison],
    explanations: Sequence[Explanation | None],
) -> list[Explanation | None]:
    """Return the explanations, of which a reduction over TP is none where shards are scaled by the same factor."""
    of_shards = {
        tuple(each.evidence["factors"])
        for each in explanations
        if each is not None and each.cause is Cause.GRADIENT_SCALED and "factors" in each.evidence
    }
    found = [
        scaled(context.suspect(of_gradient, comparisons))
        if each is not None
        and each.evidence.get("reduced_over") == "tp"
        and any(_are_all(each.evidence.get("factor", 0.0), factors) for factors in of_shards)
        else each
        for of_gradient, each in zip(wrong, explanations, strict=True)
    ]
    are_all = len(wrong) >= len(_larger_than_rounding(comparisons))
    if not are_all or len(wrong) < 2 or any(each is None or each.cause is not Cause.GRADIENT_SCALED for each in found):
        return found
    text = (
        "all gradients of parameters are scaled, and those of outputs agree: they are clipped, unscaled or divided in "
        "another way"
    )
    notes = [[each.evidence["note"]] if each is not None and "note" in each.evidence else [] for each in found]
    return [
        each and replace(each, evidence={**each.evidence, "note": "; ".join([*note, text])})
        for each, note in zip(found, notes, strict=True)
    ]


def _are_all(actual: float, factors: Sequence[float]) -> bool:
    return all(is_near(actual, factor) for factor in factors)


@dataclass(frozen=True, slots=True)
class _Missing:
    findings: list[Finding] = field(default_factory=list)
    names: frozenset[str] = frozenset()


def _missing_gradients(context: StepContext) -> _Missing:
    """Find parameters without a gradient on ranks that hold them, where the expected run has one."""
    holders: dict[str, dict[int, str]] = {}
    for key, records in context.actual.items():
        if key[0] in ("gradient", "weight"):
            holders.setdefault(key[0] + key[1], {}).update(
                {rank: record.readings[0].piece for rank, record in records.items() if record.readings}
            )
    weights = {key[1] for key in context.actual if key[0] == "weight"}
    is_partitioned = any(
        holders.get("weight" + name, {}).get(rank, piece) != piece
        for name in weights
        for rank, piece in holders.get("gradient" + name, {}).items()
    )
    findings, labels = [], set()
    for key, records_e in context.expected.items():
        if key[0] != "gradient" or key[1] not in weights or is_partitioned:
            continue
        size = sum(reading.sketch.sum_squares for record in records_e.values() for reading in record.readings[:1])
        lacking = sorted(set(holders["weight" + key[1]]) - set(holders.get("gradient" + key[1], {})))
        if not size or not lacking or _is_dp_partition(context.run, lacking):
            continue
        labels.add(f"gradient of {key[1]}")
        findings.append(
            Finding(
                GRADIENTS,
                {"phase": "backward", "step": context.number, "parameter": key[1], "ranks": lacking},
                observed=float(len(lacking)),
                allowed=0.0,
                cause=Cause.GRADIENT_MISSING.slug,
                evidence={"counted": ["rank", "has no gradient", "have no gradient"], "missing_on_ranks": lacking},
            )
        )
    return _Missing(findings, frozenset(labels))


def _is_dp_partition(run: Run, lacking: Sequence[int]) -> bool:
    """Return whether some replica has the gradient on all of its ranks: it may be that replica's partition (ZeRO)."""
    return run.dp > 1 and any(not set(group) & set(lacking) for group in run.replicas)
