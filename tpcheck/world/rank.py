"""`Rank`: what a function that runs on a rank gets as its first argument, and its debugger."""

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
class DebuggerOptions:
    """How a world accompanies a debugger prompt.

    Attributes:
        on_prompt: Called with True when a prompt opens, and with False when it closes.
        lock_file: Locked while a prompt is open: the ranks of a world take turns at the terminal.
    """

    on_prompt: Callable[[bool], None] = lambda active: None
    lock_file: str | None = None


def set_trace(rank: int, options: DebuggerOptions) -> None:
    """Open a prompt in the caller's caller.

    Raises:
        UsageError: There is no terminal.
    """
    try:
        terminal = open(_TERMINAL, "r+b", buffering=0)  # noqa: PTH123, SIM115 - stays open while the debugger steps
    except OSError as error:
        raise UsageError(
            "breakpoint", f"rank {rank}", f"an interactive terminal for the debugger; {_TERMINAL}: {error.strerror}"
        ) from None
    import io

    text = io.TextIOWrapper(terminal, write_through=True)
    _RankPdb(rank, options, text).set_trace(sys._getframe(2))


class _RankPdb(pdb.Pdb):
    def __init__(self, rank: int, options: DebuggerOptions, terminal: TextIO) -> None:
        super().__init__(stdin=terminal, stdout=terminal, nosigint=True)
        self.use_rawinput = False
        self.prompt = f"(rank {rank}) "
        self._terminal = terminal
        self._options = options

    def interaction(self, frame: FrameType | None, traceback: TracebackType | Any | None) -> None:
        with _exclusive(self._options), _foreground(self._terminal.fileno()):
            super().interaction(frame, traceback)


@contextmanager
def _exclusive(options: DebuggerOptions) -> Iterator[None]:
    """Announce the prompt, and wait until no other rank of the world has one."""
    options.on_prompt(True)
    try:
        if options.lock_file is None:
            yield
            return
        import fcntl

        descriptor = os.open(options.lock_file, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)
    finally:
        options.on_prompt(False)


@contextmanager
def _foreground(terminal: int) -> Iterator[None]:
    """Make this process group the foreground group of the terminal, which alone may read from it."""
    before = os.tcgetpgrp(terminal)
    _set_foreground_group(terminal, os.getpgrp())
    try:
        yield
    finally:
        _set_foreground_group(terminal, before)


def _set_foreground_group(terminal: int, process_group: int) -> None:
    # A background group that calls tcsetpgrp is stopped by SIGTTOU unless it blocks the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        os.tcsetpgrp(terminal, process_group)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTTOU})


class Rank:
    """This process's place in the world, and how it communicates with the other ranks.

    Attributes:
        rank: Global rank.
        topology: Sizes of the parallel axes.
    """

    def __init__(self, rank: int, topology: Topology, *, device: str, debugger: DebuggerOptions | None = None) -> None:
        self.rank = rank
        self.topology = topology
        self._device = device
        self._debugger = debugger or DebuggerOptions()
        # torch owns the groups. A reference here would keep gloo's threads past `destroy_process_group`, and a process
        # that exits while they run sometimes aborts ("terminate called without an active exception").
        self._groups: WeakValueDictionary[str, ProcessGroup] = WeakValueDictionary()

    @property
    def world_size(self) -> int:
        """Number of ranks, over all axes."""
        return self.topology.world_size

    @property
    def coordinate(self) -> dict[str, int]:
        """Position on each axis, outermost first."""
        return self.topology.coordinate(self.rank)

    @property
    def tp_rank(self) -> int:
        """Place in the TP group, from 0."""
        return self.coordinate["tp"]

    @property
    def dp_rank(self) -> int:
        """Place in the DP group, from 0."""
        return self.coordinate["dp"]

    @property
    def device(self) -> torch.device:
        """Where this rank computes; loads torch."""
        import torch

        return torch.device(self._device)

    def group(self, axis: str) -> ProcessGroup:
        """Return the process group of this rank's peers on `axis`. The first call is collective over the peers.

        Raises:
            UsageError: The topology has no such axis.
        """
        group = self._groups.get(axis)
        if group is None:
            group = self._groups[axis] = axis_group(self.topology, self.rank, axis)
        return group

    def gather(self, value: Any) -> tuple[Any, ...]:
        """Return every rank's value, by rank, on every rank. Collective over the world."""
        if self.world_size == 1:
            return (value,)
        from torch import distributed as dist

        pickled: list[Any] = [None] * self.world_size
        dist.all_gather_object(pickled, dumps(value))  # cloudpickle takes more than the pickle of torch
        return tuple(map(loads, pickled))

    def agree(self, finding: Any) -> Any:
        """Return the finding of the lowest rank that has one, on every rank. Collective over the world.

        Call this before raising: every rank then raises the same error, and none is left waiting in a collective.
        """
        return next((found for found in self.gather(finding) if found is not None), None)

    def breakpoint(self) -> None:
        """Stop here with pdb on the terminal; the deadline of the world is suspended meanwhile.

        Raises:
            UsageError: There is no terminal.
        """
        set_trace(self.rank, self._debugger)

    def __repr__(self) -> str:
        where = ", ".join(f"{axis}={index}" for axis, index in self.coordinate.items())
        return f"<Rank {self.rank} of {self.world_size}: {where}>"
