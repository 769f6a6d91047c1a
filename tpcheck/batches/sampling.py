"""Hooks in a torch DataLoader: which samples each batch is made of, and which generators moved meanwhile."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import get_spawning_popen
from typing import Any

from torch.utils.data import get_worker_info

from tpcheck.batches.generators import GeneratorStates, changed_generators, rng_states, with_generators_of
from tpcheck.batches.records import LoaderFacts

_PIPE_BUF = 4096  # bytes: POSIX guarantees 512; Linux writes up to 4096 at once
# Reports kept of one worker. A batch is looked up as soon as it arrives; workers run ahead by prefetch_factor.
_MAX_REPORTS = 64
# Batches requested ahead whose states are kept whole, 30 kB each; of those further ahead digests are kept.
_MAX_RAW_STATES = 16

Digests = dict[str, str]


@dataclass(slots=True)
class BatchProvenance:
    """How one batch was made.

    Attributes:
        number: How many batches of this epoch came before.
        indices: Sample indices, where the sampler gives them.
        rng: Digest of each generator's state before the first sample was read, by name; those of the worker that made
            the batch are named `worker3.python` and so on.
        find_drawn: Returns the names of the generators whose state moved until the batch was complete.
        sampler_rng: States before the sampler drew its order, at the start of the epoch.
        sampler_drew: Generators that moved inside the sampler since then.
        worker_seed: Seed that torch gave to the worker that made the batch.
        stream_worker: Of an IterableDataset with several workers: the worker that made the batch, and their number.
        is_requested: Whether the samples of these indices were read or sent to a worker. A batch that was not was
            skipped, as by accelerate's SkipBatchSampler.
        loader_facts: Returns what is known of the loader and of this batch; called when ranks differ.
    """

    number: int = 0
    indices: tuple[Any, ...] | None = None
    rng: GeneratorStates = field(default_factory=GeneratorStates)
    find_drawn: Callable[[], tuple[str, ...]] = tuple
    sampler_rng: GeneratorStates = field(default_factory=GeneratorStates)
    sampler_drew: tuple[str, ...] = ()
    worker_seed: int | None = None
    stream_worker: tuple[int, int] | None = None
    is_requested: bool = False
    loader_facts: Callable[[], LoaderFacts] = LoaderFacts

    @property
    def drew(self) -> tuple[str, ...]:
        return self.find_drawn()


class WorkerReports:
    """Reads, in the process that has the loader, the states that its workers report after each batch.

    Attributes:
        sender: The writing end of the pipe.
    """

    def __init__(self) -> None:
        self._receiver, self.sender = multiprocessing.Pipe(duplex=False)
        os.set_blocking(self._receiver.fileno(), False)
        os.set_blocking(self.sender.fileno(), False)
        self._unparsed = b""
        self._epoch_starts: dict[int, int] = {}  # by worker: batches that it made in earlier epochs
        self._pids: dict[int, int] = {}
        self._seeds: dict[int, int] = {}
        self._states: dict[int, dict[int, Digests]] = {}  # by worker, by number of batches made by then

    def start_epoch(self) -> None:
        """Count from here: persistent workers have finished all their earlier batches."""
        self._read()
        self._epoch_starts = {worker: max(states) for worker, states in self._states.items()}

    def states_around(self, worker: int, number: int) -> tuple[Digests, Digests, int] | None:
        """Return the worker's states before and after its batch of this number, and the worker's seed."""
        self._read()
        number += self._epoch_starts.get(worker, 0)
        states = self._states.get(worker, {})
        if number not in states or number + 1 not in states:
            return None
        return states[number], states[number + 1], self._seeds[worker]

    def _read(self) -> None:
        with suppress(BlockingIOError):
            while chunk := os.read(self._receiver.fileno(), 1 << 16):
                self._unparsed += chunk
        *lines, self._unparsed = self._unparsed.split(b"\n")
        for line in lines:
            self._add(**json.loads(line))

    def _add(self, worker: int, pid: int, seed: int, number: int, states: Digests) -> None:
        if number == 0:  # a worker that has just started
            self._pids[worker], self._seeds[worker], self._states[worker] = pid, seed, {}
        if self._pids.get(worker) == pid:
            self._states[worker][number] = states
            self._states[worker].pop(number - _MAX_REPORTS, None)


class Reporter:
    """Reports each batch: from a worker through the pipe, in the loader's own process by calling `made_here`."""

    def __init__(self, sender: Connection | None, made_here: Callable[[], None] | None = None) -> None:
        self._sender = sender
        self._made_here = made_here
        self._number = 0

    def worker_started(self) -> None:
        """Report the states of a worker that is seeded and has made no batch."""
        self._number = 0
        self._report()

    def batch_made(self) -> None:
        """Report the states after a batch."""
        if get_worker_info() is not None:
            self._number += 1
            self._report()
        elif self._made_here is not None:
            self._made_here()

    def _report(self) -> None:
        info = get_worker_info()
        if self._sender is None or info is None:
            return
        states = dict(rng_states(dataset=info.dataset))
        report = {
            "worker": info.id, "pid": os.getpid(), "seed": info.seed, "number": self._number, "states": states
        }  # fmt: skip
        line = json.dumps(report).encode() + b"\n"
        if len(line) <= _PIPE_BUF:
            with suppress(OSError):  # the pipe is full, or its reader is gone
                os.write(self._sender.fileno(), line)

    def __getstate__(self) -> dict[str, Any]:  # for a spawned worker
        return {"_sender": self._sender, "_made_here": None, "_number": 0}


