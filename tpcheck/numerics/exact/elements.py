"""Which elements of two stored tensors differ, and how; digests of slices, by which slices that moved are found."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, prod

import torch

from tpcheck.numerics.exact.stored import Stored, bit_view

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
    gap = _gap(actual, expected, differs)
    worst = int(gap.argmax())
    wrong_rows = differs.reshape(len(rows), -1).any(1).nonzero().reshape(-1) + rows.start
    flat = differs.reshape(-1)
    first = int(flat.view(torch.uint8).argmax())

    def at(place: int) -> tuple[int, ...]:
        local = [int(i) for i in torch.unravel_index(torch.tensor(place), expected.shape)]
        return (local[0] + rows.start, *local[1:]) if local else ()

    return ElementDifference(
        count=count,
        total=total,
        rows=range(int(wrong_rows[0]), int(wrong_rows[-1]) + 1),
        first=at(first),
        actual=_value(actual.reshape(-1)[first]),
        expected=_value(expected.reshape(-1)[first]),
        largest=float(gap[worst]),
        largest_at=at(worst),
        count_zero=int(((_plain(actual) == 0) & differs).count_nonzero()),
        count_not_finite=int((~_plain(actual).isfinite() & _plain(expected).isfinite()).count_nonzero()),
        count_flipped=_flipped(actual.reshape(-1)[flat], expected.reshape(-1)[flat])
        if same_dtype and count <= _FEW
        else None,
    )


def _gap(actual: torch.Tensor, expected: torch.Tensor, differs: torch.Tensor) -> torch.Tensor:
    """Return the absolute differences, flat; 0 where nothing differs, inf where one side alone is finite."""
    left, right = (_plain(side) for side in (actual, expected))
    if left.dtype != right.dtype or not left.dtype.is_floating_point:
        left, right = _wide(left), _wide(right)
    gap = (left - right).abs().reshape(-1)
    gap = gap if gap.is_floating_point() else gap.double()
    return gap.masked_fill_(~differs.reshape(-1), 0.0).nan_to_num_(nan=inf, posinf=inf)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the values in a dtype that torch computes in: those of 8 bits it can only convert."""
    return tensor.float() if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1 else tensor


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


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_PART = 1 << 18  # elements that are multiplied at once: their 8-byte words and keys stay in the cache


def slice_digests(tensor: Stored, dim: int) -> torch.Tensor:
    """Return one 64-bit digest for each index of `dim`, of the bits of everything at that index; shape (size of dim,).

    It depends on the order of the other dims' elements alone, so the digests of the rows of a matrix are those of the
    columns of its transpose. A multilinear sum with pseudo-random odd keys (splitmix64): two slices share it by chance
    with a probability of 2^-63 (Lemire, Kaser: Strongly universal string hashing is fast, arXiv 1202.4961).
    """
    shape = tensor.shape or (1,)
    sums = torch.zeros(shape[dim], dtype=torch.int64)
    others = prod(shape[1:]) // (shape[dim] if dim else 1)  # elements of one row at one index of `dim`
    for rows in tensor.pieces():
        per_row = max(1, _PART // max(1, prod(shape[1:])))
        piece = bit_view(tensor.read(rows)).reshape(len(rows), *shape[1:], -1)
        for start in range(0, len(rows), per_row):
            words = piece[start : start + per_row].to(torch.int64)
            if dim == 0:
                flat = words.reshape(len(words), -1)
                sums[rows.start + start : rows.start + start + len(words)] = (flat * _keys(0, flat.shape[1])).sum(1)
            else:
                moved = words.movedim(dim, 0).reshape(shape[dim], -1)
                first = (rows.start + start) * others * words.shape[-1]
                sums += (moved * _keys(first, moved.shape[1])).sum(1)
    return sums


def _keys(first: int, number: int) -> torch.Tensor:
    """Return odd pseudo-random keys for the places `first`, `first` + 1, ..."""
    mixed = torch.arange(first, first + number) * _GOLDEN
    for shift, factor in _FACTORS:
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed | 1
