"""Do the stored bits of two tensors agree? By memory comparison where both lie in files in one piece."""

from __future__ import annotations

import ctypes
import os
import threading
from pathlib import Path

import torch

from tpcheck.adapters import Extent
from tpcheck.compare.stored import Stored, bit_view
from tpcheck.errors import CheckpointError

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
