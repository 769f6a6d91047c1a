"""Causes of a step of several micro-batches, and of what its losses are divided by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.differences import frobenius_distance
from tpcheck.numerics.evidence import LabelCounts, LabelFacts, Suspect
from tpcheck.numerics.hypotheses.proof import Hypothesis, explanation_if_equal, largest_residual
from tpcheck.numerics.tolerance import MOST_MICRO_BATCHES, RESIDUAL_EXACT

Parts = tuple[torch.Tensor, ...]


def gradient_hypotheses(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield the gradient where micro-batches are lost, reduced too often or not, or losses divided otherwise."""
    if not _are_multiples(suspect.gradient.micro_mean):
        yield from _last_micro_batch(suspect)
        yield from _reduced_again(suspect)
        yield from _unreduced_over_dp(suspect)
    if suspect.gradient.otherwise_normalised and suspect.labels is not None:
        labels = suspect.labels.step
        yield Hypothesis(_cause_of(labels), suspect.gradient.otherwise_normalised, _evidence(labels))
    if suspect.labels is not None and suspect.labels.step.loss == "token_mean":
        yield from _divided_over_replicas(suspect, suspect.labels.step)


def _divided_over_replicas(suspect: Suspect, labels: LabelCounts) -> Iterator[Hypothesis]:
    """Yield the gradient where each micro-batch is divided by its own labels, those of all replicas."""
    terms, factors = suspect.gradient.micro_mean, _factors_of_micro_batches(labels)
    if len(terms) == len(factors):
        weighted = [tuple(part * factor for part in term) for term, factor in zip(terms, factors, strict=True)]
        yield Hypothesis(_cause_of(labels), _sum_of_parts(weighted), _evidence(labels) | _DIVIDED_OVER_REPLICAS)


def _are_multiples(terms: Sequence[Parts]) -> bool:
    """Return whether micro-batches add multiples of one gradient, so that no sum shows which of them it is of."""
    if len(terms) < 2:
        return True
    first, *others = (torch.cat([part.double().reshape(-1) for part in parts]) for parts in terms)
    size = float(first.square().sum())
    factors = [float(torch.dot(first, other)) / size if size else 0.0 for other in others]
    return all(
        frobenius_distance(other, factor * first) <= RESIDUAL_EXACT * float(torch.linalg.vector_norm(other))
        for other, factor in zip(others, factors, strict=True)
    )


