"""In 16 bits, how far a module may be off is read from the modules before it: noise grows over the layers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from statistics import median

from tpcheck.numerics.tolerance import (
    FEW_ROWS,
    LOCAL_FACTOR,
    LOCAL_FACTOR_OF_GRADIENTS,
    LOW_PRECISION,
    NEAR_LIMIT,
    NUM_NEIGHBOURS,
    SAFETY_FACTOR,
    SHARE_OF_FEW_ROWS,
    TYPICAL_NOISE,
)
from tpcheck.runs.comparing.comparisons import ACTIVATIONS, Comparer, Comparison, Table
from tpcheck.runs.trace.wholes import epsilon

ROUTERS = ("gate", "router", "wg")
"""Names of the modules that send tokens to experts, in transformers, Megatron and DeepSpeed."""


def judged_among_neighbours(comparisons: Sequence[Comparison], typical: float = TYPICAL_NOISE) -> list[Comparison]:
    """Return the comparisons with what is allowed each in light of those before it, in the order of events.

    Ten times what rounding may do to a module at the end hides a mistake of some percent in it. But how far two runs
    are apart, in units of what a replay moved a tensor by, is alike from module to module: one that is much further
    off than those before it has added what its inputs do not explain.

    Args:
        typical: How far apart, in these units, may be expected whatever came before.
    """
    judged: list[Comparison] = []
    ratios: list[float] = []
    for comparison in comparisons:
        noise = _noise(comparison)
        if noise:
            share = _share_of_noise(comparison, ratios, typical)
            comparison = replace(comparison, allowed=min(SAFETY_FACTOR, share) * noise)
            if not comparison.is_wrong:
                ratios.append(comparison.error / noise)
        judged.append(comparison)
    return judged


def rerouted_among(comparisons: Sequence[Comparison], *, is_known: bool = False) -> list[Comparison]:
    """Return the tensors of 16 bits that are wrong, or nearly so, in a few rows, where what follows is right.

    Near a tie, rounding decides to which experts a router sends a token: then its row is another one altogether, and
    tensors whose rows are in the order of experts are moved. A mistake is in most rows, or shows in what follows; as it
    may be at few positions of all samples, which make a tile of rows, too, a router has to be beside it.

    Args:
        is_known: Tokens went to other experts in the forward pass of this step.
    """
    routed = {each.name.rpartition(".")[0] for each in comparisons if each.name.rpartition(".")[2] in ROUTERS}
    found: list[Comparison] = []
    run: list[Comparison] = []
    for comparison in comparisons:
        is_keyed = -1 in comparison.expected.shape
        is_local = _noise(comparison) > 0 and (not is_keyed or _differs_in_few_rows(comparison))
        if is_local and is_near_limit(comparison):
            run.append(comparison)
        elif comparison.is_wrong:
            return found  # a mistake: what follows from it is none of these
        elif is_keyed or not run:
            beside = [each for each in (*run, comparison) if is_known or _is_inside(each, routed)] if run else []
            if any(map(_differs_in_few_rows, beside)):
                found += run
            run = []
    return found


def _is_inside(comparison: Comparison, modules: Collection[str]) -> bool:
    """Return whether a tensor is of one of the modules, or of a module directly inside."""
    return comparison.name in modules or comparison.name.rpartition(".")[0] in modules


def is_near_limit(comparison: Comparison) -> bool:
    """Return whether the error is wrong, or not far from it."""
    return comparison.margin > NEAR_LIMIT


def _differs_in_few_rows(comparison: Comparison) -> bool:
    if (
        -1 not in comparison.expected.shape
        or comparison.is_of_norms
        or comparison.actual.dtype != comparison.expected.dtype
    ):
        return False
    by_row = ((comparison.actual.sketch - comparison.expected.sketch).tile_norms() ** 2).sum(dim=1)
    num_tiles = int((comparison.expected.sketch.tile_norms().sum(dim=1) > 0).sum())
    largest = by_row.sort(descending=True).values[: max(1, int(num_tiles * FEW_ROWS))]
    return float(largest.sum()) >= SHARE_OF_FEW_ROWS * float(by_row.sum()) > 0


def noise_of_weights(comparer: Comparer, actual: Table, expected: Table, scale: float) -> float:
    """Return how far apart 16-bit weights are before a step, in units of what rounding moved them by.

    Args:
        scale: By how much further than in the replays the runs were apart.
    """
    if max(comparer.eps) <= LOW_PRECISION:
        return TYPICAL_NOISE
    compared = replace(comparer, not_compared={}).stored(actual, expected, ("weight",), scale=scale)
    ratios = [each.error / noise for each in compared if (noise := _noise(each))]
    return max([TYPICAL_NOISE, *ratios])


def _noise(comparison: Comparison) -> float:
    """Return by how much rounding moves a tensor of 16 bits; 0 for others, or where no replay measured it."""
    eps = max(epsilon(comparison.actual.dtype), epsilon(comparison.expected.dtype))
    return (comparison.allowed or 0.0) / SAFETY_FACTOR if eps > LOW_PRECISION else 0.0


def _share_of_noise(comparison: Comparison, before: Sequence[float], typical: float) -> float:
    if comparison.kind in ACTIVATIONS:
        factor = LOCAL_FACTOR if comparison.kind == "output" else LOCAL_FACTOR_OF_GRADIENTS
        return factor * max(typical, median(before[-NUM_NEIGHBOURS:] or [0.0]))
    return LOCAL_FACTOR_OF_GRADIENTS * max(typical, *before, 0.0)
