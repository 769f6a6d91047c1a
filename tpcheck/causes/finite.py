"""Numbers that are none: what becomes of them is no evidence for anything else."""

from __future__ import annotations

import torch

from tpcheck.causes.explanation import Explanation, same_shapes
from tpcheck.records import Suspect


def loses_numbers(suspect: Suspect) -> bool:
    """Return whether elements are infinite or not a number where finite ones should be.

    Such elements make every distance not a number, so that no comparison with one proves a cause.
    """
    return any(bool((~part.isfinite() & expected.isfinite()).any()) for part, expected in _pairs(suspect))


def not_finite(suspect: Suspect) -> Explanation | None:
    """Every wrong element is infinite or not a number where a finite one should be."""
    wrong = [part[_wrong(part, expected, suspect.allowed_error)] for part, expected in _pairs(suspect)]
    actual = torch.cat([one.reshape(-1) for one in wrong]) if wrong else torch.empty(0)
    return Explanation("not_finite", 0.0) if actual.numel() and not bool(actual.isfinite().any()) else None


def _pairs(suspect: Suspect) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if not same_shapes(suspect.parts, suspect.expected_parts):
        return []
    return list(zip(suspect.parts, suspect.expected_parts, strict=True))


def _wrong(actual: torch.Tensor, expected: torch.Tensor, allowed: float) -> torch.Tensor:
    return ~((actual.double() - expected.double()).abs() <= allowed)
