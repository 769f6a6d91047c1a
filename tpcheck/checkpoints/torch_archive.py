"""Where the records of a torch zip file lie; torch stores them uncompressed, so that they can be read in place."""

from __future__ import annotations

import io
import struct
import zipfile
from dataclasses import dataclass
from typing import IO, cast

from tpcheck.checkpoints.files import OpenFile, shortened
from tpcheck.errors import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"
LARGEST_DIRECTORY = 64 << 20
"""Bytes of the table of contents: half a million tensors."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field

_UTF8 = 1 << 11  # a flag of an entry: its name is not in code page 437


@dataclass(frozen=True, slots=True)
class Record:
    """Position and length of a record's bytes."""

    offset: int
    nbytes: int


class TorchArchive:
    """The records of one file, by their name within the archive's own folder."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._entries = _entries(file)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def record(self, name: str) -> Record:
        """Return where a record lies.

        Raises:
            CheckpointError: There is none, it is compressed, or it reaches beyond the file.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"record {shortened(name)} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(f"record {shortened(name)} is compressed, which torch never does")
        full_name = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
        header = bytes(self._file.read(entry.header_offset, _LOCAL_HEADER.size + len(full_name)))
        magic, name_length, extra_length = _LOCAL_HEADER.unpack_from(header)
        offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        right = magic == ZIP_MAGIC and header[_LOCAL_HEADER.size :] == full_name and name_length == len(full_name)
        if not right or offset + entry.file_size > self._file.size:
            raise CheckpointError(f"record {shortened(name)} does not lie where the table of contents says")
        return Record(offset, entry.file_size)

    def text(self, name: str) -> str | None:
        """Return a short record, such as the byte order; None where it is not there."""
        if name not in self:
            return None
        record = self.record(name)
        if record.nbytes > 100:
            raise CheckpointError(f"record {shortened(name)} is too long")
        return self._file.read(record.offset, record.nbytes).decode("ascii", "replace").strip()


def _entries(file: OpenFile) -> dict[str, zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(cast(IO[bytes], _Seekable(file))) as archive:
            infos = archive.infolist()
    except CheckpointError:
        raise
    except Exception as error:  # zipfile lets many kinds through for damaged files
        raise CheckpointError(f"its zip table of contents is damaged or missing ({shortened(str(error))})") from error
    if len({info.orig_filename.partition("/")[0] for info in infos}) > 1:
        raise CheckpointError("it holds several archives")
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.orig_filename.partition("/")[2]
        if name in entries:
            raise CheckpointError(f"record {shortened(name)} is there twice")
        entries[name] = info
    return entries


class _Seekable(io.RawIOBase):
    """The file as zipfile wants it; what asks for more than a table of contents is a lie about its length."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        if base + offset < 0:
            raise OSError("a position before the start of the file")
        self._position = base + offset
        return self._position

    def read(self, nbytes: int = -1) -> bytes:
        left = max(self._file.size - self._position, 0)
        nbytes = left if nbytes is None or nbytes < 0 else min(nbytes, left)
        if nbytes > LARGEST_DIRECTORY:
            raise CheckpointError("its zip table of contents is longer than 64 MB")
        data = bytes(self._file.read(self._position, nbytes))
        self._position += nbytes
        return data
