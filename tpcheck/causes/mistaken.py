"""Is every rank's part either right, or what a mistake that the check knows of would have made of it?"""

from __future__ import annotations

import torch

from tpcheck.causes.explanation import Explanation, remaining, same_shapes
from tpcheck.records import Suspect
from tpcheck.records.suspect import Mistaken


def mistaken(suspect: Suspect) -> Explanation | None:
    """The wrong ranks hold what one of the suspect's mistakes gives them; the others are right."""
    found = (_as(one, suspect) for one in suspect.mistaken)
    return next((explanation for explanation in found if explanation is not None), None)


def _as(one: Mistaken, suspect: Suspect) -> Explanation | None:
    if not same_shapes(suspect.parts, one.parts) or not same_shapes(suspect.parts, suspect.expected_parts):
        return None
    limit = remaining(suspect)
    worst = 0.0
    some_wrong = False
    for actual, expected, wrong in zip(suspect.parts, suspect.expected_parts, one.parts, strict=True):
        right = _distance(actual, expected)
        error = _distance(actual, wrong)
        if min(right, error) > limit:
            return None
        if error < right:
            some_wrong = True
            norm = float(torch.linalg.vector_norm(wrong.double()))
            worst = max(worst, error / norm if norm else error)
    return Explanation(one.cause, worst, one.evidence) if some_wrong else None


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(one.double() - other.double()))
