"""Causes that sums and scalars show: each test asks a question of sketches, and names a cause where it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, isfinite, sqrt
from typing import Any

import torch

from tpcheck.core.causes import Cause, Explanation, first_explanation
from tpcheck.core.optimizers import OPTIMIZERS_OF_WHOLE_MATRICES
from tpcheck.numerics.sketch import Sketch, distance
from tpcheck.numerics.tolerance import (
    FITTED_RELATIVE_ERROR,
    LEAST_MULTIPLES,
    RESIDUAL_EXACT,
    RESIDUAL_NOISY,
    SAFETY_FACTOR,
    SPREAD_OF_ONE_ROW,
)
from tpcheck.runs.comparing.comparisons import Comparison, relative
from tpcheck.runs.comparing.slice_causes import GivenSlices, positions_of_other_slices, slice_taken_for_first
from tpcheck.runs.trace.wholes import Whole, epsilon, total

# A sum of squares is close to an integer, or to one over it, by chance as seldom as this.
_CHANCE_OF_INTEGER = 1e-2


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """Gradients of one parameter as they stood before each later micro-batch of the step.

    Attributes:
        actual: For each rank, after the first micro-batch, after the second ...; without the last.
        expected: Of the expected run's whole; empty where it had one micro-batch, or other ones.
    """

    actual: Mapping[int, tuple[Sketch, ...]] = field(default_factory=dict)
    expected: tuple[Sketch, ...] = ()


@dataclass(frozen=True, slots=True)
class Suspect:
    """A tensor that is wrong, with what tests need to know beside it.

    Attributes:
        comparison: The tensor of both runs.
        tp, dp: Of the actual run; each slice of a sequence is one of the replicas.
        num_passes: Micro-batches of the actual run.
        is_first: No tensor of the phase comes before it: what is wrong came from outside the model.
        micro_batches: Of the parameter whose gradient this is.
        residuals: Right gradients that reach this one unchanged beside a branch, by the module whose output's they are.
        is_summed_inside: The module that this gradient comes from adds up its output over the TP ranks in its forward.
        ones: A column of ones with the rows of this output, which tells tensors that are the same in every row.
        bias_norm: Norm of the bias of the module whose output this is; 0 where it has none.
        slices: How the ranks of CP groups were called; None without them.
    """

    comparison: Comparison
    tp: int = 1
    dp: int = 1
    num_passes: int = 1
    is_first: bool = False
    micro_batches: MicroBatches = MicroBatches()
    residuals: Mapping[str, Sketch] = field(default_factory=dict)
    is_summed_inside: bool = False
    ones: Sketch | None = None
    bias_norm: float = 0.0
    slices: GivenSlices | None = None

    @property
    def cp(self) -> int:
        return 1 if self.slices is None else len(self.slices.slots[0])

    @property
    def sizes_over_replicas(self) -> dict[int, str]:
        """The axes over which ranks hold the same parameters, by size: data, slices, both."""
        sizes: dict[int, list[str]] = {}
        for axis, size in (("dp", self.dp // self.cp), ("cp", self.cp)):
            sizes.setdefault(size, []).append(axis)
        named = {size: " or ".join(axes) for size, axes in sizes.items() if size > 1}
        return named | ({self.dp: self.all_replicas} if self.dp > 1 else {})

    @property
    def all_replicas(self) -> str:
        """The axes over which gradients are reduced."""
        return "dp" if self.cp == 1 else "cp" if self.cp == self.dp else "dp and cp"


Test = Callable[[Suspect], Explanation | None]


def explain(suspect: Suspect) -> Explanation | None:
    """Return the first cause whose test holds, or None where none does."""
    return first_explanation(suspect, TESTS.get(suspect.comparison.kind, (not_finite, all_zero)))


def largest_residual(comparison: Comparison) -> float:
    """Return the largest error that may remain where a cause explains the tensor; -inf where nothing can be shown."""
    observed = max(comparison.errors)
    if not 0 < observed < inf or comparison.is_of_norms:
        return -inf
    return max(RESIDUAL_EXACT * observed, min(comparison.allowed or 0.0, RESIDUAL_NOISY * observed))


# ---- values


def not_finite(suspect: Suspect) -> Explanation | None:
    """Infinities or NaN that the expected tensor does not have."""
    actual, expected = suspect.comparison.actual, suspect.comparison.expected.sketch
    numbers = {variant.sketch.nonfinite for variant in actual.variants}
    if max(numbers) <= expected.nonfinite:
        return None
    return Explanation(Cause.NOT_FINITE, evidence={"elements_not_finite": max(numbers)})


def all_zero(suspect: Suspect) -> Explanation | None:
    """Every element is zero on the wrong ranks, and not in the expected run."""
    return _if_zero(Cause.ALL_ZERO, suspect)


def gradient_vanished(suspect: Suspect) -> Explanation | None:
    """No gradient comes back on the wrong ranks."""
    return _if_zero(Cause.GRADIENT_MISSING, suspect)


def _if_zero(cause: Cause, suspect: Suspect) -> Explanation | None:
    comparison = suspect.comparison
    if comparison.expected.sketch.sum_squares == 0 or comparison.is_of_norms:
        return None
    ranks = sorted(
        rank
        for rank, part in comparison.actual.parts.items()
        if part.sketch.sum_squares == 0 and not part.sketch.nonfinite
    )
    others_are_right = all(
        error <= (comparison.allowed or 0.0)
        for variant, error in zip(comparison.actual.variants, comparison.errors, strict=True)
        if not set(variant.ranks) & set(ranks)
    )
    is_all = len(ranks) == len(comparison.actual.parts)
    if any(comparison.actual.parts[rank].is_slice for rank in ranks) and not is_all:
        return None  # no label may be in a slice
    if not ranks or not (is_all or (others_are_right and len(comparison.actual.pieces) == 1)):
        return None
    return Explanation(cause, evidence={"zero_on_ranks": ranks})


# ---- predictions: what each rank would have under a mistake


def predicts(suspect: Suspect, predicted: Sketch) -> float | None:
    """Return the relative error that remains if every wrong variant is `predicted`; None where one is not."""
    comparison, limit = suspect.comparison, largest_residual(suspect.comparison)
    worst, any_is_predicted = 0.0, False
    for variant, error in zip(comparison.actual.variants, comparison.errors, strict=True):
        remaining = distance(variant.sketch, predicted)
        if min(error, remaining) > limit:
            return None
        if remaining < error:
            any_is_predicted = True
            worst = max(worst, relative(remaining, predicted.norm))
    return worst if any_is_predicted else None


def are_some_right(comparison: Comparison) -> bool:
    """Return whether the tensor is right on some ranks that hold it."""
    return min(comparison.errors) <= max(largest_residual(comparison), 0.0)


def _if_predicted(cause: Cause, suspect: Suspect, predicted: Sketch, **evidence: Any) -> Explanation | None:
    residual = predicts(suspect, predicted)
    return None if residual is None else Explanation(cause, residual, evidence)


def _times(cause: Cause, suspect: Suspect, factor: float, over: str) -> Explanation | None:
    """Return the cause of a reduction once too often, or of a mean: of gradients it leaves no replica right.

    Over TP nothing reduces the gradient of a weight of which the ranks hold shards.
    """
    comparison = suspect.comparison
    if factor == 1 or (comparison.kind != "output" and are_some_right(comparison)):
        return None
    if comparison.kind == "gradient" and over == "tp" and comparison.actual.is_sharded_over_tp:
        return None
    expected = comparison.expected.sketch
    return _if_predicted(cause, suspect, expected.scaled(factor), factor=factor, reduced_over=over)


def terms_over_tp(suspect: Suspect) -> Explanation | None:
    """The TP ranks hold terms whose sum is the expected output."""
    return _terms(Cause.MISSING_REDUCE, suspect)


def own_terms(suspect: Suspect) -> Explanation | None:
    """Each rank's gradient is its own term of a sum over the TP ranks, on top of what all of them have.

    With terms t(r) and a residual R beside the branch, ranks hold R + t(r), and R + the sum of all t is expected: the
    sum of what n ranks hold, without (n - 1) R.
    """
    comparison = suspect.comparison
    actual = comparison.actual
    if not actual.is_replicated_over_tp or actual.is_bitwise_replicated or largest_residual(comparison) < 0:
        return None
    cause = Cause.COLLECTIVE_WITHOUT_BACKWARD if suspect.is_summed_inside else Cause.MISSING_REDUCE
    summed, limit = actual.sum_over_tp(), largest_residual(comparison)
    for name, residual in {"": Sketch.zero(), **suspect.residuals}.items():
        corrected = summed - residual.scaled(suspect.tp - 1.0) if name else summed
        error = distance(corrected, comparison.expected.sketch)
        if error <= limit:
            beside = {"beside_gradient_of": name} if name else {}
            return Explanation(cause, relative(error, comparison.expected.norm), {"reduced_over": "tp", **beside})
    return None


def summed_with_bias(suspect: Suspect) -> Explanation | None:
    """The output of a module with a bias, y = x W + b, was summed over TP ranks in a wrong way, before b or with it.

    Each mistake leaves a known multiple of b in every row of a combination of the actual and the expected output.
    """
    comparison, tp = suspect.comparison, suspect.tp
    actual, expected = comparison.actual, comparison.expected.sketch
    if suspect.ones is None or not suspect.bias_norm or tp < 2 or largest_residual(comparison) < 0:
        return None
    if not actual.is_replicated_over_tp:
        return None
    summed, first = actual.sum_over_tp(), actual.sketch
    is_same_on_all = actual.is_bitwise_replicated
    hypotheses = (
        (Cause.MISSING_REDUCE, not is_same_on_all, summed - expected, tp - 1.0),  # sum over ranks of x W + b
        (Cause.BIAS_ADDED_PER_RANK, is_same_on_all, first - expected, tp - 1.0),  # x W + tp b
        (Cause.DUPLICATE_REDUCE, is_same_on_all, expected.scaled(tp) - first, tp - 1.0),  # tp x W + b
        (Cause.MEAN_INSTEAD_OF_SUM, is_same_on_all, first.scaled(tp) - expected, tp - 1.0),  # x W / tp + b
    )
    for cause, applies, left, number in hypotheses:
        norm = norm_of_equal_rows(left, suspect.ones, RESIDUAL_EXACT * left.norm) if applies else None
        if norm is not None and abs(norm / (number * suspect.bias_norm) - 1) <= SPREAD_OF_ONE_ROW:
            return Explanation(cause, evidence={"note": "what is left is the same in every row, as a bias is"})
    return None


def norm_of_equal_rows(sketch: Sketch, ones: Sketch, limit: float) -> float | None:
    """Return the norm of a row of a tensor whose rows are all the same; None where they are not.

    For each set of signs, the tiles of such a tensor are those of a column of ones times those of the row.
    """
    column = ones.tiles.sum(dim=2)  # the one column is in one tile
    sizes = column.square().sum(dim=1)
    if not bool((sizes > 0).all()):
        return None
    row = torch.einsum("si,sij->sj", column, sketch.tiles) / sizes[:, None]
    left = sketch.tiles - column[:, :, None] * row[:, None, :]
    if sqrt(float(left.square().sum(dim=(1, 2)).mean())) > limit:
        return None
    return sqrt(float(row.square().sum(dim=1).mean()))


def partial_on_replica(suspect: Suspect) -> Explanation | None:
    """The TP ranks hold terms of the gradient of a replicated parameter."""
    return _terms(Cause.PARTIAL_GRADIENT_ON_REPLICA, suspect)


def _terms(cause: Cause, suspect: Suspect) -> Explanation | None:
    comparison = suspect.comparison
    actual = comparison.actual
    if not actual.is_replicated_over_tp or actual.is_bitwise_replicated:
        return None
    sums, mean = _sums_over_tp(actual, are_replicas=comparison.kind not in ("output", "output_gradient"))
    limit = largest_residual(comparison)
    errors = [distance(each, comparison.expected.sketch) for each in sums]
    mean_error = distance(mean, comparison.expected.sketch)
    if min(max(errors), mean_error) > limit:
        return None
    evidence = {} if max(errors) <= limit else {"note": "the replicas over DP were not averaged, either"}
    return Explanation(cause, relative(min(max(errors), mean_error), comparison.expected.norm), evidence)


def _sums_over_tp(whole: Whole, *, are_replicas: bool) -> tuple[list[Sketch], Sketch]:
    """Return the wholes that sums over the ranks of TP groups make, and their mean.

    Groups that hold the same piece are replicas, those of other pieces (ZeRO) add up; of activations all add up.
    """
    sums: dict[str, list[Sketch]] = {}
    for group in whole.groups:
        held = [whole.parts[rank] for rank in group if rank in whole.parts]
        if held:
            sums.setdefault(held[0].piece, []).append(total(part.sketch for part in held))
    if not are_replicas:
        summed = total(each for of_piece in sums.values() for each in of_piece).scaled(whole.factor)
        return [summed], summed
    number = max(map(len, sums.values()))
    wholes = [total(of_piece[min(each, len(of_piece) - 1)] for of_piece in sums.values()) for each in range(number)]
    return wholes, total(total(of_piece).scaled(1 / len(of_piece)) for of_piece in sums.values())


def terms_over_dp(suspect: Suspect) -> Explanation | None:
    """Replicas over DP or CP hold their own gradients: the mean, or the sum, over them is the expected one."""
    comparison = suspect.comparison
    by_group = [whole for whole in comparison.actual.by_group() if whole is not None]
    if len(by_group) < max(2, suspect.dp):
        return None
    limit = largest_residual(comparison)
    over = " and ".join(_axes_that_differ(suspect, by_group, limit))
    if not over:
        return None
    summed = total(by_group)
    for factor in dict.fromkeys((1 / len(by_group), suspect.cp / len(by_group), 1.0)):
        error = distance(summed.scaled(factor), comparison.expected.sketch)
        if error <= limit:
            residual = relative(error, comparison.expected.norm)
            return Explanation(Cause.MISSING_REDUCE, residual, {"reduced_over": over})
    return None


def _axes_that_differ(suspect: Suspect, by_group: Sequence[Sketch], limit: float) -> list[str]:
    """Return the axes of replicas along which the wholes that TP groups hold differ."""
    slots = [(number,) for number in range(len(by_group))] if suspect.slices is None else suspect.slices.slots
    found = []
    for axis, lines in (("dp", [*zip(*slots, strict=True)]), ("cp", slots)):
        wholes = [[by_group[number] for number in line] for line in lines]
        if any(distance(whole, line[0]) > limit for line in wholes for whole in line):
            found.append(axis)
    return found


def unreduced_micro_batch(suspect: Suspect) -> Explanation | None:
    """What some micro-batches added is the same on all ranks, what others added are the ranks' own terms.

    The terms' sum over the TP ranks of a replicated parameter, or their mean over the replicas, gives the expected one.
    """
    actual, kept = suspect.comparison.actual, suspect.micro_batches.actual
    limit, expected = largest_residual(suspect.comparison), suspect.comparison.expected
    by_rank = {rank: [*kept[rank], actual.parts[rank].sketch] for rank in actual.parts if kept.get(rank)}
    if limit < 0 or len({len(sums) for sums in by_rank.values()}) != 1 or len(by_rank) < len(actual.parts):
        return None
    holders: list[tuple[str, list[list[Sketch]]]] = []
    held = [[rank for rank in group if rank in by_rank] for group in actual.groups]  # ZeRO: not all ranks have a part
    if actual.is_replicated_over_tp and len(held[0]) == len(actual.groups[0]):
        holders.append(("tp", [by_rank[rank] for rank in held[0]]))
    pieces = set(actual.pieces)
    if suspect.dp > 1 and all({actual.parts[rank].piece for rank in ranks} == pieces for ranks in held):
        owners = [{actual.parts[rank].piece: rank for rank in ranks}.values() for ranks in held]
        wholes = [[total(each) for each in zip(*(by_rank[rank] for rank in ranks), strict=True)] for ranks in owners]
        holders.append((suspect.all_replicas, wholes))
    for over, sums_of_holders in holders:
        steps = [[sums[0], *(b - a for a, b in pairwise(sums))] for sums in sums_of_holders]
        unreduced, combined = [], []
        for number, terms in enumerate(zip(*steps, strict=True)):
            if max(distance(term, terms[0]) for term in terms) <= limit:
                combined.append(terms[0])
            else:
                unreduced.append(number)
                combined.append(total(terms).scaled(1.0 if over == "tp" else 1 / len(terms)))
        error = distance(total(combined), expected.sketch)
        if unreduced and len(unreduced) < len(combined) and error <= limit:
            evidence = {"micro_batches": unreduced, "reduced_over": over}
            return Explanation(Cause.MICRO_BATCH_UNREDUCED, relative(error, expected.norm), evidence)
    return None


def labels_alone(suspect: Suspect) -> Explanation | None:
    """The gradient of a cross entropy over a cut vocabulary lacks the part of the sum of exponentials.

    With probabilities P, labels Y and n labels, the expected gradient is (P - Y) / n, the actual one -Y / n: its
    squares add up to 1 / n, or to n where losses are summed. What is missing, P / n, has rows of positive numbers with
    a sum of 1 / n: their squares add up to at most 1 / n, and to at least 1 / (n V), with V columns.
    """
    comparison = suspect.comparison
    actual, expected = comparison.actual, comparison.expected
    limit = largest_residual(comparison)
    is_cut = actual.is_sharded_over_tp and actual.label != "sequence"
    if limit < 0 or not is_cut or len(actual.variants) > 1 or len(expected.shape) < 2:
        return None
    squares, width = actual.norm**2, expected.shape[-1]
    num_rows = expected.sketch.numel // width // expected.copies
    tolerance = SAFETY_FACTOR * max(epsilon(actual.dtype), epsilon("float64") * num_rows)
    for number in (1 / squares, squares) if squares else ():
        labels = round(number)
        if not 1 <= labels <= num_rows or abs(number / labels - 1) > tolerance:
            continue
        if tolerance * labels > _CHANCE_OF_INTEGER and labels != num_rows:
            continue
        missing = comparison.error**2 / squares  # of P / n to Y / n
        spread = 1 + FITTED_RELATIVE_ERROR
        if 1 / (width * spread) <= missing <= spread and share_of(actual.sketch, expected.sketch) > 0:
            evidence = {"labels": labels, "sum_of_squares": squares}
            return Explanation(Cause.COLLECTIVE_WITHOUT_BACKWARD, evidence=evidence)
    return None


def scaled_from_outside(suspect: Suspect) -> Explanation | None:
    """The first gradient of the backward pass is the expected one times a constant: the loss was scaled."""
    return scaled(suspect) if suspect.is_first else None


def reduced_too_often(suspect: Suspect) -> Explanation | None:
    """Every rank's tensor is the expected one times the number of TP ranks."""
    return _times(Cause.DUPLICATE_REDUCE, suspect, float(suspect.tp), "tp")