class _ReportingFunction:
    """A function of the loader that also reports. Pickled for anything but a new worker, it is the plain function."""

    def __init__(self, reporter: Reporter, inner: Any) -> None:
        self._reporter = reporter
        self.__wrapped__ = inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(vars(self)["__wrapped__"], name)

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None:
            return _identity, (self.__wrapped__,)
        return type(self), (self._reporter, self.__wrapped__)


class ReportingWorkerInit(_ReportingFunction):
    """A `worker_init_fn`."""

    def __call__(self, worker_id: int) -> None:
        if self.__wrapped__ is not None:
            self.__wrapped__(worker_id)
        self._reporter.worker_started()


class ReportingCollate(_ReportingFunction):
    """A `collate_fn`."""

    def __call__(self, samples: Any) -> Any:
        batch = self.__wrapped__(samples)
        self._reporter.batch_made()
        return batch


def _identity(value: Any) -> Any:
    return value


class SamplerLog:
    """The batches that the sampler has given indices for; cleared when an epoch starts.

    Args:
        dataset: Where this process reads the samples; None where workers do, which have copies.
        has_workers: Whether indices are sent to workers.
        persistent: Reports of workers that live on in the next epoch.

    Attributes:
        pending: Batches that have not arrived yet, oldest first.
        num_made: How many batches of this epoch have arrived.
    """

    def __init__(self, *, dataset: Any = None, has_workers: bool = False, persistent: WorkerReports | None) -> None:
        self.pending: deque[BatchProvenance] = deque()
        self.num_made = 0
        self._dataset = dataset
        self._has_workers = has_workers
        self._persistent = persistent
        self._latest: BatchProvenance | None = None

    def start_epoch(self) -> None:
        self.pending.clear()
        self.num_made = 0
        self._latest = None
        if self._persistent is not None:
            self._persistent.start_epoch()

    def add(
        self, indices: Any, sampler_rng: GeneratorStates, sampler_drew: tuple[str, ...], now: GeneratorStates
    ) -> Any:
        """Note the indices of a batch, and return them as the loader should get them.

        Args:
            indices: What the sampler gave.
            sampler_rng, sampler_drew: As in `BatchProvenance`.
            now: States of this process's generators.
        """
        listed = tuple(indices) if isinstance(indices, (list, tuple)) else (indices,)
        provenance = BatchProvenance(
            indices=None if not listed or listed[0] is None else listed,  # an IterableDataset gets None
            rng=self._states(now),
            sampler_rng=sampler_rng,
            sampler_drew=sampler_drew,
        )
        self._latest = provenance
        self.pending.append(provenance)
        if self._has_workers and type(indices) is list:
            return _SentIndices(indices, provenance)
        # A sampler without batches: accelerate's SkipBatchSampler cannot wrap it.
        provenance.is_requested = self._has_workers
        return indices

    def batch_made(self) -> None:
        """Note that the latest batch was collated in this process, as by a loader without workers."""
        if self._latest is not None:
            self._latest.is_requested = True
            self._latest.find_drawn = partial(changed_generators, self._latest.rng, self._states(rng_states()))

    def _states(self, now: GeneratorStates) -> GeneratorStates:
        states = with_generators_of(now, dataset=self._dataset)
        return states if len(self.pending) < _MAX_RAW_STATES else GeneratorStates(dict(states))


class _SentIndices(list[Any]):
    """Indices of a batch on their way to a worker, which gets a plain list.

    Pickling them is how they are sent: a batch whose indices are not pickled is never made. A sampler around the
    loader's own (accelerate's SkipBatchSampler, or a user's) drops batches so, and nothing else shows it.
    """

    def __init__(self, indices: list[Any], provenance: BatchProvenance) -> None:
        super().__init__(indices)
        self._provenance = provenance

    def __reduce__(self) -> tuple[Any, ...]:
        self._provenance.is_requested = True
        return list, (list(self),)


class RecordingSampler:
    """A sampler that notes the indices it gives, and otherwise passes for the one inside."""

    def __init__(self, sampler: Any, log: SamplerLog) -> None:
        object.__setattr__(self, "_tpcheck_inner", sampler)
        object.__setattr__(self, "_tpcheck_log", log)

    def __iter__(self) -> Iterator[Any]:
        return _RecordingIterator(self._tpcheck_inner, self._tpcheck_log)

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
        return _identity, (self._tpcheck_inner,)


class _RecordingIterator:
    """Calls the sampler exactly when its user does: a sampler may shuffle in `__iter__` or at its first batch."""

    def __init__(self, sampler: Any, log: SamplerLog) -> None:
        self._log = log
        self._sampler = sampler
        self._rng = rng_states(sampler=sampler)
        self._inner = iter(sampler)
        self._started = False
        self._drew = frozenset(changed_generators(self._rng, rng_states(sampler=sampler)))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        before = rng_states(sampler=self._sampler)
        if not self._started:
            self._log.start_epoch()
            if not self._drew:
                self._rng = before
        self._started = True
        indices = next(self._inner)
        now = rng_states()
        self._drew |= frozenset(changed_generators(before, with_generators_of(now, sampler=self._sampler)))
        return self._log.add(indices, self._rng, tuple(sorted(self._drew)), now)
