"""Reads the structure of files that `torch.save` wrote; their tensors stay where they are until they are read.

Nothing is unpickled here: see `inert`. What the user allows to be is rewritten first, in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tpcheck.adapters import ReadOptions
from tpcheck.checkpoints.files import Files, OpenFile, shortened
from tpcheck.checkpoints.inert import storage_dtype
from tpcheck.checkpoints.stored import Storage
from tpcheck.checkpoints.torch_archive import ZIP_MAGIC, Record, TorchArchive
from tpcheck.checkpoints.unpickler import LARGEST_PICKLE, InertUnpickler, Stream
from tpcheck.errors import CheckpointError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER
LEGACY_PROTOCOL = 1001


def load(path: Path, files: Files, options: ReadOptions, *, inert: Collection[str] = ()) -> Any:
    """Return what was saved, with `StoredTensor` for each tensor and `Inert` for each object that is not made.

    Args:
        path: A file of `torch.save`, zip or legacy.
        files: What opens it, and keeps it for reading the tensors.
        options: Whether a file that is refused is unpickled in a process of its own.
        inert: Names of classes, with `*` for any part, that the caller wants as `Inert`, beyond torch's own list.

    Raises:
        CheckpointError: The file is damaged, or names classes that are neither on torch's own list nor in `inert`.
    """
    try:
        return _structure(files.open(path), inert)
    except _Refused as refusal:
        if options.allow_pickle:
            return _structure(files.open(_unpickled_elsewhere(path, files)), inert)
        raise CheckpointError(
            f"{path} is refused, because reading it means running {refusal}: "
            "where you trust the file, --allow-pickle does so in a process of its own."
        ) from None


class _Refused(Exception):
    """The pickle names classes that are not made, or does what no pickle of torch does."""


def _structure(file: OpenFile, inert: Collection[str]) -> Any:
    try:
        magic = bytes(file.read(0, min(file.size, 4)))
        return _zip_structure(file, inert) if magic == ZIP_MAGIC else _legacy_structure(file, inert)
    except CheckpointError as error:
        message = str(error).removesuffix(".")
        raise CheckpointError(f"{message}." if str(file.path) in message else f"{file.path}: {message}.") from error


def _zip_structure(file: OpenFile, inert: Collection[str]) -> Any:
    archive = TorchArchive(file)
    if "constants.pkl" in archive:
        raise _Refused("TorchScript code")
    if "data.pkl" not in archive:
        raise CheckpointError("it is a zip file, but not one of torch.save")
    if archive.text("byteorder") not in (None, "little"):
        raise CheckpointError("it was written on a machine of another byte order")
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
    if record.nbytes > LARGEST_PICKLE:
        raise CheckpointError(f"its pickle has {record.nbytes} bytes, which is more than a table of tensors needs")
    return _unpickled(Stream(file, record.offset, record.offset + record.nbytes), inert, storage)


def _legacy_structure(file: OpenFile, inert: Collection[str]) -> Any:
    storages: dict[str, Storage] = {}

    def storage(pid: Any) -> Storage:
        kind, key, _, numel, view = _storage_id(pid, fields=5)
        dtype = storage_dtype(kind)
        if view is not None:
            raise CheckpointError("it was written by a torch that is too old to be read")
        return storages.setdefault(key, Storage(file.path, dtype, numel * dtype.itemsize))

    stream = Stream(file, 0, file.size)
    if _unpickled(stream, inert, storage, first=True) != LEGACY_MAGIC:
        raise CheckpointError("it is a pickle, but not one of torch.save")
    if _unpickled(stream, inert, storage) != LEGACY_PROTOCOL:
        raise CheckpointError("it was written by a torch that is too old to be read")
    _unpickled(stream, inert, storage)  # the machine it was written on
    structure = _unpickled(stream, inert, storage)
    keys = _unpickled(stream, inert, storage)
    if not isinstance(keys, list) or {*keys} != {*storages} or len(keys) != len(storages):
        raise CheckpointError("its list of storages is not that of its tensors")
    position = stream.position
    for key in keys:  # each: number of elements, then their bytes
        of_key = storages[key]
        if int.from_bytes(file.read(position, 8), "little") * of_key.dtype.itemsize != of_key.nbytes:
            raise CheckpointError(f"storage {shortened(key)} is not as long as its tensors say")
        of_key.offset = position + 8
        position += 8 + of_key.nbytes
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


def _unpickled(stream: Stream, inert: Collection[str], storage: Any, *, first: bool = False) -> Any:
    unpickler = InertUnpickler(stream, inert=inert, persistent_load=storage)
    try:
        structure = unpickler.load()
    except Exception as error:  # a damaged pickle raises anything
        if unpickler.refused:
            raise _Refused(_listed(unpickler.refused)) from error
        if isinstance(error, CheckpointError):
            raise
        if first:
            raise CheckpointError("it is neither a zip file nor a pickle of torch.save") from error
        raise CheckpointError(f"its pickle is damaged ({type(error).__name__})") from error
    if unpickler.refused:
        raise _Refused(_listed(unpickler.refused))
    return structure


def _listed(names: Collection[str], limit: int = 8) -> str:
    printable = [name if name.isprintable() and len(name) < 120 else shortened(name) for name in names]
    return ", ".join(printable[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _unpickled_elsewhere(path: Path, files: Files) -> Path:
    rewritten = files.scratch() / "rewritten.pt"
    command = [sys.executable, "-I", "-m", "tpcheck.checkpoints.rewrite_pickle", str(path), str(rewritten)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode or not rewritten.exists():
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CheckpointError(f"{path} could not be unpickled: {shortened(lines[-1], 300)}.")
    return rewritten
