"""Open the files of a checkpoint, its JSON and its index; they may be damaged, hostile, or change meanwhile."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeGuard, TypeVar

import torch

from tpcheck.core.errors import CheckpointError

MAX_DESCRIPTORS = 256
"""Files that one checkpoint keeps open: a quarter of the usual limit; further files are opened for each read."""


MAX_JSON_NBYTES = 32 << 20
"""The table of 250,000 tensors; the objects that Python makes of it stay below 1 GB whatever it holds."""

T_co = TypeVar("T_co", covariant=True)


def inside(folder: Path, name: object) -> Path:
    """Return the path of a file that a checkpoint's metadata names.

    A path out of the folder is refused. The file itself may be a symlink out of it, as in the cache of the hub.

    Raises:
        CheckpointError: The name is not that of a file below the folder.
    """
    if not isinstance(name, str) or len(name) > 1000 or not PurePosixPath(name).parts or {*name} & {"\0", "\\"}:
        raise CheckpointError(f"{folder} names a file {shortened(name)}, which is not a file name.")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise CheckpointError(f"{folder} names a file {shortened(name)}, which is outside of it.")
    path = folder / parts
    try:
        within = path.parent.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a cycle of links, before Python 3.13
        raise CheckpointError(f"{folder} names a file {shortened(name)}, which cannot be resolved: {error}.") from error
    if not within:
        raise CheckpointError(f"{folder} names a file {shortened(name)}, whose folder is a link out of it.")
    return path


def shortened(value: object, limit: int = 120) -> str:
    """Return the value as text for a message, cut where a hostile file makes it long."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"of type {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def is_sizes(value: Any) -> TypeGuard[Sequence[int]]:
    """Return whether the value is a shape, or another short sequence of sizes."""
    return isinstance(value, (list, tuple)) and len(value) <= 64 and all(map(is_size, value))


class OpenFile:
    """One regular file, as it was when it was opened."""

    __slots__ = ("_descriptor", "_identity", "path", "size")

    def __init__(self, path: Path, *, keep: bool) -> None:
        self.path = path
        descriptor = _open_regular(path)
        status = os.fstat(descriptor)
        self.size = status.st_size
        self._identity = _identity(status)
        self._descriptor = descriptor if keep else None
        if not keep:
            os.close(descriptor)

    def read(self, offset: int, nbytes: int) -> bytearray:
        """Return exactly these bytes."""
        self._require_range(offset, nbytes)
        buffer = bytearray(nbytes)
        target, done = memoryview(buffer), 0
        with self._reading() as descriptor:
            while done < nbytes:
                try:
                    count = os.preadv(descriptor, [target[done:]], offset + done)
                except OSError as error:
                    raise CheckpointError(f"{self.path} cannot be read: {_reason(error)}.") from error
                if not count:
                    raise CheckpointError(f"{self.path} was truncated while it was read.")
                done += count
        return buffer

    def read_tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a contiguous tensor of the bytes from this position on."""
        data = self.read(offset, prod(shape) * dtype.itemsize)
        return torch.frombuffer(data, dtype=dtype).reshape(shape) if data else torch.empty(shape, dtype=dtype)

    def require_unchanged(self) -> None:
        try:
            now = _identity(self.path.stat())
        except OSError as error:
            raise CheckpointError(f"{self.path} was removed while it was read: {_reason(error)}.") from error
        if now != self._identity:
            raise CheckpointError(f"{self.path} was changed while it was read.")

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _require_range(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise CheckpointError(
                f"{self.path} has {self.size} bytes, so {shortened(nbytes)} from {shortened(offset)} cannot be read."
            )

    @contextmanager
    def _reading(self) -> Iterator[int]:
        if self._descriptor is not None:
            yield self._descriptor
            return
        descriptor = _open_regular(self.path)
        try:
            if _identity(os.fstat(descriptor)) != self._identity:
                raise CheckpointError(f"{self.path} was changed while it was read.")
            yield descriptor
        finally:
            os.close(descriptor)


class Files:
    """The files of one checkpoint; several threads may use it until it is closed.

    As a context manager it closes the files on an error alone: a checkpoint that is opened keeps them.
    """

    def __init__(self) -> None:
        self._open: dict[Path, OpenFile] = {}
        self._lock = threading.Lock()
        self._scratch: list[TemporaryDirectory[str]] = []

    def __enter__(self) -> Files:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:
            self.close()

    def open(self, path: Path) -> OpenFile:
        """Return the file, opened once.

        Raises:
            CheckpointError: It is empty, or not a regular file that can be read.
        """
        with self._lock:
            if path not in self._open:
                self._open[path] = OpenFile(path, keep=len(self._open) < MAX_DESCRIPTORS)
            return self._open[path]

    def scratch(self) -> Path:
        """Return a new private folder, which `close` removes."""
        folder = TemporaryDirectory(prefix="tpcheck-checkpoint-")
        with self._lock:
            self._scratch.append(folder)
        return Path(folder.name)

    def require_unchanged(self) -> None:
        """Raise `CheckpointError` if a file has changed since it was opened."""
        for file in tuple(self._open.values()):
            file.require_unchanged()

    def close(self) -> None:
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()
            for folder in self._scratch:
                folder.cleanup()
            self._scratch.clear()


def _open_regular(path: Path) -> int:
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO without a writer would block
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be opened: {_reason(error)}.") from error
    status = os.fstat(descriptor)
    problem = None
    if stat.S_ISDIR(status.st_mode):
        problem = "a folder, where a file should be"
    elif not stat.S_ISREG(status.st_mode):
        problem = "not a regular file"
    elif not status.st_size:
        problem = "empty"
    if problem is not None:
        os.close(descriptor)
        raise CheckpointError(f"{path} is {problem}.")
    return descriptor


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return reason[:1].lower() + reason[1:]


def is_folder(source: Any) -> bool:
    """Return whether this is the path of a folder; False for a live object, or where the path cannot be read."""
    try:
        return isinstance(source, Path) and source.is_dir()
    except OSError:
        return False


def is_present(path: Path) -> bool:
    """Return whether there is anything of that name; a link that leads nowhere counts, and opening it reports that."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; an empty list where it cannot be listed."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []


def read_json(path: Path, files: Files, *, strict: bool = True) -> dict[str, Any]:
    """Return the object in a JSON file; see `parse_json`.

    Raises:
        CheckpointError: The file holds anything else.
    """
    file = files.open(path)
    if file.size > MAX_JSON_NBYTES:
        raise CheckpointError(f"{path} has {file.size} bytes, which is more than a JSON file of a checkpoint needs.")
    return parse_json(file.read(0, file.size), str(path), strict=strict)


def read_config(folder: Path, files: Files, name: str = "config.json") -> dict[str, Any]:
    """Return the model's configuration, which may hold infinities as Mamba's does; empty where there is none."""
    return read_json(folder / name, files, strict=False) if is_present(folder / name) else {}


def parse_json(data: bytes | bytearray, where: str, *, strict: bool) -> dict[str, Any]:
    """Return the JSON object; if strict, refuse repeated keys, infinities and NaN.

    Args:
        where: What holds the data, for error messages.
    """
    try:
        hooks: dict[str, Any] = {"object_pairs_hook": _unique, "parse_constant": _refuse} if strict else {}
        value = json.loads(data.decode("utf-8"), **hooks)
    except RecursionError:
        raise CheckpointError(f"{where} is nested too deeply to be JSON of a checkpoint.") from None
    except (ValueError, MemoryError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {shortened(str(error))}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} does not hold a JSON object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for key, value in pairs:
        if key in entries:
            raise ValueError(f"the key {shortened(key)} is duplicated")
        for text in (key, value):
            if isinstance(text, str) and not text.isascii():
                text.encode()  # raises a ValueError for a lone surrogate, which is not text
        entries[key] = value
    return entries


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number of JSON")


def read_index(path: Path, files: Files) -> dict[str, Path]:
    """Return the file of each tensor.

    Raises:
        CheckpointError: The index is damaged, or names what is not a file in its folder.
    """
    weight_map = read_json(path, files).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} names no tensors: it has no weight_map.")
    paths: dict[str, Path] = {}
    for name in weight_map.values():
        if not isinstance(name, str):
            raise CheckpointError(f"{path} names a file {shortened(name)}, which is not a file name.")
        if name not in paths:
            paths[name] = inside(path.parent, name)
            if not is_present(paths[name]):
                raise CheckpointError(f"{path} names {shortened(name)}, which is missing.")
    return {tensor: paths[name] for tensor, name in weight_map.items()}


