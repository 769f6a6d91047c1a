"""The norm that gradients are clipped by: of all of them, and the same on every rank?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import hypot, sqrt

from tpcheck.core.causes import Explanation
from tpcheck.core.findings import Finding
from tpcheck.numerics.norms import NORM_CAUSES, GradientNorms, Matches, ObservedNorm, explain_norm
from tpcheck.numerics.tolerance import FITTED_RELATIVE_ERROR, SAFETY_FACTOR
from tpcheck.runs.comparing.comparisons import Comparison, margin
from tpcheck.runs.comparing.run_findings import NORM, Answer
from tpcheck.runs.comparing.sketch_causes import clip_factors
from tpcheck.runs.comparing.step_context import StepContext, loss_scales
from tpcheck.runs.trace.wholes import epsilon

# Factors of parameters' gradients are those of one clipping where they are as near to each other.
_SAME_FACTOR = 1e-3


def clipped_otherwise(
    context: StepContext, wrong: Sequence[Comparison], comparisons: Sequence[Comparison]
) -> Explanation | None:
    """Return by which norm each rank clipped, where all gradients differ by one factor a rank."""
    group = context.run.replicas[0]
    if len(group) < 2 or len(wrong) < max(1, len([each for each in comparisons if each.expected.norm]) // 2):
        return None
    factors: dict[int, list[float]] = {}
    for each in wrong:
        of_each = clip_factors(each)
        if of_each is None:
            return None
        for rank, factor in of_each.items():
            factors.setdefault(rank, []).append(factor)
    noise = max(FITTED_RELATIVE_ERROR, 100 * max(epsilon(each.expected.dtype) for each in wrong))
    if any(max(of_rank) - min(of_rank) > _SAME_FACTOR * abs(of_rank[0]) for of_rank in factors.values()):
        return None
    if not all(rank in factors for rank in group):
        return None
    # Every rank multiplied its gradients by c / N(rank), where the expected run multiplied them by c / N and has norm c
    # now. So the norm that a rank used, times that multiplier, is c: N(rank) is compared in units of clipped gradients.
    norms = norms_of_ranks(comparisons, group)
    if norms is None:
        return None
    clipped_to = hypot(*(each.expected.norm for each in comparisons))
    observed = ObservedNorm((clipped_to,) * len(group), norms.whole, noise, noise, unit=0.0)
    explanation = explain_norm(observed, norms).explanation
    if explanation is None:
        return None
    inverse = [1 / of_rank[0] if of_rank[0] else 0.0 for of_rank in (factors[rank] for rank in group)]
    if _is_round(inverse, len(group)) and not _is_clipped(context, clipped_to):
        return None
    shown = {str(rank): float(f"{factors[rank][0]:.6g}") for rank in group}
    return replace(explanation, evidence={**explanation.evidence, "factor_of_rank": shown, "clipped_to": clipped_to})


def _is_round(factors: Sequence[float], tp: int) -> bool:
    """Return whether the ranks share one factor that may be anything's: a number, or the root of one up to `tp`.

    A norm that is wrong by it, as one summed over the ranks, scales gradients no otherwise than a loss divided twice.
    """
    factor = factors[0]
    if any(abs(other - factor) > _SAME_FACTOR * abs(factor) for other in factors):
        return False
    numbers = [each for each in (factor, 1 / factor) if each >= 1] if factor > 0 else []
    roots = [each**2 for each in numbers if each**2 < tp + 0.5]
    return any(round(each) > 1 and abs(each - round(each)) <= _SAME_FACTOR * each for each in (*numbers, *roots))


def _is_clipped(context: StepContext, norm: float) -> bool:
    """Return whether the expected run says that its gradients, which have this norm now, had a larger one."""
    reported = [step.reported_norm for step in context.step.expected.values() if step.reported_norm is not None]
    return any(each > norm * (1 + _SAME_FACTOR) for each in reported)


def norms_of_ranks(comparisons: Sequence[Comparison], group: Sequence[int]) -> GradientNorms | None:
    """Return the norms of the actual run's gradients; None where a tensor's pieces are not those of one TP group."""
    by_rank: dict[int, dict[str, float]] = {rank: {} for rank in group}
    replicated = set()
    for each in comparisons:
        parts = each.actual.parts
        if each.is_of_norms or not all(rank in parts for rank in group):
            return None
        if len({parts[rank].piece for rank in group}) == 1:
            replicated.add(each.name)
        for rank in group:
            by_rank[rank][each.name] = sqrt(parts[rank].sketch.sum_squares)
    vectors = frozenset(each.name for each in comparisons if len(each.expected.shape) < 2)
    matrices = frozenset(each.name for each in comparisons) - vectors
    kinds = {"every vector": vectors, "every matrix": matrices}
    return GradientNorms(tuple(by_rank[rank] for rank in group), frozenset(replicated), kinds=kinds)


def norm_matches(context: StepContext, gradients: Answer) -> Answer:
    """Is the norm that the loop says it clipped by that of all gradients?

    Clipped gradients are smaller than that norm: then it is compared with the norm that the other run tells.
    """
    number = context.number
    comparisons = [each for each in gradients.comparisons if each.kind == "gradient"]
    reported = {
        rank: step.reported_norm for rank, step in context.step.actual.items() if step.reported_norm is not None
    }
    clipping = [finding for finding in gradients.findings if finding.cause in NORM_CAUSES]
    if clipping:
        first = clipping[0]
        where = {"phase": "update", "step": number, "ranks": first.where.get("ranks", [])}
        return Answer(NORM, number, findings=(replace(first, check=NORM, where=where),))
    if not reported:
        reason = (
            "the actual run reports no norm that it clips by: its gradients are compared as they are after clipping"
        )
        return Answer(NORM, -1, not_compared={"gradient norm": reason})  # once for all steps
    own = hypot(*(each.actual.norm for each in comparisons))
    told_e = next(
        (step.reported_norm for step in context.step.expected.values() if step.reported_norm is not None), None
    )
    eps = max([epsilon(each.actual.dtype) for each in comparisons] or [epsilon("float32")])
    eps = max(eps, epsilon("float32"))
    is_complete = bool(comparisons) and not any(label.startswith("gradient of") for label in gradients.not_compared)
    expected = told_e
    if expected is None:
        if not is_complete:
            reason = "the norm that the expected run clips by is unknown, and not all gradients were compared"
            return Answer(NORM, number, not_compared={"gradient norm": reason})
        if all(norm > own * (1 + SAFETY_FACTOR * eps) for norm in reported.values()):
            reason = "gradients are clipped, and the norm that the expected run clips by is unknown"
            return Answer(NORM, number, not_compared={"gradient norm": reason})
        expected = own
    deviations = [each.deviation or 0.0 for each in comparisons] if told_e is not None else []
    unclipped = told_e / own if told_e is not None and own else 1.0
    allowed = SAFETY_FACTOR * max(2 * eps * expected, hypot(*deviations) * max(1.0, unclipped))
    wrong = {rank: norm for rank, norm in reported.items() if not abs(norm - expected) <= allowed}
    error = max(abs(norm - expected) for norm in reported.values())
    margins = {"gradient norm": margin(error, allowed)}
    is_measured = told_e is None or bool(context.measured.replays)
    if not wrong or not is_measured:
        return Answer(NORM, number, margins if is_measured else {})
    group = context.run.replicas[0]
    norms = norms_of_ranks(comparisons, group) if is_complete else None
    matches = Matches()
    if norms is not None and norms.whole and all(rank in reported for rank in group):
        before = expected / norms.whole  # by which clipping made them smaller
        noise = max(10 * eps, allowed / expected / 10)
        used = tuple(reported[rank] / before for rank in group)
        matches = explain_norm(
            ObservedNorm(used, norms.whole, noise, noise, scales=_scales(context), unit=before), norms
        )
    explanation = matches.explanation
    evidence = {
        "norm_actual": [reported[rank] for rank in sorted(reported)],
        "norm_expected": expected,
        "dtype": context.measured.dtype,
        **({"norm_could_be": list(matches.could_be)} if matches.could_be else {}),
        **(explanation.evidence if explanation else {}),
    }
    relative_error = error / expected if expected else error
    finding = Finding(
        NORM,
        {"phase": "update", "step": number, "ranks": sorted(wrong)},
        relative_error,
        allowed / expected if expected else allowed,
        explanation.cause.slug if explanation else None,
        evidence,
    )
    return Answer(NORM, number, margins, (finding,))


def _scales(context: StepContext) -> dict[str, float]:
    """Return by what gradients are multiplied before they are unscaled."""
    known = {
        "the number of micro-batches": float(context.num_passes),
        "the number of replicas": float(context.run.dp),
        "the loss scale": loss_scales(context.step)[0],
    }
    return {what: scale for what, scale in known.items() if scale > 1}
