"""Sums that no gradient comes back through, statistics over one shard, and uses of a module whose gradient is lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.numerics.evidence import suspect
from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.evidence import BackwardFacts, GradientFacts, Suspect
from tpcheck.numerics.hypotheses import explain

GENERATOR = torch.Generator().manual_seed(0)
REDUCED = ("all_reduce",)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def halves(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tensor.chunk(2, dim=-1)


def of_parts(actual: Sequence[torch.Tensor], expected: torch.Tensor, **facts: Any) -> Suspect:
    """Return a suspect for an input gradient of which each of two ranks holds half."""
    made = suspect("input_gradient", actual, expected_parts=halves(expected), expected=expected, role="input")
    return replace(made, backward=BackwardFacts(**{"collectives": REDUCED, **facts}))


def named(made: Suspect) -> tuple[Cause | None, Any]:
    found: Explanation | None = explain(made)
    return (None, None) if found is None else (found.cause, found.evidence.get("lost"))


def cross_entropy() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradient of logits, and its part that goes through the sum of exponentials."""
    softmax = drawn(2, 3, 8).softmax(-1)
    labels = torch.nn.functional.one_hot(torch.tensor([[0, 5, 7], [1, 2, 6]]), 8)
    return (softmax - labels) / 6, softmax / 6


def test_a_loss_whose_label_or_whose_sum_sends_nothing_back_is_named() -> None:
    whole, through_sum = cross_entropy()
    facts = {"through_sum": halves(through_sum)}
    assert named(of_parts(halves(through_sum), whole, **facts)) == (Cause.COLLECTIVE_WITHOUT_BACKWARD, "labels' logits")
    through_labels = halves(whole - through_sum)
    assert named(of_parts(through_labels, whole, **facts)) == (Cause.COLLECTIVE_WITHOUT_BACKWARD, "sum of exponentials")


def test_it_is_no_collective_without_backward_where_there_is_none_or_the_gradient_is_another() -> None:
    whole, through_sum = cross_entropy()
    facts = {"through_sum": halves(through_sum)}
    assert named(of_parts(halves(through_sum), whole, collectives=()))[0] is None
    assert named(of_parts(halves(through_sum + 0.01 * drawn(2, 3, 8)), whole, **facts))[0] is None


def test_a_backward_that_has_the_labels_of_its_own_part_alone_is_named() -> None:
    """As of a hand-written log_softmax whose backward adds up what comes to the rank's own part of the vocabulary."""
    whole, through_sum = cross_entropy()
    labels = torch.tensor([[0, 5, 7], [1, 2, 6]])
    parts = [part * ((labels >= 4) == bool(rank))[..., None].double() for rank, part in enumerate(halves(whole))]
    found = named(of_parts(parts, whole, collectives=(), through_sum=halves(through_sum)))
    assert found == (Cause.COLLECTIVE_WITHOUT_BACKWARD, "other ranks' labels")


def test_a_backward_with_the_softmax_over_its_own_part_is_a_statistic_over_one_shard() -> None:
    whole, through_sum = cross_entropy()
    parts = [
        part / part.sum(-1, keepdim=True) / 6 + whole_part - part
        for part, whole_part in zip(halves(through_sum), halves(whole), strict=True)
    ]
    assert named(of_parts(parts, whole, through_sum=halves(through_sum)))[0] is Cause.STATISTIC_OVER_ONE_SHARD


@pytest.mark.parametrize("sums_backward", [True, False])
def test_a_sum_of_a_loss_that_is_reduced_again_in_the_backward_pass_is_named(sums_backward: bool) -> None:
    """As by `torch.distributed.nn.functional.all_reduce`, whose backward pass adds up what all ranks have already."""
    whole, through_sum = cross_entropy()
    facts = {"through_sum": halves(through_sum), "sums_backward": sums_backward}
    for again, what in ((through_sum, "sum of exponentials"), (whole - through_sum, "labels' logits")):
        found = explain(of_parts(halves(whole + again), whole, **facts))
        if sums_backward:
            assert found is not None
            assert (found.cause, found.evidence["reduced_again"]) == (Cause.DUPLICATE_REDUCE, what)
        else:
            assert found is None


@pytest.mark.parametrize(
    ("sums_backward", "expected"), [(True, Cause.DUPLICATE_REDUCE), (False, Cause.GRADIENT_SCALED)]
)
def test_a_gradient_that_comes_back_through_a_collective_as_often_as_there_are_ranks_is_reduced_again(
    sums_backward: bool, expected: Cause
) -> None:
    whole = drawn(2, 3, 8)
    made = replace(of_parts(halves(2 * whole), whole, collectives=(), sums_backward=sums_backward), role="output")
    assert named(made)[0] is expected


