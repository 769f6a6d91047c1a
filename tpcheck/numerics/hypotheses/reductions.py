"""Causes of sums over ranks: left out, done twice, divided, or over another group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.differences import frobenius, frobenius_distance, subtract
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.proof import (
    Hypothesis,
    Test,
    explanation_if_equal,
    largest_residual,
    paired_parts,
    relative,
)
from tpcheck.numerics.tolerance import MOST_RANKS_OF_GROUPS


def terms_of_output(suspect: Suspect) -> Explanation | None:
    """The ranks' parts are terms of the expected output; equal ones were divided by the number of ranks instead.

    Where a collective was issued as in sibling layers, over other ranks, the terms were summed over those.
    """
    explanation = _never_summed(Cause.MISSING_REDUCE, suspect)
    return explanation and (over_tp(suspect) or issued_over_another_group(suspect) or explanation)


def terms_of_replicas(suspect: Suspect) -> Explanation | None:
    """The gradients of replicas are terms of the expected one; where one alone is not zero, the others have lost it."""
    has_terms = sum(bool(part.any()) for part in suspect.actual_parts) > 1
    return _never_summed(Cause.PARTIAL_GRADIENT_ON_REPLICA, suspect) if has_terms else None


def _never_summed(cause: Cause, suspect: Suspect) -> Explanation | None:
    if not suspect.is_replicated or len(suspect.actual_parts) < 2 or suspect.expected is None:
        return None
    total = sum(part.double() for part in suspect.actual_parts)
    return explanation_if_equal(cause, total, suspect.expected.double(), suspect)


def terms_of_input_gradient(suspect: Suspect) -> Explanation | None:
    """The ranks' input gradients are terms of the expected one, in all features or in some."""
    return _terms_by_feature(Cause.MISSING_REDUCE, suspect)


def terms_of_parameter_gradient(suspect: Suspect) -> Explanation | None:
    """The ranks' gradients of a replicated parameter are terms of the expected one, in all features or in some."""
    return _terms_by_feature(Cause.PARTIAL_GRADIENT_ON_REPLICA, suspect)


def _terms_by_feature(cause: Cause, suspect: Suspect) -> Explanation | None:
    """Return the cause if the ranks' gradients add up to the expected one in the features that are wrong.

    The other features are right on every rank: some branches of a shared module are reduced, some are not. Equal terms
    are the expected gradient divided by their number, which has other causes.
    """
    parts, expected = suspect.actual_parts, suspect.expected
    if not suspect.is_replicated or len(parts) < 2 or any(part.shape != expected.shape for part in parts):
        return None
    limit = largest_residual(suspect)
    wide, *terms = (tensor.double().reshape(tensor.shape or (1,)) for tensor in (expected, *parts))
    wrong = _wrong_features(terms, wide, limit)
    if not bool(wrong.any()):
        return None
    wrong_terms, wrong_expected = [term[..., wrong] for term in terms], wide[..., wrong]
    error = frobenius_distance(sum(wrong_terms), wrong_expected)
    if error > limit or all(frobenius_distance(term, wrong_terms[0]) <= limit for term in wrong_terms):
        return None
    if all(not bool(term.any()) or frobenius_distance(term, wrong_expected) <= limit for term in wrong_terms):
        return None  # no rank has a term: some have all, and the others lost it
    evidence = {} if bool(wrong.all()) else {"partial_features": f"{int(wrong.sum())} of {wrong.numel()}"}
    return Explanation(cause, relative(error, wrong_expected), evidence)


def _wrong_features(terms: Sequence[torch.Tensor], expected: torch.Tensor, limit: float) -> torch.Tensor:
    """Return which indices of the last dim are wrong on any rank; all of a vector, whose elements prove nothing."""
    if expected.dim() < 2:
        return torch.ones(expected.shape, dtype=torch.bool)
    others = tuple(range(expected.dim() - 1))
    errors = torch.stack([torch.linalg.vector_norm(subtract(term, expected), dim=others) for term in terms])
    wrong: torch.Tensor = (errors > limit / expected.shape[-1] ** 0.5).any(dim=0)
    return wrong


