"""The order of a head's rows under rotary embeddings: pairs next to each other, or half of the rotated rows apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

Order = Literal["half-split", "interleaved"]

_MIN_ROWS = 8
"""Rows of a block that shows the order by itself: of four rows, only the middle ones change places."""

_MAX_SIZES = 8  # sizes that are tried for the first block; more than one only where slices are equal


@dataclass(frozen=True, slots=True)
class RotaryOrder:
    """Blocks of rows, one for each head that is concerned, in the other order.

    Attributes:
        rotary_dim: Rows of a block: all that are rotated, which may be a part of the head.
        starts: The first row of each block.
        actual: The order of the actual tensor if that of the expected one is the other.
    """

    rotary_dim: int
    starts: tuple[int, ...]
    actual: Order

    def evidence(self) -> dict[str, Any]:
        return {"rotary_dim": self.rotary_dim, "heads": len(self.starts), "first": self.starts[0], "order": self.actual}


def rotary_order(actual: torch.Tensor, expected: torch.Tensor) -> RotaryOrder | None:
    """Return the blocks that make up all differences, or None where something else differs.

    Args:
        actual, expected: The digests of the slices, of equal number.
    """
    differing = (actual != expected).nonzero().reshape(-1)
    if len(differing) < 2 or differing[0] == 0:  # the first row of a head keeps its place
        return None
    start = int(differing[0]) - 1
    for size, order in _sizes(actual[start:], expected[start:]):
        sources = _sources(size, order)
        starts: list[int] = []
        next_row = 0
        for row in differing.tolist():
            if row < next_row:
                continue
            start, next_row = row - 1, row - 1 + size
            if not _holds(actual, expected, start, sources):
                break
            starts.append(start)
        else:
            if size >= _MIN_ROWS or len(starts) > 1:
                return RotaryOrder(size, tuple(starts), order)
    return None


def _holds(actual: torch.Tensor, expected: torch.Tensor, start: int, sources: torch.Tensor) -> bool:
    stop = start + len(sources)
    return stop <= len(expected) and torch.equal(actual[start:stop], expected[start:stop][sources])


def _sizes(actual: torch.Tensor, expected: torch.Tensor) -> Iterator[tuple[int, Order]]:
    """Yield the size that the first block has in each order: its second row stands at the start of the second half."""
    places: tuple[tuple[Order, torch.Tensor], ...] = (
        ("half-split", actual == expected[1]),
        ("interleaved", expected == actual[1]),
    )
    for order, place in places:
        for half in place.nonzero().reshape(-1)[:_MAX_SIZES].tolist():
            if 2 <= half <= len(actual) // 2:
                yield 2 * half, order


def _sources(size: int, order: Order) -> torch.Tensor:
    """Return which row of the block in one order stands at each place of it in the other."""
    pairs = torch.arange(size).reshape(-1, 2) if order == "half-split" else torch.arange(size).reshape(2, -1)
    return pairs.T.reshape(-1)
