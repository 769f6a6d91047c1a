"""Tensors of checkpoints, read in pieces that fit into memory: have two the same bits, and which elements differ?"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf, prod
from pathlib import Path

import torch

from tpcheck.backends.checkpoint_format import Checkpoint, Extent
from tpcheck.core.errors import CheckpointError

PIECE = 8 << 20  # bytes read at once: a few pieces in flight stay far below the gigabyte that the documentation states


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """A tensor of a checkpoint.

    Attributes:
        checkpoint: The checkpoint that holds it.
        name: Its name there.
        cast: The dtype that floating point values are rounded to when they are read; None leaves them as they are.
    """

    checkpoint: Checkpoint
    name: str
    cast: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.checkpoint.shape(self.name))

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.checkpoint.dtype(self.name)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what `read` returns."""
        stored = self.stored_dtype
        return stored if self.cast is None or not stored.is_floating_point else self.cast

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def num_rows(self) -> int:
        """Size of dim 0; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def read(self, rows: range) -> torch.Tensor:
        """Return consecutive rows, in the dtype of this tensor; a scalar for any rows."""
        return self.checkpoint.read(self.name, rows).to(self.dtype)

    def extent(self) -> Extent | None:
        """Return where these bits lie in a file, or None where no file holds them as they are read."""
        return self.checkpoint.extent(self.name) if self.dtype == self.stored_dtype else None

    def pieces(self, rows: range | None = None) -> Iterator[range]:
        """Yield consecutive rows of about `PIECE` bytes, one row at least; nothing for an empty tensor."""
        span = range(self.num_rows) if rows is None else rows
        if not self.numel:
            return
        itemsize = max(self.dtype.itemsize, self.stored_dtype.itemsize)
        step = max(1, PIECE // (self.numel // self.num_rows * itemsize))
        for start in range(span.start, span.stop, step):
            yield range(start, min(start + step, span.stop))


def bit_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of each element as integers: same shape, complex elements with a last dim of 2."""
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    real = real.resolve_neg().contiguous()
    return real.view(_INTEGERS[real.dtype.itemsize])


def is_constant(tensor: CheckpointTensor) -> bool:
    """Return whether all elements have the same bits, as in many norms and biases: such a tensor equals many others."""
    if not tensor.numel:
        return True
    first = bit_view(tensor.read(range(1))).reshape(tensor.numel // tensor.num_rows, -1)[0]
    return all(bool((bit_view(tensor.read(rows)).reshape(-1, len(first)) == first).all()) for rows in tensor.pieces())


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Bytes read from each file at once. Comparing two files of 256 MiB in the page cache (9 rounds in turn, one core, CPU
# time): `os.pread(...) == os.pread(...)` 22.5 ms, memcmp through ctypes 23.7, numpy.array_equal of 8-byte words 27.5,
# reading without comparing 18.7; pieces of 1 MiB 25.5. numpy.memmap takes 299 and keeps both files resident.
_READ_SIZE = 1 << 18


class BitComparer:
    """Compares bits in files and in memory, and keeps the files that it opens. Several threads may use one."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> BitComparer:
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def equal(self, actual: CheckpointTensor, expected: CheckpointTensor) -> bool:
        """Return whether two tensors of one shape and dtype have the same bits; stop at the first that differ."""
        return self.equal_rows(actual, expected, range(expected.num_rows))

    def equal_rows(self, actual: CheckpointTensor, expected: CheckpointTensor, rows: range) -> bool:
        """Return whether some rows of two tensors of one shape and dtype have the same bits."""
        if not expected.numel:
            return True
        extents = actual.extent(), expected.extent()
        if extents[0] is not None and extents[1] is not None:
            row_nbytes = expected.nbytes // expected.num_rows
            return self._equal_bytes(extents[0], extents[1], rows.start * row_nbytes, rows.stop * row_nbytes)
        return all(
            torch.equal(bit_view(actual.read(piece)), bit_view(expected.read(piece))) for piece in expected.pieces(rows)
        )

    def _equal_bytes(self, actual: Extent, expected: Extent, start: int, stop: int) -> bool:
        return all(
            self._read(actual, offset, min(_READ_SIZE, stop - offset))
            == self._read(expected, offset, min(_READ_SIZE, stop - offset))
            for offset in range(start, stop, _READ_SIZE)
        )

    def _read(self, extent: Extent, offset: int, nbytes: int) -> bytes:
        data = os.pread(self._descriptor(extent.path), nbytes, extent.offset + offset)
        while len(data) < nbytes:
            more = os.pread(self._descriptor(extent.path), nbytes - len(data), extent.offset + offset + len(data))
            if not more:
                raise CheckpointError(f"{extent.path} was changed while it was read: it became shorter.")
            data += more
        return data

    def _descriptor(self, path: Path) -> int:
        with self._opening:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[path]


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