def _last_micro_batch(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield what the last micro-batch alone gives, as it is and over the number of micro-batches."""
    terms = suspect.gradient.micro_mean
    number = len(terms)
    for factor in (1.0, float(number)) if number > 1 else ():
        predicted = tuple(part * factor for part in terms[-1])
        yield Hypothesis(Cause.LAST_MICRO_BATCH_ONLY, predicted, {"micro_batches": number})


def _reduced_again(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield A(k), with A(j) = n A(j-1) + S(j): what micro-batch j adds, S(j), is summed with all that was there.

    The n ranks hold the same A(j-1), so that reducing the accumulated gradient multiplies it by n.
    """
    terms, tp, dp = suspect.gradient.micro_mean, len(suspect.actual_parts), suspect.num_replicas
    number = len(terms)
    for ranks, over in dict.fromkeys([(tp, "tp"), (dp, "dp"), (tp * dp, "tp and dp")]):
        if ranks > 1 and number > 1:
            predicted = _sum_of_parts(
                [
                    tuple(part * float(ranks) ** (number - 1 - index) for part in term)
                    for index, term in enumerate(terms)
                ]
            )
            equals = f"{ranks} times what was accumulated before, at each micro-batch"
            yield Hypothesis(Cause.REDUCED_AFTER_ACCUMULATION, predicted, {"equals": equals, "reduced_over": over})


def _unreduced_over_dp(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield gradients in which some micro-batches' are the replica's own, or its term of the mean."""
    mean, local = suspect.gradient.micro_mean, suspect.gradient.micro_local
    if suspect.num_replicas < 2 or not mean or not local:
        return
    for unreduced in _proper_subsets(len(mean)):
        for factor in (1.0, 1 / suspect.num_replicas):
            terms = [
                tuple(part * factor for part in local[index]) if index in unreduced else mean[index]
                for index in range(len(mean))
            ]
            evidence = {"micro_batches": list(unreduced), "reduced_over": "dp"}
            yield Hypothesis(Cause.MICRO_BATCH_UNREDUCED, _sum_of_parts(terms), evidence)


def unreduced_over_tp(suspect: Suspect) -> Explanation | None:
    """The TP ranks hold terms of some micro-batches' gradients, and the whole of others': their sum shows which."""
    terms, parts = suspect.gradient.micro_mean, suspect.actual_parts
    if not suspect.is_replicated or len(parts) < 2 or not terms:
        return None
    limit = largest_residual(suspect)
    if max(frobenius_distance(part, parts[0]) for part in parts) <= limit:
        return None
    total = torch.stack([part.double() for part in parts]).sum(dim=0)
    for unreduced in _proper_subsets(len(terms)):
        predicted = torch.stack(
            [term[0].double() * (1.0 if index in unreduced else len(parts)) for index, term in enumerate(terms)]
        ).sum(dim=0)
        found = explanation_if_equal(Cause.MICRO_BATCH_UNREDUCED, total, predicted, suspect)
        if found is not None:
            evidence = {"micro_batches": list(unreduced), "reduced_over": "tp"}
            return Explanation(found.cause, found.residual, evidence)
    return None


def _proper_subsets(number: int) -> Iterator[tuple[int, ...]]:
    """Yield the sets of micro-batches that are neither empty nor all of them, the smallest first."""
    for size in range(1, number if number <= MOST_MICRO_BATCHES else 2):
        yield from combinations(range(number), size)


def _sum_of_parts(terms: Sequence[Parts]) -> Parts:
    return tuple(torch.stack(parts).sum(dim=0) for parts in zip(*terms, strict=True))


# ---- what losses are divided by


def loss_divided_otherwise(suspect: Suspect) -> Explanation | None:
    """The loss of a micro-batch is that of another way to divide: by its own labels, or by those of the step.

    Or the number that it is divided by is, where a module is given that as a tensor.
    """
    facts, expected = suspect.labels, suspect.expected
    if facts is None or not facts.step.differ or expected is None or torch.as_tensor(expected).numel() != 1:
        return None
    weight = facts.step.weight(facts.dp_rank, facts.micro_batch)
    if not weight:
        return None
    for factor, divided_by in _factors(facts, weight):
        for ratio in (factor, 1 / factor) if suspect.role == "input" else (factor,):
            predicted = torch.as_tensor(expected, dtype=torch.float64).reshape(()) * ratio
            errors = [frobenius_distance(part.double().reshape(()), predicted) for part in suspect.actual_parts]
            if errors and max(errors) <= largest_residual(suspect):
                evidence = _evidence(facts.step) | divided_by
                return Explanation(_cause_of(facts.step), max(errors) / abs(float(predicted)), evidence)
    return None


def _factors(facts: LabelFacts, weight: float) -> Iterator[tuple[float, dict[str, object]]]:
    """Yield what the expected loss is multiplied by under each other way to divide."""
    step = facts.step
    if step.loss == "token_mean":
        averaged = sum(map(len, step.counts)) if step.adds_up else 1
        yield averaged / weight, {}
        replica = sum(step.counts[facts.dp_rank])
        if replica:
            replicas = 1 if step.adds_up else len(step.counts)
            yield step.total / replicas / replica, {"divided_by": "the number of labels of each replica"}
        yield _factors_of_micro_batches(step)[facts.micro_batch], _DIVIDED_OVER_REPLICAS
    else:
        yield weight, {}
        yield weight / sum(map(len, step.counts)), {}


_DIVIDED_OVER_REPLICAS: dict[str, object] = {"divided_by": "the number of labels of each micro-batch over all replicas"}


def _factors_of_micro_batches(step: LabelCounts) -> list[float]:
    """Return by what the expected losses of each micro-batch are multiplied where it is divided by its own labels.

    Its labels are those of all replicas, of which each has one micro-batch of a number.
    """
    averaged = 1 if step.adds_up else len(step.counts[0])
    return [step.total / averaged / labels if labels else 0.0 for labels in map(sum, zip(*step.counts, strict=True))]


def _cause_of(labels: LabelCounts) -> Cause:
    return Cause.MEAN_OF_LOCAL_MEANS if labels.loss == "token_mean" else Cause.TOKEN_MEAN_INSTEAD_OF_MEAN


def _evidence(labels: LabelCounts) -> dict[str, object]:
    own, all_labels = "the number of labels of each micro-batch", "the number of labels of the whole step"
    actual, expected = (own, all_labels) if labels.loss == "token_mean" else (all_labels, own)
    return {
        "labels": [list(of_rank) for of_rank in labels.counts],
        "divided_by": actual,
        "reference_divides_by": expected,
    }


# ---- what is logged


def loss_of_one_replica(suspect: Suspect) -> Explanation | None:
    """The logged loss is that of each rank's own replica, where it should be their mean."""
    if suspect.loss is None or not suspect.loss.expected:
        return None
    own, differences = suspect.loss.expected, [abs(logged - suspect.expected) for logged in suspect.actual_parts]
    error = max(abs(logged - own) for logged in suspect.actual_parts)
    if error > RESIDUAL_EXACT * min(differences):
        return None
    note = "it is the loss of the rank's own replica, not the mean over DP"
    return Explanation(Cause.MISSING_REDUCE, error / abs(own), {"note": note})