def averaged_over_tp(suspect: Suspect) -> Explanation | None:
    """Every rank's tensor is the expected one over the number of TP ranks."""
    return _times(Cause.MEAN_INSTEAD_OF_SUM, suspect, 1 / suspect.tp, "tp")


def summed_over_dp(suspect: Suspect) -> Explanation | None:
    """Every rank's gradient is the expected one times the number of DP ranks, or of slices."""
    found = (
        _times(Cause.SUM_INSTEAD_OF_MEAN, suspect, float(size), over)
        for size, over in suspect.sizes_over_replicas.items()
    )
    return next(filter(None, found), None)


def averaged_over_dp(suspect: Suspect) -> Explanation | None:
    """Every rank's gradient is the expected one over the number of DP ranks, or of slices: a mean once too often."""
    found = (
        _times(Cause.MEAN_INSTEAD_OF_SUM, suspect, 1 / size, over) for size, over in suspect.sizes_over_replicas.items()
    )
    return next(filter(None, found), None)


# ---- slices of sequences


def positions_given_otherwise(suspect: Suspect) -> Explanation | None:
    """The model was called with positions that the tokens of the slices do not have."""
    return positions_of_other_slices(suspect.slices)


def first_slice_alone(suspect: Suspect) -> Explanation | None:
    """The output is right where the first slice is, and nowhere else."""
    return slice_taken_for_first(suspect.slices, suspect.comparison)


