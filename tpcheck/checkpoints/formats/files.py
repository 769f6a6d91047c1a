"""What a path that may be a checkpoint looks like from outside."""

from __future__ import annotations

import ctypes
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tpcheck.core.errors import CheckpointError

KEPT_OPEN = 256
"""Descriptors that one checkpoint keeps: a quarter of the usual limit; further files are opened for each read."""


def inside(folder: Path, name: object) -> Path:
    """Return the path of a file that a checkpoint's own metadata names.

    What leads out of the folder is refused, but a file may itself be a symlink out of it, as in the hub's cache.

    Raises:
        CheckpointError: The name is not one of a file below the folder.
    """
    if not isinstance(name, str) or len(name) > 1000 or not PurePosixPath(name).parts or {*name} & {"\0", "\\"}:
        raise CheckpointError(f"{folder} names a file {shortened(name)}, which is no file's name.")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise CheckpointError(f"{folder} names a file {shortened(name)}, which lies outside of it.")
    path = folder / parts
    try:
        within = path.parent.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a cycle of links, before Python 3.13
        raise CheckpointError(f"{folder} names a file {shortened(name)}, which leads nowhere: {error}.") from error
    if not within:
        raise CheckpointError(f"{folder} names a file {shortened(name)}, whose folder is a link out of it.")
    return path


def shortened(value: object, limit: int = 120) -> str:
    """Return the value as text for a message, cut where a hostile file made it long."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"of type {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


class OpenFile:
    """One regular file, as it was when it was opened."""

    __slots__ = ("_descriptor", "_state", "path", "size")

    def __init__(self, path: Path, *, keep: bool) -> None:
        self.path = path
        descriptor = _opened(path)
        status = os.fstat(descriptor)
        self.size = status.st_size
        self._state = _state(status)
        self._descriptor = descriptor if keep else None
        if not keep:
            os.close(descriptor)

    def read(self, offset: int, nbytes: int) -> bytearray:
        """Return exactly these bytes."""
        self._require_range(offset, nbytes)
        buffer = bytearray(nbytes)
        self._fill(memoryview(buffer), offset)
        return buffer

    def read_into(self, offset: int, target: torch.Tensor) -> None:
        """Fill a contiguous CPU tensor with the bytes from this position on."""
        nbytes = target.numel() * target.element_size()
        self._require_range(offset, nbytes)
        if nbytes:
            memory = (ctypes.c_char * nbytes).from_address(target.data_ptr())
            self._fill(memoryview(memory).cast("B"), offset)

    def require_unchanged(self) -> None:
        try:
            now = _state(self.path.stat())
        except OSError as error:
            raise CheckpointError(f"{self.path} was removed while it was read: {_reason(error)}.") from error
        if now != self._state:
            raise CheckpointError(f"{self.path} was changed while it was read.")

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _require_range(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise CheckpointError(
                f"{self.path} has {self.size} bytes, and {shortened(nbytes)} from {shortened(offset)} are asked for."
            )

    def _fill(self, target: memoryview, offset: int) -> None:
        done = 0
        with self._reading() as descriptor:
            while done < len(target):
                try:
                    count = os.preadv(descriptor, [target[done:]], offset + done)
                except OSError as error:
                    raise CheckpointError(f"{self.path} cannot be read: {_reason(error)}.") from error
                if not count:
                    raise CheckpointError(f"{self.path} was truncated while it was read.")
                done += count

    @contextmanager
    def _reading(self) -> Iterator[int]:
        if self._descriptor is not None:
            yield self._descriptor
            return
        descriptor = _opened(self.path)
        try:
            if _state(os.fstat(descriptor)) != self._state:
                raise CheckpointError(f"{self.path} was changed while it was read.")
            yield descriptor
        finally:
            os.close(descriptor)


class Files:
    """The files of one checkpoint; safe to use from several threads until it is closed."""

    def __init__(self) -> None:
        self._open: dict[Path, OpenFile] = {}
        self._lock = threading.Lock()
        self._scratch: list[TemporaryDirectory[str]] = []

    def open(self, path: Path) -> OpenFile:
        """Return the file, opened the first time that it is asked for.

        Raises:
            CheckpointError: It is not a regular file that can be read, or it is empty.
        """
        with self._lock:
            if path not in self._open:
                self._open[path] = OpenFile(path, keep=len(self._open) < KEPT_OPEN)
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


def _opened(path: Path) -> int:
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )  # a FIFO without a writer hangs otherwise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be opened: {_reason(error)}.") from error
    status = os.fstat(descriptor)
    what = None
    if stat.S_ISDIR(status.st_mode):
        what = "a folder, where a file should be"
    elif not stat.S_ISREG(status.st_mode):
        what = "not a regular file"
    elif not status.st_size:
        what = "empty"
    if what is not None:
        os.close(descriptor)
        raise CheckpointError(f"{path} is {what}.")
    return descriptor


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _reason(error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return reason[:1].lower() + reason[1:]


def as_path(source: Any) -> Path | None:
    """Return the source as a path, if it is one and not a live object."""
    return Path(source) if isinstance(source, (str, os.PathLike)) else None


def is_folder(path: Path) -> bool:
    """Return whether this is a folder; not where that cannot be told."""
    try:
        return path.is_dir()
    except OSError:
        return False


def is_present(path: Path) -> bool:
    """Return whether there is anything of that name: a link that leads nowhere is, and opening it says so."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True


def names_in(folder: Path) -> list[str]:
    """Return the names in a folder, sorted; none where it cannot be listed."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError:
        return []
