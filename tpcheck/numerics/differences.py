"""How far the ranks' parts of a tensor are from the expected tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import hypot, inf, isfinite, sqrt

import torch

from tpcheck.backends.layout import Layout
from tpcheck.numerics.activation_placement import PlacedTensor


@dataclass(frozen=True, slots=True)
class Difference:
    """The result of comparing one tensor, equal or not.

    Attributes:
        error: Frobenius norm of actual - expected over the full tensor; the worst rank's where it is replicated.
        expected_norm: Frobenius norm of the expected tensor.
        allowed: Largest error that passes.
        part_errors: Frobenius norm of each rank's error, by tp_rank.
        largest: Largest absolute difference of one element.
        largest_at: Its index in the part that holds it.
        count_differing: How many elements differ at all; the worst rank's number where the tensor is replicated.
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
        """Return the difference of tensors of different shapes, which cannot be subtracted."""
        return cls(inf, frobenius(expected), allowed, (inf,) * num_parts, inf, (), expected.numel())

    @property
    def agrees(self) -> bool:
        return self.error <= self.allowed

    @property
    def margin(self) -> float:
        """Error divided by allowed error; 0 where both are 0."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowed if self.allowed else inf

    @property
    def relative(self) -> float:
        """Error relative to the expected tensor; absolute where that is zero."""
        return self._relative(self.error)

    @property
    def relative_allowed(self) -> float:
        """Allowed error, in the unit of `relative`."""
        return self._relative(self.allowed)

    def wrong_tp_ranks(self) -> tuple[int, ...]:
        """Return the tp_ranks whose part alone exceeds what is allowed; all that differ where none does."""
        beyond = tuple(rank for rank, error in enumerate(self.part_errors) if error > self.allowed)
        return beyond or tuple(rank for rank, error in enumerate(self.part_errors) if error)

    def _relative(self, error: float) -> float:
        return error / self.expected_norm if self.expected_norm and isfinite(self.expected_norm) else error


def compare_placed(placed: PlacedTensor, expected: torch.Tensor, allowed: float) -> Difference:
    """Compare every rank's part with its part of `expected`."""
    gaps = [subtract(part, placed.expected_part(expected, tp_rank)) for tp_rank, part in enumerate(placed.parts)]
    return summarize(gaps, frobenius(expected), allowed, is_replicated=placed.is_replicated)


def summarize(gaps: Sequence[torch.Tensor], expected_norm: float, allowed: float, *, is_replicated: bool) -> Difference:
    """Return the difference whose elements are `gaps`, one tensor for each rank's part."""
    errors = tuple(frobenius(gap) for gap in gaps)
    counts = [int(gap.count_nonzero()) for gap in gaps]
    largest, at = max((largest_element(gap) for gap in gaps), key=lambda element: element[0])
    return Difference(
        error=max(errors) if is_replicated else hypot(*errors),
        expected_norm=expected_norm,
        allowed=allowed,
        part_errors=errors,
        largest=largest,
        largest_at=at,
        count_differing=max(counts) if is_replicated else sum(counts),
    )


def subtract(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return actual - expected in float64: 0 for equal infinities and NaN on both sides, inf for any other NaN."""
    actual, expected = _real(actual), _real(expected)
    gap = actual.to(torch.float64) - expected.to(torch.float64)
    if isfinite(float(gap.sum())):  # one kernel for the four of isfinite; it may overflow where all are finite
        return gap
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    return gap.masked_fill(same, 0.0).nan_to_num(nan=inf, posinf=inf, neginf=-inf)


def frobenius(tensor: torch.Tensor) -> float:
    """Return the Frobenius norm, in float64."""
    return float(torch.linalg.vector_norm(_real(tensor).to(torch.float64))) if tensor.numel() else 0.0


def _real(tensor: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def rounding_error(tensor: torch.Tensor) -> float:
    """Return the Frobenius error that rounding makes where every element is off by eps * U(-1, 1) of its size.

    A single element is off by 2 eps: it ends a long sum (a loss), whose last addition and division round once each.
    0 for a tensor that holds infinities or the dtype's largest numbers: a mask is copied, not computed.
    """
    if not _rounds(tensor):
        return 0.0
    norm = frobenius(tensor)
    share = 2.0 if tensor.numel() == 1 else 1 / sqrt(3)
    return norm * torch.finfo(tensor.dtype).eps * share if isfinite(norm) else 0.0


def spacing(tensor: torch.Tensor) -> float:
    """Return the distance of the largest finite element to the next number of its dtype; 0 where there is none."""
    if not _rounds(tensor):
        return 0.0
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) * torch.finfo(tensor.dtype).eps if finite.numel() else 0.0


def _rounds(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def frobenius_distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the Frobenius norm of actual - expected; inf where the shapes differ."""
    if actual.shape != expected.shape:
        return inf
    norm = frobenius(_real(actual).to(torch.float64) - _real(expected).to(torch.float64))
    return norm if isfinite(norm) else frobenius(subtract(actual, expected))


def largest_element(gap: torch.Tensor) -> tuple[float, tuple[int, ...]]:
    """Return the largest absolute element and its index; 0 and no index for an empty tensor."""
    if not gap.numel():
        return 0.0, ()
    flat = int(gap.abs().argmax())
    largest, index = abs(float(gap.reshape(-1)[flat])), []
    for size in reversed(gap.shape):
        flat, position = divmod(flat, size)
        index.append(position)
    return largest, tuple(reversed(index))


def compare_parameter(
    layout: Layout, expected: torch.Tensor, parts: Sequence[torch.Tensor], allowed: float
) -> Difference:
    """Compare every rank's shard with the reference's parameter; `largest_at` is an index into the full tensor.

    Shapes that do not fit the layout make the error infinite.
    """
    shapes = [tuple(part.shape) for part in parts]
    if shapes != list(layout.local_shapes) or tuple(expected.shape) != tuple(layout.shape):
        return Difference.unbounded(expected, allowed, len(parts))
    if layout.is_replicated:
        gaps = [subtract(part, expected) for part in parts]
        return summarize(gaps, frobenius(expected), allowed, is_replicated=True)
    gap = subtract(layout.assemble(parts), expected)
    errors = tuple(map(frobenius, layout.parts(gap)))
    return replace(summarize([gap], frobenius(expected), allowed, is_replicated=False), part_errors=errors)


def distance_of_terms(parts: Sequence[torch.Tensor], expected: torch.Tensor) -> float:
    """Return the Frobenius distance of `expected` to the parts, or to their sum in the features where that is nearer.

    Each feature (index of the last dim) is complete on every rank or a term on each: where two branches leave a module,
    the gradient of one may be reduced and that of the other not yet. A vector is read as one feature, because single
    elements prove nothing.
    """
    total = subtract(torch.stack(list(parts)).sum(dim=0), expected)
    gaps = [total, *(subtract(part, expected) for part in parts)]
    if expected.dim() < 2:
        as_terms, *as_replicas = (torch.tensor(frobenius(gap), dtype=torch.float64) for gap in gaps)
    else:
        others = tuple(range(expected.dim() - 1))
        as_terms, *as_replicas = (torch.linalg.vector_norm(gap, dim=others) for gap in gaps)
    return frobenius(torch.minimum(as_terms, torch.stack(as_replicas).amax(dim=0)))


def projection(vector: torch.Tensor, others: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the combination of some vectors that is nearest to `vector`, in float64; they need not be independent."""
    matrix = torch.stack([other.double() for other in others], dim=1)
    nearest: torch.Tensor = matrix @ (torch.linalg.pinv(matrix) @ vector.double())
    return nearest
