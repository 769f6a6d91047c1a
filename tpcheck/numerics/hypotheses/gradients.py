"""Causes of gradients alone: missing, scaled, of a tied or another parameter."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.differences import frobenius, frobenius_distance
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.proof import Hypothesis, largest_residual, paired_parts, same_shapes
from tpcheck.numerics.tolerance import LEAST_ELEMENTS, LEAST_MULTIPLES


def missing(suspect: Suspect) -> Explanation | None:
    """The parameter has no gradient on some ranks."""
    return Explanation(Cause.GRADIENT_MISSING) if suspect.gradient.missing_on else None


def vanished(suspect: Suspect) -> Explanation | None:
    """No gradient comes back at all, on any rank."""
    if not suspect.actual_parts or suspect.expected is None or not bool(suspect.expected.any()):
        return None
    is_zero = not any(bool(part.any()) for part in suspect.actual_parts)
    return Explanation(Cause.GRADIENT_MISSING) if is_zero else None


def lost_on_some(suspect: Suspect) -> Explanation | None:
    """On the wrong ranks the gradient is zero where it should not be, at some indices of a dim or as a whole.

    It is right at the other indices (of features, as a rule), and on the other ranks.
    """
    limit = largest_residual(suspect)
    pairs = paired_parts(suspect)
    wrong = [pair for pair in pairs if not frobenius_distance(*pair) <= limit]
    lost = {_lost_indices(*pair, limit) for pair in wrong}
    found = lost.pop() if len(lost) == 1 else None
    if found is None:
        return None
    dim, indices, size = found
    evidence = {"no_gradient_at": list(indices), "along_dim": dim, "size": size} if len(indices) < size else {}
    is_unseen = bool(suspect.backward.unseen) and len(wrong) == len(pairs)
    return Explanation(Cause.COLLECTIVE_WITHOUT_BACKWARD if is_unseen else Cause.GRADIENT_MISSING, evidence=evidence)


def lost_branches(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield what comes back where one of the modules that take a tensor, or all but one, send nothing back."""
    branches = suspect.backward.branches
    for name, parts in branches.items():
        without = tuple(
            whole.double() - part.double() for whole, part in zip(suspect.expected_parts, parts, strict=True)
        )
        yield Hypothesis(Cause.GRADIENT_MISSING, without, {"lost_through": [name]})
    for name, parts in branches.items() if len(branches) > 2 else ():
        yield Hypothesis(
            Cause.GRADIENT_MISSING, parts, {"lost_through": [other for other in branches if other != name]}
        )


def lost_on_ranks(suspect: Suspect) -> Explanation | None:
    """Nothing comes back on some ranks from a module that takes the tensor there."""
    return Explanation(Cause.GRADIENT_MISSING) if suspect.backward.lost_on else None


def _lost_indices(
    actual: torch.Tensor, expected: torch.Tensor, limit: float
) -> tuple[int, tuple[int, ...], int] | None:
    """Return a dim, its indices at which all of a gradient is zero where it should not be, and its size.

    Of several dims that with the smallest share of indices. None where the gradient is wrong elsewhere, too.
    """
    found = []
    for dim in range(-1, -actual.dim() - 1, -1):
        size = actual.shape[dim]
        rows, wide = (tensor.double().movedim(dim, 0).reshape(size, -1) for tensor in (actual, expected))
        lost = ~rows.any(dim=1) & wide.any(dim=1)
        number = int(lost.sum())
        if number * rows.shape[1] >= LEAST_ELEMENTS and frobenius_distance(rows[~lost], wide[~lost]) <= limit:
            found.append((number / size, -dim, tuple(lost.nonzero()[:, 0].tolist()), size))
    _, dim, indices, size = min(found, default=(0.0, 0, (), 0))
    return (-dim, indices, size) if found else None


def multiple(suspect: Suspect) -> Explanation | None:
    """Each rank's gradient is the expected one times a constant of its own, which is not 1 on some."""
    if not suspect.actual_parts or not same_shapes(suspect.actual_parts, suspect.expected_parts):
        return None
    limit = largest_residual(suspect)
    factors: list[float] = []
    worst = 0.0
    for part, expected in zip(suspect.actual_parts, suspect.expected_parts, strict=True):
        actual, wide, size = part.double().reshape(-1), expected.double().reshape(-1), frobenius(expected)
        if (expected.numel() < LEAST_MULTIPLES and expected.dim()) or not size:
            return None
        factor = float(torch.dot(actual, wide)) / size**2
        error = frobenius_distance(actual, factor * wide)
        if error > limit or not factor:
            return None
        factors.append(factor)
        worst = max(worst, error / size)
    return Explanation(Cause.GRADIENT_SCALED, worst, {"factors": [float(f"{factor:.6g}") for factor in factors]})


def untied_hypotheses(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield the gradient without that of a parameter that the reference ties with this one."""
    for name, parts in suspect.gradient.untied.items():
        pairs = list(zip(suspect.expected_parts, parts, strict=True))
        if all(part is not None and part.shape == expected.shape for expected, part in pairs):
            predicted = tuple(expected - part for expected, part in pairs)
            yield Hypothesis(Cause.TIED_WEIGHT_UNTIED, predicted, {"tied_with": name})


def another_parameters_hypotheses(suspect: Suspect) -> Iterator[Hypothesis]:
    """Yield the gradients of the parameters that lie over the ranks as this one does."""
    for name, (_, *parts) in suspect.others.items():
        yield Hypothesis(Cause.TENSOR_OF_ANOTHER_LAYER, tuple(parts), {"it_is_of": name})
