"""Causes of the optimizer's step: its norm, and its update."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.explanation import EXACT, Test, dtype_rounded, one_of_hypotheses, remaining

_TOLD_APART = frozenset({"differed_at_start", "gradients_differ"})  # what tells replicas apart is no drift
_NORM_AGREES = 1e-6  # of a norm that was worked out from the weights


def clipped_by(cause: Cause, name: str) -> Test:
    """The step of each rank is that of gradients clipped by another norm, which is told in the evidence as `name`."""

    def test(suspect: Suspect) -> Explanation | None:
        implied: Sequence[float] = suspect.evidence.get("norm_implied", ())
        usual = suspect.evidence.get(name)
        if not implied or usual is None:
            return None
        alone = usual if isinstance(usual, (list, tuple)) else [usual] * len(implied)
        errors = [
            abs(one - other) / other if other else 1.0
            for tp_rank, (one, other) in enumerate(zip(implied, alone, strict=True))
            if tp_rank in _wrong(suspect)
        ]
        return Explanation(cause, max(errors)) if errors and max(errors) <= _NORM_AGREES else None

    return test


def drift(suspect: Suspect) -> Explanation | None:
    """Replicas that should be equal are not: of the TP ranks some are right, or those over DP differ."""
    if _TOLD_APART & suspect.evidence.keys():
        return None
    some_right = suspect.replicated and 0 < len(_wrong(suspect)) < len(suspect.parts)
    return (
        Explanation(Cause.REPLICA_DRIFT, 0.0) if some_right or "replicas_over_dp_differ" in suspect.evidence else None
    )


def _wrong(suspect: Suspect) -> list[int]:
    """Return the tp_ranks that are wrong by more than what may remain where a cause explains them."""
    pairs = zip(suspect.parts, suspect.expected_parts, strict=False)
    limit = remaining(suspect)
    return [
        tp_rank
        for tp_rank, (part, expected) in enumerate(pairs)
        if part.shape != expected.shape or float(torch.linalg.vector_norm(part.double() - expected.double())) > limit
    ]


UPDATE_TESTS: tuple[Test, ...] = (
    one_of_hypotheses,
    dtype_rounded,
    clipped_by(Cause.NORM_IS_LOCAL, "norm_of_each_rank_alone"),
    clipped_by(Cause.NORM_COUNTS_REPLICAS, "norm_with_replicas_counted"),
    drift,
)


def norm_is_local(suspect: Suspect) -> Explanation | None:
    """Every rank's norm is that of the gradients of one rank alone, or of its shards alone."""
    names = ("norm_of_each_rank_alone", "norm_of_each_ranks_shards")
    alone = [norm for name in names for norm in suspect.evidence.get(name, ())]
    return _norms_hold(Cause.NORM_IS_LOCAL, suspect, alone)


def norm_counts_replicas(suspect: Suspect) -> Explanation | None:
    """Every rank's norm is that of all gradients with those of replicated parameters counted once for each rank."""
    counted = suspect.evidence.get("norm_with_replicas_counted")
    return _norms_hold(Cause.NORM_COUNTS_REPLICAS, suspect, () if counted is None else (counted,))


def _norms_hold(cause: Cause, suspect: Suspect, explanations: Sequence[float]) -> Explanation | None:
    if not explanations:
        return None
    errors = [min(abs(norm - explained) for explained in explanations) for norm in suspect.parts]
    remaining = max(errors) / suspect.expected if suspect.expected else max(errors)
    return Explanation(cause, remaining) if remaining <= EXACT * suspect.observed else None


NORM_TESTS: tuple[Test, ...] = (norm_is_local, norm_counts_replicas)
