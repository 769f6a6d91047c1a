"""How the workers of a data loader tell in which state their random generators are.

Every worker writes one short line a batch into one pipe that never blocks: a line that nobody reads is lost, and the
worker goes on. Lines are shorter than PIPE_BUF, so those of several workers do not mix.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import get_spawning_popen
from typing import Any

from torch.utils.data import get_worker_info

from tpcheck.collect.rng import rng_digests

_PIPE_BUF = 4096  # POSIX allows 512; Linux writes up to 4096 bytes at once
_KEPT = 64  # reports of one worker; a batch is asked about as soon as it arrives, workers run ahead by prefetch_factor

Digests = dict[str, str]


class WorkerReports:
    """The reading end, in the process that has the loader.

    Attributes:
        sender: The writing end.
    """

    def __init__(self) -> None:
        self._receiver, self.sender = multiprocessing.Pipe(duplex=False)
        os.set_blocking(self._receiver.fileno(), False)
        os.set_blocking(self.sender.fileno(), False)
        self._rest = b""
        self._first: dict[int, int] = {}
        self._pids: dict[int, int] = {}
        self._seeds: dict[int, int] = {}
        self._states: dict[int, dict[int, Digests]] = {}  # worker, number of batches made by then

    def new_epoch(self) -> None:
        """Workers that persist have done all their earlier work by now: what they make next is their number 0."""
        self._read()
        self._first = {worker: max(states) for worker, states in self._states.items()}

    def around(self, worker: int, number: int) -> tuple[Digests, Digests, int] | None:
        """Return the worker's states before and after its batch of this number, and the seed it was given."""
        self._read()
        number += self._first.get(worker, 0)
        states = self._states.get(worker, {})
        if number not in states or number + 1 not in states:
            return None
        return states[number], states[number + 1], self._seeds[worker]

    def _read(self) -> None:
        with suppress(BlockingIOError):
            while chunk := os.read(self._receiver.fileno(), 1 << 16):
                self._rest += chunk
        *lines, self._rest = self._rest.split(b"\n")
        for line in lines:
            self._take(**json.loads(line))

    def _take(self, worker: int, pid: int, seed: int, number: int, states: Digests) -> None:
        if number == 0:  # a worker that has just started
            self._pids[worker], self._seeds[worker], self._states[worker] = pid, seed, {}
        if self._pids.get(worker) == pid:
            self._states[worker][number] = states
            self._states[worker].pop(number - _KEPT, None)


class Reporter:
    """The writing end: in the workers, or in the process itself where there are none."""

    def __init__(self, sender: Connection | None, made_here: Callable[[], None] | None = None) -> None:
        self._sender = sender
        self._made_here = made_here
        self._number = 0

    def started(self) -> None:
        """This worker is seeded and has made no batch yet."""
        self._number = 0
        self._report()

    def made(self) -> None:
        """A batch is whole."""
        if get_worker_info() is not None:
            self._number += 1
            self._report()
        elif self._made_here is not None:
            self._made_here()

    def _report(self) -> None:
        info = get_worker_info()
        if self._sender is None or info is None:
            return
        states = rng_digests(dataset=info.dataset)
        report = {
            "worker": info.id, "pid": os.getpid(), "seed": info.seed, "number": self._number, "states": states
        }  # fmt: skip
        line = json.dumps(report).encode() + b"\n"
        if len(line) <= _PIPE_BUF:
            with suppress(OSError):  # the pipe is full, or nobody reads any more
                os.write(self._sender.fileno(), line)

    def __getstate__(self) -> dict[str, Any]:  # to a worker that is spawned
        return {"_sender": self._sender, "_made_here": None, "_number": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class _Wrapper:
    """A function of the loader's that also reports. Pickled for anything but a new worker, it is the function alone."""

    def __init__(self, reporter: Reporter, inner: Any) -> None:
        self._reporter = reporter
        self.__wrapped__ = inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(vars(self)["__wrapped__"], name)

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            return _itself, (self.__wrapped__,)
        return type(self), (self._reporter, self.__wrapped__)


class WorkerInit(_Wrapper):
    """A `worker_init_fn`."""

    def __call__(self, worker_id: int) -> None:
        if self.__wrapped__ is not None:
            self.__wrapped__(worker_id)
        self._reporter.started()


class Collate(_Wrapper):
    """A `collate_fn`."""

    def __call__(self, samples: Any) -> Any:
        batch = self.__wrapped__(samples)
        self._reporter.made()
        return batch


def _itself(value: Any) -> Any:
    return value