class FileContents(Protocol[T_co]):
    """The tensors of one file, and the reason for each that cannot be read."""

    @property
    def tensors(self) -> Mapping[str, T_co]: ...

    @property
    def unread(self) -> Mapping[str, str]: ...


def merge_files(
    index: Path, files_of: Mapping[str, Path], read: Callable[[Path], FileContents[T_co]]
) -> tuple[Mapping[str, T_co], Mapping[str, str]]:
    """Return the tensors of all files, and the reason for each that cannot be read or that the index does not list.

    Args:
        index: The index, for error messages.
        files_of: The file of each tensor, by the index.
        read: Returns the contents of one file.

    Raises:
        CheckpointError: A file does not hold what the index says, or two files hold the same tensor.
    """
    tensors: dict[str, T_co] = {}
    unread: dict[str, str] = {}
    path_of: dict[str, Path] = {}
    for path in dict.fromkeys(files_of.values()):
        contents = read(path)
        for name in (*contents.tensors, *contents.unread):
            if name in path_of:
                raise CheckpointError(
                    f"Tensor {shortened(name)} is both in {path_of[name].name} and in {path.name}: "
                    "the files hold shards of one model, or two versions of it."
                )
            path_of[name] = path
        tensors |= contents.tensors
        unread |= contents.unread
    for name, path in files_of.items():
        if path_of.get(name) != path:
            raise CheckpointError(f"{index} says that tensor {shortened(name)} is in {path.name}, which lacks it.")
    for name in path_of.keys() - files_of.keys():
        tensors.pop(name, None)
        unread[name] = f"{index.name} does not list it, though one of its files holds it"
    return tensors, unread