# ---- accumulation


def reduced_after_accumulation(suspect: Suspect) -> Explanation | None:
    """What was reduced after earlier micro-batches was reduced again after each later one.

    With A(j) the gradient as it stood after micro-batch j, and n ranks, A(j) = n A(j-1) + S(j): what is too much at
    the end is (n - 1) times the sum of all earlier A. With the expected run's S(j), it is the sum of n**(k-j) S(j).
    """
    comparison = suspect.comparison
    expected = comparison.expected.sketch
    for ranks in dict.fromkeys((suspect.tp, suspect.dp, suspect.tp * suspect.dp)):
        if ranks < 2:
            continue
        replicas = suspect.all_replicas
        over = "tp" if ranks == suspect.tp else replicas if ranks == suspect.dp else f"tp and {replicas}"
        evidence = {"equals": f"{ranks} times what was accumulated before, at each micro-batch", "reduced_over": over}
        kept = suspect.micro_batches.actual
        first = next((kept[rank] for rank in comparison.actual.parts if kept.get(rank)), ())
        if first and comparison.actual.is_replicated_over_tp:
            found = _if_predicted(
                Cause.REDUCED_AFTER_ACCUMULATION,
                suspect,
                expected + total(first).scaled(ranks - 1.0),
                **evidence,
            )
            if found:
                return found
        terms = _terms_of_micro_batches(suspect)
        if terms:
            predicted = total(term.scaled(float(ranks) ** (len(terms) - 1 - j)) for j, term in enumerate(terms))
            found = _if_predicted(Cause.REDUCED_AFTER_ACCUMULATION, suspect, predicted, **evidence)
            if found:
                return found
    return None