def times_tp(suspect: Suspect) -> Explanation | None:
    """Every rank's part is the expected one times the number of TP ranks."""
    return _scaled(Cause.DUPLICATE_REDUCE, _tp(suspect), suspect)


def over_tp(suspect: Suspect) -> Explanation | None:
    """Every rank's part is the expected one over the number of TP ranks."""
    return _scaled(Cause.MEAN_INSTEAD_OF_SUM, 1 / _tp(suspect), suspect)


def times_tp_on_some(suspect: Suspect) -> Explanation | None:
    """As `times_tp`, of a full tensor that every rank should hold and some have right."""
    return _scaled(Cause.DUPLICATE_REDUCE, _tp(suspect), suspect, _wrong_replicas(suspect))


def over_tp_on_some(suspect: Suspect) -> Explanation | None:
    """As `over_tp`, of a full tensor that every rank should hold and some have right."""
    return _scaled(Cause.MEAN_INSTEAD_OF_SUM, 1 / _tp(suspect), suspect, _wrong_replicas(suspect))


def times_dp(suspect: Suspect) -> Explanation | None:
    """Every rank's part is the expected one times the number of DP replicas."""
    return _scaled(Cause.SUM_INSTEAD_OF_MEAN, suspect.num_replicas, suspect)


def over_dp(suspect: Suspect) -> Explanation | None:
    """Every rank's part is the expected one over the number of DP replicas."""
    return _scaled(Cause.MEAN_INSTEAD_OF_SUM, 1 / suspect.num_replicas, suspect)


def _tp(suspect: Suspect) -> int:
    return max(1, len(suspect.actual_parts))


Parts = Sequence[torch.Tensor]


def _wrong_replicas(suspect: Suspect) -> tuple[Parts, Parts]:
    """Return the parts of the ranks that are wrong, and the expected ones; nothing where the ranks hold shards."""
    limit, pairs = largest_residual(suspect), paired_parts(suspect) if suspect.is_replicated else []
    wrong = [(part, expected) for part, expected in pairs if not frobenius_distance(part, expected) <= limit]
    return [part for part, _ in wrong], [expected for _, expected in wrong]


def _scaled(cause: Cause, factor: float, suspect: Suspect, of: tuple[Parts, Parts] | None = None) -> Explanation | None:
    """Return the cause if the parts, all ranks' unless `of` has some, are the expected ones times a factor."""
    actual_parts, expected_parts = of or (suspect.actual_parts, suspect.expected_parts)
    if factor == 1 or not expected_parts:
        return None
    actual, expected = (
        torch.cat([part.double().reshape(-1) for part in parts]) for parts in (actual_parts, expected_parts)
    )
    return explanation_if_equal(cause, actual / factor, expected, suspect)


def where_replicas_are_averaged(test: Test) -> Test:
    """Restrict a test to where a factor of the number of replicas has no other reason.

    Where TP has as many ranks, it has none if the gradients of all parameters have it: one alone is scaled.
    """

    def restricted(suspect: Suspect) -> Explanation | None:
        is_clear = suspect.num_replicas != _tp(suspect) or suspect.gradient.is_every_parameter
        return test(suspect) if is_clear else None

    return restricted


ADVICE_ON_BACKWARD = (
    "Sum in one pass alone: torch.distributed.nn.functional.all_reduce adds up in its backward pass what every rank "
    "has whole already. A torch.autograd.Function whose backward returns the gradient as it is does not."
)


def where_module_computed_it(test: Test) -> Test:
    """Restrict a test to what a module computed: its collectives do not scale the output gradient that it receives."""

    def restricted(suspect: Suspect) -> Explanation | None:
        return test(suspect) if suspect.role == "input" else None

    return restricted


