"""A tensor of a checkpoint, read in pieces that fit into memory, and whether two of them have the same bits."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
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
                raise CheckpointError(f"{extent.path} became shorter while it was read.")
            data += more
        return data

    def _descriptor(self, path: Path) -> int:
        with self._opening:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[path]
