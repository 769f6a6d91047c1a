"""Why a weight is wrong after an optimizer step whose gradients are right."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpcheck.causes.explanation import Explanation, Test, remaining
from tpcheck.causes.mistaken import mistaken
from tpcheck.causes.rounding import dtype_rounded
from tpcheck.records import Suspect

_TOLD_APART = frozenset({"differed_at_start", "gradients_differ"})  # what tells replicas apart is no drift
_NORM_AGREES = 1e-6  # of a norm that was worked out from the weights


def clipped_by(slug: str, name: str) -> Test:
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
        return Explanation(slug, max(errors)) if errors and max(errors) <= _NORM_AGREES else None

    return test


def drift(suspect: Suspect) -> Explanation | None:
    """Replicas that should be equal are not: of the TP ranks some are right, or those over DP differ."""
    if _TOLD_APART & suspect.evidence.keys():
        return None
    some_right = suspect.replicated and 0 < len(_wrong(suspect)) < len(suspect.parts)
    return Explanation("replica_drift", 0.0) if some_right or "replicas_over_dp_differ" in suspect.evidence else None


def _wrong(suspect: Suspect) -> list[int]:
    """Return the tp_ranks that are wrong by more than what may remain where a cause explains them."""
    pairs = zip(suspect.parts, suspect.expected_parts, strict=False)
    limit = remaining(suspect)
    return [
        tp_rank
        for tp_rank, (part, expected) in enumerate(pairs)
        if part.shape != expected.shape or float(torch.linalg.vector_norm(part.double() - expected.double())) > limit
    ]


TESTS: tuple[Test, ...] = (
    mistaken,
    dtype_rounded,
    clipped_by("norm_is_local", "norm_of_each_rank_alone"),
    clipped_by("norm_counts_replicas", "norm_with_replicas_counted"),
    drift,
)
