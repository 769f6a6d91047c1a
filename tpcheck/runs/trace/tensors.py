"""The tensors of one step of a trace, in one safetensors file: all sketches stacked, full tensors beside them.

Files are written and read here, without the library: it maps the whole file, and one that is truncated meanwhile would
end the process; nothing in a header is believed.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, overload

import torch

from tpcheck.core.digests import flat_bytes
from tpcheck.core.errors import TpcheckError
from tpcheck.numerics.sketch import SIGN_SETS, TILES
from tpcheck.runs.trace.json_records import Malformed, parse_line

LONGEST_HEADER = 32 << 20
_STACKED_AT_ONCE = 128  # sketches: 1 MiB
TILES_NAMES = {False: "tiles_float64", True: "tiles_float32"}
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorsToWrite:
    """The tensors of one step, in the order in which its records hold them."""

    def __init__(self) -> None:
        self._tiles: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        self._full: list[torch.Tensor] = []

    def put_tiles(self, tiles: torch.Tensor, *, as_float32: bool) -> None:
        self._tiles[as_float32].append(tiles)

    def put_full(self, tensor: torch.Tensor) -> None:
        self._full.append(tensor)

    def write(self, path: Path) -> None:
        """Write the file under a temporary name, then rename it."""
        entries = [
            _EntryToWrite(TILES_NAMES[as_float32], dtype, (len(tiles), *tiles[0].shape), _stacked(tiles, dtype))
            for as_float32, dtype in ((False, torch.float64), (True, torch.float32))
            if (tiles := self._tiles[as_float32])
        ]
        for number, tensor in enumerate(self._full):
            stored = tensor.detach()
            # safetensors has no complex128, and an unknown dtype is kept as its bytes would not be: as float64
            if stored.dtype == torch.complex128:
                stored = torch.view_as_real(stored.resolve_conj())
            stored = stored if stored.dtype in _NAMES else stored.to(torch.float64)
            entries.append(_EntryToWrite(f"full.{number}", stored.dtype, tuple(stored.shape), (stored,)))
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("xb") as file:
            _write_safetensors(file, entries)
        temporary.rename(path)


@dataclass(frozen=True, slots=True)
class _EntryToWrite:
    """One tensor of a file, whose elements are those of the pieces one after another."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[torch.Tensor]


def _stacked(tiles: list[torch.Tensor], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield stacks of a few: all of a step together are as large as what is written."""
    largest = torch.finfo(dtype).max  # an infinity minus itself would be no number
    for start in range(0, len(tiles), _STACKED_AT_ONCE):
        yield torch.stack(tiles[start : start + _STACKED_AT_ONCE]).clamp_(-largest, largest).to(dtype)


def _write_safetensors(file: BinaryIO, entries: Sequence[_EntryToWrite]) -> None:
    header: dict[str, Any] = {}
    end = 0
    for entry in entries:
        start, end = end, end + prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for entry in entries:
        for piece in entry.pieces:
            file.write(flat_bytes(piece.cpu()).numpy().data)


# ---- reading


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading that is no link, pipe or device.

    Raises:
        TpcheckError: It is one, or cannot be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise TpcheckError(f"{path} cannot be read: it is not a regular file")
            with open(descriptor, "rb", closefd=False) as file:  # a descriptor
                yield file
        finally:
            os.close(descriptor)
    except OSError as error:
        is_link = error.errno in (errno.ELOOP, errno.EMLINK)
        reason = "it is a link, and a trace has none" if is_link else os.strerror(error.errno or errno.EIO)
        raise TpcheckError(f"{path} cannot be read: {reason}") from None


@contextmanager
def reading(path: Path, line: int | None = None) -> Iterator[None]:
    """Say in one sentence what is wrong with a file, or with a line of it, while it is read.

    Raises:
        TpcheckError: It is damaged, or cannot be read.
    """
    place = str(path) if line is None else f"{path}, line {line}"
    try:
        yield
    except Malformed as malformed:
        raise TpcheckError(f"{place}: {malformed}") from None
    except (OSError, MemoryError, RuntimeError) as error:  # RecursionError is a RuntimeError
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise TpcheckError(f"{place}: it cannot be read: {reason}") from None


def read_exactly(file: BinaryIO, start: int, length: int) -> bytearray:
    """Return bytes of a file.

    Raises:
        Malformed: It ends before.
    """
    if start + length > os.fstat(file.fileno()).st_size:
        raise Malformed("ends too early")
    data = bytearray(length)
    file.seek(start)
    if file.readinto(data) != length:  # type: ignore[attr-defined]
        raise Malformed("ends too early")
    return data


class NoTensors:
    """A `TensorSource` for lines that have none."""

    def next_tiles(self, *, as_float32: bool) -> torch.Tensor:
        raise Malformed("has a sketch")

    def next_full(self, number: int, dtype: str) -> Sequence[torch.Tensor]:
        raise Malformed("has a tensor")


NO_TENSORS = NoTensors()


class StoredTensors:
    """The tensors of one step, in the order in which they were put; a `TensorSource`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, _Entry] = {}
        self._tiles: dict[bool, Iterator[torch.Tensor]] = {False: iter(()), True: iter(())}
        self._num_full = 0
        with open_regular(path) as file, reading(path):
            self._entries = _read_header(file)
            for as_float32, name in TILES_NAMES.items():
                if name in self._entries:
                    entry = self._entries.pop(name)
                    wanted = torch.float32 if as_float32 else torch.float64
                    if entry.dtype != wanted or entry.shape[1:] != (SIGN_SETS, TILES, TILES):
                        raise Malformed(f"{name} has the shape {entry.shape}: not sketches of this version of tpcheck")
                    tiles = entry.read(file).to(torch.float64)
                    if tiles.isnan().any():
                        raise Malformed(f"{TILES_NAMES[as_float32]} has elements that are not numbers")
                    self._tiles[as_float32] = iter(tiles)
        self._num_stored = len(self._entries)

    def next_tiles(self, *, as_float32: bool) -> torch.Tensor:
        tiles = next(self._tiles[as_float32], None)
        if tiles is None:
            raise Malformed(f"has no tiles: there are too few in {self._path.name}")
        return tiles

    def next_full(self, number: int, dtype: str) -> FullTensors:
        if self._num_full + number > self._num_stored:
            raise Malformed(f"has no tensor: there are too few in {self._path.name}")
        numbers = range(self._num_full, self._num_full + number)
        entries = [self._entries.get(f"full.{index}") for index in numbers]
        self._num_full += number
        if any(entry is None for entry in entries):
            raise Malformed(f"has no tensor of its number in {self._path.name}")
        return FullTensors(self._path, [entry for entry in entries if entry is not None], dtype)

    def require_all_used(self) -> None:
        """Check that no tensor is left.

        Raises:
            Malformed: One is.
        """
        if self._num_full < self._num_stored or any(next(tiles, None) is not None for tiles in self._tiles.values()):
            raise Malformed(f"has fewer tensors than {self._path.name}")


