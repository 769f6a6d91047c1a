"""A sampler that tells which samples it gave out for each batch, and from which generators it drew."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tpcheck.collect.left_out import LeftOut, left_out
from tpcheck.collect.rng import States, moved, rng_states, with_own
from tpcheck.collect.worker_reports import WorkerReports

_KEPT = 16  # batches given out whose states are kept whole, 10 kB each; of those that run further ahead, digests


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
        return states if len(self.pending) < _KEPT else States(dict(states))


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


def _itself(value: Any) -> Any:
    return value
