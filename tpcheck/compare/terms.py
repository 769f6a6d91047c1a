"""How far the ranks' terms of a tensor are from adding up to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpcheck.compare.difference import difference, frobenius


def distance_of_terms(parts: Sequence[torch.Tensor], expected: torch.Tensor) -> float:
    """Return the Frobenius distance of the ranks' parts from `expected`, read as terms of a sum where that is nearer.

    Each feature (index of the last dim) is whole on every rank or a term on each: where two branches leave a module,
    the gradient of one may be reduced and that of the other not yet. What is no matrix is read as one feature, for
    single elements prove nothing.
    """
    total = difference(torch.stack(list(parts)).sum(dim=0), expected)
    gaps = [total, *(difference(part, expected) for part in parts)]
    if expected.dim() < 2:
        as_terms, *as_whole = (torch.tensor(frobenius(gap), dtype=torch.float64) for gap in gaps)
    else:
        others = tuple(range(expected.dim() - 1))
        as_terms, *as_whole = (torch.linalg.vector_norm(gap, dim=others) for gap in gaps)
    return frobenius(torch.minimum(as_terms, torch.stack(as_whole).amax(dim=0)))