class FullTensors(Sequence[torch.Tensor]):
    """Tensors in a file, each read whenever it is asked for."""

    def __init__(self, path: Path, entries: Sequence[_Entry], dtype: str) -> None:
        self._path = path
        self._entries = entries
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self._entries)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> FullTensors: ...

    def __getitem__(self, index: int | slice) -> torch.Tensor | FullTensors:
        if isinstance(index, slice):
            return FullTensors(self._path, self._entries[index], self._dtype)
        entry = self._entries[index]
        with open_regular(self._path) as file, reading(self._path):
            tensor = entry.read(file)
        if self._dtype == "complex128" and tensor.shape[-1:] == (2,) and tensor.dtype == torch.float64:
            return torch.view_as_complex(tensor)
        return tensor


class _Entry:
    """One tensor of a file."""

    def __init__(self, dtype: torch.dtype, shape: tuple[int, ...], start: int, length: int) -> None:
        self.dtype = dtype
        self.shape = shape
        self._start = start
        self._length = length

    def read(self, file: BinaryIO) -> torch.Tensor:
        data = read_exactly(file, self._start, self._length)
        if not data:
            return torch.zeros(self.shape, dtype=self.dtype)
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)


def _read_header(file: BinaryIO) -> dict[str, _Entry]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(read_exactly(file, 0, 8), "little")
    if length > min(LONGEST_HEADER, size - 8):
        raise Malformed(f"has a header of {length} bytes in a file of {size}")
    table = parse_line(bytes(read_exactly(file, 8, length)))
    table.pop("__metadata__", None)
    entries: dict[str, _Entry] = {}
    end = 0
    for name, entry in table.items():
        if not isinstance(entry, dict) or {*entry} != {"dtype", "shape", "data_offsets"}:
            raise Malformed("has a tensor without dtype, shape and data_offsets")
        shape, offsets, kind = entry["shape"], entry["data_offsets"], entry["dtype"]
        if not isinstance(kind, str) or kind not in DTYPES or not _are_sizes(shape) or not _are_sizes(offsets):
            raise Malformed("has a tensor of an unknown dtype, shape or place")
        num_bytes = prod(shape) * DTYPES[kind].itemsize
        if offsets != [end, end + num_bytes]:
            raise Malformed("has a tensor whose place in the file is not that of its shape")
        entries[name] = _Entry(DTYPES[kind], tuple(shape), 8 + length + end, num_bytes)
        end += num_bytes
    if 8 + length + end != size:
        raise Malformed(f"has {size} bytes, its header describes {8 + length + end}")
    return entries


def _are_sizes(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(size) is int and 0 <= size < 1 << 48 for size in value)
    )