def last_micro_batch_only(suspect: Suspect) -> Explanation | None:
    """The gradient is that of the last micro-batch alone, or that over the number of micro-batches."""
    terms = _terms_of_micro_batches(suspect)
    if not terms:
        return None
    for factor in (1.0, float(len(terms))):
        found = _if_predicted(Cause.LAST_MICRO_BATCH_ONLY, suspect, terms[-1].scaled(factor), micro_batches=len(terms))
        if found:
            return found
    return None


def mean_of_local_means(suspect: Suspect) -> Explanation | None:
    """Micro-batches, or replicas, with unlike numbers of tokens were weighted alike.

    If micro-batch j has n(j) of N tokens, the expected gradient is the sum of S(j) = n(j)/N M(j), the actual one that
    of M(j)/k = N/(k n(j)) S(j): the inverses of its shares of the S(j) add up to k, because all n(j) add up to N. For
    replicas, the expected gradient is the sum of n(d)/N times theirs: its shares add up to 1, and are not all alike.
    """
    terms = _terms_of_micro_batches(suspect)
    comparison = suspect.comparison
    if len(terms) > 1 and len(comparison.actual.variants) == 1:
        shares = fit(comparison.actual.sketch, terms, largest_residual(comparison))
        if shares and all(share > 0 for share in shares) and is_near(sum(1 / share for share in shares), len(terms)):
            found = [1 / share / len(terms) for share in shares]
            if not all(is_near(share, 1) for share in shares):
                return Explanation(Cause.MEAN_OF_LOCAL_MEANS, evidence={"share_of_tokens": _digits(found)})
    if comparison.kind != "output_gradient" or suspect.dp < 2:
        return None
    groups = [group for group in comparison.actual.by_group() if group is not None]
    if len(groups) != suspect.dp:
        return None
    # The actual one is `factor` times the sum of all groups: 1 / dp of each replica's own.
    own = [group.scaled(comparison.actual.factor * suspect.dp) for group in groups]
    shares = fit(comparison.expected.sketch, own, largest_residual(comparison))
    if not shares or not all(share > 0 for share in shares) or not is_near(sum(shares), 1):
        return None
    return Explanation(Cause.MEAN_OF_LOCAL_MEANS, evidence={"share_of_tokens": _digits(shares)})


