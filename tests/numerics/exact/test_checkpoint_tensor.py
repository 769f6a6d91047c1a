"""Tensors are read in pieces, compared bit by bit, in files and in memory, and their differing elements are found."""

from __future__ import annotations

import os
from math import inf, nan
from pathlib import Path

import pytest
import torch

from tests.numerics.exact.tensors import Tensors, stored
from tpcheck import CheckpointError
from tpcheck.backends.checkpoint_format import Extent
from tpcheck.numerics.exact import checkpoint_tensor
from tpcheck.numerics.exact.checkpoint_tensor import (
    BitComparer,
    CheckpointTensor,
    ElementDifference,
    bit_view,
    element_difference,
    is_constant,
)


def in_file(path: Path, tensor: torch.Tensor, offset: int = 0) -> CheckpointTensor:
    path.write_bytes(bytes(offset) + tensor.numpy().tobytes())
    checkpoint = Tensors({"a": tensor}, {"a": Extent(path, offset, tensor.nbytes)})
    return CheckpointTensor(checkpoint, "a")


def test_pieces_cover_all_rows_and_hold_one_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_tensor, "PIECE", 100)
    assert list(stored(torch.ones(7, 5, dtype=torch.float64)).pieces()) == [
        range(i, min(i + 2, 7)) for i in (0, 2, 4, 6)
    ]
    assert list(stored(torch.ones(2, 1000)).pieces()) == [range(1), range(1, 2)]
    assert list(stored(torch.ones(7, 5)).pieces(range(3, 5))) == [range(3, 5)]
    assert list(stored(torch.ones(())).pieces()) == [range(1)]
    assert list(stored(torch.ones(0, 5)).pieces()) == list(stored(torch.ones(5, 0)).pieces()) == []


def test_a_cast_rounds_floating_point_values_alone() -> None:
    rounded, counter = stored(torch.tensor([1.001]), torch.bfloat16), stored(torch.tensor([3]), torch.bfloat16)
    assert (rounded.dtype, rounded.read(range(1)).tolist()) == (torch.bfloat16, [1.0])
    assert counter.dtype == torch.int64


def test_a_cast_tensor_lies_in_no_file(tmp_path: Path) -> None:
    tensor = in_file(tmp_path / "a", torch.ones(2))
    assert tensor.extent() is not None
    assert CheckpointTensor(tensor.checkpoint, "a", torch.bfloat16).extent() is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float64, torch.complex64])
def test_a_bit_view_has_an_integer_for_each_element(dtype: torch.dtype) -> None:
    bits = bit_view(torch.ones(3, 2).to(dtype))
    assert not bits.is_floating_point()
    assert bits.shape[:2] == (3, 2)


@pytest.mark.parametrize("from_file", [True, False])
def test_zero_is_not_minus_zero_and_a_nan_equals_itself(tmp_path: Path, from_file: bool) -> None:
    def made(name: str, values: list[float]) -> CheckpointTensor:
        return in_file(tmp_path / name, torch.tensor(values)) if from_file else stored(torch.tensor(values))

    with BitComparer() as comparer:
        assert comparer.equal(made("a", [float("nan"), 0.0]), made("b", [float("nan"), 0.0]))
        assert not comparer.equal(made("a", [0.0]), made("b", [-0.0]))
        assert comparer.equal(stored(torch.ones(0)), stored(torch.ones(0)))


def test_rows_are_compared_alone_at_any_offset_of_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_tensor, "_READ_SIZE", 7)
    tensor = torch.arange(30.0).reshape(10, 3)
    changed = tensor.clone()
    changed[4, 1] = -1
    pair = in_file(tmp_path / "a", tensor, offset=5), in_file(tmp_path / "b", changed)
    with BitComparer() as comparer:
        differing = [row for row in range(10) if not comparer.equal_rows(*pair, range(row, row + 1))]
        assert differing == [4]
        assert comparer.equal_rows(*pair, range(5, 10))
        assert not comparer.equal(*pair)


def test_a_file_that_becomes_shorter_is_an_error(tmp_path: Path) -> None:
    pair = in_file(tmp_path / "a", torch.ones(100)), in_file(tmp_path / "b", torch.ones(100))
    os.truncate(tmp_path / "b", 100)
    with BitComparer() as comparer, pytest.raises(CheckpointError, match="was changed while it was read"):
        comparer.equal(*pair)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.zeros(3, 4), True),
        (torch.tensor(2.0), True),
        (torch.ones(0), True),
        (torch.full((3, 2), 1 + 2j), True),
        (torch.tensor([[0.0, 0.0], [0.0, -0.0]]), False),
        (torch.tensor([1 + 2j, 1 + 3j]), False),
    ],
)
def test_a_constant_tensor_has_the_same_bits_everywhere(tensor: torch.Tensor, expected: bool) -> None:
    assert is_constant(stored(tensor)) == expected


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
