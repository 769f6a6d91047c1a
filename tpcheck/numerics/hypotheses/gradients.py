"""Causes of gradients: of parameters, and of what modules send back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.explanation import (
    Test,
    dtype_rounded,
    num_dp,
    num_tp,
    one_of_hypotheses,
    remaining,
    same_shapes,
    scaled,
    scaled_on_some,
)
from tpcheck.numerics.hypotheses.moved import shards_moved

_LEAST_ELEMENTS = 4  # any number is a multiple of any other


def missing(suspect: Suspect) -> Explanation | None:
    if "missing_on_ranks" in suspect.evidence:
        return Explanation(Cause.GRADIENT_MISSING, 0.0)
    return None


def terms_of_ranks(cause: Cause) -> Test:
    """The ranks' gradients are terms of the expected one, in all features or in those that are wrong.

    The other features are right on every rank: some branches of a shared module are reduced, some are not. Equal terms
    are the expected gradient divided by their number.
    """

    def test(suspect: Suspect) -> Explanation | None:
        parts, expected = suspect.parts, suspect.expected
        if not suspect.replicated or len(parts) < 2 or any(part.shape != expected.shape for part in parts):
            return None
        limit = remaining(suspect)
        wide, *terms = (one.double().reshape(one.shape or (1,)) for one in (expected, *parts))
        wrong = _wrong_features(terms, wide, limit)
        if not bool(wrong.any()):
            return None
        terms_wrong, wide_wrong = [term[..., wrong] for term in terms], wide[..., wrong]
        error = _norm(sum(terms_wrong) - wide_wrong)
        if error > limit or all(_norm(one - terms_wrong[0]) <= limit for one in terms_wrong):
            return None
        share = {} if bool(wrong.all()) else {"partial_features": f"{int(wrong.sum())} of {wrong.numel()}"}
        return Explanation(cause, error / _norm(wide_wrong), share)

    return test


def _wrong_features(terms: Sequence[torch.Tensor], expected: torch.Tensor, limit: float) -> torch.Tensor:
    """Return which indices of the last dim are wrong on any rank; all of a vector, whose elements prove nothing."""
    if expected.dim() < 2:
        return torch.ones(expected.shape, dtype=torch.bool)
    others = tuple(range(expected.dim() - 1))
    errors = torch.stack([torch.linalg.vector_norm(term - expected, dim=others) for term in terms])
    wrong: torch.Tensor = (errors > limit / expected.shape[-1] ** 0.5).any(dim=0)
    return wrong


def multiple(suspect: Suspect) -> Explanation | None:
    """Each rank's gradient is the expected one times a constant of its own, which is not 1 on some."""
    if not suspect.parts or not same_shapes(suspect.parts, suspect.expected_parts):
        return None
    limit = remaining(suspect)
    factors: list[float] = []
    worst = 0.0
    for part, expected in zip(suspect.parts, suspect.expected_parts, strict=True):
        wide, size = expected.double().reshape(-1), float(torch.linalg.vector_norm(expected.double()))
        if (expected.numel() < _LEAST_ELEMENTS and expected.dim()) or not size:
            return None
        factor = float(torch.dot(part.double().reshape(-1), wide)) / size**2
        error = float(torch.linalg.vector_norm(part.double().reshape(-1) - factor * wide))
        if error > limit or not factor:
            return None
        factors.append(factor)
        worst = max(worst, error / size)
    return Explanation(Cause.GRADIENT_SCALED, worst, {"factors": [float(f"{factor:.6g}") for factor in factors]})


def averaging(test: Test) -> Test:
    """A factor of the number of replicas is due to averaging over them where nothing else has that number.

    Where TP has as many ranks, it is only if the gradients of all parameters have it: those of one have been scaled.
    """

    def asked(suspect: Suspect) -> Explanation | None:
        told_apart = num_dp(suspect) != num_tp(suspect) or suspect.evidence.get("every_parameter", False)
        return test(suspect) if told_apart else None

    return asked


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


GRADIENT_TESTS: tuple[Test, ...] = (
    missing,
    terms_of_ranks(Cause.PARTIAL_GRADIENT_ON_REPLICA),
    averaging(scaled(Cause.SUM_INSTEAD_OF_MEAN, num_dp)),
    averaging(scaled(Cause.MEAN_INSTEAD_OF_SUM, lambda suspect: 1 / num_dp(suspect))),
    multiple,
    one_of_hypotheses,
    shards_moved,
    dtype_rounded,
)


def _of_a_module(test: Test) -> Test:
    """Ask only where a module made the gradient: no collective of a module scales what it is handed."""

    def asked(suspect: Suspect) -> Explanation | None:
        return test(suspect) if str(suspect.where.get("field", "")).startswith("input") else None

    return asked


def vanished(suspect: Suspect) -> Explanation | None:
    """No gradient comes back at all, on the ranks that are wrong."""
    if not suspect.parts or suspect.expected is None or not bool(suspect.expected.any()):
        return None
    return (
        Explanation(Cause.GRADIENT_MISSING, 0.0) if not any(bool(torch.any(part)) for part in suspect.parts) else None
    )


INPUT_GRADIENT_TESTS: tuple[Test, ...] = (
    vanished,
    terms_of_ranks(Cause.MISSING_REDUCE),
    _of_a_module(scaled(Cause.DUPLICATE_REDUCE, num_tp)),
    _of_a_module(scaled(Cause.MEAN_INSTEAD_OF_SUM, lambda suspect: 1 / num_tp(suspect))),
    _of_a_module(scaled_on_some(Cause.DUPLICATE_REDUCE, num_tp)),
    _of_a_module(scaled_on_some(Cause.MEAN_INSTEAD_OF_SUM, lambda suspect: 1 / num_tp(suspect))),
    one_of_hypotheses,
    multiple,
    dtype_rounded,
)
