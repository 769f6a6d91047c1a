"""How far the ranks' parts of one tensor are from what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, inf, isfinite, sqrt

import torch

from tpcheck.compare.placing import Placed
from tpcheck.placement import Replicate


@dataclass(frozen=True, slots=True)
class Difference:
    """One comparison of a tensor, equal or not.

    Attributes:
        error: Frobenius norm of actual - expected over the whole tensor; the worst rank's where it is replicated.
        expected_norm: Frobenius norm of the expected tensor.
        allowed: Largest error that passes.
        part_errors: Frobenius norm of each rank's own error, by tp_rank.
        largest: Largest absolute difference of one element.
        largest_at: Its index in the part that holds it.
        count_differing: How many elements differ at all.
    """

    error: float
    expected_norm: float
    allowed: float
    part_errors: tuple[float, ...]
    largest: float
    largest_at: tuple[int, ...]
    count_differing: int

    @classmethod
    def unbounded(cls, expected: torch.Tensor, allowed: float, num_parts: int) -> Difference:
        """Return the difference of tensors that cannot be subtracted, their shapes being different."""
        return cls(inf, frobenius(expected), allowed, (inf,) * num_parts, inf, (), expected.numel())

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed

    @property
    def margin(self) -> float:
        """Error divided by what is allowed; 0 where both are 0."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowed if self.allowed else inf

    @property
    def relative(self) -> float:
        """Error relative to the expected tensor; absolute where that is zero."""
        return self._in_units_of_expected(self.error)

    @property
    def relative_allowed(self) -> float:
        """What is allowed, in the unit of `relative`."""
        return self._in_units_of_expected(self.allowed)

    def wrong_tp_ranks(self) -> tuple[int, ...]:
        """Return the tp_ranks whose own part alone exceeds what is allowed; all that differ where none does."""
        beyond = tuple(rank for rank, error in enumerate(self.part_errors) if error > self.allowed)
        return beyond or tuple(rank for rank, error in enumerate(self.part_errors) if error)

    def _in_units_of_expected(self, error: float) -> float:
        return error / self.expected_norm if self.expected_norm and isfinite(self.expected_norm) else error


def compare_placed(placed: Placed, expected: torch.Tensor, allowed: float) -> Difference:
    """Compare every rank's part with the part of `expected` that it should be."""
    gaps = [difference(part, placed.expected_part(expected, tp_rank)) for tp_rank, part in enumerate(placed.parts)]
    return measured(gaps, frobenius(expected), allowed, replicated=isinstance(placed.placement, Replicate))


def measured(gaps: Sequence[torch.Tensor], expected_norm: float, allowed: float, *, replicated: bool) -> Difference:
    """Sum up element-wise differences, one tensor for each rank's part."""
    errors = tuple(frobenius(gap) for gap in gaps)
    largest, at = max((largest_element(gap) for gap in gaps), key=lambda element: element[0])
    return Difference(
        error=max(errors) if replicated else hypot(*errors),
        expected_norm=expected_norm,
        allowed=allowed,
        part_errors=errors,
        largest=largest,
        largest_at=at,
        count_differing=sum(int(gap.count_nonzero()) for gap in gaps),
    )


def difference(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return actual - expected in float64; equal infinities and NaN on both sides differ by 0, other NaN by inf."""
    actual, expected = _real(actual), _real(expected)
    gap = actual.to(torch.float64) - expected.to(torch.float64)
    if bool(gap.isfinite().all()):
        return gap
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    return gap.masked_fill(same, 0.0).nan_to_num(nan=inf, posinf=inf, neginf=-inf)


def frobenius(tensor: torch.Tensor) -> float:
    """Return the Frobenius norm, in float64."""
    return float(torch.linalg.vector_norm(_real(tensor).to(torch.float64))) if tensor.numel() else 0.0


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def own_rounding(tensor: torch.Tensor) -> float:
    """Return how far rounding moves the tensor itself (Frobenius): every element by eps * U(-1, 1) of its size.

    A single element by up to 2 eps: it ends a long sum (a loss), whose last addition and division round once each.
    0 for a tensor that holds infinities or the dtype's largest numbers: a mask is copied, not computed.
    """
    if not _rounds(tensor):
        return 0.0
    norm = frobenius(tensor)
    share = 2.0 if tensor.numel() == 1 else 1 / sqrt(3)
    return norm * torch.finfo(tensor.dtype).eps * share if isfinite(norm) else 0.0


def spacing(tensor: torch.Tensor) -> float:
    """Return how far the largest finite element is from the next number of the tensor's dtype; 0 for none."""
    if not _rounds(tensor):
        return 0.0
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) * torch.finfo(tensor.dtype).eps if finite.numel() else 0.0


def _rounds(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def frobenius_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the Frobenius norm of the difference of two tensors of one shape; inf where the shapes differ."""
    return frobenius(difference(actual, expected)) if actual.shape == expected.shape else inf


def largest_element(gap: torch.Tensor) -> tuple[float, tuple[int, ...]]:
    """Return the largest absolute element and its index; 0 and no index for an empty tensor."""
    if not gap.numel():
        return 0.0, ()
    flat = int(gap.abs().argmax())
    index: list[int] = []
    left = flat
    for size in reversed(gap.shape):
        left, here = divmod(left, size)
        index.append(here)
    return abs(float(gap.reshape(-1)[flat])), tuple(reversed(index))
