"""Which elements of two stored tensors differ, and how."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tpcheck.compare.difference import difference
from tpcheck.compare.stored import Stored, bit_view

Value = float | int | bool | complex | None


@dataclass(frozen=True, slots=True)
class ElementDifference:
    """All differing elements of two tensors of one shape, bit by bit.

    Attributes:
        count: How many elements differ.
        total: How many there are.
        rows: The rows (indices of dim 0) from the first to the last that holds a difference.
        first: Index of the first differing element.
        actual, expected: The values there.
        largest: Largest absolute difference; inf where only one side is finite.
        largest_at: Its index.
        count_zero: Differing elements that are zero in the actual tensor.
        count_not_finite: Differing elements that are NaN or infinite in the actual tensor alone.
        count_flipped: How many bits differ over all elements, where few elements differ; else None.
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


_FEW = 16  # differing elements whose bits are counted


def element_difference(actual: Stored, expected: Stored) -> ElementDifference | None:
    """Return how two tensors of one shape differ, or None; where their dtypes differ, values are compared, not bits."""
    found: ElementDifference | None = None
    for rows in expected.pieces():
        part = _piece(actual.read(rows), expected.read(rows), rows, expected.numel)
        found = part if found is None else found if part is None else _joined(found, part)
    return found


def _piece(actual: torch.Tensor, expected: torch.Tensor, rows: range, total: int) -> ElementDifference | None:
    same_dtype = actual.dtype == expected.dtype
    if same_dtype and torch.equal(bit_view(actual), bit_view(expected)):
        return None
    differs = bit_view(actual) != bit_view(expected) if same_dtype else _values_differ(actual, expected)
    if actual.is_complex() and same_dtype:
        differs = differs.any(-1)
    count = int(differs.count_nonzero())
    if not count:
        return None
    flat = differs.reshape(-1)
    wrong, right = actual.reshape(-1)[flat], expected.reshape(-1)[flat]
    places = flat.nonzero().reshape(-1)
    gap = difference(wrong, right).abs()
    gap = gap.amax(-1) if gap.dim() > 1 else gap
    worst = int(gap.argmax())

    def at(place: int) -> tuple[int, ...]:
        local = [int(i) for i in torch.unravel_index(places[place], expected.shape)]
        return (local[0] + rows.start, *local[1:]) if local else ()

    finite = [torch.isfinite(_wide(part)) for part in (wrong, right)]
    return ElementDifference(
        count=count,
        total=total,
        rows=range(at(0)[0], at(-1)[0] + 1) if expected.dim() else rows,
        first=at(0),
        actual=_value(wrong[0]),
        expected=_value(right[0]),
        largest=float(gap[worst]),
        largest_at=at(worst),
        count_zero=int((_wide(wrong) == 0).count_nonzero()),
        count_not_finite=int((~finite[0] & finite[1]).count_nonzero()),
        count_flipped=_flipped(wrong, right) if same_dtype and count <= _FEW else None,
    )


def _joined(before: ElementDifference, after: ElementDifference) -> ElementDifference:
    worse = after if after.largest > before.largest else before
    few = before.count_flipped is not None and after.count_flipped is not None and before.count + after.count <= _FEW
    return replace(
        before,
        count=before.count + after.count,
        rows=range(before.rows.start, after.rows.stop),
        largest=worse.largest,
        largest_at=worse.largest_at,
        count_zero=before.count_zero + after.count_zero,
        count_not_finite=before.count_not_finite + after.count_not_finite,
        count_flipped=(before.count_flipped or 0) + (after.count_flipped or 0) if few else None,
    )


def _values_differ(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    left, right = _wide(actual), _wide(expected)
    return ~((left == right) | (left.isnan() & right.isnan()))


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in a dtype that holds them all and in which everything can be asked."""
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor.to(torch.int64)


def _value(element: torch.Tensor) -> Value:
    value: Value = element.to(torch.float64).item() if element.is_floating_point() else element.item()
    return value


def _flipped(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """Return how many bits differ over all elements."""
    changed = bit_view(actual).reshape(-1) ^ bit_view(expected).reshape(-1)
    width = 8 * changed.dtype.itemsize
    return sum((int(bits) & ((1 << width) - 1)).bit_count() for bits in changed.tolist())
