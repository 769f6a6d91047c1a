"""Which elements of two tensors of one shape differ, and by how much."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

import torch

from tpcheck.numerics.exact.checkpoint_tensor import CheckpointTensor, bit_view

Value = float | int | bool | complex | None

_MAX_COUNTED = 16  # differing elements whose flipped bits are counted


@dataclass(frozen=True, slots=True)
class ElementDifference:
    """All differing elements of two tensors of one shape.

    Attributes:
        count: Number of elements that differ.
        total: Number of elements.
        rows: The rows (indices of dim 0) from the first to the last that holds a difference.
        first: Index of the first element that differs.
        actual, expected: The values at `first`.
        largest: Largest absolute difference; inf where only one side is finite.
        largest_at: Index of the largest difference.
        count_zero: Number of differing elements that are zero in the actual tensor.
        count_not_finite: Number of differing elements that are NaN or infinite in the actual tensor alone.
        count_flipped: Number of bits that differ over all elements; None where more than 16 elements differ.
    """

    count: int
    total: int
    rows: range
    first: tuple[int, ...]
    actual: Value
    expected: Value
    largest: float
    largest_at: tuple[int, ...]
    count_zero: int
    count_not_finite: int
    count_flipped: int | None


def element_difference(actual: CheckpointTensor, expected: CheckpointTensor) -> ElementDifference | None:
    """Return how two tensors of one shape differ, or None; compare values in place of bits where the dtypes differ."""
    difference: ElementDifference | None = None
    for rows in expected.pieces():
        of_piece = _difference_in_piece(actual.read(rows), expected.read(rows), rows, expected.numel)
        if of_piece is not None:
            difference = of_piece if difference is None else _joined(difference, of_piece)
    return difference


def _difference_in_piece(
    actual: torch.Tensor, expected: torch.Tensor, rows: range, total: int
) -> ElementDifference | None:
    same_dtype = actual.dtype == expected.dtype
    if same_dtype and torch.equal(bit_view(actual), bit_view(expected)):
        return None
    differs = bit_view(actual) != bit_view(expected) if same_dtype else _values_differ(actual, expected)
    if actual.is_complex() and same_dtype:
        differs = differs.any(-1)
    count = int(differs.count_nonzero())
    if not count:
        return None
    difference = _absolute_difference(actual, expected, differs)
    largest_at = int(difference.argmax())
    differing_rows = differs.reshape(len(rows), -1).any(1).nonzero().reshape(-1) + rows.start
    differs_flat = differs.reshape(-1)
    first = int(differs_flat.view(torch.uint8).argmax())

    def index(flat_index: int) -> tuple[int, ...]:
        in_piece = [int(i) for i in torch.unravel_index(torch.tensor(flat_index), expected.shape)]
        return (in_piece[0] + rows.start, *in_piece[1:]) if in_piece else ()

    count_flipped = None
    if same_dtype and count <= _MAX_COUNTED:
        count_flipped = _count_flipped(actual.reshape(-1)[differs_flat], expected.reshape(-1)[differs_flat])
    return ElementDifference(
        count=count,
        total=total,
        rows=range(int(differing_rows[0]), int(differing_rows[-1]) + 1),
        first=index(first),
        actual=_value(actual.reshape(-1)[first]),
        expected=_value(expected.reshape(-1)[first]),
        largest=float(difference[largest_at]),
        largest_at=index(largest_at),
        count_zero=int(((_computable(actual) == 0) & differs).count_nonzero()),
        count_not_finite=int((~_computable(actual).isfinite() & _computable(expected).isfinite()).count_nonzero()),
        count_flipped=count_flipped,
    )


def _joined(before: ElementDifference, after: ElementDifference) -> ElementDifference:
    larger = after if after.largest > before.largest else before
    count = before.count + after.count
    count_flipped = None
    if before.count_flipped is not None and after.count_flipped is not None and count <= _MAX_COUNTED:
        count_flipped = before.count_flipped + after.count_flipped
    return replace(
        before,
        count=count,
        rows=range(before.rows.start, after.rows.stop),
        largest=larger.largest,
        largest_at=larger.largest_at,
        count_zero=before.count_zero + after.count_zero,
        count_not_finite=before.count_not_finite + after.count_not_finite,
        count_flipped=count_flipped,
    )


def _absolute_difference(actual: torch.Tensor, expected: torch.Tensor, differs: torch.Tensor) -> torch.Tensor:
    """Return |actual - expected|, flat: 0 where nothing differs, inf where only one side is finite."""
    left, right = _computable(actual), _computable(expected)
    if left.dtype != right.dtype or not left.dtype.is_floating_point:
        left, right = _widest(left), _widest(right)
    difference = (left - right).abs().reshape(-1)
    difference = difference if difference.is_floating_point() else difference.double()
    return difference.masked_fill_(~differs.reshape(-1), 0.0).nan_to_num_(nan=inf, posinf=inf)


def _values_differ(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    left, right = _widest(actual), _widest(expected)
    return ~((left == right) | (left.isnan() & right.isnan()))


def _computable(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in a dtype that torch can compute in: floats of 8 bits it can only convert."""
    return tensor.float() if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1 else tensor


def _widest(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in the widest dtype of their kind."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor.to(torch.int64)


def _value(element: torch.Tensor) -> Value:
    value: Value = element.to(torch.float64).item() if element.is_floating_point() else element.item()
    return value


def _count_flipped(actual: torch.Tensor, expected: torch.Tensor) -> int:
    changed = bit_view(actual).reshape(-1) ^ bit_view(expected).reshape(-1)
    mask = (1 << 8 * changed.dtype.itemsize) - 1  # bits of a negative number, too
    return sum((int(bits) & mask).bit_count() for bits in changed.tolist())
