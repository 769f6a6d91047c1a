"""What a rank leaves behind for the controller to read: its output, and its Python stacks when it does not answer."""

from __future__ import annotations

import faulthandler
import math
import os
import re
import signal
import sys
import tempfile
from dataclasses import dataclass
from itertools import takewhile
from typing import IO

_LONGEST = 1 << 20  # of a rank that never stops printing, the last part is enough
_ANNOUNCEMENT = re.compile(r"\[\.\.\. [\d.]+ MB before this\]")


class Output:
    """Three nameless files: stdout, stderr, and the stacks that faulthandler writes.

    Files, not pipes: a rank that prints much never waits for a reader, and what was written survives its writer.
    """

    def __init__(self, *, capture: bool) -> None:
        self._files: tuple[IO[bytes], ...] = tuple(
            tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
            for _ in range(3 if capture else 1)
        )
        self._capture = capture

    @property
    def descriptors(self) -> list[int]:
        """Return what a rank takes as stdout, stderr and stack file."""
        stacks, *captured = [file.fileno() for file in self._files]
        return [*(captured or _own_descriptors()), stacks]

    def restart(self) -> None:
        """Forget what was written: the next run begins."""
        for file in self._files:
            # The rank's descriptor is a copy of this one and shares its position.
            os.ftruncate(file.fileno(), 0)
            os.lseek(file.fileno(), 0, os.SEEK_SET)

    @property
    def stdout(self) -> str:
        return _tail(self._files[1]) if self._capture else ""

    @property
    def stderr(self) -> str:
        return _tail(self._files[2]) if self._capture else ""

    @property
    def stacks(self) -> str:
        return _tail(self._files[0])

    @property
    def stacks_size(self) -> int:
        return os.fstat(self._files[0].fileno()).st_size

    def close(self) -> None:
        for file in self._files:
            file.close()


def is_announcement(line: str) -> bool:
    """Tell whether this line says that what came before it was not kept."""
    return _ANNOUNCEMENT.fullmatch(line) is not None


def _own_descriptors() -> list[int]:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # else the ranks' lines overtake those written before
    return [1, 2]


def _tail(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    if not size:
        return ""
    before = max(0, size - _LONGEST)
    text = os.pread(file.fileno(), _LONGEST, before).decode(errors="replace")
    return f"[... {math.ceil(before / 1e5) / 10} MB before this]\n{text}" if before else text


# One that code under test is unlikely to use. faulthandler answers it even while the rank is blocked in C++.
STACK_SIGNAL: int = getattr(signal, "SIGRTMAX", signal.SIGUSR2)

_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x")
_CALLERS = ("/tpcheck/world/rank_main.py", "/tpcheck/pytest_plugin/body.py")
_COMMUNICATION = ("/torch/distributed/", "/deepspeed/comm/", "/torch/autograd/function.py")


@dataclass(frozen=True, slots=True)
class Frame:
    file: str
    line: str
    function: str

    @property
    def is_communication(self) -> bool:
        return any(part in self.file for part in _COMMUNICATION)

    def __str__(self) -> str:
        return f'  File "{self.file}", line {self.line}, in {self.function}'


def dump_on_signal(descriptor: int) -> None:
    """Make this process write every thread's stack to `descriptor` when asked, and when it crashes."""
    faulthandler.enable(file=descriptor, all_threads=True)
    faulthandler.register(STACK_SIGNAL, file=descriptor, all_threads=True, chain=False)


def main_stack(dump: str) -> tuple[Frame, ...]:
    """Return the frames of the thread that runs the user's function, innermost first, without those that called it."""
    threads = _threads(dump)
    if not threads:
        return ()
    main = next((frames for frames in threads if any(map(_is_caller, frames))), threads[0])
    return tuple(takewhile(lambda frame: not _is_caller(frame), main))


def as_traceback(frames: tuple[Frame, ...]) -> str:
    """Return the frames in the order of a traceback: most recent call last."""
    return "\n".join(["Stack (most recent call last):", *map(str, reversed(frames))])


def collective(frames: tuple[Frame, ...]) -> str | None:
    """Return the torch.distributed call that the innermost frames belong to, by the name its caller used."""
    name = None
    for frame in frames:
        if not frame.is_communication:
            break
        if frame.function != "wrapper":  # torch logs every collective through one of these
            name = frame.function
    return name


def _is_caller(frame: Frame) -> bool:
    return frame.file.endswith(_CALLERS)


def _threads(dump: str) -> list[list[Frame]]:
    threads: list[list[Frame]] = []
    for line in dump.splitlines():
        if _THREAD.match(line):
            threads.append([])
        elif threads and (match := _FRAME.match(line)):
            threads[-1].append(Frame(match["file"], match["line"], match["function"]))
    return [frames for frames in threads if frames]
