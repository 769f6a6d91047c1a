"""A cause whose test held, and the test that most causes come down to: is this tensor, made right, the expected one?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tpcheck.records import Suspect

EXACT = 1e-3  # a cause explains a difference when at most this share of it remains


@dataclass(frozen=True, slots=True)
class Explanation:
    """A cause whose test held.

    Attributes:
        cause: Slug of the cause.
        error: Relative error that remains once the cause is taken into account.
    """

    cause: str
    error: float


Test = Callable[[Suspect], Explanation | None]


def holds(slug: str, explained: torch.Tensor, suspect: Suspect) -> Explanation | None:
    return None if suspect.expected is None else equal(slug, explained, suspect.expected.double(), suspect)


def equal(slug: str, explained: torch.Tensor, expected: torch.Tensor, suspect: Suspect) -> Explanation | None:
    if explained.shape != expected.shape:
        return None
    norm = float(torch.linalg.vector_norm(expected))
    error = float(torch.linalg.vector_norm(explained - expected))
    explains = error <= suspect.allowed_error or (norm > 0 and error <= EXACT * suspect.observed * norm)
    return Explanation(slug, error / norm if norm else error) if explains else None


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


def num_tp(suspect: Suspect) -> float:
    return max(1, len(suspect.parts))


def num_dp(suspect: Suspect) -> float:
    return suspect.num_replicas
