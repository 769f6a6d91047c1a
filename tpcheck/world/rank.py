"""One rank, as the function that runs on it sees it, with pdb."""

from __future__ import annotations

import os
import pdb
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, TextIO
from weakref import WeakValueDictionary

from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology
from tpcheck.world.channel import dumps, loads
from tpcheck.world.groups import axis_group

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup


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


class Rank:
    """This process's place in the world, and the ways to talk to the others.

    Attributes:
        rank: Global rank.
        topology: Sizes of the parallel axes.
    """

    def __init__(self, rank: int, topology: Topology, *, device: str, prompt: Prompt | None = None) -> None:
        self.rank = rank
        self.topology = topology
        self._device = device
        self._prompt = prompt or Prompt()
        # torch holds the groups. A reference here would keep gloo's threads past `destroy_process_group`, and a process
        # that exits with them aborts now and then ("terminate called without an active exception").
        self._groups: WeakValueDictionary[str, ProcessGroup] = WeakValueDictionary()

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @property
    def coordinate(self) -> dict[str, int]:
        """Position on each axis, outermost first."""
        return self.topology.coordinate(self.rank)

    @property
    def tp_rank(self) -> int:
        return self.coordinate["tp"]

    @property
    def dp_rank(self) -> int:
        return self.coordinate["dp"]

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device(self._device)

    def group(self, axis: str) -> ProcessGroup:
        """Return the process group of this rank's peers on `axis`; made at first use, which its members make together.

        Raises:
            UsageError: The topology has no such axis.
        """
        group = self._groups.get(axis)
        if group is None:
            group = self._groups[axis] = axis_group(self.topology, self.rank, axis)
        return group

    def gather(self, value: Any) -> tuple[Any, ...]:
        """Return every rank's value, by rank, on every rank. Collective over the world."""
        import torch

        if self.world_size == 1:
            return (value,)
        own = torch.frombuffer(bytearray(dumps(value)), dtype=torch.uint8)
        return tuple(loads(part.numpy().tobytes()) for part in _all_gather_uneven(own, self.world_size))

    def agree(self, finding: Any) -> Any:
        """Return the first finding that is not None, by rank; the same on every rank. Collective over the world.

        Ask this before raising: every rank then raises the same error, and none is left waiting in a collective.
        """
        return next((found for found in self.gather(finding) if found is not None), None)

    def breakpoint(self) -> None:
        """Stop here with pdb on the terminal; the other ranks and the world's deadline wait.

        Raises:
            UsageError: There is no terminal.
        """
        set_trace(self.rank, self._prompt)

    def __repr__(self) -> str:
        where = ", ".join(f"{axis}={index}" for axis, index in self.coordinate.items())
        return f"<Rank {self.rank} of {self.world_size}: {where}>"


def _all_gather_uneven(own: torch.Tensor, world_size: int) -> list[torch.Tensor]:
    """Return every rank's bytes. CPU tensors: the default group carries them on every device."""
    import torch
    from torch import distributed as dist

    sizes = [torch.empty(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor([own.numel()]))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: own.numel()] = own
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(world_size)]
    dist.all_gather(parts, padded)
    return [part[: int(size)] for part, size in zip(parts, sizes, strict=True)]
