"""Stored tensors, read in pieces that fit into memory, and whether their bits agree."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from tpcheck.backends.checkpoint_format import Checkpoint, Extent
from tpcheck.core.errors import CheckpointError

PIECE = 8 << 20  # bytes that are read at once: a few of them in flight stay far below the gigabyte that is promised


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that lies in a checkpoint.

    Attributes:
        checkpoint: Where it lies.
        name: Its name there.
        cast: Floating point values are rounded to this dtype when they are read; None leaves them as they are.
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
        own = self.stored_dtype
        return own if self.cast is None or not own.is_floating_point else self.cast

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
        """Return consecutive rows, in the dtype of this tensor; a scalar as it is."""
        return self.checkpoint.read(self.name, rows).to(self.dtype)

    def extent(self) -> Extent | None:
        """Return where these bits lie in a file, if they lie there as they are."""
        return self.checkpoint.extent(self.name) if self.dtype == self.stored_dtype else None

    def pieces(self, rows: range | None = None) -> Iterator[range]:
        """Yield consecutive rows of about `PIECE` bytes, one at least; nothing for an empty tensor."""
        span = range(self.num_rows) if rows is None else rows
        if not self.numel:
            return
        wider = max(self.dtype.itemsize, self.stored_dtype.itemsize)
        step = max(1, PIECE // max(1, self.numel // self.num_rows * wider))
        for start in range(span.start, span.stop, step):
            yield range(start, min(start + step, span.stop))


def bit_view(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of each element as integers: shape as before, complex ones with a last dim of 2."""
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    plain = plain.resolve_neg().contiguous()
    return plain.view(_INTEGERS[plain.dtype.itemsize])


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


_BUFFER = 1 << 20  # bytes: two of them stay in a core's second-level cache (ci/bench/checkpoint)

_memcmp = ctypes.CDLL(None).memcmp  # a foreign call, so other threads run meanwhile
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class BitComparer:
    """Compares bits in files and readers; keeps the files that it opens. Used by several threads at once."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._opening = threading.Lock()
        self._own = threading.local()

    def __enter__(self) -> BitComparer:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def equal(self, actual: Stored, expected: Stored) -> bool:
        """Return whether two tensors of one shape and dtype have the same bits; stops at the first that differ."""
        whole = range(expected.num_rows)
        return not expected.numel or self.equal_rows(actual, expected, whole)

    def equal_rows(self, actual: Stored, expected: Stored, rows: range) -> bool:
        """Return whether some rows of two tensors of one shape and dtype have the same bits."""
        ours, theirs = actual.extent(), expected.extent()
        if ours is not None and theirs is not None:
            row = expected.nbytes // expected.num_rows
            return self._equal_bytes(ours, theirs, rows.start * row, rows.stop * row)
        return all(
            torch.equal(bit_view(actual.read(piece)), bit_view(expected.read(piece))) for piece in expected.pieces(rows)
        )

    def _equal_bytes(self, actual: Extent, expected: Extent, start: int, stop: int) -> bool:
        ours, theirs = self._buffers()
        for offset in range(start, stop, _BUFFER):
            length = min(_BUFFER, stop - offset)
            self._fill(ours, actual, offset, length)
            self._fill(theirs, expected, offset, length)
            if _memcmp(ours.address, theirs.address, length):
                return False
        return True

    def _fill(self, buffer: _Buffer, extent: Extent, offset: int, length: int) -> None:
        got = 0
        while got < length:
            with_rest = [buffer.view[got:length]]
            more = os.preadv(self._file(extent.path), with_rest, extent.offset + offset + got)
            if not more:
                raise CheckpointError(f"{extent.path} became shorter while it was read")
            got += more

    def _file(self, path: Path) -> int:
        if path not in self._files:
            with self._opening:
                if path not in self._files:
                    self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]

    def _buffers(self) -> tuple[_Buffer, _Buffer]:
        if not hasattr(self._own, "buffers"):
            self._own.buffers = _Buffer(), _Buffer()
        buffers: tuple[_Buffer, _Buffer] = self._own.buffers
        return buffers


class _Buffer:
    def __init__(self) -> None:
        memory = bytearray(_BUFFER)
        self.view = memoryview(memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
