"""Causes of outputs that are wrong on some slices of a sequence: each test asks which parts of it are right."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.sketch import TILES
from tpcheck.runs.comparing.comparisons import Comparison
from tpcheck.runs.recording.slices import FROM_ZERO, ZIGZAG


@dataclass(frozen=True, slots=True)
class GivenSlices:
    """How the actual run's slices lie, and what the model was told of that.

    Attributes:
        order: That makes up the other run's samples.
        positions: Which the positions are that the model was called with, as `PassRecord.positions`.
        slots: For each replica of the model, the numbers of its TP groups, by cp_rank.
    """

    order: str
    positions: str
    slots: tuple[tuple[int, ...], ...]


def positions_of_other_slices(given: GivenSlices | None) -> Explanation | None:
    """The model was called with positions that its tokens do not have: those of another order, or from 0.

    Positions may begin anew in a sample of several documents, so this alone is no finding: it explains an output that
    is wrong.
    """
    if given is None or not given.positions or given.positions == given.order:
        return None
    evidence = {"slices": given.order, "positions": given.positions}
    if given.positions == FROM_ZERO:
        return Explanation(Cause.SLICE_TAKEN_FOR_FIRST, evidence=evidence)
    return Explanation(Cause.POSITIONS_OF_ANOTHER_ORDER, evidence=evidence)


def slice_taken_for_first(given: GivenSlices | None, comparison: Comparison) -> Explanation | None:
    """Only the first part of the sequence is right, or only the slice of the first rank; all others are wrong.

    The parts are those that slices are cut into, seen as the tiles of rows of which one rank has elements.
    """
    if given is None or comparison.is_of_norms or not comparison.allowed or len(comparison.expected.shape) < 2:
        return None
    parts = _parts(given, comparison)
    if len(parts) < 2:
        return None
    actual = comparison.actual
    patterns = (
        ("the first part of the sequence", [number > 0 for number in range(len(parts))]),
        ("the slice of the first rank", [cp_rank > 0 for cp_rank, *_ in parts]),
    )
    are_terms = actual.is_replicated_over_tp and not actual.is_bitwise_replicated  # that are summed after the module
    for sketch in (actual.sketch, *([actual.sum_over_tp()] if are_terms else [])):
        gap = (sketch - comparison.expected.sketch).tile_norms().square().sum(dim=1)
        is_wrong = [sqrt(float(gap[first:last].sum())) > comparison.allowed for _, first, last in parts]
        for right, expected in patterns:
            if is_wrong == expected:
                evidence = {"right_in": right, **_same_bits(given, comparison)}
                return Explanation(Cause.SLICE_TAKEN_FOR_FIRST, evidence=evidence)
    return None


def _parts(given: GivenSlices, comparison: Comparison) -> list[tuple[int, int, int]]:
    """Return the parts of the sequence in order: cp_rank, first and one past the last tile; none if these overlap."""
    groups = comparison.actual.groups
    owner: dict[int, int] = {}
    for slots in given.slots:
        for cp_rank, number in enumerate(slots):
            for rank in groups[number] if number < len(groups) else ():
                part = comparison.actual.parts.get(rank)
                rows = [] if part is None else torch.nonzero(part.sketch.tile_norms().sum(dim=1)).reshape(-1).tolist()
                for row in rows:
                    if owner.setdefault(row, cp_rank) != cp_rank:
                        return []
    num_slices = len(given.slots[0])
    num_chunks = 2 * num_slices if given.order == ZIGZAG else num_slices
    parts: list[tuple[int, int, int]] = []
    for row in range(TILES):
        if row not in owner:
            continue
        is_same_chunk = bool(parts) and row * num_chunks // TILES == parts[-1][1] * num_chunks // TILES
        if parts and parts[-1][0] == owner[row] and is_same_chunk:
            parts[-1] = (owner[row], parts[-1][1], row + 1)
        else:
            parts.append((owner[row], row, row + 1))
    return parts


def _same_bits(given: GivenSlices, comparison: Comparison) -> dict[str, list[int]]:
    """Return the ranks that hold the same bits for each slice, if all do."""
    groups, parts = comparison.actual.groups, comparison.actual.parts
    for slots in given.slots:
        for peers in zip(*(groups[number] for number in slots if number < len(groups)), strict=True):
            if len({parts[rank].digest for rank in peers if rank in parts}) > 1:
                return {}
    return {"same_bits_on_ranks": sorted(parts)}
