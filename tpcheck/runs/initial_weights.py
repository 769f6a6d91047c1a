"""Weights before the first step that two runs have drawn for themselves."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, inf, prod, sqrt

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.sketch import SIGN_SETS, TILES, distance
from tpcheck.numerics.tolerance import SPREAD_OF_ONE_ROW
from tpcheck.runs.comparisons import Comparison

# Two draws of n elements have a correlation of 1 / sqrt(n) by chance, and norms that differ by as much of themselves.
_DEVIATIONS = 4
_LEAST_ELEMENTS = 256  # with fewer, chance may be a quarter
# Elements in another order leave the norm as it is, to the float32 in which it may be computed. Of two draws one in a
# thousand comes as close as a thousandth of what chance does; of many tensors not one in ten.
_SAME_NORM, _SAME_NORM_IN_FLOAT32, _MOST_OF_SAME_NORM = 1e-3, 1e-6, 0.1


def drawn_separately(comparisons: Sequence[Comparison], wrong: Sequence[Comparison]) -> Explanation | None:
    """Return the cause where each run has drawn these weights for itself.

    Two draws from one distribution are about equally large and uncorrelated. So are the weights of another layer, which
    another expected tensor is equal to, and elements in another order, which have the same norm.

    Args:
        comparisons: Of all weights before the first step.
        wrong: Those for which no other cause is known.
    """
    if not any(_num_elements(each) >= _LEAST_ELEMENTS for each in wrong):
        return None
    num_of_same_norm = sum(map(_has_same_norm, wrong))
    if num_of_same_norm > _MOST_OF_SAME_NORM * len(wrong) or not all(map(_is_another_draw, wrong)):
        return None
    return None if _stands_elsewhere(comparisons, wrong) else Explanation(Cause.DRAWN_SEPARATELY)


def _num_elements(comparison: Comparison) -> int:
    return prod(comparison.expected.shape)


def _norms_apart(comparison: Comparison) -> float:
    """Return by how much of the expected norm the actual one differs from it, in units of what chance does."""
    expected = comparison.expected.norm
    return abs(comparison.actual.norm - expected) / expected * sqrt(_num_elements(comparison)) if expected else inf


def _has_same_norm(comparison: Comparison) -> bool:
    return _norms_apart(comparison) <= max(_SAME_NORM, _SAME_NORM_IN_FLOAT32 * sqrt(_num_elements(comparison)))


def _is_another_draw(comparison: Comparison) -> bool:
    if _norms_apart(comparison) > _DEVIATIONS:
        return False
    apart = hypot(comparison.actual.norm, comparison.expected.norm)  # of uncorrelated tensors
    tolerance = _spread(comparison.expected.shape) + _DEVIATIONS / sqrt(_num_elements(comparison))
    return all(abs(error / apart - 1) <= tolerance for error in comparison.errors)


def _spread(shape: tuple[int, ...]) -> float:
    """Return how far a norm from a sketch may be off, where tiles along both dims are added up."""
    is_matrix = len(shape) > 1 and min(shape[-1], prod(shape[:-1])) >= TILES
    return _DEVIATIONS / sqrt(2 * SIGN_SETS * TILES * TILES) if is_matrix else SPREAD_OF_ONE_ROW


def _stands_elsewhere(comparisons: Sequence[Comparison], wrong: Sequence[Comparison]) -> bool:
    """Return whether a wrong weight is the expected run's of another name: to a tenth, which chance does not reach."""
    return any(
        distance(each.actual.sketch, other.expected.sketch) < other.expected.norm / 10
        for each in wrong
        for other in comparisons
        if other is not each and other.expected.shape == each.expected.shape and other.expected.norm
    )
