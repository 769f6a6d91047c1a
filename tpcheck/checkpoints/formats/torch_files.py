"""Read the structure of a file of `torch.save`; its tensors stay in the file until their elements are read."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from tpcheck.backends.checkpoint_format import ReadOptions
from tpcheck.checkpoints.formats.files import Files, OpenFile, shortened
from tpcheck.checkpoints.formats.storage_view import Storage, StorageView
from tpcheck.checkpoints.formats.unpickler import MAX_PICKLE_NBYTES, PickledObject, SafeUnpickler, Stream, storage_dtype
from tpcheck.core.errors import CheckpointError

ZIP_MAGIC = b"PK\x03\x04"
MAX_DIRECTORY_NBYTES = 64 << 20
"""The zip table of contents of half a million tensors."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., length of the name, length of the extra field

_UTF8 = 1 << 11  # flag of an entry: its name is in UTF-8, not in code page 437


@dataclass(frozen=True, slots=True)
class Record:
    """The position and length of a record."""

    offset: int
    nbytes: int


class TorchArchive:
    """The records of a zip file, by their name within the folder of the archive."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._entries = _entries(file)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def record(self, name: str) -> Record:
        """Return where a record lies.

        Raises:
            CheckpointError: The record is missing, is compressed, or reaches beyond the file.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"record {shortened(name)} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise CheckpointError(f"record {shortened(name)} is compressed, which torch.save never does")
        full_name = entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8 else "cp437")
        header = bytes(self._file.read(entry.header_offset, _LOCAL_HEADER.size + len(full_name)))
        magic, name_length, extra_length = _LOCAL_HEADER.unpack_from(header)
        offset = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        right = magic == ZIP_MAGIC and header[_LOCAL_HEADER.size :] == full_name and name_length == len(full_name)
        if not right or offset + entry.file_size > self._file.size:
            raise CheckpointError(f"record {shortened(name)} does not lie where the table of contents says")
        return Record(offset, entry.file_size)

    def text(self, name: str) -> str | None:
        """Return the text of a short record, such as the byte order, or None where there is none."""
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
    except Exception as error:  # zipfile raises many types for damaged files
        raise CheckpointError(f"its zip table of contents is damaged or missing ({shortened(str(error))})") from error
    if len({info.orig_filename.partition("/")[0] for info in infos}) > 1:
        raise CheckpointError("it holds several archives")
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        name = info.orig_filename.partition("/")[2]
        if name in entries:
            raise CheckpointError(f"record {shortened(name)} is duplicated")
        entries[name] = info
    return entries


class _Seekable(io.RawIOBase):
    """The file as zipfile reads it; refuses to read more than a table of contents, whose length may be a lie."""

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
        if nbytes > MAX_DIRECTORY_NBYTES:
            raise CheckpointError("its zip table of contents is longer than 64 MB")
        data = bytes(self._file.read(self._position, nbytes))
        self._position += nbytes
        return data


LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER
LEGACY_PROTOCOL = 1001


def load(path: Path, files: Files, options: ReadOptions, *, keep: Collection[str] = ()) -> Any:
    """Return what was saved, with a `StorageView` for each tensor and a `PickledObject` for each other object.

    Args:
        path: A file of `torch.save`, zip or legacy.
        files: Opens the file, and keeps it open for reading the tensors.
        options: Whether to unpickle a file that is refused, in a separate process.
        keep: Names of further classes to return as `PickledObject`, with `*` for any part.

    Raises:
        CheckpointError: The file is damaged, or names classes that neither `weights_only` allows nor `keep` names.
    """
    try:
        return read_structure(files.open(path), keep)
    except RefusedError as refusal:
        if options.allow_pickle:
            return read_structure(files.open(_rewritten(path, files)), keep)
        raise CheckpointError(
            f"{path} is refused, because reading it would run {refusal}; if you trust the file, --allow-pickle "
            "reads it in a separate process."
        ) from None


