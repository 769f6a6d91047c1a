"""Causes of the optimizer's step (clipped by another norm, not taken, another rank's momentum), and of drift."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import log10

from tpcheck.core.causes import Cause, Explanation
from tpcheck.core.clipping import EPSILONS
from tpcheck.numerics.differences import frobenius_distance
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.proof import Hypothesis, largest_residual, same_shapes, wrong_tp_ranks
from tpcheck.numerics.norms import explain_norm, groups_with_own_norm
from tpcheck.numerics.tolerance import FITTED_RELATIVE_ERROR, RESIDUAL_EXACT


def skipped(suspect: Suspect) -> Explanation | None:
    """Some ranks skipped the step, and the reference takes it."""
    return Explanation(Cause.STEP_SKIPPED) if suspect.step.skipped_on else None


def unlike_masters(suspect: Suspect) -> Explanation | None:
    """Every wrong rank has a weight that is not its float32 master, rounded."""
    unlike = suspect.step.unlike_masters_on
    return Explanation(Cause.MASTERS_STALE) if unlike and set(suspect.where.get("ranks", ())) <= {*unlike} else None


def wrong_norm(suspect: Suspect) -> Explanation | None:
    """The ranks' norms are summed up in one of the usual wrong ways."""
    return None if suspect.norms is None else explain_norm(suspect.norms.of_reported, suspect.norms.norms).explanation


def norm_of_one_group(suspect: Suspect) -> Explanation | None:
    """Groups of parameters are clipped each by its own norm, and the norm that is reported is that of one of them."""
    facts = suspect.norms
    if facts is None or facts.step is None:
        return None
    for names, norm in groups_with_own_norm(facts.step, facts.norms):
        error = facts.of_reported.error_of((norm,) * facts.norms.tp, facts.tolerance)
        if error is not None:
            note = "it is the norm of one group"
            return Explanation(Cause.CLIPPED_PER_GROUP, error, {"note": note, "parameters": sorted(names)})
    return None


def only_the_report_is_wrong(suspect: Suspect) -> Explanation | None:
    """No usual mistake gives what is reported, and every gradient was clipped by the right norm, not by that one."""
    facts = suspect.norms
    if facts is None or not facts.clips_otherwise_than_reported or facts.step is None or not facts.step.is_right:
        return None
    return None if explain_norm(facts.of_reported, facts.norms).could_be else Explanation(Cause.REPORTED_NORM_WRONG)


def gradient_with_the_loss_scale(suspect: Suspect) -> Explanation | None:
    """Every rank's gradient is larger by the loss scale than it should be, or smaller, or divided by the next one."""
    ratios, scale = suspect.step.ratios.get("gradient", ()), suspect.step.loss_scale
    if not ratios or scale == 1:
        return None
    next_scale = suspect.step.next_loss_scale
    for factor, note in (
        (scale, "it is not divided by the loss scale"),
        (1 / scale, _DIVIDED_TWICE),
        *(((scale / next_scale, _DIVIDED_BY_NEXT),) if next_scale not in (1, scale) else ()),
    ):
        if all(abs(ratio - factor) <= RESIDUAL_EXACT * factor for ratio in ratios):
            return Explanation(
                Cause.GRADIENT_SCALED, evidence={"factors": suspect.step.known_digits(ratios), "note": note}
            )
    return None


_DIVIDED_TWICE = "it is divided by the loss scale twice, or clipped before it is divided"
_DIVIDED_BY_NEXT = "it is divided by the loss scale of the next step"


def clipped_by_groups(suspect: Suspect) -> Explanation | None:
    """Each group of parameters is clipped by the norm of its own gradients."""
    facts = suspect.norms
    if facts is None or facts.step is None:
        return None
    groups = groups_with_own_norm(facts.step, facts.norms)
    if not groups:
        return None
    evidence = {"norm_of_group": [norm for _, norm in groups], "groups": [sorted(names) for names, _ in groups]}
    return Explanation(Cause.CLIPPED_PER_GROUP, evidence=evidence)


