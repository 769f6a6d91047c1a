"""How far a parameter, or its gradient, is from the reference's, through its layout over the TP group."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpcheck.adapters import Layout
from tpcheck.compare.difference import Difference, difference, frobenius, largest_element, measured


def compare_parameter(
    layout: Layout, expected: torch.Tensor, parts: Sequence[torch.Tensor], allowed: float
) -> Difference:
    """Compare every rank's shard with the reference's whole tensor; `largest_at` is an index into the whole.

    Parts of the wrong shape differ without bound.
    """
    if any(tuple(part.shape) != shape for part, shape in zip(parts, layout.local_shapes, strict=True)):
        return Difference.unbounded(expected, allowed, len(parts))
    if layout.is_replicated:
        if tuple(expected.shape) != tuple(layout.shape):
            return Difference.unbounded(expected, allowed, len(parts))
        return measured([difference(part, expected) for part in parts], frobenius(expected), allowed, replicated=True)
    assembled = layout.assemble(parts)
    if assembled.shape != expected.shape:
        return Difference.unbounded(expected, allowed, len(parts))
    gap = difference(assembled, expected)
    largest, at = largest_element(gap)
    return Difference(
        error=frobenius(gap),
        expected_norm=frobenius(expected),
        allowed=allowed,
        part_errors=tuple(frobenius(layout.local(gap, tp_rank)) for tp_rank in range(len(parts))),
        largest=largest,
        largest_at=at,
        count_differing=int(gap.count_nonzero()),
    )