class RefusedError(Exception):
    """The pickle needs classes that are not known to be harmless, or TorchScript."""


def read_structure(file: OpenFile, keep: Collection[str] = ()) -> Any:
    """Return what was saved in an open file; see `load`.

    Raises:
        CheckpointError: The file is damaged.
        RefusedError: It names classes that are not known to be harmless.
    """
    try:
        magic = bytes(file.read(0, min(file.size, 4)))
        return _zip_structure(file, keep) if magic == ZIP_MAGIC else _legacy_structure(file, keep)
    except CheckpointError as error:
        message = str(error).removesuffix(".")
        raise CheckpointError(f"{message}." if str(file.path) in message else f"{file.path}: {message}.") from error


def _zip_structure(file: OpenFile, keep: Collection[str]) -> Any:
    archive = TorchArchive(file)
    if "constants.pkl" in archive:
        raise RefusedError("TorchScript code")
    if "data.pkl" not in archive:
        raise CheckpointError("it is a zip file, but not one of torch.save")
    if archive.text("byteorder") not in (None, "little"):
        raise CheckpointError("its byte order is that of another machine")
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        kind, key, _, numel = _storage_id(pid, fields=4)
        dtype = storage_dtype(kind)
        if key not in storages:
            record = archive.record(f"data/{key}") if numel else Record(0, 0)
            if numel * dtype.itemsize != record.nbytes:
                raise CheckpointError(f"storage {shortened(key)} has {record.nbytes} bytes for {numel} of {dtype}")
            storages[key] = Storage(file.path, dtype, record.nbytes, record.offset)
        return storages[key]

    record = archive.record("data.pkl")
    if record.nbytes > MAX_PICKLE_NBYTES:
        raise CheckpointError(f"its pickle has {record.nbytes} bytes, which is more than a state dict needs")
    return _unpickled(Stream(file, record.offset, record.offset + record.nbytes), keep, storage)


def _legacy_structure(file: OpenFile, keep: Collection[str]) -> Any:
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        kind, key, _, numel, view = _storage_id(pid, fields=5)
        dtype = storage_dtype(kind)
        if view is not None:
            raise CheckpointError("it was written by a torch that is too old to be read")
        return storages.setdefault(key, Storage(file.path, dtype, numel * dtype.itemsize))

    stream = Stream(file, 0, file.size)
    if _unpickled(stream, keep, storage, first=True) != LEGACY_MAGIC:
        raise CheckpointError("it is a pickle, but not one of torch.save")
    if _unpickled(stream, keep, storage) != LEGACY_PROTOCOL:
        raise CheckpointError("it was written by a torch that is too old to be read")
    _unpickled(stream, keep, storage)  # properties of the machine that wrote it
    structure = _unpickled(stream, keep, storage)
    keys = _unpickled(stream, keep, storage)
    if not isinstance(keys, list) or {*keys} != {*storages} or len(keys) != len(storages):
        raise CheckpointError("its list of storages does not match its tensors")
    position = stream.position
    for key in keys:  # the number of elements, then their bytes
        saved = storages[key]
        if int.from_bytes(file.read(position, 8), "little") * saved.dtype.itemsize != saved.nbytes:
            raise CheckpointError(f"storage {shortened(key)} is not as long as its tensors say")
        saved.offset = position + 8
        position += 8 + saved.nbytes
    if position > file.size:
        raise CheckpointError("its last storage is truncated")
    return structure


def _storage_id(pid: Any, *, fields: int) -> tuple[Any, ...]:
    if not isinstance(pid, tuple) or len(pid) != fields + 1 or pid[0] != "storage":
        raise CheckpointError("it refers to something that is not a storage")
    key, numel = pid[2], pid[4]
    if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 60:
        raise CheckpointError(f"it has a storage {shortened(key)} of {shortened(numel)} elements")
    return pid[1:]


