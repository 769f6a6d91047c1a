"""Does a rank get samples again, or leave some out, within one epoch? By a bounded memory of what it has had.

What is by right: an epoch that ends and starts again, drawing with replacement, the same batch at every step, a block
of samples that is repeated as a whole. So a sample that comes again is no evidence; how it comes again is:

- `Copies`: the loader went back. A run of samples is the very run that came just before, in the same order; it does not
  begin where the stream or the current pass began; and then the stream goes on with samples that had not come yet.
- `WorkerStreams`: workers of an IterableDataset give each other's samples: the same ones at the same places of their
  streams, or, at the end of an epoch, each worker each sample once.
- `Gaps`: the sampler went ahead. First indices of batches rise by one number, jump once by a multiple of it, and rise
  on.

What is remembered is a digest of 64 bits for each sample (or its index): of the last 65,536 to 131,072, about 16 MB at
most, however long the run. That a new sample has the digest of a remembered one has a probability of 131,072 / 2^64 =
7e-15, so 7e-6 for one sample of 10^9; a finding needs a run of them at one distance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import lgamma, log
from operator import index
from typing import Any

from tpcheck.batches.records import LoaderFacts
from tpcheck.batches.sampling import BatchProvenance

# How probable a finding may be, in an epoch of samples that are drawn with replacement, at the number of samples that
# makes it most probable.
CHANCE = 1e-4
_GENERATION = 1 << 16  # samples; two generations are remembered
_MAX_COMMON = 1 << 12  # samples that come again and again, such as padding
_MAX_OF_BATCH = 1 << 10  # samples of a batch that are looked at: those of a larger one whose digest is divisible
_MIN_SHUFFLED = 8  # samples that each worker must have given, where only their numbers are evidence


@dataclass(frozen=True, slots=True)
class Repeat:
    """Samples that a rank got again.

    Attributes:
        step: The batch in which the first of them came again, as many batches came before it.
        of_step: The batch in which they had come.
        num_samples: How many came again.
        workers: The workers of the loader that gave the same samples.
        read: What is equal: `contents`, or `sample indices` of samples that may be augmented differently.
    """

    step: int
    of_step: int
    num_samples: int
    workers: tuple[int, ...] = ()
    read: str = "contents"


@dataclass(frozen=True, slots=True)
class Gap:
    """Samples that a sampler left out.

    Attributes:
        step: The first batch behind the gap.
        num_batches: How many batches were left out.
        first_index, expected_index: The first index of that batch, and the one that was next.
    """

    step: int
    num_batches: int
    first_index: int
    expected_index: int


class _Recent:
    """The numbers of the last samples. Two dicts: when the newer one is full, it becomes the older one."""

    def __init__(self) -> None:
        self._newer: dict[Any, int] = {}
        self._older: dict[Any, int] = {}
        self.has_forgotten = False

    def get(self, sample: Any) -> int | None:
        number = self._newer.get(sample)
        return self._older.get(sample) if number is None else number

    def set(self, sample: Any, number: int) -> None:
        self._newer[sample] = number
        if len(self._newer) >= _GENERATION:
            self.has_forgotten = self.has_forgotten or bool(self._older)
            self._newer, self._older = {}, self._newer


@dataclass(slots=True)
class _Run:
    """Samples that came before, one after the other, each at the same distance.

    Attributes:
        distance: How many samples before.
        step, of_step: Of its first sample, now and before.
        batch_size: Of the batch in which it begins.
        length: How many they are.
        restarts: Whether it begins where the stream or the pass began.
    """

    distance: int
    step: int
    of_step: int
    batch_size: int
    restarts: bool
    length: int = 1

    @property
    def goes_back(self) -> bool:
        """Return whether it is the run that came just before, once or several times, and at least a batch.

        One sample after its equal is no run: a dataset may have it twice.
        """
        return not self.restarts and self.length >= max(2, self.batch_size) and self.length % self.distance == 0


class Copies:
    """Finds a loader that goes back: samples n to n + m come again after n + m, in the same order, then new ones.

    Let samples be drawn with replacement from N. That somewhere m of them in a row are the m before them, and no other
    one comes twice among D different ones, has a probability of at most D N^-m exp(-D^2 / 2N), which is largest at
    N = D^2 / 2m: D (2m / (e D^2))^m. Where others do come twice, D different samples are known and N is at least D:
    that m samples continue a run somewhere among T is at most T D^-(m - 1). It must be below `CHANCE`.
    """

    def __init__(self) -> None:
        self._recent = _Recent()
        self._common: set[Any] = set()
        self._number = 0  # samples so far
        self._distinct = 0
        self._scattered = 0  # samples that came again and do not go back
        self._run: _Run | None = None
        self._candidate: Repeat | None = None
        self._stream_start: Any = None
        self._pass_start: Any = None

    def add(self, samples: Iterable[Any], step: int) -> Repeat | None:
        """Take the samples of a batch; return what came again once it is beyond chance."""
        different = dict.fromkeys(samples)  # rows that are equal within a batch are padding, or say as little
        for sample in different:
            self._add(sample, step, len(different))
        candidate = self._candidate
        return candidate if candidate is not None and self._is_beyond_chance(candidate.num_samples) else None

    def _add(self, sample: Any, step: int, batch_size: int) -> None:
        number, self._number = self._number, self._number + 1
        if sample in self._common:
            return
        before = self._recent.get(sample)
        if before is None:
            if number == 0:
                self._stream_start = sample
            if self._run is not None or number == 0:
                self._pass_start = sample
            if self._run is not None:
                self._end_run(self._run, goes_on=True)
                self._run = None
            self._distinct += 1
        else:
            distance = number - (before >> 64)
            if self._run is not None and self._run.distance == distance:
                self._run.length += 1
            else:
                if self._run is not None:
                    self._end_run(self._run, goes_on=False)
                restarts = sample in (self._stream_start, self._pass_start)
                self._run = _Run(distance, step, before >> 1 & (1 << 63) - 1, batch_size, restarts)
                if before & 1 and not restarts and len(self._common) < _MAX_COMMON:
                    self._common.add(sample)
        is_scattered = before is not None and self._run is not None and self._run.length == 1
        self._recent.set(sample, number << 64 | step << 1 | is_scattered)

    def _end_run(self, run: _Run, *, goes_on: bool) -> None:
        if run.goes_back and goes_on:
            if self._candidate is None:
                self._candidate = Repeat(run.step, run.of_step, run.length)
        elif not run.restarts:
            self._scattered += run.length

    def _is_beyond_chance(self, length: int) -> bool:
        if not self._scattered:
            return log(self._distinct) + length * (log(2 * length / self._distinct**2) - 1) <= log(CHANCE)
        return log(self._number) - (length - 1) * log(self._distinct) <= log(CHANCE)


class WorkerStreams:
    """Finds workers that give each other's samples, as where each yields all of an IterableDataset.

    Let workers draw with replacement from N samples. That m different ones of t samples are at the same places of two
    streams has a probability of at most C(t, m) N^-m, and N is at least the number of different samples. Streams in
    different orders are judged at the end of an epoch alone: every sample has come exactly once from every worker.
    """

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._recent = _Recent()  # by sample: its place in the stream of the worker that gave it last, step, worker
        self._numbers = [0] * num_workers  # samples of each worker
        self._distinct = 0
        self._at_same_place: set[Any] = set()
        self._from_others = 0
        self._from_same = 0
        self._first: Repeat | None = None

    def add(self, samples: Iterable[Any], step: int, worker: int) -> Repeat | None:
        """Take the samples of a batch; return what came again once it is beyond chance."""
        for sample in samples:
            place = self._numbers[worker]
            self._numbers[worker] += 1
            before = self._recent.get(sample)
            self._recent.set(sample, place << 96 | step << 32 | worker)
            if before is None:
                self._distinct += 1
                continue
            giver = before & (1 << 32) - 1
            if giver == worker:
                self._from_same += 1
                continue
            self._from_others += 1
            if self._first is None:
                self._first = Repeat(step, before >> 32 & (1 << 64) - 1, 0, tuple(sorted((giver, worker))))
            if before >> 96 == place and len(self._at_same_place) < _MAX_COMMON:
                self._at_same_place.add(sample)
        matched, again = len(self._at_same_place), self._from_others + self._from_same
        if not matched:
            return None
        log_choices = lgamma(again + 1) - lgamma(matched + 1) - lgamma(again - matched + 1)
        return self._found(matched) if log_choices - matched * log(self._distinct) <= log(CHANCE) else None

    def end(self) -> Repeat | None:
        """Return what came again, where the numbers of a whole epoch show it."""
        each_once = self._from_others == (self._num_workers - 1) * self._distinct and not self._from_same
        is_evidence = each_once and self._distinct >= _MIN_SHUFFLED and not self._recent.has_forgotten
        return self._found(self._from_others) if is_evidence else None

    def _found(self, num_samples: int) -> Repeat | None:
        return None if self._first is None else replace(self._first, num_samples=num_samples)


class Gaps:
    """Finds a sampler that leaves out whole batches: its batches' first indices rise evenly, jump once, rise on.

    Only of an order that is not shuffled; three batches before the gap and two after it show that it is none by design.
    """

    def __init__(self) -> None:
        self._offsets: tuple[int, ...] = ()  # of the indices of a batch from its first
        self._first = 0  # index of the last batch
        self._stride = 0
        self._num_even = 0  # batches in a row that rise evenly
        self._gap: Gap | None = None
        self._is_confirmed = False
        self._is_even = True

    def add(self, indices: Sequence[Any], step: int) -> Gap | None:
        """Take the indices of a batch; return the gap once the batches behind it rise evenly."""
        try:
            numbers = [index(each) for each in indices]
        except TypeError:
            numbers = []
        if not self._is_even or not numbers:
            self._is_even = False
            return None
        first, offsets = numbers[0], tuple(number - numbers[0] for number in numbers)
        if not self._num_even:
            self._first, self._offsets, self._num_even = first, offsets, 1
            return None
        rise, self._first = first - self._first, first
        if offsets != self._offsets[: len(offsets)]:
            self._is_even = False
        elif self._num_even == 1 and self._gap is None:
            self._stride, self._num_even = rise, 2
            self._is_even = rise > 0
        elif rise == self._stride:
            self._num_even += 1
            self._is_confirmed = self._is_confirmed or self._gap is not None
        elif self._gap is None and self._num_even >= 3 and rise > 0 and rise % self._stride == 0:
            self._gap = Gap(step, rise // self._stride - 1, first, first - rise + self._stride)
        else:
            self._is_even = False
        return self.found

    @property
    def found(self) -> Gap | None:
        """The gap, once it is confirmed and nothing else is uneven."""
        return self._gap if self._is_confirmed and self._is_even else None


class SampleMemory:
    """What a rank has had in one epoch.

    Args:
        repeats_calls: Whether a batch that is the one before counts once: a loop may call its model with it again.
    """

    def __init__(self, *, repeats_calls: bool = False) -> None:
        self._repeats_calls = repeats_calls
        self._latest: tuple[int, ...] = ()
        self._contents = Copies()
        self._indices = Copies()
        self._workers: WorkerStreams | None = None
        self._gaps = Gaps()
        self._provenance = BatchProvenance()
        self._facts: LoaderFacts | None = None

    def add(self, samples: tuple[int, ...], provenance: BatchProvenance, step: int) -> Repeat | Gap | None:
        """Take a batch; return what is wrong once it is known."""
        self._provenance = provenance
        latest, self._latest = self._latest, samples
        if self._repeats_calls and samples == latest:
            return None
        looked_at = _looked_at(samples)
        found: Repeat | Gap | None = self._contents.add(looked_at, step)
        if provenance.stream_worker is not None:
            worker, num_workers = provenance.stream_worker
            if self._workers is None:
                self._workers = WorkerStreams(num_workers)
            found = self._workers.add(looked_at, step, worker) or found
        if provenance.indices is not None and found is None:
            found = self._add_indices(provenance.indices, step)
        return None if found is None or self._is_by_design(found) else found

    def end(self) -> Repeat | Gap | None:
        """Return what only the end of an epoch shows."""
        found: Repeat | Gap | None = self._gaps.found
        if found is None and self._workers is not None:
            found = self._workers.end()
        return None if found is None or self._is_by_design(found, is_over=True) else found

    def _add_indices(self, indices: tuple[Any, ...], step: int) -> Repeat | Gap | None:
        with suppress(TypeError):  # of an index that has no hash
            repeat = self._indices.add(indices, step)
            if repeat is not None:
                return replace(repeat, read="sample indices")
        return self._gaps.add(indices, step)

    @property
    def loader(self) -> LoaderFacts:
        """What is known of the loader; reading it the first time may take long."""
        if self._facts is None:
            self._facts = self._provenance.loader_facts()
        return self._facts

    def _is_by_design(self, found: Repeat | Gap, *, is_over: bool = False) -> bool:
        """Return whether the sampler may do so: it draws with replacement, or has indices of its own choice."""
        facts = self.loader
        if isinstance(found, Repeat):
            return facts.replacement is True
        in_order = facts.sampler == "SequentialSampler" or (
            facts.sampler == "DistributedSampler" and facts.shuffle is False
        )
        # Another sampler's order may come back to what it has left out.
        return not in_order and not (is_over and facts.sampler not in ("list", "tuple", "range", None))


def _looked_at(samples: Sequence[int]) -> Sequence[int]:
    """Return the samples of a batch that are remembered: all, or of a large batch those with some digests.

    Which ones depends on the samples alone, so that the same ones are remembered when they come again.
    """
    every = -(-len(samples) // _MAX_OF_BATCH)
    return samples if every <= 1 else [sample for sample in samples if sample % every == 0]