def _terms_of_micro_batches(suspect: Suspect) -> list[Sketch]:
    """Return the expected gradient of each micro-batch; nothing where the expected run did not keep them."""
    kept = suspect.micro_batches.expected
    if not kept:
        return []
    sums = [*kept, suspect.comparison.expected.sketch]
    return [sums[0], *(later - earlier for earlier, later in pairwise(sums))]


# ---- scales


def scaled(suspect: Suspect) -> Explanation | None:
    """Each rank's gradient is the expected one times a constant of its own."""
    comparison = suspect.comparison
    limit, expected = largest_residual(comparison), comparison.expected.sketch
    if limit < 0 or (expected.numel < LEAST_MULTIPLES and comparison.expected.shape):
        return None
    if len(comparison.actual.variants) == 1 and len(comparison.actual.pieces) > 1:
        return scaled_shards(comparison) or scaled_alike(suspect)
    return scaled_alike(suspect)


def scaled_shards(comparison: Comparison) -> Explanation | None:
    """Some ranks' shards are the expected ones times a constant each, those of the others are right."""
    factors = clip_factors(comparison)
    if factors is None:
        return None
    wrong = {rank: factor for rank, factor in factors.items() if not is_near(factor, 1)}
    if not wrong or (len(wrong) == len(factors) and is_near(min(wrong.values()), max(wrong.values()))):
        return None
    shown = dict(zip(map(str, wrong), _digits(wrong.values()), strict=True))
    return Explanation(Cause.GRADIENT_SCALED, evidence={"factor_of_rank": shown})


