"""Every differing element is counted, the first and the largest difference are placed."""

from __future__ import annotations

from math import inf, nan

import pytest
import torch

from tests.numerics.exact.tensors import stored
from tpcheck.numerics.exact import checkpoint_tensor
from tpcheck.numerics.exact.element_difference import ElementDifference, element_difference


def difference(actual: torch.Tensor, expected: torch.Tensor) -> ElementDifference | None:
    return element_difference(stored(actual), stored(expected))


def changed(tensor: torch.Tensor, **values: float) -> torch.Tensor:
    """Return a copy with other values at flat indices: `i3=0.0`."""
    copy = tensor.clone()
    for index, value in values.items():
        copy.view(-1)[int(index[1:])] = value
    return copy


def test_equal_tensors_have_none() -> None:
    assert difference(torch.tensor([nan, 1.0]), torch.tensor([nan, 1.0])) is None
    assert difference(torch.ones(0), torch.ones(0)) is None


@pytest.mark.parametrize("piece", [8, 1 << 20])
def test_it_is_the_same_over_one_piece_and_many(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_tensor, "PIECE", piece)
    expected = torch.arange(1.0, 13.0).reshape(6, 2)
    found = difference(changed(expected, i3=0.0, i8=20.0, i9=nan), expected)
    assert found is not None
    assert (found.count, found.total, found.rows) == (3, 12, range(1, 5))
    assert (found.first, found.actual, found.expected) == ((1, 1), 0.0, 4.0)
    assert (found.largest, found.largest_at) == (inf, (4, 1))
    assert (found.count_zero, found.count_not_finite) == (1, 1)
    assert found.count_flipped is not None


def test_flipped_bits_are_counted_where_few_elements_differ() -> None:
    expected = torch.zeros(20, dtype=torch.int16)
    assert difference(changed(expected, i0=1, i1=-1), expected).count_flipped == 17  # type: ignore[union-attr]
    assert difference(expected + 1, expected).count_flipped is None  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float64, torch.complex64, torch.int64])
def test_every_dtype_has_a_largest_difference(dtype: torch.dtype) -> None:
    found = difference(torch.tensor([1, 4]).to(dtype), torch.tensor([1, 2]).to(dtype))
    assert found is not None
    assert (found.count, found.largest, found.first) == (1, 2.0, (1,))


def test_values_are_compared_where_dtypes_differ() -> None:
    assert difference(torch.tensor([1.0, 2.0]).half(), torch.tensor([1.0, 2.0])) is None
    found = difference(torch.tensor([1.0, 2.0]).half(), torch.tensor([1.0, 2.001]))
    assert found is not None
    assert (found.count, found.first, found.count_flipped) == (1, (1,), None)


def test_a_scalar_has_the_empty_index() -> None:
    found = difference(torch.tensor(1.0), torch.tensor(2.0))
    assert found is not None
    assert (found.first, found.rows, found.largest) == ((), range(1), 1.0)


def test_the_largest_difference_of_all_pieces_is_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_tensor, "PIECE", 8)
    expected = torch.arange(1.0, 13.0).reshape(6, 2)
    found = difference(changed(expected, i1=100.0, i9=20.0), expected)
    assert found is not None
    assert (found.largest, found.largest_at) == (98.0, (0, 1))


@pytest.mark.parametrize(("count", "flipped"), [(16, 16), (17, None)])
def test_flipped_bits_of_few_elements_are_counted_over_all_pieces(
    count: int, flipped: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_tensor, "PIECE", 8)
    expected = torch.zeros(20, dtype=torch.int16)
    found = difference(changed(expected, **{f"i{index}": 1 for index in range(count)}), expected)
    assert found is not None
    assert (found.count, found.count_flipped) == (count, flipped)


def test_unsigned_and_boolean_values_do_not_wrap() -> None:
    found = difference(torch.tensor([1, 0], dtype=torch.uint8), torch.tensor([3, 0], dtype=torch.uint8))
    assert found is not None
    assert (found.largest, found.actual) == (2.0, 1)
    found = difference(torch.tensor([False]), torch.tensor([True]))
    assert found is not None
    assert (found.largest, found.actual, found.expected) == (1.0, False, True)


def test_small_differences_of_float64_are_exact() -> None:
    found = difference(torch.tensor([1.0 + 1e-12]).double() + 1e-12, torch.tensor([1.0]).double())
    assert found is not None
    assert found.largest == pytest.approx(1e-12, rel=1e-3)


def test_complex_values_are_compared_where_dtypes_differ() -> None:
    expected = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128)
    assert difference(expected.to(torch.complex64), expected) is None
    found = difference((expected + torch.tensor([0, 1j])).to(torch.complex64), expected)
    assert found is not None
    assert (found.first, found.largest) == ((1,), 1.0)
