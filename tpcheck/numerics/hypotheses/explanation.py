"""Explanations of a suspect, and the tests that many causes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import hypot

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.evidence import Hypothesis, Suspect

EXACT = 1e-3  # a cause explains a difference when at most this share of it remains
NOISY = 0.1  # or this share, where what remains is no more than rounding may do


Test = Callable[[Suspect], Explanation | None]


def holds(cause: Cause, explained: torch.Tensor, suspect: Suspect) -> Explanation | None:
    return None if suspect.expected is None else equal(cause, explained, suspect.expected.double(), suspect)


def equal(cause: Cause, explained: torch.Tensor, expected: torch.Tensor, suspect: Suspect) -> Explanation | None:
    if explained.shape != expected.shape:
        return None
    norm = float(torch.linalg.vector_norm(expected))
    error = float(torch.linalg.vector_norm(explained - expected))
    return Explanation(cause, error / norm if norm else error) if error <= remaining(suspect) else None


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


def sum_of_ranks(cause: Cause) -> Test:
    """The ranks' tensors are terms of the expected one, and were never added up."""

    def test(suspect: Suspect) -> Explanation | None:
        if not suspect.replicated or len(suspect.parts) < 2:
            return None
        return holds(cause, sum(part.double() for part in suspect.parts), suspect)

    return test


def scaled(cause: Cause, factor: Callable[[Suspect], float]) -> Test:
    """Every rank's part is the expected one times a factor that follows from the number of ranks."""

    def test(suspect: Suspect) -> Explanation | None:
        scale = factor(suspect)
        if scale == 1 or not suspect.expected_parts:
            return None
        actual = torch.cat([part.double().reshape(-1) / scale for part in suspect.parts])
        expected = torch.cat([part.double().reshape(-1) for part in suspect.expected_parts])
        return equal(cause, actual, expected, suspect)

    return test


def scaled_on_some(cause: Cause, factor: Callable[[Suspect], float]) -> Test:
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
        return equal(cause, actual / scale, expected, suspect)

    return test


def num_tp(suspect: Suspect) -> float:
    return max(1, len(suspect.parts))


def num_dp(suspect: Suspect) -> float:
    return suspect.num_replicas


def loses_numbers(suspect: Suspect) -> bool:
    """Return whether elements are infinite or not a number where finite ones should be.

    Such elements make every distance not a number, so that no comparison with one proves a cause.
    """
    return any(bool((~part.isfinite() & expected.isfinite()).any()) for part, expected in _matching_parts(suspect))


def not_finite(suspect: Suspect) -> Explanation | None:
    """Every wrong element is infinite or not a number where a finite one should be."""
    wrong = [part[_wrong(part, expected, suspect.allowed_error)] for part, expected in _matching_parts(suspect)]
    actual = torch.cat([one.reshape(-1) for one in wrong]) if wrong else torch.empty(0)
    return Explanation(Cause.NOT_FINITE, 0.0) if actual.numel() and not bool(actual.isfinite().any()) else None


def _matching_parts(suspect: Suspect) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if not same_shapes(suspect.parts, suspect.expected_parts):
        return []
    return list(zip(suspect.parts, suspect.expected_parts, strict=True))


def _wrong(actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> torch.Tensor:
    return ~((actual.double() - expected.double()).abs() <= allowed)


def one_of_hypotheses(suspect: Suspect) -> Explanation | None:
    """The wrong ranks hold what one of the suspect's hypotheses predicts; the others are right."""
    found = (_holds(hypothesis, suspect) for hypothesis in suspect.hypotheses)
    return next((explanation for explanation in found if explanation is not None), None)


def _holds(hypothesis: Hypothesis, suspect: Suspect) -> Explanation | None:
    if not same_shapes(suspect.parts, hypothesis.predicted) or not same_shapes(suspect.parts, suspect.expected_parts):
        return None
    limit = remaining(suspect)
    worst = 0.0
    some_wrong = False
    for actual, expected, wrong in zip(suspect.parts, suspect.expected_parts, hypothesis.predicted, strict=True):
        right = _distance(actual, expected)
        error = _distance(actual, wrong)
        if min(right, error) > limit:
            return None
        if error < right:
            some_wrong = True
            norm = float(torch.linalg.vector_norm(wrong.double()))
            worst = max(worst, error / norm if norm else error)
    return Explanation(hypothesis.cause, worst, hypothesis.evidence) if some_wrong else None


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(one.double() - other.double()))


_LOWER = (torch.float32, torch.bfloat16, torch.float16)
_LEAST_ELEMENTS = 8  # a number of 53 bits ends in as many zeros as bfloat16 asks for once in 2**45; eight never do
_ROUNDINGS = 4.0  # in units of the lower dtype's epsilon: what went in was rounded, then the result


def dtype_rounded(suspect: Suspect) -> Explanation | None:
    """The wrong ranks' elements are numbers of a lower dtype, to the last bit, as near to the expected as it allows.

    The expected ones are not: values that are exact in any dtype (zeros, ones) prove nothing.
    """
    if not suspect.parts or not same_shapes(suspect.parts, suspect.expected_parts):
        return None
    limit = max(suspect.allowed_error, 1e-3 * remaining(suspect))
    pairs = zip(suspect.parts, suspect.expected_parts, strict=True)
    wrong = [(part, expected) for part, expected in pairs if _norm(part.double() - expected.double()) > limit]
    if not wrong or any(part.numel() < _LEAST_ELEMENTS or not part.is_floating_point() for part, _ in wrong):
        return None
    own = torch.finfo(wrong[0][0].dtype).eps
    for dtype in sorted(_LOWER, key=lambda one: torch.finfo(one).eps, reverse=True):
        eps = torch.finfo(dtype).eps
        if eps > own and all(_is_of(part, dtype) and not _is_of(expected, dtype) for part, expected in wrong):
            size = max(_norm(expected.double()) for _, expected in wrong)
            if actual_distance(suspect) > _ROUNDINGS * eps * size * max(1, len(suspect.parts)):
                return None
            error = max(_norm(part.double() - expected.to(dtype).double()) for part, expected in wrong)
            return Explanation(Cause.DTYPE_ROUNDED, error / size, {"rounded_to": str(dtype).removeprefix("torch.")})
    return None


def _is_of(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))