def scaled_alike(suspect: Suspect) -> Explanation | None:
    """Each replica's gradient is the expected one times a constant."""
    comparison = suspect.comparison
    limit, expected = largest_residual(comparison), comparison.expected.sketch
    factors, worst = [], 0.0
    for variant, error in zip(comparison.actual.variants, comparison.errors, strict=True):
        factor = 1.0 if error <= limit else share_of(variant.sketch, expected)
        remaining = distance(variant.sketch, expected.scaled(factor))
        if not factor or remaining > limit:
            return None
        factors.append(factor)
        worst = max(worst, relative(remaining, expected.norm))
    distinct = _digits(dict.fromkeys(factors))
    numbers = {
        "micro-batches": suspect.num_passes,
        "TP ranks": suspect.tp,
        "replicas": suspect.dp // suspect.cp,
        "slices": suspect.cp,
    }
    known = [
        f"{of} the number of {what}"
        for what, number in numbers.items()
        for of, multiple in (("is", number), ("is 1 over", 1 / number))
        if number > 1 and len(distinct) == 1 and is_near(distinct[0], multiple)
    ]
    note = {"note": "the factor " + " and ".join(known)} if known else {}
    if known and comparison.kind == "output_gradient" and is_near(distinct[0] * suspect.dp, 1):
        note["note"] += ", as where a loss is divided by the labels of all replicas and gradients are averaged"
    return Explanation(Cause.GRADIENT_SCALED, worst, {"factors": distinct, **note})


