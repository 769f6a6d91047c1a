"""Which orders of samples are a loader that goes back or ahead, and which are right."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest

from tpcheck.batches.records import LoaderFacts
from tpcheck.batches.repeats import (
    _GENERATION,
    _MAX_OF_BATCH,
    CHANCE,
    Copies,
    Gap,
    Gaps,
    Repeat,
    SampleMemory,
    WorkerStreams,
)
from tpcheck.batches.sampling import BatchProvenance


def cut(samples: Iterable[int], size: int) -> list[list[int]]:
    listed = list(samples)
    return [listed[start : start + size] for start in range(0, len(listed), size)]


def found_in(batches: Sequence[Sequence[int]]) -> Repeat | None:
    copies = Copies()
    return next(filter(None, (copies.add(batch, step) for step, batch in enumerate(batches))), None)


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("back", [2, 3])
def test_a_loader_that_goes_back_is_found_where_it_does(size: int, back: int) -> None:
    batches = cut(range(60 * size), size)
    at = 7
    assert found_in([*batches[:at], *batches[at - back :]]) == Repeat(at, at - back, back * size)


def test_a_stream_that_goes_back_within_a_batch_is_found() -> None:
    assert found_in(cut([*range(50), *range(39, 100)], 4)) == Repeat(12, 9, 11)


def test_the_second_of_many_epochs_that_goes_back_is_not_mistaken_for_an_epoch() -> None:
    batches = cut(range(40), 4)
    assert found_in([*batches[:6], *batches[2:]]) is not None
    assert found_in([*batches, *batches]) is None


def shuffled(samples: Iterable[int], seed: int) -> list[int]:
    return random.Random(seed).sample(list(samples), len(list(samples)))


RIGHT = {
    "every sample once": cut(range(400), 4),
    "epochs in one order": cut(list(range(40)) * 5, 4),
    "epochs that end within a batch": cut(list(range(41)) * 5, 4),
    "epochs in other orders": cut([sample for seed in range(9) for sample in shuffled(range(40), seed)], 4),
    "epochs of one of two replicas": cut(
        [sample for seed in range(9) for sample in shuffled(range(80), seed)[:40]], 4
    ),
    "tiny epochs in other orders": cut([sample for seed in range(99) for sample in shuffled(range(5), seed)], 1),
    "drawn with replacement": cut([random.Random(seed).randrange(50) for seed in range(2000)], 4),
    "one batch": [[1, 2, 3, 4]] * 100,
    "one sample": [[1, 1, 1, 1]] * 100,
    "a few batches in turn": cut(list(range(16)) * 50, 4),
    "every batch three times": [batch for batch in cut(range(200), 4) for _ in range(3)],
    "every two batches three times": [
        batch for block in cut(range(400), 8) for _ in range(3) for batch in cut(block, 4)
    ],
    "every block in three other orders": [
        batch for block in cut(range(400), 4) for seed in range(3) for batch in cut(shuffled(block, seed), 2)
    ],
    "every sample twice": cut([sample for sample in range(200) for _ in range(2)], 4),
    "every sample three times, over the borders of batches": cut([n for n in range(200) for _ in range(3)], 4),
    "more and more of the samples": cut([n for size in (8, 16, 32, 64) for n in range(size)], 4),
    "padding among samples": [[*range(4 * step + 1, 4 * step + 4), 0] for step in range(200)],
    "padded with the first samples": cut([*range(38), 0, 1], 4),
    "some samples are there twice": cut([n // 2 if n % 7 == 0 else n + 1000 for n in range(400)], 4),
    "two datasets in turn, the shorter one again and again": [
        batch
        for step in range(60)
        for batch in ([1000 + 4 * step + n for n in range(4)], [4 * (step % 5) + n for n in range(4)])
    ],
    "labels alone": cut([random.Random(seed).randrange(2) for seed in range(2000)], 4),
    "the last batches again": [*cut(range(40), 4), *cut(range(32, 40), 4)],
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_samples_come_again_by_right(name: str) -> None:
    assert found_in(RIGHT[name]) is None


def test_orders_that_are_drawn_are_rarely_taken_for_a_loader_that_goes_back() -> None:
    """At the number of samples that makes it most probable: m = 2 and D = 28, so N = D^2 / 2m = 196."""
    rng = random.Random(0)
    drawn = [found_in(cut([rng.randrange(196) for _ in range(32)], 2)) for _ in range(2000)]
    assert sum(repeat is not None for repeat in drawn) <= 2  # 0.2 are allowed; 3 or more come in 0.1 % of cases
    assert CHANCE == 1e-4


def test_the_memory_is_bounded_and_still_finds_what_goes_back() -> None:
    copies, batches = Copies(), cut(range(5 * _GENERATION), 512)
    for step, batch in enumerate([*batches, *batches[-2:]]):
        assert copies.add(batch, step) is None
    assert copies.add([-1], len(batches) + 2) == Repeat(len(batches), len(batches) - 2, 1024)
    assert len(copies._recent._newer) + len(copies._recent._older) <= 2 * _GENERATION


# ---- workers


def streams(*of_workers: Sequence[int], size: int = 2) -> Repeat | None:
    """Take the batches of several workers in turn."""
    taken, step = WorkerStreams(len(of_workers)), 0
    for batches in zip(*(cut(samples, size) for samples in of_workers), strict=True):
        for worker, batch in enumerate(batches):
            if (repeat := taken.add(batch, step, worker)) is not None:
                return repeat
            step += 1
    return taken.end()


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_that_each_give_all_samples_are_found(workers: int) -> None:
    repeat = streams(*[range(16)] * workers)
    assert repeat is not None
    assert (repeat.step, repeat.of_step, repeat.workers) == (1, 0, (0, 1))


def test_workers_that_each_shuffle_all_samples_are_found_at_the_end() -> None:
    repeat = streams(shuffled(range(16), 1), shuffled(range(16), 2))
    assert repeat is not None
    assert (repeat.num_samples, repeat.workers) == (16, (0, 1))


@pytest.mark.parametrize(
    "of_workers",
    [
        (range(0, 40, 2), range(1, 40, 2)),
        ([*range(10)] * 4, [*range(10, 20)] * 4),
        ([0] * 40, [0] * 40),
        ([0, 1, 2, 3] * 10, [0, 1, 2, 3] * 10),
        ([random.Random(n).randrange(30) for n in range(60)], [random.Random(-n - 9).randrange(30) for n in range(60)]),
    ],
    ids=["split", "split, several epochs", "one sample", "four samples in turn", "drawn with replacement"],
)
def test_workers_whose_samples_come_again_by_right(of_workers: tuple[Sequence[int], ...]) -> None:
    assert streams(*of_workers) is None


# ---- gaps


def gap_in(batches: Sequence[Sequence[int]]) -> Gap | None:
    gaps = Gaps()
    for step, batch in enumerate(batches):
        gaps.add(batch, step)
    return gaps.found


@pytest.mark.parametrize("stride", [1, 3])
def test_batches_that_are_left_out_are_found(stride: int) -> None:
    batches = cut(range(0, 40 * stride, stride), 4)
    assert gap_in([*batches[:4], *batches[6:]]) == Gap(4, 2, 24 * stride, 16 * stride)


@pytest.mark.parametrize(
    "samples",
    [
        range(42),
        shuffled(range(40), 0),
        [*range(38), 0, 1],
        [*range(12, 40)],  # a run that resumes
        [*range(16), *range(17, 33)],  # not whole batches
        [*range(16), *range(24, 32), *range(40, 48)],  # several times
    ],
)
def test_orders_without_a_gap(samples: Sequence[int]) -> None:
    assert gap_in(cut(samples, 4)) is None


# ---- all of it


def memory_finds(
    orders: Sequence[Sequence[int]], facts: LoaderFacts, *, contents: Sequence[Sequence[int]] | None = None
) -> Repeat | Gap | None:
    memory = SampleMemory()
    for step, indices in enumerate(orders):
        provenance = BatchProvenance(indices=tuple(indices), loader_facts=lambda: facts)
        samples = tuple(indices if contents is None else contents[step])
        if (found := memory.add(samples, provenance, step)) is not None:
            return found
    return memory.end()


BATCHES = cut(range(80), 4)


def test_a_sampler_that_goes_back_is_found_by_its_indices_where_samples_are_augmented() -> None:
    orders = [*BATCHES[:7], *BATCHES[5:]]
    augmented = cut(range(1000, 1000 + 4 * len(orders)), 4)
    found = memory_finds(orders, LoaderFacts(sampler="Own"), contents=augmented)
    assert found == Repeat(7, 5, 8, read="sample indices")


def test_a_sampler_with_replacement_may_go_back() -> None:
    assert memory_finds([*BATCHES[:7], *BATCHES[5:]], LoaderFacts(replacement=True)) is None


@pytest.mark.parametrize(
    ("facts", "is_found"),
    [
        (LoaderFacts(sampler="SequentialSampler"), True),
        (LoaderFacts(sampler="DistributedSampler", shuffle=False), True),
        (LoaderFacts(sampler="Own"), True),  # at the end of the epoch
        (LoaderFacts(sampler="list"), False),
    ],
)
def test_a_gap_counts_where_it_is_not_chosen(facts: LoaderFacts, is_found: bool) -> None:
    assert (memory_finds([*BATCHES[:7], *BATCHES[9:]], facts) is not None) is is_found


def test_a_model_may_be_called_with_one_batch_again() -> None:
    memory = SampleMemory(repeats_calls=True)
    for step, batch in enumerate([*BATCHES[:7], *BATCHES[6:]]):
        assert memory.add(tuple(batch), BatchProvenance(), step) is None


def test_of_a_large_batch_the_same_samples_are_remembered_when_they_come_again() -> None:
    rng, memory = random.Random(0), SampleMemory()
    batches = [tuple(rng.getrandbits(64) for _ in range(4 * _MAX_OF_BATCH)) for _ in range(8)]
    found = [memory.add(batch, BatchProvenance(), step) for step, batch in enumerate([*batches[:6], *batches[4:]])]
    repeats = [repeat for repeat in found if isinstance(repeat, Repeat)]
    assert (repeats[0].step, repeats[0].of_step) == (6, 4)
    assert repeats[0].num_samples < 4 * _MAX_OF_BATCH
