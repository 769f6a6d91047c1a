"""Why the gradient of a parameter is wrong."""

from __future__ import annotations

import torch

from tpcheck.causes.explanation import (
    Explanation,
    Test,
    num_dp,
    num_tp,
    remaining,
    same_shapes,
    scaled,
    sum_of_ranks,
)
from tpcheck.causes.mistaken import mistaken
from tpcheck.causes.rounding import dtype_rounded
from tpcheck.records import Suspect

_LEAST_ELEMENTS = 4  # any number is a multiple of any other


def missing(suspect: Suspect) -> Explanation | None:
    if "missing_on_ranks" in suspect.evidence:
        return Explanation("gradient_missing", 0.0)
    return None


def terms_of_ranks(slug: str) -> Test:
    """The ranks' gradients are terms of the expected one; equal ones are that divided by their number."""
    is_sum = sum_of_ranks(slug)

    def test(suspect: Suspect) -> Explanation | None:
        found = is_sum(suspect)
        return found if found is not None and not _equal_parts(suspect) else None

    return test


def multiple(suspect: Suspect) -> Explanation | None:
    """Each rank's gradient is the expected one times a constant of its own, which is not 1 on some."""
    if not suspect.parts or not same_shapes(suspect.parts, suspect.expected_parts):
        return None
    limit = remaining(suspect)
    factors: list[float] = []
    worst = 0.0
    for part, expected in zip(suspect.parts, suspect.expected_parts, strict=True):
        wide, size = expected.double().reshape(-1), float(torch.linalg.vector_norm(expected.double()))
        if (expected.numel() < _LEAST_ELEMENTS and expected.dim()) or not size:
            return None
        factor = float(torch.dot(part.double().reshape(-1), wide)) / size**2
        error = float(torch.linalg.vector_norm(part.double().reshape(-1) - factor * wide))
        if error > limit or not factor:
            return None
        factors.append(factor)
        worst = max(worst, error / size)
    return Explanation("gradient_scaled", worst, {"factors": [float(f"{factor:.6g}") for factor in factors]})


def averaging(test: Test) -> Test:
    """A factor of the number of replicas is due to averaging over them where nothing else has that number.

    Where TP has as many ranks, it is only if the gradients of all parameters have it: those of one have been scaled.
    """

    def asked(suspect: Suspect) -> Explanation | None:
        told_apart = num_dp(suspect) != num_tp(suspect) or suspect.evidence.get("every_parameter", False)
        return test(suspect) if told_apart else None

    return asked


def _equal_parts(suspect: Suspect) -> bool:
    first, *others = (part.double() for part in suspect.parts)
    return all(float(torch.linalg.vector_norm(part - first)) <= remaining(suspect) for part in others)


TESTS: tuple[Test, ...] = (
    missing,
    terms_of_ranks("partial_gradient_on_replica"),
    averaging(scaled("sum_instead_of_mean", num_dp)),
    averaging(scaled("mean_instead_of_sum", lambda suspect: 1 / num_dp(suspect))),
    multiple,
    mistaken,
    dtype_rounded,
)