def share_of(actual: Sketch, expected: Sketch) -> float:
    """Return the multiple of `expected` that is nearest to `actual`; 0 where there is none."""
    size = float((expected.tiles**2).sum())
    return float((actual.tiles * expected.tiles).sum()) / size if size else 0.0


def fit(sketch: Sketch, terms: Sequence[Sketch], limit: float) -> list[float]:
    """Return the shares of the terms whose sum is the tensor, but for an error of at most `limit`; else nothing."""
    if limit < 0 or sketch.numel < LEAST_MULTIPLES * len(terms):
        return []
    columns = torch.stack([term.tiles.reshape(-1) for term in terms], dim=1)
    sizes = torch.linalg.vector_norm(columns, dim=0)
    if not bool((sizes > 0).all()):
        return []
    solution = torch.linalg.lstsq(columns / sizes, sketch.tiles.reshape(-1, 1), driver="gelsd").solution[:, 0] / sizes
    shares = [float(share) for share in solution]
    nearest = total(term.scaled(share) for term, share in zip(terms, shares, strict=True))
    return shares if all(map(isfinite, shares)) and distance(sketch, nearest) <= limit else []


def is_near(actual: float, expected: float) -> bool:
    """Return whether two factors are one, but for rounding and the digits that are shown of it."""
    return abs(actual - expected) <= RESIDUAL_EXACT * abs(expected)


def _digits(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in values]


# ---- shards


def shard_of_one_rank_on_all(suspect: Suspect) -> Explanation | None:
    """The TP ranks hold the same bits where they should hold different elements."""
    actual = suspect.comparison.actual
    for group in actual.groups:
        parts = [actual.parts[rank] for rank in group if rank in actual.parts]
        digests = {part.digest for part in parts}
        if len({part.piece for part in parts}) < 2 or len(digests) > 1 or not parts[0].sketch.sum_squares:
            return None
    expected = suspect.comparison.expected
    if any(
        len({expected.parts[rank].digest for rank in group if rank in expected.parts}) == 1 and len(group) > 1
        for group in expected.groups
        if expected.is_sharded_over_tp
    ):
        return None
    is_sharded = actual.is_sharded_over_tp
    return (
        Explanation(Cause.SHARD_REPEATED, evidence={"ranks_with_equal_shards": list(actual.ranks)})
        if is_sharded
        else None
    )