def clipped_with_another_epsilon(suspect: Suspect) -> Explanation | None:
    """The step is that of gradients clipped by the right norm plus a power of ten."""
    facts = suspect.norms
    if facts is None or not facts.implied or facts.clipping.max_norm <= 0:
        return None
    epsilons = [norm + facts.clipping.epsilon - facts.expected for norm in facts.implied]
    nearest = 10.0 ** round(log10(epsilons[0])) if epsilons[0] > 0 else 0.0
    errors = [abs(epsilon - nearest) for epsilon in epsilons]
    if nearest <= EPSILONS[-1] or max(errors) > min(FITTED_RELATIVE_ERROR * facts.expected, RESIDUAL_EXACT * nearest):
        return None
    return Explanation(Cause.CLIP_EPSILON_DIFFERS, max(errors) / facts.expected, {"epsilon": nearest})


def clipped_by_another_norm(suspect: Suspect) -> Explanation | None:
    """The step of each wrong rank is that of gradients clipped by a norm that is summed up in a usual wrong way."""
    facts = suspect.norms
    if facts is None or not facts.implied:
        return None
    wrong = wrong_tp_ranks(suspect)
    if wrong and len(wrong) < len(facts.implied):  # each may have a norm of its own; the right ones say nothing of it
        own = (norm if rank in wrong else facts.norms.of_ranks[rank] for rank, norm in enumerate(facts.implied))
        facts = replace(facts, implied=tuple(own))
    search = facts.step is not None and facts.step.is_uniform
    return explain_norm(facts.of_implied, facts.norms, search=search).explanation


def step_hypotheses(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield the weights if the optimizer sees shards, and without this step; then with another shard's momentum.

    The momentum is that of one rank everywhere, or that of the next rank.
    """
    step, tp = suspect.step, len(suspect.actual_parts)
    if step.on_shards:
        yield Hypothesis(Cause.OPTIMIZER_SEES_ONE_SHARD, step.on_shards)
    if step.before:
        yield Hypothesis(Cause.STALE_WEIGHT, step.before)
    if not step.momentum_parts:
        return
    moves = [part.double() for part in step.momentum_parts]
    one_everywhere = [(Cause.SHARD_REPEATED, [source] * tp) for source in range(tp)]
    shifted = [(Cause.SHARD_ORDER_SWAPPED, [(rank + by) % tp for rank in range(tp)]) for by in range(1, tp)]
    for cause, sources in (*one_everywhere, *shifted):
        predicted = tuple(
            expected.double() + step.momentum_share * (moves[source] - move)
            for expected, move, source in zip(suspect.expected_parts, moves, sources, strict=True)
        )
        note = "the momentum of another rank's shard gives these weights"
        yield Hypothesis(cause, predicted, {"momentum_of_tp_rank": sources, "note": note})


def state_of_an_earlier_step(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield what the expected state was before this step."""
    if suspect.step.before:
        yield Hypothesis(Cause.STALE_WEIGHT, suspect.step.before)


def state_of_another_rank(suspect: Suspect) -> Explanation | None:
    """Every wrong rank holds, of a parameter that is sharded, the state of another rank's shard."""
    if suspect.is_replicated or not same_shapes(suspect.actual_parts, suspect.expected_parts):
        return None
    limit, sources = largest_residual(suspect), []
    for tp_rank in wrong_tp_ranks(suspect):
        actual = suspect.actual_parts[tp_rank]
        source = next(
            (
                other
                for other, expected in enumerate(suspect.expected_parts)
                if other != tp_rank and expected.shape == actual.shape and frobenius_distance(actual, expected) <= limit
            ),
            None,
        )
        if source is None:
            return None
        sources.append(source)
    evidence = {"state_of_tp_rank": sources}
    return Explanation(Cause.OPTIMIZER_STATE_OF_ANOTHER_RANK, evidence=evidence) if sources else None


def replicas_drift_in_step(suspect: Suspect) -> Explanation | None:
    """Replicas differ after this step: some of the TP ranks are right, or those over DP differ."""
    replicas = suspect.replicas
    if replicas.differed_at_start or replicas.gradients_differ:
        return None
    are_some_right = suspect.is_replicated and 0 < len(wrong_tp_ranks(suspect)) < len(suspect.actual_parts)
    return Explanation(Cause.REPLICA_DRIFT) if are_some_right or replicas.differ_over_dp else None


def replicas_drift(suspect: Suspect) -> Explanation | None:
    """Replicas that were equal at the start are not any more, and it is not their gradients that differ."""
    is_at_start = suspect.where.get("phase") == "start"
    if is_at_start or suspect.replicas.differed_at_start or "gradient" in suspect.replicas.num_differing:
        return None
    return Explanation(Cause.REPLICA_DRIFT)
