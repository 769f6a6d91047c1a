"""Causes of the optimizer's step (clipped by another norm, not taken, another rank's momentum), and of drift."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.differences import frobenius_distance
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.proof import Hypothesis, largest_residual, same_shapes, wrong_tp_ranks
from tpcheck.numerics.tolerance import FITTED_RELATIVE_ERROR, RESIDUAL_EXACT


def norm_is_local(suspect: Suspect) -> Explanation | None:
    """Every rank's norm is that of the gradients of one rank alone, or of its shards alone."""
    if suspect.norms is None:
        return None
    return _norms_equal(Cause.NORM_IS_LOCAL, suspect, (*suspect.norms.of_ranks, *suspect.norms.of_ranks_shards))


def norm_counts_replicas(suspect: Suspect) -> Explanation | None:
    """Every rank's norm is that of all gradients with those of replicated parameters counted once for each rank."""
    if suspect.norms is None:
        return None
    return _norms_equal(Cause.NORM_COUNTS_REPLICAS, suspect, (suspect.norms.counting_replicas,))


def _norms_equal(cause: Cause, suspect: Suspect, explained: Sequence[float]) -> Explanation | None:
    errors = [min(abs(actual - norm) for norm in explained) for actual in suspect.actual_parts]
    error = max(errors) / suspect.expected if suspect.expected else max(errors)
    return Explanation(cause, error) if error <= RESIDUAL_EXACT * suspect.observed else None


def clipped_by_local_norm(suspect: Suspect) -> Explanation | None:
    """The step of each wrong rank is that of gradients clipped by the norm of this rank's gradients alone."""
    if suspect.norms is None:
        return None
    return _clipped_by(Cause.NORM_IS_LOCAL, suspect, suspect.norms.implied, suspect.norms.of_ranks)


def clipped_by_norm_of_replicas(suspect: Suspect) -> Explanation | None:
    """The step of each wrong rank is that of gradients clipped by a norm that counts replicas once for each rank."""
    norms = suspect.norms
    if norms is None:
        return None
    counted = (norms.counting_replicas,) * len(norms.implied)
    return _clipped_by(Cause.NORM_COUNTS_REPLICAS, suspect, norms.implied, counted)


def _clipped_by(
    cause: Cause, suspect: Suspect, implied: Sequence[float], explained: Sequence[float]
) -> Explanation | None:
    if not implied:
        return None
    pairs = [(implied[tp_rank], explained[tp_rank]) for tp_rank in wrong_tp_ranks(suspect)]
    errors = [abs(actual - norm) / norm if norm else 1.0 for actual, norm in pairs]
    return Explanation(cause, max(errors)) if errors and max(errors) <= FITTED_RELATIVE_ERROR else None


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
