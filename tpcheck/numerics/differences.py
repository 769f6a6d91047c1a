"""How far the ranks' parts of a tensor are from what they should be, and how those parts make up the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import hypot, inf, isfinite, sqrt

import torch

from tpcheck.backends.layout import Layout
from tpcheck.core.placement import Placement, Replicate, Shard


@dataclass(frozen=True, slots=True)
class Placed:
    """Each rank's part of a tensor, with the placement that relates it to the whole."""

    placement: Placement
    parts: tuple[torch.Tensor, ...]

    @property
    def is_replicated(self) -> bool:
        """Whether every rank should hold the whole tensor."""
        return isinstance(self.placement, Replicate)

    @property
    def num_blocks(self) -> int:
        """How many blocks the whole is cut in, each for itself."""
        return len(self.placement.sizes) if isinstance(self.placement, Shard) else 1

    @property
    def is_fused(self) -> bool:
        """Whether the whole is cut block by block, so that its parts agree in one reading order alone."""
        return self.num_blocks > 1

    def expected_part(self, whole: torch.Tensor, tp_rank: int) -> torch.Tensor:
        """Return what `tp_rank` should hold of `whole`."""
        if not isinstance(self.placement, Shard):
            return whole
        dim = self.placement.dim
        ranges = self.placement.ranges(whole.shape[dim], len(self.parts), tp_rank)
        return torch.cat([whole.narrow(dim, indices.start, len(indices)) for indices in ranges], dim=dim)


def place(whole_shape: Sequence[int], parts: Sequence[torch.Tensor], hint: Placement | None = None) -> Placed | None:
    """Return the placement that the parts have, or None where their shapes do not make up the whole.

    Args:
        whole_shape: Shape of the expected tensor.
        parts: Each rank's tensor, by tp_rank.
        hint: Placement of the output features of the module's weight, followed where the shapes bear it out: blocks
            cannot be told from shapes.
    """
    shapes = [tuple(part.shape) for part in parts]
    whole = tuple(whole_shape)
    if all(shape == whole for shape in shapes):
        return Placed(Replicate(), tuple(parts))
    cut = [dim for dim in range(len(whole)) if any(len(s) != len(whole) or s[dim] != whole[dim] for s in shapes)]
    if len(cut) != 1 or any(len(shape) != len(whole) for shape in shapes):
        return None
    dim = cut[0]
    sizes = tuple(shape[dim] for shape in shapes)
    if isinstance(hint, Shard) and dim == len(whole) - 1 and _total_sizes(hint) == sizes:
        return Placed(Shard(dim, hint.blocks, hint.sizes), tuple(parts))
    if sum(sizes) != whole[dim]:
        return None
    return Placed(Shard(dim, sizes=(sizes,)), tuple(parts))


def _total_sizes(shard: Shard) -> tuple[int, ...]:
    return tuple(sum(by_block) for by_block in zip(*shard.sizes, strict=True))


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


def compare_parameter(
    layout: Layout, expected: torch.Tensor, parts: Sequence[torch.Tensor], allowed: float
) -> Difference:
    """Compare every rank's shard with the reference's whole tensor; `largest_at` is an index into the whole.

    Parts of the wrong shape differ without bound.
    """
    if any(tuple(part.shape) != shape for part, shape in zip(parts, layout.local_shapes, strict=True)):
        return Difference.unbounded(expected, allowed, len(parts))
    if layout.is_replicated:
        if tuple(expected.shape) != tuple(layout.shape):
            return Difference.unbounded(expected, allowed, len(parts))
        return measured([difference(part, expected) for part in parts], frobenius(expected), allowed, replicated=True)
    assembled = layout.assemble(parts)
    if assembled.shape != expected.shape:
        return Difference.unbounded(expected, allowed, len(parts))
    gap = difference(assembled, expected)
    largest, at = largest_element(gap)
    return Difference(
        error=frobenius(gap),
        expected_norm=frobenius(expected),
        allowed=allowed,
        part_errors=tuple(frobenius(layout.local(gap, tp_rank)) for tp_rank in range(len(parts))),
        largest=largest,
        largest_at=at,
        count_differing=int(gap.count_nonzero()),
    )


def distance_of_terms(parts: Sequence[torch.Tensor], expected: torch.Tensor) -> float:
    """Return the Frobenius distance of the ranks' parts from `expected`, read as terms of a sum where that is nearer.

    Each feature (index of the last dim) is whole on every rank or a term on each: where two branches leave a module,
    the gradient of one may be reduced and that of the other not yet. What is no matrix is read as one feature, for
    single elements prove nothing.
    """
    total = difference(torch.stack(list(parts)).sum(dim=0), expected)
    gaps = [total, *(difference(part, expected) for part in parts)]
    if expected.dim() < 2:
        as_terms, *as_whole = (torch.tensor(frobenius(gap), dtype=torch.float64) for gap in gaps)
    else:
        others = tuple(range(expected.dim() - 1))
        as_terms, *as_whole = (torch.linalg.vector_norm(gap, dim=others) for gap in gaps)
    return frobenius(torch.minimum(as_terms, torch.stack(as_whole).amax(dim=0)))
