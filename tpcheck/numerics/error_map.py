"""Where in a wrong tensor the error lies: a small grid of tiles, with the parts that the ranks hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import isfinite, prod
from typing import Any

import torch

from tpcheck.numerics.differences import frobenius, subtract
from tpcheck.numerics.evidence import Suspect

MOST_TILES = 32  # along each side: a page shows them, and a report stays small
_MOST_ELEMENTS = 1 << 26  # of a tensor: positions and squares take half a gigabyte each
_MOST_RECTANGLES = 64  # of all shards together: more cannot be distinguished in a picture

Span = tuple[int, int]
"""First index, and the first after the last."""


@dataclass(frozen=True, slots=True)
class HeldRectangle:
    """Rows and columns that some ranks hold; where a tensor is fused, a rank holds several."""

    ranks: tuple[int, ...]
    rows: Span
    columns: Span


@dataclass(frozen=True, slots=True)
class ErrorMap:
    """The error of one tensor, read as a matrix: rows are all dims but the last.

    Attributes:
        shape: Of the full tensor.
        tiles: For each of at most 32 x 32 tiles the Frobenius error over the norm of the expected tensor, row by row;
            the worst rank's where every rank holds the full tensor. Absolute where the expected tensor is zero.
        shards: What the ranks hold; empty where it is no small number of rectangles.
    """

    shape: tuple[int, ...]
    tiles: tuple[tuple[float, ...], ...]
    shards: tuple[HeldRectangle, ...]

    def as_evidence(self) -> dict[str, Any]:
        shards = [
            {"ranks": list(shard.ranks), "rows": list(shard.rows), "columns": list(shard.columns)}
            for shard in self.shards
        ]
        tiles = [[float(f"{error:.3g}") for error in row] for row in self.tiles]
        return {"error_map": {"shape": list(self.shape), "tiles": tiles, "shards": shards}}


def error_map(suspect: Suspect) -> ErrorMap | None:
    """Return where the error of a suspect lies; None for a number, a huge tensor, and what cannot be subtracted."""
    expected, parts, cut = suspect.expected, suspect.actual_parts, suspect.cut
    if cut is None or not isinstance(expected, torch.Tensor) or expected.dim() == 0:
        return None
    if not 0 < expected.numel() <= _MOST_ELEMENTS:
        return None
    expected_parts = cut(expected)
    if expected.is_complex() or [part.shape for part in parts] != [part.shape for part in expected_parts]:
        return None
    columns = expected.shape[-1]
    rows = expected.numel() // columns
    height, width = min(rows, MOST_TILES), min(columns, MOST_TILES)
    # Positions count from 1: padding of a shard, which is not in the full tensor, is 0.
    numbers = torch.arange(1, expected.numel() + 1).reshape(expected.shape)
    positions = [part.reshape(-1).cpu() - 1 for part in cut(numbers)]
    norm = frobenius(expected)
    norm = norm if isfinite(norm) else 1.0
    squares = [
        _squares_by_tile(subtract(part, right), held, norm, (rows, columns), (height, width))
        for part, right, held in zip(parts, expected_parts, positions, strict=True)
    ]
    total = max(squares, key=lambda each: float(each.sum())) if suspect.is_replicated else torch.stack(squares).sum(0)
    tiles = tuple(tuple(map(float, row)) for row in total.sqrt().reshape(height, width).tolist())
    return ErrorMap(tuple(expected.shape), tiles, tuple(_shards(suspect.tp_group, positions, columns)))


def _squares_by_tile(
    gap: torch.Tensor, held: torch.Tensor, norm: float, shape: tuple[int, int], tiles: tuple[int, int]
) -> torch.Tensor:
    (rows, columns), (height, width) = shape, tiles
    is_inside = held >= 0
    held, errors = held[is_inside], gap.reshape(-1).cpu()[is_inside] / (norm or 1.0)
    tile = (held // columns * height // rows) * width + held % columns * width // columns
    return torch.zeros(prod(tiles), dtype=torch.float64).index_add_(0, tile, errors.square())


def _shards(ranks: tuple[int, ...], positions: list[torch.Tensor], columns: int) -> list[HeldRectangle]:
    """Return the rectangles that the ranks hold; none where a part is no product of rows and columns."""
    ranks_of: dict[tuple[Span, Span], list[int]] = {}
    for rank, held in zip(ranks, positions, strict=True):
        held = held[held >= 0]
        rows_held, columns_held = ((held // columns).bincount().nonzero(), (held % columns).bincount().nonzero())
        if len(rows_held) * len(columns_held) != len(held):
            return []
        for rectangle in product(_spans(rows_held), _spans(columns_held)):
            ranks_of.setdefault(rectangle, []).append(rank)
            if len(ranks_of) > _MOST_RECTANGLES:
                return []
    return [HeldRectangle(tuple(holders), *rectangle) for rectangle, holders in ranks_of.items()]


def _spans(indices: torch.Tensor) -> Iterator[Span]:
    """Yield the runs of adjacent numbers."""
    indices = indices.reshape(-1)
    ends = (indices[1:] - indices[:-1] != 1).nonzero().reshape(-1) + 1
    for run in indices.tensor_split(ends):
        if len(run):
            yield int(run[0]), int(run[-1]) + 1