def _unpickled(stream: Stream, keep: Collection[str], storage: Any, *, first: bool = False) -> Any:
    unpickler = SafeUnpickler(stream, keep=keep, persistent_load=storage)
    try:
        structure = unpickler.load()
    except Exception as error:  # a damaged pickle raises any type
        if unpickler.refused:
            raise RefusedError(_listed(unpickler.refused)) from error
        if isinstance(error, CheckpointError):
            raise
        if first:
            raise CheckpointError("it is neither a zip file nor a pickle of torch.save") from error
        raise CheckpointError(f"its pickle is damaged ({type(error).__name__})") from error
    if unpickler.refused:
        raise RefusedError(_listed(unpickler.refused))
    return structure


def _listed(names: Collection[str], limit: int = 8) -> str:
    printable = [name if name.isprintable() and len(name) < 120 else shortened(name) for name in names]
    return ", ".join(printable[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _rewritten(path: Path, files: Files) -> Path:
    """Unpickle the file in a separate process, which saves it without classes, and return the new file."""
    rewritten = files.scratch() / "rewritten.pt"
    command = [sys.executable, "-I", "-m", "tpcheck.checkpoints.rewrite_pickle", str(path), str(rewritten)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode or not rewritten.exists():
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CheckpointError(f"{path} could not be unpickled: {shortened(lines[-1], 300)}.")
    return rewritten


KEYS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which trainers save the model's state dict, beside that of the optimizer."""


@dataclass(frozen=True, slots=True)
class StateDict:
    """Tensors by name.

    Attributes:
        key: The key in the file that leads to it; None if the file is the state dict.
        tensors: The entries that can be read.
        unread: The reason for each entry that cannot.
    """

    key: str | None
    tensors: Mapping[str, StorageView]
    unread: Mapping[str, str]


def state_dict(structure: Any, where: object) -> StateDict:
    """Return the state dict in a file: all of it, or the entry under one of the usual keys.

    Args:
        where: The file, for error messages.

    Raises:
        CheckpointError: The file holds none, or several.
    """
    if not isinstance(structure, Mapping):
        raise CheckpointError(f"{where} holds no state dict, but {_describe(structure)}.")
    keys = [key for key in KEYS if _holds_tensors(structure.get(key))]
    if len(keys) > 1:
        raise CheckpointError(
            f"{where} holds several state dicts, under {', '.join(map(repr, keys))}; save one of them to its own "
            "file and pass that."
        )
    key = keys[0] if keys else None
    entries = structure if key is None else structure[key]
    if not _holds_tensors(entries):
        raise CheckpointError(f"{where} holds no state dict: {_outline(structure)}.")
    tensors = {_name(name, where): value for name, value in entries.items() if isinstance(value, StorageView)}
    unread = {_name(name, where): f"is {_describe(value)}" for name, value in entries.items() if name not in tensors}
    return StateDict(key, tensors, unread)


def ties(tensors: Mapping[str, StorageView]) -> tuple[frozenset[str], ...]:
    """Return the groups of names that are the same view of the same storage."""
    names: dict[StorageView, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if tensor.nbytes:
            names[tensor].append(name)
    return tuple(frozenset(tied) for tied in names.values() if len(tied) > 1)


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, StorageView) for entry in value.values())


def _name(name: Any, where: object) -> str:
    if not isinstance(name, str):
        raise CheckpointError(f"{where} holds a state dict with a name that is not text: {shortened(name)}.")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{where} holds a tensor with a name that is not text: {shortened(name)}.") from None
    return name


def _describe(value: Any) -> str:
    if isinstance(value, StorageView):
        return "a tensor"
    if isinstance(value, PickledObject):
        return f"created by {value.name}" if "." in value.name else value.name
    return f"a {type(value).__name__}, not a tensor"


def _outline(structure: Mapping[Any, Any]) -> str:
    keys = ", ".join(shortened(key, 40) for key in list(structure)[:5])
    return f"no tensors under its keys {keys}" if keys else "it is empty"