def where_it_is_summed_backward(test: Test) -> Test:
    """Restrict a test to a gradient that comes back through a collective issued in the backward pass."""

    def restricted(suspect: Suspect) -> Explanation | None:
        found = test(suspect) if suspect.backward.sums_backward else None
        return found and replace(found, evidence={**found.evidence, "advice": ADVICE_ON_BACKWARD})

    return restricted


def issued_over_another_group(suspect: Suspect) -> Explanation | None:
    """The module issued the collectives of its sibling layers, over other ranks."""
    collectives = suspect.collectives
    if collectives is None or not collectives.issued:
        return None
    issued, expected = ([name for name, _ in side] for side in (collectives.issued, collectives.expected))
    return Explanation(Cause.WRONG_GROUP) if issued == expected else None


_TAKE_BEFORE = (
    "Take what every rank computes as a whole, such as a router, from before the function that sums gradients in its "
    "backward pass, and only what each rank has a part of from behind it."
)


def branches_reduced_otherwise(suspect: Suspect) -> Explanation | None:
    """Of what comes back to a tensor through its branches, some is reduced once more, or is left as terms.

    As where code sums the gradient of what it gives to experts, and a router beside them has the whole of its own.
    """
    branches, tp = suspect.backward.branches, len(suspect.actual_parts)
    pairs = paired_parts(suspect) if suspect.is_replicated and tp > 1 else []
    if not pairs:
        return None
    expected = suspect.expected.double()
    total = sum(part.double() for part, _ in pairs)
    for size in range(1, len(branches)):
        for names in combinations(branches, size):
            of_names = sum(branches[name][0].double() for name in names)
            once_more = [part.double() - (tp - 1) * of_names for part, _ in pairs]
            found = [explanation_if_equal(Cause.DUPLICATE_REDUCE, each, expected, suspect) for each in once_more]
            if all(found) and found[0] is not None:
                return replace(found[0], evidence={"through": list(names), "advice": _TAKE_BEFORE})
            whole = (tp - 1) * (expected - of_names)
            as_terms = explanation_if_equal(Cause.MISSING_REDUCE, total - whole, expected, suspect)
            if as_terms is not None:
                return replace(as_terms, evidence={"through": list(names)})
    return None


