"""Causes of gradients alone: missing, scaled, of a tied or another parameter."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.differences import frobenius, frobenius_distance
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.proof import Hypothesis, largest_residual, same_shapes
from tpcheck.numerics.tolerance import LEAST_MULTIPLES


def missing(suspect: Suspect) -> Explanation | None:
    """The parameter has no gradient on some ranks."""
    return Explanation(Cause.GRADIENT_MISSING) if suspect.gradient.missing_on else None


def vanished(suspect: Suspect) -> Explanation | None:
    """No gradient comes back at all, on any rank."""
    if not suspect.actual_parts or suspect.expected is None or not bool(suspect.expected.any()):
        return None
    is_zero = not any(bool(part.any()) for part in suspect.actual_parts)
    return Explanation(Cause.GRADIENT_MISSING) if is_zero else None


def multiple(suspect: Suspect) -> Explanation | None:
    """Each rank's gradient is the expected one times a constant of its own, which is not 1 on some."""
    if not suspect.actual_parts or not same_shapes(suspect.actual_parts, suspect.expected_parts):
        return None
    limit = largest_residual(suspect)
    factors: list[float] = []
    worst = 0.0
    for part, expected in zip(suspect.actual_parts, suspect.expected_parts, strict=True):
        actual, wide, size = part.double().reshape(-1), expected.double().reshape(-1), frobenius(expected)
        if (expected.numel() < LEAST_MULTIPLES and expected.dim()) or not size:
            return None
        factor = float(torch.dot(actual, wide)) / size**2
        error = frobenius_distance(actual, factor * wide)
        if error > limit or not factor:
            return None
        factors.append(factor)
        worst = max(worst, error / size)
    return Explanation(Cause.GRADIENT_SCALED, worst, {"factors": [float(f"{factor:.6g}") for factor in factors]})


def untied_hypotheses(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield the gradient without that of a parameter that the reference ties with this one."""
    for name, parts in suspect.gradient.untied.items():
        pairs = list(zip(suspect.expected_parts, parts, strict=True))
        if all(part is not None and part.shape == expected.shape for expected, part in pairs):
            predicted = tuple(expected - part for expected, part in pairs)
            yield Hypothesis(Cause.TIED_WEIGHT_UNTIED, predicted, {"tied_with": name})


def another_parameters_hypotheses(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield the gradients of the parameters that lie over the ranks as this one does."""
    for name, (_, *parts) in suspect.others.items():
        yield Hypothesis(Cause.TENSOR_OF_ANOTHER_LAYER, tuple(parts), {"it_is_of": name})