def rms_norm() -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Return facts of a norm without a weight, its input gradient, and that with its statistic held constant."""
    inputs, gradient = drawn(2, 3, 8).requires_grad_(), drawn(2, 3, 8)
    scale = inputs.square().mean(-1, keepdim=True).rsqrt()
    (inputs * scale).backward(gradient)
    whole, inputs = inputs.grad, inputs.detach()
    assert whole is not None
    outputs = inputs * scale.detach()
    facts = {"inputs": halves(inputs), "outputs": halves(outputs), "output_gradients": halves(gradient)}
    return facts, whole, gradient * scale.detach()


def test_a_norm_whose_statistic_sends_nothing_back_is_named() -> None:
    facts, whole, constant = rms_norm()
    assert named(of_parts(halves(constant), whole, **facts)) == (Cause.COLLECTIVE_WITHOUT_BACKWARD, "statistic")
    assert named(of_parts(halves(constant * 1.01), whole, **facts))[0] is None


def test_a_norm_whose_ranks_have_their_own_share_of_the_statistics_gradient_is_named() -> None:
    facts, whole, constant = rms_norm()
    terms = [
        (output * gradient).sum(-1, keepdim=True)
        for output, gradient in zip(facts["outputs"], facts["output_gradients"], strict=True)
    ]
    shares = [term / sum(terms) for term in terms]
    parts = [
        part + share * (full - part) for part, share, full in zip(halves(constant), shares, halves(whole), strict=True)
    ]
    assert named(of_parts(parts, whole, **facts)) == (Cause.COLLECTIVE_WITHOUT_BACKWARD, "other ranks' share")


def test_a_softmax_whose_sum_sends_nothing_back_is_named() -> None:
    outputs, gradient = drawn(2, 3, 8).softmax(-1), drawn(2, 3, 8)
    whole = outputs * (gradient - (gradient * outputs).sum(-1, keepdim=True))
    facts = {"inputs": halves(outputs.log()), "outputs": halves(outputs), "output_gradients": halves(gradient)}
    found = named(of_parts(halves(gradient * outputs), whole, **facts))
    assert found == (Cause.COLLECTIVE_WITHOUT_BACKWARD, "statistic")


@pytest.mark.parametrize("unseen", [REDUCED, ()])
def test_a_gradient_that_vanishes_is_missing_or_lost_in_a_collective(unseen: tuple[str, ...]) -> None:
    whole, cause = drawn(2, 3, 8), Cause.COLLECTIVE_WITHOUT_BACKWARD if unseen else Cause.GRADIENT_MISSING
    zeros = halves(torch.zeros_like(whole))
    assert named(of_parts(zeros, whole, unseen=unseen))[0] is cause
    weight = suspect("gradient", zeros, whole)
    for missing_on, expected in (((0, 1), cause), ((1,), Cause.GRADIENT_MISSING)):
        facts = {"gradient": GradientFacts(missing_on=missing_on), "backward": BackwardFacts(REDUCED, unseen)}
        assert named(replace(weight, **facts))[0] is expected


def test_what_each_ranks_part_computes_alone_is_a_statistic_over_one_shard() -> None:
    whole = drawn(2, 3, 8)
    alone = tuple(part / part.norm() for part in halves(whole))
    expected = halves(whole / whole.norm())
    made = suspect("activation", alone, expected_parts=expected, expected=whole / whole.norm())
    assert named(replace(made, computed_alone=alone))[0] is Cause.STATISTIC_OVER_ONE_SHARD
    assert named(replace(made, computed_alone=alone, has_cut_matrices=True))[0] is None
    assert named(replace(made, computed_alone=halves(drawn(2, 3, 8))))[0] is None
    assert named(made)[0] is None


def test_a_use_of_a_module_whose_gradient_is_lost_is_named() -> None:
    uses = (halves(drawn(4, 8)), halves(drawn(4, 8)), halves(drawn(4, 8)))
    expected = tuple(sum(of_rank) for of_rank in zip(*uses, strict=True))
    kept = tuple(first + last for first, last in zip(uses[0], uses[2], strict=True))
    made = suspect("gradient", kept, expected_parts=expected)
    found = explain(replace(made, gradient=GradientFacts(uses=uses)))
    assert found is not None
    assert (found.cause, found.evidence) == (Cause.USE_OF_MODULE_LOST, {"uses": 3, "lost_uses": [1]})
    assert explain(made) is None
