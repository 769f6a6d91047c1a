"""When a cause explains a suspect: little of the difference remains, or every wrong rank holds what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot, inf, isfinite
from typing import Any

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.differences import frobenius, frobenius_distance
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.tolerance import RESIDUAL_EXACT, RESIDUAL_NOISY

Test = Callable[[Suspect], Explanation | None]


def explanation_if_equal(
    cause: Cause, corrected: torch.Tensor, expected: torch.Tensor, suspect: Suspect
) -> Explanation | None:
    """Return the cause if `corrected`, the actual tensor without the mistake, equals the expected one."""
    error = frobenius_distance(corrected, expected)
    return Explanation(cause, relative(error, expected)) if error <= largest_residual(suspect) else None


def relative(error: float, tensor: torch.Tensor) -> float:
    """Return the error relative to the tensor's norm; absolute where that is zero or not finite."""
    size = frobenius(tensor)
    return error / size if size and isfinite(size) else error


def largest_residual(suspect: Suspect) -> float:
    """Return the largest Frobenius error that may remain where a cause explains the suspect.

    -inf, which no error is below, where nothing differs, or elements are infinite or NaN on one side alone: such
    suspects prove nothing.
    """
    observed = observed_distance(suspect)
    if not 0 < observed < inf:
        return -inf
    return max(RESIDUAL_EXACT * observed, min(suspect.allowed_error, RESIDUAL_NOISY * observed))


def observed_distance(suspect: Suspect) -> float:
    """Return how far the ranks' parts are from the expected ones (Frobenius); of replicas, the farthest."""
    actual, expected = suspect.actual_parts, suspect.expected_parts
    if not expected and suspect.expected is not None:
        expected = (suspect.expected,) * len(actual)
    if not actual or not same_shapes(actual, expected):
        size = 0.0 if suspect.expected is None else frobenius(suspect.expected)
        return suspect.observed * size if suspect.allowed else 0.0  # exact checks count elements
    errors = list(map(frobenius_distance, actual, expected))
    return max(errors) if suspect.is_replicated else hypot(*errors)


def wrong_tp_ranks(suspect: Suspect) -> list[int]:
    """Return the tp_ranks whose error is larger than what may remain where a cause explains it."""
    limit = largest_residual(suspect)
    errors = map(frobenius_distance, suspect.actual_parts, suspect.expected_parts)
    return [tp_rank for tp_rank, error in enumerate(errors) if error > limit]


def same_shapes(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    return [part.shape for part in actual] == [part.shape for part in expected]


def paired_parts(suspect: Suspect) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each rank's part and the expected one, by tp_rank; nothing where their shapes are not the same."""
    if not same_shapes(suspect.actual_parts, suspect.expected_parts):
        return []
    return list(zip(suspect.actual_parts, suspect.expected_parts, strict=True))


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What each rank would hold under a mistake.

    Attributes:
        cause: The mistake.
        predicted: What each rank would hold, by tp_rank.
        evidence: Which rank, group or factor the mistake is about, by name, JSON-able.
    """

    cause: Cause
    predicted: tuple[torch.Tensor, ...]
    evidence: Mapping[str, Any] = field(default_factory=dict)


def first_confirmed(*hypotheses: Callable[[Suspect], Iterable[Hypothesis]]) -> Test:
    """Return a test that names the first hypothesis that predicts what the wrong ranks hold; the others are right."""

    def test(suspect: Suspect) -> Explanation | None:
        if not suspect.actual_parts or not same_shapes(suspect.actual_parts, suspect.expected_parts):
            return None
        limit = largest_residual(suspect)
        found = (_confirmed(each, suspect, limit) for of_suspect in hypotheses for each in of_suspect(suspect))
        return next((explanation for explanation in found if explanation is not None), None)

    return test


def _confirmed(hypothesis: Hypothesis, suspect: Suspect, limit: float) -> Explanation | None:
    if not same_shapes(suspect.actual_parts, hypothesis.predicted):
        return None
    worst, any_rank_matches = 0.0, False
    triples = zip(suspect.actual_parts, suspect.expected_parts, hypothesis.predicted, strict=True)
    for actual, expected, prediction in triples:
        error_to_expected = frobenius_distance(actual, expected)
        error_to_prediction = frobenius_distance(actual, prediction)
        if min(error_to_expected, error_to_prediction) > limit:
            return None
        if error_to_prediction < error_to_expected:
            any_rank_matches = True
            worst = max(worst, relative(error_to_prediction, prediction))
    return Explanation(hypothesis.cause, worst, hypothesis.evidence) if any_rank_matches else None
