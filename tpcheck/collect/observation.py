"""Which random generators a data loader draws from while it makes each batch, and in which state they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

from tpcheck.collect.rng import moved, rng_digests
from tpcheck.collect.unwrap import torch_loader
from tpcheck.collect.worker_reports import Collate, Reporter, WorkerInit, WorkerReports


@dataclass(slots=True)
class Made:
    """How one batch was made.

    Attributes:
        number: How many batches of this epoch came before.
        indices: Sample indices, where the sampler gives them.
        rng: Digest of each generator's state before the first sample was read, by name; those of the worker that made
            the batch are named `worker3.python` and so on.
        drew: Names of the generators whose state moved until the batch was whole.
        sampler_rng: States before the sampler drew its order, at the start of the epoch.
        sampler_drew: Generators that moved inside the sampler since then.
        worker_seed: Seed that torch gave to the worker that made the batch.
        whole: Whether the batch was seen to be made, in this process.
        exact: False where the bracket around the batch holds more than the batch: the start of an iterator, say.
    """

    number: int
    indices: tuple[Any, ...] | None = None
    rng: dict[str, str] = field(default_factory=dict)
    drew: tuple[str, ...] = ()
    sampler_rng: dict[str, str] = field(default_factory=dict)
    sampler_drew: tuple[str, ...] = ()
    worker_seed: int | None = None
    whole: bool = False
    exact: bool = True


class Observation:
    """Made by `observe_workers`. Call `asked` before and `made` after each batch; `remove` at the end.

    Streams and batches stay as they are. The hooks are the loader's own: `worker_init_fn`, `collate_fn`, and the
    sampler, which is only listened to; pickling or copying the loader gives a loader without them.
    """

    def __init__(self, loader: Any) -> None:
        self._loader = torch_loader(loader)
        self._log = _Log(self._new_epoch)
        self._number = 0
        self._before: dict[str, str] = {}
        self._torch_before: torch.Tensor | None = None
        self._reports = WorkerReports() if self._loader is not None and self._loader.num_workers else None
        self._originals = self._install(self._loader) if self._loader is not None else {}

    def asked(self) -> None:
        """Note the states of this process's generators; call it before a batch is asked for."""
        self._before = rng_digests()
        self._torch_before = torch.default_generator.get_state() if not self._number else None

    def made(self) -> Made:
        """Return how the batch that has just arrived was made."""
        while self._log.pending:
            made = self._log.pending.popleft()
            if self._reports is None and not made.whole:
                continue  # given out and then skipped, as accelerate's skip_first_batches does
            self._number = made.number + 1
            if self._reports is not None:
                self._add_worker(made, self._reports)
            return made
        made = Made(self._number, rng=self._before, drew=moved(self._before, rng_digests()), exact=False)
        if self._torch_before is not None and "torch" in made.drew and _only_seeds_drawn(self._torch_before):
            made.drew = tuple(name for name in made.drew if name != "torch")
        self._number += 1
        return made

    def remove(self) -> None:
        """Give the loader its own functions and sampler back."""
        if self._loader is not None:
            vars(self._loader).update(self._originals)
        self._originals = {}

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _new_epoch(self) -> None:
        if self._reports is not None and self._loader is not None and self._loader.persistent_workers:
            self._reports.new_epoch()

    def _install(self, loader: DataLoader[Any]) -> dict[str, Any]:
        reporter = Reporter(self._reports.sender if self._reports else None, self._log.finish)
        # Past DataLoader.__setattr__, which refuses a new sampler once the loader is made.
        own = vars(loader)
        sampler = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        originals = {name: own[name] for name in ("collate_fn", "worker_init_fn", sampler)}
        self._log.dataset = loader.dataset
        own["collate_fn"] = Collate(reporter, loader.collate_fn)
        own["worker_init_fn"] = WorkerInit(reporter, loader.worker_init_fn)
        own[sampler] = _Listened(own[sampler], self._log)
        return originals

    def _add_worker(self, made: Made, reports: WorkerReports) -> None:
        assert self._loader is not None
        if not getattr(self._loader, "in_order", True):
            return
        worker = made.number % self._loader.num_workers
        bracket = reports.around(worker, made.number // self._loader.num_workers)
        if bracket is not None:
            before, after, made.worker_seed = bracket
            made.rng |= {f"worker{worker}.{name}": digest for name, digest in before.items()}
            made.drew = tuple(f"worker{worker}.{name}" for name in moved(before, after))


def observe_workers(loader: Any) -> Observation:
    """Watch which generators the batches of `loader` are drawn from, in this process and in its workers.

    Works with fork and spawn workers, persistent ones and prefetching. Around anything but a torch DataLoader (or a
    wrapper of one) only this process's generators are seen, between `asked` and `made`.
    """
    return Observation(loader)


class _Log:
    """What the sampler gave out, by batch; cleared when an epoch starts."""

    def __init__(self, on_epoch: Callable[[], None]) -> None:
        self.on_epoch = on_epoch
        self.pending: deque[Made] = deque()
        self.dataset: Any = None
        self._latest: Made | None = None
        self._given = 0  # in this epoch

    def start(self) -> None:
        self.pending.clear()
        self._given = 0
        self.on_epoch()

    def give(self, indices: Any, sampler_rng: dict[str, str], sampler_drew: tuple[str, ...]) -> None:
        listed = tuple(indices) if isinstance(indices, (list, tuple)) else (indices,)
        made = Made(
            self._given,
            indices=None if not listed or listed[0] is None else listed,  # an IterableDataset is asked for None
            rng=rng_digests(dataset=self.dataset),
            sampler_rng=sampler_rng,
            sampler_drew=sampler_drew,
        )
        self._given += 1
        self._latest = made
        self.pending.append(made)

    def finish(self) -> None:
        """The batch given last is whole; called in this process, so by a loader without workers."""
        if self._latest is not None:
            self._latest.whole = True
            self._latest.drew = moved(self._latest.rng, rng_digests(dataset=self.dataset))


class _Listened:
    """A sampler that notes what it gives out, and passes for the one inside."""

    def __init__(self, sampler: Any, log: _Log) -> None:
        object.__setattr__(self, "_tpcheck_inner", sampler)
        object.__setattr__(self, "_tpcheck_log", log)

    def __iter__(self) -> Iterator[Any]:
        return _ListenedIterator(self._tpcheck_inner, self._tpcheck_log)

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

    def __init__(self, sampler: Any, log: _Log) -> None:
        self._log = log
        self._rng = rng_digests(sampler=sampler)
        self._sampler = sampler
        self._drew: frozenset[str] = frozenset()
        self._inner = iter(sampler)
        self._started = False
        self._drew = frozenset(moved(self._rng, rng_digests(sampler=sampler)))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if not self._started:
            self._log.start()
        before = rng_digests(sampler=self._sampler)
        if not self._started and not self._drew:
            self._rng = before
        self._started = True
        indices = next(self._inner)
        self._drew |= frozenset(moved(before, rng_digests(sampler=self._sampler)))
        self._log.give(indices, self._rng, tuple(sorted(self._drew)))
        return indices


def _only_seeds_drawn(before: torch.Tensor) -> bool:
    """Tell whether torch's generator moved by no more than a RandomSampler's seed and an iterator's base seed."""
    replay = torch.Generator()
    replay.set_state(before)
    now = torch.default_generator.get_state()
    for _ in range(2):
        torch.empty((), dtype=torch.int64).random_(generator=replay)
        if torch.equal(replay.get_state(), now):
            return True
    return False


def _itself(value: Any) -> Any:
    return value
