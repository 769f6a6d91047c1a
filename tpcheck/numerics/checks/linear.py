"""What a linear module's own inputs and weights give on each rank, and its output under known mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from tpcheck.core.causes import Cause
from tpcheck.core.placement import Shard
from tpcheck.numerics.differences import frobenius_distance
from tpcheck.numerics.evidence import Evidence, Hypothesis, TensorKey

ROUNDINGS = 10.0  # a product that is summed in another order may move as far as what is allowed, and a little more


@dataclass(frozen=True, slots=True)
class Products:
    """The products of a linear module, in float64.

    Attributes:
        by_rank: Each rank's inputs times its weight, without bias, by tp_rank.
        bias: The whole bias; zero where there is none.
        own_biases: What each rank holds of it.
        are_terms: The weight is cut along its input features (row-parallel), so that the products are to be added up.
    """

    by_rank: tuple[torch.Tensor, ...]
    bias: torch.Tensor
    own_biases: tuple[torch.Tensor, ...]
    are_terms: bool

    @property
    def total(self) -> torch.Tensor:
        """The sum of all terms, without bias."""
        return torch.stack(self.by_rank).sum(dim=0)


def products(evidence: Evidence, step: int, key: TensorKey, allowed: float) -> Products | None:
    """Return the products of the module whose output `key` is, or None where it is no linear module.

    It is one if the reference's output is the product of the reference's input and weight, plus its bias.

    Args:
        allowed: Largest Frobenius error of that output.
    """
    name = f"{key.module}.weight"
    layout = evidence.layouts.get(name)
    before = TensorKey(key.phase, key.module, key.call, "input", "0")
    whole_input = evidence.reference[step].activations.get(before)
    if layout is None or whole_input is None or key.role != "output" or key.phase != "forward":
        return None
    weight, bias = reference_weight(evidence, step, name), reference_weight(evidence, step, f"{key.module}.bias")
    expected = evidence.reference[step].activations.get(key)
    if expected is None or weight is None or weight.dim() != 2 or whole_input.shape[-1:] != weight.shape[1:]:
        return None
    wide_bias = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    if (
        frobenius_distance(whole_input.double() @ weight.double().t() + wide_bias, expected.double())
        > ROUNDINGS * allowed
    ):
        return None
    placement = layout.placement()
    cut_dim = placement.dim if isinstance(placement, Shard) else None
    by_rank = _by_rank(evidence, step, before, name, placement if cut_dim == 1 else None)
    held = own_weights(evidence, step, f"{key.module}.bias")
    own_biases = tuple(one.double() for one in held) if held is not None else (wide_bias[:0],) * len(by_rank or ())
    return None if by_rank is None else Products(by_rank, wide_bias, own_biases, are_terms=cut_dim == 1)


def input_gradient_products(evidence: Evidence, step: int, key: TensorKey, allowed: float) -> Products | None:
    """Return what each rank's output gradient and weight give for the input gradient `key`, to be added up.

    None where the module is no linear one that is cut along its output features (column-parallel), as `products` tells.

    Args:
        allowed: Largest Frobenius error of that input gradient.
    """
    name = f"{key.module}.weight"
    layout = evidence.layouts.get(name)
    placement = layout.placement() if layout is not None else None
    after = TensorKey(key.phase, key.module, key.call, "output", "0")
    whole, expected = (evidence.reference[step].activations.get(one) for one in (after, key))
    weight, own = reference_weight(evidence, step, name), own_weights(evidence, step, name)
    gradients = [one.activations.get(after) for one in evidence.candidate[step]]
    if not isinstance(placement, Shard) or placement.dim != 0 or (key.phase, key.role) != ("backward", "input"):
        return None
    if whole is None or expected is None or weight is None or weight.dim() != 2 or own is None:
        return None
    pairs = [(gradient, held) for gradient, held in zip(gradients, own, strict=True) if gradient is not None]
    if len(pairs) < len(own) or any(gradient.shape[-1] != len(held) for gradient, held in (*pairs, (whole, weight))):
        return None
    if frobenius_distance(whole.double() @ weight.double(), expected.double()) > ROUNDINGS * allowed:
        return None
    terms = tuple(gradient.double() @ held.double() for gradient, held in pairs)
    nothing = torch.zeros((), dtype=torch.float64)
    return Products(terms, nothing, (nothing[None][:0],) * len(terms), are_terms=True)


def reference_weight(evidence: Evidence, step: int, name: str) -> Any:
    """Return the reference's parameter as `step` used it, or None where it has none of this name."""
    return evidence.weights_before(step).get(name)


