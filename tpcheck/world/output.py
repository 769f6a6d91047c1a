"""The output of a rank, and its Python stacks when it does not answer, as the controller reads them."""

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

_MAX_BYTES = 1 << 20  # of a rank that prints without end, the last part is enough
_TRUNCATION_NOTICE = re.compile(r"\[\.\.\. [\d.]+ MB before this\]")


class Output:
    """Three temporary files: stdout, stderr, and the stacks that faulthandler writes.

    Files, not pipes: a rank that prints much never waits for a reader, and the output survives the rank.
    """

    def __init__(self, *, capture: bool) -> None:
        self._files: tuple[IO[bytes], ...] = tuple(
            tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
            for _ in range(3 if capture else 1)
        )
        self._capture = capture

    @property
    def descriptors(self) -> list[int]:
        """Return the descriptors that a rank uses as stdout, stderr and stack file."""
        stacks, *captured = [file.fileno() for file in self._files]
        return [*(captured or _controller_descriptors()), stacks]

    def restart(self) -> None:
        """Empty the files: the next run begins."""
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


def is_truncation_notice(line: str) -> bool:
    """Return whether this line says that earlier output was dropped."""
    return _TRUNCATION_NOTICE.fullmatch(line) is not None


def _controller_descriptors() -> list[int]:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # otherwise the lines of ranks overtake earlier ones
    return [1, 2]


def _tail(file: IO[bytes]) -> str:
    size = os.fstat(file.fileno()).st_size
    if not size:
        return ""
    before = max(0, size - _MAX_BYTES)
    text = os.pread(file.fileno(), _MAX_BYTES, before).decode(errors="replace")
    return f"[... {math.ceil(before / 1e5) / 10} MB before this]\n{text}" if before else text


# A signal that code under test is unlikely to use. faulthandler handles it even while the rank is blocked in C++.
STACK_SIGNAL: int = getattr(signal, "SIGRTMAX", signal.SIGUSR2)

_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x")
_SERIALIZING = (
    ("/tpcheck/world/failures.py", "serialized_exception"),
    ("/tpcheck/pytest_plugin/run_on_rank.py", "body_failed"),
)
_LIBRARY_PATHS = (
    "/tpcheck/world/",
    "/tpcheck/pytest_plugin/",
    "/site-packages/",
    "/dist-packages/",
    "/lib/python",
    "<frozen",
    "<string>",
)
_FUNCTIONAL_COLLECTIVES = "/torch/distributed/_functional_collectives.py"
_COMMUNICATION_PATHS = ("/torch/distributed/", "/deepspeed/comm/", "/torch/autograd/function.py")


@dataclass(frozen=True, slots=True)
class Frame:
    file: str
    line: str
    function: str

    @property
    def is_communication(self) -> bool:
        return any(part in self.file for part in _COMMUNICATION_PATHS)

    @property
    def is_operator(self) -> bool:
        return self.file.endswith("/torch/_ops.py")

    def __str__(self) -> str:
        return f'  File "{self.file}", line {self.line}, in {self.function}'


def dump_on_signal(descriptor: int) -> None:
    """Make this process write the stack of every thread to `descriptor` at `STACK_SIGNAL`, and when it crashes."""
    faulthandler.enable(file=descriptor, all_threads=True)
    faulthandler.register(STACK_SIGNAL, file=descriptor, all_threads=True, chain=False)


def main_stack(dump: str) -> tuple[Frame, ...]:
    """Return the frames of the thread that runs the user's function, innermost first, up to that function."""
    threads = _threads(dump)
    if not threads:
        return ()
    main = next((frames for frames in threads if any(map(_is_caller, frames))), threads[0])
    return tuple(takewhile(lambda frame: not _is_caller(frame), main))


def as_traceback(frames: tuple[Frame, ...]) -> str:
    """Return the frames in the order of a traceback: most recent call last."""
    return "\n".join(["Stack (most recent call last):", *map(str, reversed(frames))])


def collective(frames: tuple[Frame, ...]) -> str | None:
    """Return the name of the torch.distributed function that the user's code is in, None where it is in none."""
    if len(frames) > 1 and frames[0].is_operator:  # DTensor waits in an operator
        frames = frames[1:]
    if frames and frames[0].file.endswith(_FUNCTIONAL_COLLECTIVES):
        return frames[0].function
    name = None
    for frame in frames:
        if not frame.is_communication:
            break
        if frame.function != "wrapper":  # torch wraps every collective in a logging function of this name
            name = frame.function
    return name


def user_place(frames: tuple[Frame, ...]) -> str | None:
    """Return the innermost frame outside of libraries, else the innermost frame of all, None if there is none."""
    user_frames = [frame for frame in frames if not any(part in frame.file for part in _LIBRARY_PATHS)]
    return next((f"{frame.file}:{frame.line} in {frame.function}" for frame in (*user_frames, *frames)), None)


def is_serializing(frames: tuple[Frame, ...]) -> bool:
    """Return whether the function has raised, and the rank serializes the exception."""
    return any(
        frame.file.endswith(file) and frame.function == function for frame in frames for file, function in _SERIALIZING
    )


def _is_caller(frame: Frame) -> bool:
    """Return whether this frame calls the user's function."""
    in_rank_main = frame.file.endswith("/tpcheck/world/rank_main.py")
    return in_rank_main or (
        frame.file.endswith("/tpcheck/pytest_plugin/run_on_rank.py") and frame.function == "run_body"
    )


def _threads(dump: str) -> list[list[Frame]]:
    threads: list[list[Frame]] = []
    for line in dump.splitlines():
        if _THREAD.match(line):
            threads.append([])
        elif threads and (match := _FRAME.match(line)):
            threads[-1].append(Frame(match["file"], match["line"], match["function"]))
    return [frames for frames in threads if frames]
