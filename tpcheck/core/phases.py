"""What a long run is doing: whoever waits for it hears so, also from the first rank, which is another process."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import IO

_Listener = Callable[[str], None]
_LISTENER: ContextVar[_Listener | None] = ContextVar("listener", default=None)
_VARIABLE = "TPCHECK_PHASES_FILE"  # to which the first rank of a spawned world appends a line for each phase
_INTERVAL_S = 0.5  # for people who read


@contextmanager
def listening(listener: _Listener) -> Iterator[None]:
    """Call `listener` with each phase that this thread, or the first rank of a world that it spawns, begins inside."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def begin_phase(text: str, rank: int = 0) -> None:
    """Report what this process does next; of the ranks of a world the first one does."""
    if rank:
        return
    listener, place = _LISTENER.get(), os.environ.get(_VARIABLE)
    if listener is not None:
        listener(text)
    elif place is not None:
        path, _, identity = place.rpartition(":")
        with suppress(OSError):  # a full disk, say: nothing depends on it
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
            try:
                if _identity(descriptor) == identity:  # else the file is gone, and its descriptor is another's
                    os.write(descriptor, f"{text}\n".encode(errors="backslashreplace"))
            finally:
                os.close(descriptor)


@contextmanager
def phases_of_ranks() -> Iterator[Mapping[str, str]]:
    """Yield the environment in which ranks report their phases to who listens here; empty where nobody does."""
    listener = _LISTENER.get()
    if listener is None:
        yield {}
        return
    with _open_file() as (file, place):
        has_ended = threading.Event()
        reader = threading.Thread(target=_pass_on, args=(file, listener, has_ended), daemon=True)
        reader.start()
        try:
            yield {_VARIABLE: place}
        finally:
            has_ended.set()
            reader.join()


@contextmanager
def _open_file() -> Iterator[tuple[IO[str], str]]:
    """Yield a temporary file, and the path by which other processes open it with what tells it from others.

    Where there is /proc it has no name elsewhere, so that a process that is killed leaves nothing.
    """
    with ExitStack() as stack:
        file: IO[str] = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        if not _is_at(path, file.fileno()):
            named = stack.enter_context(tempfile.NamedTemporaryFile("w+", encoding="utf-8"))
            file, path = named, named.name
        yield file, f"{path}:{_identity(file.fileno())}"


def _is_at(path: str, descriptor: int) -> bool:
    with suppress(OSError):
        return os.path.samestat(Path(path).stat(), os.fstat(descriptor))
    return False


def _identity(descriptor: int) -> str:
    """Return what tells an open file from every other."""
    status = os.fstat(descriptor)
    return f"{status.st_dev}.{status.st_ino}"


def _pass_on(file: IO[str], listener: _Listener, has_ended: threading.Event) -> None:
    """Call the listener with each whole line that is appended to the file, until the world has ended."""
    rest = ""
    is_last = False
    while not is_last:
        is_last = has_ended.wait(_INTERVAL_S)
        *lines, rest = (rest + file.read()).split("\n")
        for line in lines:
            listener(line)
