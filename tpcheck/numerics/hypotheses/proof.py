"""When a cause explains a suspect: little of the difference remains, or every wrong rank holds what it predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot, inf
from typing import Any

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.tolerance import EXACT, NOISY

Test = Callable[[Suspect], Explanation | None]


def explains(cause: Cause, explained: torch.Tensor, expected: torch.Tensor, suspect: Suspect) -> Explanation | None:
    """Return the cause if a tensor, once corrected for it, equals the expected one."""
    if explained.shape != expected.shape:
        return None
    size, error = norm(expected), distance(explained, expected)
    return Explanation(cause, error / size if size else error) if error <= remaining(suspect) else None


def remaining(suspect: Suspect) -> float:
    """Return the largest Frobenius error that may remain where a cause explains the suspect."""
    observed = observed_distance(suspect)
    return max(EXACT * observed, min(suspect.allowed_error, NOISY * observed))


def observed_distance(suspect: Suspect) -> float:
    """Return how far the ranks' parts are from the expected ones (Frobenius); of replicas, the farthest."""
    actual, expected = suspect.actual_parts, suspect.expected_parts
    if not expected and suspect.expected is not None:
        expected = (suspect.expected,) * len(actual)
    if not actual or not same_shapes(actual, expected):
        size = 0.0 if suspect.expected is None else norm(suspect.expected)
        return suspect.observed * size if suspect.allowed else 0.0  # exact checks count elements
    errors = list(map(distance, actual, expected))
    return max(errors) if suspect.is_replicated else hypot(*errors)


def wrong_tp_ranks(suspect: Suspect) -> list[int]:
    """Return the tp_ranks whose error is larger than what may remain where a cause explains it."""
    limit = remaining(suspect)
    errors = map(distance, suspect.actual_parts, suspect.expected_parts)
    return [tp_rank for tp_rank, error in enumerate(errors) if error > limit]


def same_shapes(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> bool:
    return [part.shape for part in actual] == [part.shape for part in expected]


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the Frobenius norm of the difference; infinity where the shapes differ."""
    return norm(actual.double() - expected.double()) if actual.shape == expected.shape else inf


def norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


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


def predicted(*hypotheses: Callable[[Suspect], Iterable[Hypothesis]]) -> Test:
    """Return the test for the first hypothesis that predicts what the wrong ranks hold; the other ranks are right."""

    def test(suspect: Suspect) -> Explanation | None:
        if not suspect.actual_parts or not same_shapes(suspect.actual_parts, suspect.expected_parts):
            return None
        limit = remaining(suspect)
        found = (_confirmed(each, suspect, limit) for of_suspect in hypotheses for each in of_suspect(suspect))
        return next((explanation for explanation in found if explanation is not None), None)

    return test


def _confirmed(hypothesis: Hypothesis, suspect: Suspect, limit: float) -> Explanation | None:
    if not same_shapes(suspect.actual_parts, hypothesis.predicted):
        return None
    worst, is_of_some = 0.0, False
    triples = zip(suspect.actual_parts, suspect.expected_parts, hypothesis.predicted, strict=True)
    for actual, expected, prediction in triples:
        right, error = distance(actual, expected), distance(actual, prediction)
        if min(right, error) > limit:
            return None
        if error < right:
            is_of_some = True
            size = norm(prediction)
            worst = max(worst, error / size if size else error)
    return Explanation(hypothesis.cause, worst, hypothesis.evidence) if is_of_some else None