def shards_in_another_order(suspect: Suspect) -> Explanation | None:
    """The actual run's shards are the expected run's to the bit, on other ranks."""
    actual, expected = suspect.comparison.actual, suspect.comparison.expected
    pieces_a = {piece: actual.parts[ranks[0]].digest for piece, ranks in actual.pieces.items()}
    pieces_e = {piece: expected.parts[ranks[0]].digest for piece, ranks in expected.pieces.items()}
    if len(pieces_a) < 2 or pieces_a.keys() != pieces_e.keys() or pieces_a == pieces_e:
        return None
    if sorted(pieces_a.values()) != sorted(pieces_e.values()):
        return None
    owner = {bits: expected.pieces[piece][0] for piece, bits in pieces_e.items()}
    moved = {str(actual.pieces[piece][0]): owner[bits] for piece, bits in pieces_a.items() if pieces_e[piece] != bits}
    return Explanation(Cause.SHARD_ORDER_SWAPPED, evidence={"rank_holds_shard_of": moved})


# ---- norms


def clip_factors(comparison: Comparison) -> dict[int, float] | None:
    """Return by which factor each rank's part of a gradient differs from its part of the expected one.

    The expected whole is fitted by the pieces that the actual ranks hold; None where it is no such sum.
    """
    actual, expected, limit = comparison.actual, comparison.expected, largest_residual(comparison)
    if limit < 0:
        return None
    pieces = actual.pieces
    if len(pieces) == 1:
        factors: dict[int, float] = {}
        for variant, error in zip(actual.variants, comparison.errors, strict=True):
            factor = 1.0 if error <= limit else share_of(variant.sketch, expected.sketch)
            if not factor or distance(variant.sketch, expected.sketch.scaled(factor)) > limit:
                return None
            factors |= dict.fromkeys(variant.ranks, factor)
        return factors
    if actual.adds_groups:
        terms = [
            total(
                next(actual.parts[rank].sketch for rank in group if rank in ranks)
                for group in actual.groups
                if set(group) & set(ranks)
            ).scaled(actual.factor)
            for ranks in pieces.values()
        ]
    else:
        terms = [actual.parts[ranks[0]].sketch for ranks in pieces.values()]
    shares = fit(expected.sketch, terms, limit)
    if not shares or not all(shares):
        return None
    return {rank: 1 / share for share, ranks in zip(shares, pieces.values(), strict=True) for rank in ranks}


# ---- updates


def sees_one_shard(optimizer: str, actual: Whole) -> Explanation | None:
    """Return the cause where an optimizer of whole matrices stepped on shards, and gradients were right."""
    is_of_matrices = any(name in optimizer.lower() for name in OPTIMIZERS_OF_WHOLE_MATRICES)
    if not is_of_matrices or not actual.is_sharded_over_tp:
        return None
    return Explanation(Cause.OPTIMIZER_SEES_ONE_SHARD, evidence={"optimizer": optimizer})


_OVER_RANKS: tuple[Test, ...] = (reduced_too_often, averaged_over_tp)

TESTS: Mapping[str, tuple[Test, ...]] = {
    "output": (
        not_finite,
        summed_with_bias,
        terms_over_tp,
        *_OVER_RANKS,
        shard_of_one_rank_on_all,
        shards_in_another_order,
        all_zero,
        positions_given_otherwise,
        first_slice_alone,
    ),
    "output_gradient": (
        not_finite,
        own_terms,
        mean_of_local_means,
        gradient_vanished,
        scaled_from_outside,
        labels_alone,
        *_OVER_RANKS,
        scaled,
    ),
    "gradient": (
        not_finite,
        gradient_vanished,
        unreduced_micro_batch,
        partial_on_replica,
        terms_over_dp,
        reduced_after_accumulation,
        last_micro_batch_only,
        mean_of_local_means,
        summed_over_dp,
        averaged_over_dp,
        *_OVER_RANKS,
        scaled,
        shard_of_one_rank_on_all,
        shards_in_another_order,
    ),
    "weight": (not_finite, shard_of_one_rank_on_all, shards_in_another_order, all_zero),
    "master": (not_finite, shard_of_one_rank_on_all, shards_in_another_order, all_zero),
    "state": (not_finite, shards_in_another_order, all_zero),  # of another rank: `state_causes`
    "buffer": (not_finite, all_zero),
}
