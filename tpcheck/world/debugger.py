"""pdb on one rank: takes the terminal, and stops the clock of the world."""

from __future__ import annotations

import os
import pdb
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, TextIO

from tpcheck.errors import UsageError

_TERMINAL = "/dev/tty"


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a world lends to a prompt.

    Attributes:
        announce: Told True when a person takes over and False when they leave.
        lock: A file that is locked while a prompt is open: the ranks of a world take turns at the terminal.
    """

    announce: Callable[[bool], None] = lambda active: None
    lock: str | None = None


def set_trace(rank: int, prompt: Prompt, frame: FrameType | None = None) -> None:
    """Open a prompt in the caller's caller.

    Raises:
        UsageError: There is no terminal.
    """
    try:
        terminal = open(_TERMINAL, "r+b", buffering=0)  # noqa: PTH123, SIM115 - stays open while the debugger steps
    except OSError as error:
        raise UsageError(
            "breakpoint", f"rank {rank}", f"a terminal to talk on; {_TERMINAL}: {error.strerror}"
        ) from None
    import io

    text = io.TextIOWrapper(terminal, write_through=True)
    _RankPdb(rank, prompt, text).set_trace(frame or sys._getframe(2))


class _RankPdb(pdb.Pdb):
    def __init__(self, rank: int, prompt: Prompt, terminal: TextIO) -> None:
        super().__init__(stdin=terminal, stdout=terminal, nosigint=True)
        self.use_rawinput = False
        self.prompt = f"(rank {rank}) "
        self._terminal = terminal
        self._lent = prompt

    def interaction(self, frame: FrameType | None, traceback: TracebackType | Any | None) -> None:
        with _turn(self._lent), _foreground(self._terminal.fileno()):
            super().interaction(frame, traceback)


@contextmanager
def _turn(prompt: Prompt) -> Iterator[None]:
    prompt.announce(True)
    try:
        if prompt.lock is None:
            yield
            return
        import fcntl

        descriptor = os.open(prompt.lock, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
    finally:
        prompt.announce(False)


@contextmanager
def _foreground(terminal: int) -> Iterator[None]:
    """Make this process group the one that may read from the terminal."""
    before = os.tcgetpgrp(terminal)
    _hand_terminal(terminal, os.getpgrp())
    try:
        yield
    finally:
        _hand_terminal(terminal, before)


def _hand_terminal(terminal: int, process_group: int) -> None:
    # A background group that does this is stopped by SIGTTOU unless it blocks it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        os.tcsetpgrp(terminal, process_group)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTTOU})