def linear_hypotheses(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield what the ranks hold where a linear module reduces its terms wrongly, the most telling mistake first."""
    terms, parts, tp = suspect.linear, suspect.actual_parts, len(suspect.actual_parts)
    if terms is None or not terms.are_summed or tp < 2:
        return
    if len({tensor.shape for tensor in (*parts, *terms.by_rank)}) > 1:
        return
    total, bias = terms.total, terms.bias
    local = [term + bias for term in terms.by_rank]
    yield Hypothesis(Cause.MISSING_REDUCE, _where_wrong(suspect, local))
    for rank, term in enumerate(local):
        yield Hypothesis(Cause.MISSING_REDUCE, _where_wrong(suspect, [term] * tp), {"term_of_tp_rank": rank})
    yield Hypothesis(Cause.MEAN_INSTEAD_OF_SUM, (total / tp + bias,) * tp)
    yield Hypothesis(Cause.DUPLICATE_REDUCE, (total * tp + bias,) * tp)
    if bool(bias.any()):
        for times in range(2, tp + 1):
            yield Hypothesis(Cause.BIAS_ADDED_PER_RANK, (total + times * bias,) * tp, {"bias_times": times})
    if 2 < tp <= MOST_RANKS_OF_GROUPS:
        groups = [_nearest_group(terms.by_rank, rank, part - bias) for rank, part in enumerate(parts)]
        sums = tuple(sum((terms.by_rank[peer] for peer in group), bias) for group in groups)
        yield Hypothesis(Cause.WRONG_GROUP, sums, {"summed_over_tp_ranks": [list(group) for group in groups]})


def beside_an_addend(suspect: Suspect) -> Explanation | None:
    """What is added to a sum over the ranks is right, and the sum is left out, done twice or a mean, or has it, too.

    As where hand-written code multiplies by the weight of a linear layer, which it does not call, and adds a bias or
    a residual.
    """
    tp = len(suspect.actual_parts)
    if not suspect.is_replicated or tp < 2 or suspect.expected is None:
        return None
    expected, parts = suspect.expected.double(), [part.double() for part in suspect.actual_parts]
    if any(part.shape != expected.shape for part in parts):
        return None
    found = (_beside(suspect, name, addend.double(), expected, parts) for name, addend in suspect.addends.items())
    return next((explanation for explanation in found if explanation is not None), None)


def _beside(
    suspect: Suspect, name: str, addend: torch.Tensor, expected: torch.Tensor, parts: Sequence[torch.Tensor]
) -> Explanation | None:
    tp, terms = len(parts), [part - addend for part in parts]
    is_bias = addend.dim() == 1
    addend_cause = Cause.BIAS_ADDED_PER_RANK if is_bias else Cause.DUPLICATE_REDUCE
    has_term = [bool((term.abs() > suspect.allowed_error).any()) for term in terms]
    are_terms = sum(has_term) > 1  # else one has the whole sum
    mistakes: list[tuple[Cause, list[torch.Tensor], dict[str, object]]] = [
        (Cause.MEAN_INSTEAD_OF_SUM, [term * tp + addend for term in terms], {}),
        *([(Cause.MISSING_REDUCE, [sum(terms[1:], parts[0])], {})] if are_terms else []),
        (Cause.DUPLICATE_REDUCE, [term / tp + addend for term in terms], {}),
    ]
    for times in range(2, tp + 1):
        without_copies = [part - (times - 1) * addend for part in parts]
        mistakes.append((addend_cause, without_copies, {"bias_times": times} if is_bias else {"advice": _ADD_AFTER}))
    for cause, corrected, evidence in mistakes:
        found = [explanation_if_equal(cause, each, expected, suspect) for each in corrected]
        known = [each.residual for each in found if each is not None]
        if len(known) == len(found):
            return Explanation(cause, max(known), {"beside": name, **evidence})
    return None


_ADD_AFTER = "Add what every rank has whole, such as a residual, after the sum over the ranks, not before it."


def _where_wrong(suspect: Suspect, predicted: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the expected tensor with the predicted elements where it is wrong: some elements may be right."""
    expected = suspect.expected_parts[0].double()
    return tuple(
        torch.where((part.double() - expected).abs() > suspect.allowed_error, wrong, expected)
        for part, wrong in zip(suspect.actual_parts, predicted, strict=True)
    )


def _nearest_group(terms: Sequence[torch.Tensor], rank: int, total: torch.Tensor) -> tuple[int, ...]:
    """Return the ranks, `rank` and some but not all others, whose terms add up to nearest to `total`."""
    others = [other for other in range(len(terms)) if other != rank]
    groups = [tuple(sorted((rank, *peers))) for size in range(1, len(others)) for peers in combinations(others, size)]
    return min(groups, key=lambda group: frobenius(sum(terms[peer] for peer in group) - total))


def averaging_hypotheses(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield gradients without the mean over DP, and with another group in its place: TP, or all ranks."""
    local = suspect.gradient.local_parts
    if suspect.gradient.is_reduced_over_tp:
        yield from _reduced_over_tp(local, "it is averaged over the TP group", is_mean=True)
        yield from _reduced_over_tp(suspect.expected_parts, "it is averaged over the TP group, too", is_mean=True)
        yield from _reduced_over_tp(suspect.expected_parts, "it is summed over the TP group", is_mean=False)
    if local:
        note = "it is the gradient of this replica's batch alone, not the mean over DP"
        yield Hypothesis(Cause.MISSING_REDUCE, local, {"note": note})


def _reduced_over_tp(parts: Sequence[torch.Tensor], note: str, *, is_mean: bool) -> Iterator[Hypothesis]:
    if len({part.shape for part in parts}) == 1:
        total = torch.stack([part.double() for part in parts]).sum(dim=0)
        predicted = total / len(parts) if is_mean else total
        yield Hypothesis(Cause.WRONG_GROUP, (predicted,) * len(parts), {"note": note})
