"""A cause whose test held, and the test that most causes come down to: is this tensor, made right, the expected one?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import hypot
from typing import Any

import torch

from tpcheck.records import Suspect

EXACT = 1e-3  # a cause explains a difference when at most this share of it remains
NOISY = 0.1  # or this share, where what remains is no more than rounding may do


@dataclass(frozen=True, slots=True)
class Explanation:
    """A cause whose test held.

    Attributes:
        cause: Slug of the cause.
        error: Relative error that remains once the cause is taken into account.
        evidence: What more the test has shown, by name.
    """

    cause: str
    error: float
    evidence: Mapping[str, Any] = field(default_factory=dict)


Test = Callable[[Suspect], Explanation | None]


def holds(slug: str, explained: torch.Tensor, suspect: Suspect) -> Explanation | None:
    return None if suspect.expected is None else equal(slug, explained, suspect.expected.double(), suspect)


def equal(slug: str, explained: torch.Tensor, expected: torch.Tensor, suspect: Suspect) -> Explanation | None:
    if explained.shape != expected.shape:
        return None
    norm = float(torch.linalg.vector_norm(expected))
    error = float(torch.linalg.vector_norm(explained - expected))
    return Explanation(slug, error / norm if norm else error) if error <= remaining(suspect) else None


def remaining(suspect: Suspect) -> float:
    """Return the largest Frobenius error that may remain where a cause explains the suspect."""
    distance = actual_distance(suspect)
    return max(EXACT * distance, min(suspect.allowed_error, NOISY * distance))


def actual_distance(suspect: Suspect) -> float:
    """Return how far the ranks' parts are from what they should be (Frobenius); of replicas, the farthest."""
    expected = suspect.expected_parts
    if not expected and suspect.expected is not None:
        expected = (suspect.expected,) * len(suspect.parts)
    if not expected or not suspect.parts or not same_shapes(suspect.parts, expected):
        norm = 0.0 if suspect.expected is None else float(torch.linalg.vector_norm(suspect.expected.double()))
        return suspect.observed * norm if suspect.allowed else 0.0  # exact checks count elements
    errors = [float(torch.linalg.vector_norm(a.double() - b.double())) for a, b in _pairs(suspect.parts, expected)]
    return max(errors) if suspect.replicated else hypot(*errors)


def same_shapes(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(a.shape == b.shape for a, b in _pairs(some, others))


def _pairs(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(some, others, strict=False))


def sum_of_ranks(slug: str) -> Test:
    """The ranks' tensors are terms of the expected one, and were never added up."""

    def test(suspect: Suspect) -> Explanation | None:
        if not suspect.replicated or len(suspect.parts) < 2:
            return None
        return holds(slug, sum(part.double() for part in suspect.parts), suspect)

    return test


def scaled(slug: str, factor: Callable[[Suspect], float]) -> Test:
    """Every rank's part is the expected one times a factor that follows from the number of ranks."""

    def test(suspect: Suspect) -> Explanation | None:
        scale = factor(suspect)
        if scale == 1 or not suspect.expected_parts:
            return None
        actual = torch.cat([part.double().reshape(-1) / scale for part in suspect.parts])
        expected = torch.cat([part.double().reshape(-1) for part in suspect.expected_parts])
        return equal(slug, actual, expected, suspect)

    return test


def scaled_on_some(slug: str, factor: Callable[[Suspect], float]) -> Test:
    """As `scaled`, of a whole tensor that every rank should hold and some have right."""

    def test(suspect: Suspect) -> Explanation | None:
        if not suspect.replicated or not same_shapes(suspect.parts, suspect.expected_parts):
            return None
        limit = remaining(suspect)
        pairs = _pairs(suspect.parts, suspect.expected_parts)
        wrong = [
            (part.double().reshape(-1), whole.double().reshape(-1))
            for part, whole in pairs
            if not float(torch.linalg.vector_norm(part.double() - whole.double())) <= limit
        ]
        scale = factor(suspect)
        if scale == 1 or not wrong:
            return None
        actual, expected = (torch.cat(tensors) for tensors in zip(*wrong, strict=True))
        return equal(slug, actual / scale, expected, suspect)

    return test


def num_tp(suspect: Suspect) -> float:
    return max(1, len(suspect.parts))


def num_dp(suspect: Suspect) -> float:
    return suspect.num_replicas