def own_weights(evidence: Evidence, step: int, name: str) -> Sequence[Any] | None:
    """Return each rank's shard of a parameter as `step` used it, by tp_rank, or None where one has none."""
    held = evidence.parts_before(step)
    return [one[name] for one in held] if all(name in one for one in held) else None


def _by_rank(
    evidence: Evidence, step: int, before: TensorKey, name: str, cut_features: Shard | None
) -> tuple[torch.Tensor, ...] | None:
    """Return each rank's input times its weight; a whole input is cut where the weight's input features are."""
    weights = own_weights(evidence, step, name)
    inputs = [one.activations.get(before) for one in evidence.candidate[step]]
    if weights is None or any(one is None for one in inputs):
        return None
    made = []
    for tp_rank, (given, weight) in enumerate(zip(inputs, weights, strict=True)):
        assert given is not None
        if cut_features is not None and given.shape[-1] != weight.shape[1]:
            ranges = cut_features.ranges(given.shape[-1], len(weights), tp_rank)
            given = torch.cat([given[..., indices.start : indices.stop] for indices in ranges], dim=-1)
        if given.shape[-1:] != weight.shape[1:]:
            return None
        made.append(given.double() @ weight.double().t())
    return tuple(made)


def own_parts(made: Products, shapes: Sequence[Sequence[int]]) -> tuple[torch.Tensor, ...] | None:
    """Return what each rank's part should be for the ranks' own inputs and weights; None where that cannot be told."""
    if made.are_terms:
        own = (made.total + made.own_biases[0] if made.own_biases[0].numel() else made.total,) * len(shapes)
    else:
        pairs = zip(made.by_rank, made.own_biases, strict=True)
        own = tuple(product + bias if bias.numel() else product for product, bias in pairs)
        if any(part.shape[-1] < shape[-1] for part, shape in zip(own, shapes, strict=True)):
            own = (torch.cat(own, dim=-1),) * len(shapes)  # gathered
    return own if all(part.shape == tuple(shape) for part, shape in zip(own, shapes, strict=True)) else None


_MOST_RANKS = 6  # groups are looked for among all subsets of the ranks


def linear_hypotheses(
    made: Products, parts: Sequence[torch.Tensor], expected: torch.Tensor, allowed: float
) -> Iterator[Hypothesis]:
    """Yield the hypotheses by which the ranks' terms may have become `parts`, the most telling first.

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
    yield Hypothesis(Cause.MISSING_REDUCE, _where_wrong(parts, expected, own, allowed))
    for rank, term in enumerate(own):
        kept = Hypothesis(
            Cause.MISSING_REDUCE, _where_wrong(parts, expected, [term] * tp, allowed), {"term_of_tp_rank": rank}
        )
        yield kept
    yield Hypothesis(Cause.MEAN_INSTEAD_OF_SUM, (total / tp + bias,) * tp)
    yield Hypothesis(Cause.DUPLICATE_REDUCE, (total * tp + bias,) * tp)
    if bool(bias.any()):
        for times in range(2, tp + 1):
            yield Hypothesis(Cause.BIAS_ADDED_PER_RANK, (total + times * bias,) * tp, {"bias_times": times})
    if 2 < tp <= _MOST_RANKS:
        groups = [_nearest_group(made.by_rank, rank, part - bias) for rank, part in enumerate(parts)]
        sums = tuple(sum((made.by_rank[peer] for peer in group), bias) for group in groups)
        yield Hypothesis(Cause.WRONG_GROUP, sums, {"summed_over_tp_ranks": [list(group) for group in groups]})


def _where_wrong(
    parts: Sequence[torch.Tensor], expected: torch.Tensor, predicted: Sequence[torch.Tensor], allowed: float
) -> tuple[torch.Tensor, ...]:
    """Return the expected tensor with the predicted elements in the places that are wrong: part of it may be right."""
    wide = expected.double()
    return tuple(
        torch.where((part.double() - wide).abs() > allowed, wrong, wide)
        for part, wrong in zip(parts, predicted, strict=True)
    )


def _nearest_group(terms: Sequence[torch.Tensor], rank: int, total: torch.Tensor) -> tuple[int, ...]:
    """Return the ranks, `rank` and some but not all others, whose terms add up to nearest to `total`."""
    others = [one for one in range(len(terms)) if one != rank]
    groups = [tuple(sorted((rank, *chosen))) for size in range(1, len(others)) for chosen in combinations(others, size)]
    return min(groups, key=lambda group: float((sum(terms[one] for one in group) - total).double().norm()))
