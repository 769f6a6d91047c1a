"""In 16 bits, how far a module may be off is read from the modules before it: noise grows over the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median

from tpcheck.numerics.tolerance import (
    LOCAL_FACTOR,
    LOCAL_FACTOR_OF_GRADIENTS,
    LOW_PRECISION,
    NUM_NEIGHBOURS,
    TYPICAL_NOISE,
)
from tpcheck.runs.comparisons import ACTIVATIONS, Comparison
from tpcheck.runs.wholes import epsilon


def judged_among_neighbours(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons with what is allowed each in light of those before it, in the order of events.

    Ten times what rounding may do to a module at the end hides a mistake of some percent in it. But how far two runs
    are apart, in units of what a replay moved a tensor by, is alike from module to module: one that is much further
    off than those before it has added what its inputs do not explain.
    """
    judged: list[Comparison] = []
    ratios: list[float] = []
    for comparison in comparisons:
        noise = _noise(comparison)
        if not noise:
            judged.append(comparison)
            continue
        assert comparison.allowed is not None
        allowed = min(comparison.allowed, _share_of_noise(comparison, ratios) * noise)
        comparison = replace(comparison, allowed=allowed)
        judged.append(comparison)
        if not comparison.is_wrong:
            ratios.append(comparison.error / noise)
    return judged


def _noise(comparison: Comparison) -> float:
    """Return by how much rounding moves a tensor of 16 bits, at least its own; 0 for others, or where unknown."""
    eps = max(epsilon(comparison.actual.dtype), epsilon(comparison.expected.dtype))
    if eps <= LOW_PRECISION or not comparison.deviation or comparison.allowed is None:
        return 0.0
    return max(comparison.deviation, eps / 3**0.5 * comparison.expected.norm)


def _share_of_noise(comparison: Comparison, before: Sequence[float]) -> float:
    if comparison.kind in ACTIVATIONS:
        factor = LOCAL_FACTOR if comparison.kind == "output" else LOCAL_FACTOR_OF_GRADIENTS
        return factor * max(TYPICAL_NOISE, median(before[-NUM_NEIGHBOURS:] or [0.0]))
    return LOCAL_FACTOR_OF_GRADIENTS * max(TYPICAL_NOISE, *before, 0.0)
