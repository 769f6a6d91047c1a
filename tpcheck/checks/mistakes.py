"""What the output of a row-parallel module would be under the mistakes that its terms can tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch

from tpcheck.checks.linear import Products
from tpcheck.records.suspect import Mistaken

_MOST_RANKS = 6  # groups are looked for among all subsets of the ranks


def mistakes(
    made: Products, parts: Sequence[torch.Tensor], expected: torch.Tensor, allowed: float
) -> Iterator[Mistaken]:
    """Yield the mistakes by which the ranks' terms may have become `parts`, the most telling first.

    Args:
        made: The terms of the ranks.
        parts: What the module returned on each rank.
        expected: What it should have returned on each.
        allowed: Largest Frobenius error that passes.
    """
    tp = len(parts)
    if not made.are_terms or tp < 2 or any(part.shape != expected.shape for part in parts):
        return
    total, bias = made.total, made.bias
    own = [term + bias for term in made.by_rank]
    yield Mistaken("missing_reduce", _where_wrong(parts, expected, own, allowed))
    for rank, term in enumerate(own):
        kept = Mistaken(
            "missing_reduce", _where_wrong(parts, expected, [term] * tp, allowed), {"term_of_tp_rank": rank}
        )
        yield kept
    yield Mistaken("mean_instead_of_sum", (total / tp + bias,) * tp)
    yield Mistaken("duplicate_reduce", (total * tp + bias,) * tp)
    if bool(bias.any()):
        for times in range(2, tp + 1):
            yield Mistaken("bias_added_per_rank", (total + times * bias,) * tp, {"bias_times": times})
    if 2 < tp <= _MOST_RANKS:
        groups = [_nearest_group(made.by_rank, rank, part - bias) for rank, part in enumerate(parts)]
        sums = tuple(sum((made.by_rank[peer] for peer in group), bias) for group in groups)
        yield Mistaken("wrong_group", sums, {"summed_over_tp_ranks": [list(group) for group in groups]})


def _where_wrong(
    parts: Sequence[torch.Tensor], expected: torch.Tensor, mistaken: Sequence[torch.Tensor], allowed: float
) -> tuple[torch.Tensor, ...]:
    """Return the expected tensor with the mistaken elements in the places that are wrong: part of it may be right."""
    wide = expected.double()
    return tuple(
        torch.where((part.double() - wide).abs() > allowed, wrong, wide)
        for part, wrong in zip(parts, mistaken, strict=True)
    )


def _nearest_group(terms: Sequence[torch.Tensor], rank: int, total: torch.Tensor) -> tuple[int, ...]:
    """Return the ranks, `rank` and some but not all others, whose terms add up to nearest to `total`."""
    others = [one for one in range(len(terms)) if one != rank]
    groups = [tuple(sorted((rank, *chosen))) for size in range(1, len(others)) for chosen in combinations(others, size)]
    return min(groups, key=lambda group: float((sum(terms[one] for one in group) - total).double().norm()))
