"""A sampler that tells which samples it gave out for each batch, and from which generators it drew."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import get_spawning_popen
from types import FrameType
from typing import Any

from torch.utils.data import get_worker_info

from tpcheck.batches.generators import States, moved, rng_digests, rng_states, with_own

_LIBRARIES = ("torch", "torchdata", "accelerate")
_HIGHEST = 16  # frames; from a sampler to the loop there are 5 to 10


@dataclass(frozen=True, slots=True)
class LeftOut:
    """The first batches of an epoch that nobody will see.

    Attributes:
        unmade: So many are skipped before the loader hears of them.
        unseen: So many after these are made and then dropped.
    """

    unmade: int = 0
    unseen: int = 0


def left_out() -> LeftOut | None:
    """Return what those do who ask for the iterator of a sampler, to be called in its `__iter__`.

    accelerate's `skip_first_batches` puts a SkipBatchSampler around a loader's own, or drops batches of the loader.
    None where somebody else deals with what the sampler gives: which batch that becomes cannot be told.
    """
    unmade = unseen = 0
    first = True
    for frame in _above(sys._getframe(2)):
        user = frame.f_locals.get("self")
        name = type(user).__name__
        if name == "DataLoaderDispatcher":  # several of the sampler's batches become one
            return None
        if first and name != "SkipBatchSampler" and not frame.f_globals["__name__"].endswith("dataloader"):
            return None
        first = False
        skipped = getattr(user, "skip_batches", 0)
        if name == "SkipBatchSampler":
            unmade += skipped
        elif isinstance(skipped, int):
            unseen += skipped
    return None if first else LeftOut(unmade, unseen)


def _above(frame: FrameType | None) -> list[FrameType]:
    """Return this frame and those that called it, as far as libraries go that make loaders."""
    frames: list[FrameType] = []
    while frame is not None and len(frames) < _HIGHEST:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _LIBRARIES:
            break
        frames.append(frame)
        frame = frame.f_back
    return frames


_PIPE_BUF = 4096  # POSIX allows 512; Linux writes up to 4096 bytes at once
_KEPT_REPORTS = (
    64  # reports of one worker; a batch is asked about as soon as it arrives, workers run ahead by prefetch_factor
)

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
            self._states[worker].pop(number - _KEPT_REPORTS, None)


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


_KEPT_STATES = 16  # batches given out whose states are kept whole, 10 kB each; of those that run further ahead, digests


@dataclass(slots=True)
class Made:
    """How one batch was made.

    Attributes:
        number: How many batches of this epoch came before.
        indices: Sample indices, where the sampler gives them.
        rng: Digest of each generator's state before the first sample was read, by name; those of the worker that made
            the batch are named `worker3.python` and so on.
        drawn: Returns the names of the generators whose state moved until the batch was whole.
        sampler_rng: States before the sampler drew its order, at the start of the epoch.
        sampler_drew: Generators that moved inside the sampler since then.
        worker_seed: Seed that torch gave to the worker that made the batch.
        whole: Whether the batch was seen to be made, in this process.
        exact: False where the bracket around the batch holds more than the batch: the start of an iterator, say.
    """

    number: int
    indices: tuple[Any, ...] | None = None
    rng: States = field(default_factory=States)
    drawn: Callable[[], tuple[str, ...]] = tuple
    sampler_rng: States = field(default_factory=States)
    sampler_drew: tuple[str, ...] = ()
    worker_seed: int | None = None
    whole: bool = False
    exact: bool = True

    @property
    def drew(self) -> tuple[str, ...]:
        return self.drawn()


class Log:
    """What the sampler gave out, by batch; cleared when an epoch starts."""

    def __init__(self, persistent: WorkerReports | None) -> None:
        self._persistent = persistent  # reports of workers that go on with the next epoch
        self.pending: deque[Made] = deque()
        self.dataset: Any = None
        self.told = True
        self._latest: Made | None = None
        self._given = 0  # in this epoch
        self._left_out = LeftOut()

    def start(self, left_out: LeftOut | None) -> None:
        """An epoch begins; None where it cannot be told which batch the loop will get."""
        self.pending.clear()
        self._latest = None
        self.told = left_out is not None
        self._left_out = left_out or LeftOut()
        self._given = -self._left_out.unmade
        if self._persistent is not None:
            self._persistent.new_epoch()

    def give(self, indices: Any, sampler_rng: States, sampler_drew: tuple[str, ...], now: States) -> None:
        """The sampler has given out the indices of a batch; `now` are the states of this process's generators."""
        listed = tuple(indices) if isinstance(indices, (list, tuple)) else (indices,)
        made = Made(
            self._given,
            indices=None if not listed or listed[0] is None else listed,  # an IterableDataset is asked for None
            rng=self._states(now),
            sampler_rng=sampler_rng,
            sampler_drew=sampler_drew,
        )
        self._given += 1
        self._latest = made
        if self.told and made.number >= self._left_out.unseen:
            self.pending.append(made)

    def finish(self) -> None:
        """The batch given last is whole; called in this process, so by a loader without workers."""
        if self._latest is not None:
            self._latest.whole = True
            self._latest.drawn = partial(moved, self._latest.rng, self._states(rng_states()))

    def _states(self, now: States) -> States:
        states = with_own(now, dataset=self.dataset)
        return states if len(self.pending) < _KEPT_STATES else States(dict(states))


class Listened:
    """A sampler that notes what it gives out, and passes for the one inside."""

    def __init__(self, sampler: Any, log: Log) -> None:
        object.__setattr__(self, "_tpcheck_inner", sampler)
        object.__setattr__(self, "_tpcheck_log", log)

    def __iter__(self) -> Iterator[Any]:
        return _ListenedIterator(self._tpcheck_inner, self._tpcheck_log, left_out())

    def __len__(self) -> int:
        return len(self._tpcheck_inner)

    def __bool__(self) -> bool:  # a sampler may have no length
        return bool(self._tpcheck_inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "_tpcheck_inner"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._tpcheck_inner, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self._tpcheck_inner)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._tpcheck_inner,)


class _ListenedIterator:
    """Calls the sampler exactly when its user does: a sampler may shuffle in `__iter__` or at its first batch."""

    def __init__(self, sampler: Any, log: Log, left_out: LeftOut | None) -> None:
        self._log = log
        self._left_out = left_out
        self._rng = rng_states(sampler=sampler)
        self._sampler = sampler
        self._drew: frozenset[str] = frozenset()
        self._inner = iter(sampler)
        self._started = False
        self._drew = frozenset(moved(self._rng, rng_states(sampler=sampler)))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._started:
            self._log.start(self._left_out)
        before = rng_states(sampler=self._sampler)
        if not self._started and not self._drew:
            self._rng = before
        self._started = True
        indices = next(self._inner)
        now = rng_states()
        self._drew |= frozenset(moved(before, with_own(now, sampler=self._sampler)))
        self._log.give(indices, self._rng, tuple(sorted(self._drew)), now)
        return indices
