"""Causes of sums inside a module: one that no gradient comes back through, one over a rank's part, one of uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.proof import Hypothesis, first_confirmed
from tpcheck.numerics.hypotheses.reductions import ADVICE_ON_BACKWARD


def no_gradient_comes_back(suspect: Suspect) -> Explanation | None:
    """No gradient comes back on any rank through a module that issued a collective which autograd does not see."""
    if not suspect.backward.unseen:
        return None
    if suspect.kind == "gradient":
        is_lost = len(suspect.gradient.missing_on) == len(suspect.actual_parts)
    else:
        is_lost = suspect.expected is not None and bool(suspect.expected.any())
        is_lost = is_lost and not any(bool(part.any()) for part in suspect.actual_parts)
    return Explanation(Cause.COLLECTIVE_WITHOUT_BACKWARD) if is_lost else None


def gradient_without_the_sums(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield what comes back through a module besides sums over ranks, of a cross entropy or of a statistic."""
    if suspect.backward.through_sum:
        yield from _of_cross_entropy(suspect)
    if suspect.backward.collectives:
        yield from _with_constant_statistics(suspect)


def _of_cross_entropy(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield the gradient of a rank's logits where one of the two sums over the vocabulary comes back wrongly.

    Behind a cross entropy it is the softmax minus one at the label. Each sum may be lost, or reduced again in the
    backward pass; a rank may have the softmax of the labels of its own part alone, as where a backward pass adds up
    only these, or a softmax over its own part.
    """
    through_sum = [part.double() for part in suspect.backward.through_sum]
    expected = [part.double() for part in suspect.expected_parts]
    through_labels = [whole - part for whole, part in zip(expected, through_sum, strict=True)]
    labels, exponentials = "labels' logits", "sum of exponentials"
    yield _without(through_sum, labels)
    yield _without(through_labels, exponentials)
    if suspect.backward.sums_backward:
        times = len(expected) - 1
        for again, what in ((through_labels, labels), (through_sum, exponentials)):
            predicted = tuple(whole + times * part for whole, part in zip(expected, again, strict=True))
            yield Hypothesis(Cause.DUPLICATE_REDUCE, predicted, {"reduced_again": what, "advice": ADVICE_ON_BACKWARD})
    if suspect.is_replicated:
        return
    weights = torch.stack([part.sum(-1, keepdim=True) for part in through_sum])  # of each position, by tp_rank
    has_label = [part.abs().amax(-1, keepdim=True) > weights.sum(dim=0) / 2 for part in through_labels]
    yield _without([part * own for part, own in zip(expected, has_label, strict=True)], "other ranks' labels")
    over_own = [
        torch.where(own == 0, 0, part * weights.sum(dim=0) / own) + label
        for part, own, label in zip(through_sum, weights, through_labels, strict=True)
    ]
    yield Hypothesis(Cause.STATISTIC_OVER_ONE_SHARD, tuple(over_own), {"statistic": exponentials})


def _with_constant_statistics(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield the gradient of a module whose output is its input times, or over, a statistic of a row, held constant.

    Of a norm the output is the input times a constant of the row and a weight; of a softmax it is the exponentials over
    their sum, and its derivative with that sum held constant is the output itself. What remains of the expected
    gradient comes back through the statistic, of which each rank has a share: a rank may have its own share alone.
    """
    facts = suspect.backward
    rows = list(zip(facts.inputs, facts.outputs, facts.output_gradients, strict=True))
    if not rows:
        return
    shares = _shares_of_rows([(output * gradient).sum(-1, keepdim=True) for _, output, gradient in rows])
    for constant in (
        [gradient * torch.where(inputs == 0, 0, output / inputs) for inputs, output, gradient in rows],
        [gradient * output for _, output, gradient in rows],
    ):
        yield _without(constant, "statistic")
        through = zip(constant, suspect.expected_parts, shares, strict=False)
        yield _without([part + share * (whole - part) for part, whole, share in through], "other ranks' share")


def _shares_of_rows(terms: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return each rank's term over the sum of all; 0 where that is 0."""
    if len({term.shape for term in terms}) > 1 or not terms:
        return []
    total = torch.stack(list(terms)).sum(dim=0)
    return [torch.where(total == 0, 0, term / total) for term in terms]


def _without(parts: Sequence[torch.Tensor], lost: str) -> Hypothesis:
    return Hypothesis(Cause.COLLECTIVE_WITHOUT_BACKWARD, tuple(parts), {"lost": lost})


without_the_sums = first_confirmed(gradient_without_the_sums)


def _alone(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield what each rank computes by itself; where a matrix is cut that may be right, as terms of a sum."""
    if suspect.computed_alone and not suspect.has_cut_matrices:
        yield Hypothesis(Cause.STATISTIC_OVER_ONE_SHARD, suspect.computed_alone)


statistic_over_one_shard = first_confirmed(_alone)


def lost_uses(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield the gradient without that of some uses of a module that is called more than once."""
    uses = suspect.gradient.uses
    for number in range(1, 2 ** len(uses) - 1):
        lost = [call for call in range(len(uses)) if number >> call & 1]
        kept = [parts for call, parts in enumerate(uses) if call not in lost]
        predicted = tuple(torch.stack(of_rank).sum(dim=0) for of_rank in zip(*kept, strict=True))
        yield Hypothesis(Cause.USE_OF_MODULE_LOST, predicted, {"uses": len(uses), "lost_uses": lost})
