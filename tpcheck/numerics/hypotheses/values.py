"""Causes that the wrong elements themselves show: no numbers, zeros, numbers of a lower dtype."""

from __future__ import annotations

from math import isfinite

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.differences import frobenius, frobenius_distance
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.proof import largest_residual, observed_distance, paired_parts
from tpcheck.numerics.tolerance import LEAST_ELEMENTS, LOWER_DTYPE_ROUNDINGS, RESIDUAL_EXACT

_LOWER = (torch.bfloat16, torch.float16, torch.float32)  # the coarsest first


def loses_numbers(suspect: Suspect) -> bool:
    """Return whether elements are infinite or not a number where finite ones should be.

    Such elements make every distance infinite, so that no comparison with one proves a cause.
    """
    return any(bool((~part.isfinite() & expected.isfinite()).any()) for part, expected in paired_parts(suspect))


def not_finite(suspect: Suspect) -> Explanation | None:
    """Every wrong element is infinite or not a number where a finite one should be."""
    wrong = _wrong_elements(suspect)
    return Explanation(Cause.NOT_FINITE) if wrong.numel() and not bool(wrong.isfinite().any()) else None


def all_zero(suspect: Suspect) -> Explanation | None:
    """Every wrong element is zero, and there are more than a few."""
    wrong = _wrong_elements(suspect)
    return Explanation(Cause.ALL_ZERO) if wrong.numel() >= LEAST_ELEMENTS and not bool(wrong.any()) else None


def _wrong_elements(suspect: Suspect) -> torch.Tensor:
    """Return the elements, over all ranks, that are off by more than is allowed for the full tensor."""
    wrong = [
        part[~((part.double() - expected.double()).abs() <= suspect.allowed_error)].reshape(-1)
        for part, expected in paired_parts(suspect)
    ]
    return torch.cat(wrong) if wrong else torch.empty(0)


def dtype_rounded(suspect: Suspect) -> Explanation | None:
    """The wrong ranks' elements are numbers of a lower dtype, to the last bit, as near to the expected as it allows.

    The expected ones are not: values that are exact in any dtype (zeros, ones) prove nothing.
    """
    limit = max(suspect.allowed_error, RESIDUAL_EXACT * largest_residual(suspect))
    wrong = [(part, expected) for part, expected in paired_parts(suspect) if frobenius_distance(part, expected) > limit]
    if not wrong or any(part.numel() < LEAST_ELEMENTS or not part.is_floating_point() for part, _ in wrong):
        return None
    own_eps = torch.finfo(wrong[0][0].dtype).eps
    for dtype in _LOWER:
        eps = torch.finfo(dtype).eps
        if eps > own_eps and all(_is_of(part, dtype) and not _is_of(expected, dtype) for part, expected in wrong):
            size = max(frobenius(expected) for _, expected in wrong)
            most = LOWER_DTYPE_ROUNDINGS * eps * size * len(suspect.actual_parts)
            if not isfinite(size) or observed_distance(suspect) > most:
                return None
            error = max(frobenius_distance(part, expected.to(dtype)) for part, expected in wrong)
            return Explanation(Cause.DTYPE_ROUNDED, error / size, {"rounded_to": str(dtype).removeprefix("torch.")})
    return None


def _is_of(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
