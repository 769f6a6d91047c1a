"""Weights before the first step: drawn by each run for itself, or apart where a recording begins in a training."""

from __future__ import annotations

from collections.abc import Sequence
from math import hypot, inf, prod, sqrt
from statistics import median

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.sketch import SIGN_SETS, TILES, distance
from tpcheck.numerics.tolerance import SPREAD_OF_ONE_ROW
from tpcheck.runs.comparing.comparisons import Comparison
from tpcheck.runs.trace.wholes import epsilon

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


# ---- recordings that begin in the middle of a training

_FAR_FROM_OTHERS = 1e3  # times the median: rounding moves all weights of a model apart about as far
_FAR_FROM_ITSELF = 1e-2  # of its norm: how far weights are apart is allowed for, and more would hide any mistake
_EPSILONS_APART = 4  # of the lowest dtype: weights that are rounded to it in every step are apart by one or two
_NO_ROUNDING = 1e6  # times what a step's rounding does: it may add up, but in float64 not from 1e-14 to a hundredth


def not_by_rounding(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the weights that rounding in the steps before the recording has not moved to where they are."""
    trained = _trained_as_given(comparisons)
    usual = median(each.relative for each in trained) if trained else 0.0
    limit = max(_FAR_FROM_ITSELF, _FAR_FROM_OTHERS * usual)
    return [each for each in trained if each.is_wrong and each.relative > limit]


def left_at_zero(comparisons: Sequence[Comparison], gradients: Sequence[Comparison]) -> list[Comparison]:
    """Return the biases that are zero in one run alone, although they have a gradient that is no mere rounding.

    Nothing else shows that a bias was not loaded: fused with that of queries and values, that of keys is a part of it.

    Args:
        gradients: Of a recorded step.
    """
    trained = {
        each.name
        for each in gradients
        if each.allowed is not None and min(each.actual.norm, each.expected.norm) > each.allowed
    }
    return [each for each in comparisons if each.is_wrong and each.name in trained and is_zero_on_one_side(each)]


def is_zero_on_one_side(comparison: Comparison) -> bool:
    """Return whether a bias is zero in one run, and not in the other."""
    norms = (comparison.actual.norm, comparison.expected.norm)
    return comparison.kind == "weight" and comparison.name.endswith("bias") and min(norms) == 0 < max(norms)


def too_far_apart(comparisons: Sequence[Comparison], eps: float = 0.0) -> str:
    """Return why steps with these weights are not compared; empty where they are.

    A multiple of how far they are apart is allowed: of more than a hundredth it would hide any mistake.

    Args:
        eps: Machine epsilon of the lowest dtype that the runs compute in, where that is known.
    """
    trained = _trained_as_given(comparisons)
    furthest = max(trained, key=lambda each: each.relative, default=None)
    if furthest is None:
        return ""
    eps = max(eps, epsilon(furthest.actual.dtype), epsilon(furthest.expected.dtype))
    if furthest.relative <= max(_FAR_FROM_ITSELF, _EPSILONS_APART * eps):
        return ""
    return (
        f"earlier steps were not recorded, and {furthest.name} is {furthest.relative:.1%} apart: what differs may "
        "follow from that"
    )


def parted_unseen(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the weights that rounding has not moved so far apart in steps that were not recorded."""
    return [
        each
        for each in _trained_as_given(comparisons)
        if each.relative > _FAR_FROM_ITSELF and each.error > _NO_ROUNDING * (each.allowed or inf)
    ]


def _trained_as_given(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the weights without biases: those of keys have no gradient, and Adam makes whole steps of its rounding."""
    return [each for each in comparisons if each.kind == "weight" and not each.name.endswith("bias")]
