"""Python stacks of ranks that do not answer: written by faulthandler on a signal, read by the controller."""

from __future__ import annotations

import faulthandler
import re
import signal
from dataclasses import dataclass
from itertools import takewhile

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
