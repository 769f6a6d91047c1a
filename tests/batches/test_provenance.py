"""Observing a loader shows which generators were drawn from, and changes neither batches nor random streams."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tpcheck.batches.provenance import LoaderObserver, loader_facts
from tpcheck.batches.records import LoaderFacts
from tpcheck.batches.sampling import BatchProvenance

WORKERS: dict[str, dict[str, Any]] = {
    "none": {},
    "forked": {"num_workers": 2, "multiprocessing_context": "fork"},
    "persistent": {
        "num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True, "prefetch_factor": 3
    },
    "spawned": {"num_workers": 1, "multiprocessing_context": "spawn", "persistent_workers": True},
}  # fmt: skip


class Samples(Dataset[torch.Tensor]):
    """Every sample draws from torch; sample 5 also from Python, sample 7 from a generator of the dataset's."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = random.random() if index == 5 else self.rng.random() if index == 7 else 0.0
        return torch.rand(2) + index + noise


class Stream(IterableDataset[float]):
    def __iter__(self) -> Iterator[float]:
        return (np.random.rand() for _ in range(7))


def seed_by_numpy(worker_id: int) -> None:
    np.random.seed(worker_id)


def batches(
    dataset: type[Samples | Stream], observe: Any, **options: Any
) -> tuple[list[torch.Tensor], list[BatchProvenance]]:
    """Two epochs, and the state of torch's generator after them."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    loader: Any = DataLoader(dataset(), batch_size=2, shuffle=dataset is Samples, **options)  # type: ignore[arg-type]
    tensors, provenances = [], []
    observer = observe(loader)
    for _ in range(2):
        for batch in loader:
            tensors.append(batch)
            if observer is not None:
                provenances.append(observer.after_batch())
    return [*tensors, torch.default_generator.get_state()], provenances


@cache
def observed(dataset: type[Samples | Stream], workers: str) -> tuple[list[torch.Tensor], list[BatchProvenance]]:
    return batches(dataset, LoaderObserver, **WORKERS[workers])


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("dataset", [Samples, Stream])
def test_batches_and_random_streams_are_those_of_an_unobserved_loader(
    dataset: type[Samples | Stream], workers: str
) -> None:
    if dataset is Stream and workers == "spawned":
        return  # a spawned worker takes seconds to start: one dataset shows what it shows
    actual, provenances = observed(dataset, workers)
    expected, _ = batches(dataset, lambda loader: None, **WORKERS[workers])
    assert all(map(torch.equal, actual, expected))
    assert len(provenances) == len(actual) - 1 == len(expected) - 1


@pytest.mark.parametrize("workers", WORKERS)
def test_each_batch_has_its_indices_and_generators(workers: str) -> None:
    _, provenances = observed(Samples, workers)
    num_workers = WORKERS[workers].get("num_workers", 0)
    for each in provenances:
        worker = f"worker{each.number % num_workers}." if num_workers else ""
        expected = {f"{worker}torch"}
        expected |= {f"{worker}python"} if 5 in (each.indices or ()) else set()
        expected |= {f"{worker}numpy:dataset.rng"} if 7 in (each.indices or ()) else set()
        assert set(each.drew) == expected
        assert expected <= set(each.rng)
        assert each.sampler_drew == ("torch",)  # RandomSampler draws its seed
    assert sorted(index for each in provenances[:5] for index in each.indices or ()) == list(range(10))


def test_a_pickled_or_copied_loader_has_no_hooks() -> None:
    loader = DataLoader(Samples(), batch_size=2, worker_init_fn=seed_by_numpy)
    collate = loader.collate_fn
    LoaderObserver(loader)
    for other in (pickle.loads(pickle.dumps(loader)), copy.deepcopy(loader)):
        assert other.collate_fn is collate
        assert other.worker_init_fn is seed_by_numpy
        assert type(other.batch_sampler).__name__ == "BatchSampler"


def test_hooks_are_removed() -> None:
    loader = DataLoader(Samples(), batch_size=2)
    before = dict(vars(loader))
    observer = LoaderObserver(loader)
    assert loader.collate_fn is not before["collate_fn"]
    assert isinstance(loader.batch_sampler, torch.utils.data.BatchSampler)
    assert len(loader) == 5
    observer.remove()
    assert vars(loader) == before


def test_workers_do_not_wait_for_their_reports_to_be_read() -> None:
    loader = DataLoader(torch.zeros(600, 1), num_workers=1, batch_size=1)
    LoaderObserver(loader)
    assert sum(1 for _ in loader) == 600  # more than twice as many lines as fit into the pipe


def test_a_new_epoch_starts_counting_again() -> None:
    loader = DataLoader(Samples(), batch_size=2)
    observer = LoaderObserver(loader)
    next(iter(loader))
    for number, _ in enumerate(loader):
        assert observer.after_batch().number == number


def test_no_file_descriptor_stays_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        LoaderObserver(DataLoader(Samples(), num_workers=1)).remove()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_what_a_plain_generator_draws_is_seen_from_outside() -> None:
    def stream() -> Iterator[float]:
        while True:
            yield random.random()

    source = stream()
    observer = LoaderObserver(source)
    observer.before_batch()
    next(source)
    provenance = observer.after_batch()
    assert (provenance.drew, provenance.indices) == (("python",), None)


def test_the_seeds_that_a_starting_loader_draws_are_left_out_in_every_epoch() -> None:
    def stream() -> Iterator[Any]:
        yield from DataLoader(torch.zeros(4, 1), shuffle=True)

    observer = LoaderObserver(stream())
    for _ in range(2):
        observer.before_batch(starts_epoch=True)
        next(stream())
        assert observer.after_batch().drew == ()


def facts_of(loader: Any) -> LoaderFacts:
    return loader_facts(loader, BatchProvenance())


def test_facts_of_a_loader_name_the_worker_init_fn_and_the_sampler() -> None:
    loader = DataLoader(Samples(), num_workers=2, worker_init_fn=seed_by_numpy, shuffle=True)
    for facts in (facts_of(loader), LoaderObserver(loader).after_batch().loader_facts()):
        assert str(facts.worker_init_fn).endswith("seed_by_numpy")
        assert (facts.sampler, facts.dataset, facts.iterable) == ("RandomSampler", "Samples", False)
        pickle.dumps(facts)


def test_facts_of_a_worker_init_fn_include_its_arguments() -> None:
    loader = DataLoader(Samples(), num_workers=2, worker_init_fn=partial(seed_by_numpy, worker_id=3))
    assert str(facts_of(loader).worker_init_fn).endswith("seed_by_numpy(worker_id=3)")


def test_facts_of_a_distributed_sampler() -> None:
    sampler = torch.utils.data.DistributedSampler(Samples(), num_replicas=4, rank=3, seed=7)  # type: ignore[arg-type]
    facts = facts_of(DataLoader(Samples(), sampler=sampler))
    assert (facts.num_replicas, facts.rank, facts.sampler_seed, facts.shuffle, facts.epoch) == (4, 3, 7, True, 0)


SIZE_OF_SCRIPT = 4


def test_facts_of_a_dataset_have_the_numbers_that_its_methods_read() -> None:
    number, unread = 3, 5

    class Split(Samples):
        def __len__(self) -> int:
            return number // SIZE_OF_SCRIPT

    assert unread
    numbers = facts_of(DataLoader(Split(), sampler=[0])).numbers or {}
    assert {name: numbers[name] for name in numbers if name.startswith("dataset.")} == {
        "dataset.number": 3,
        "dataset.SIZE_OF_SCRIPT": 4,
    }


def test_an_iterator_under_way_has_no_numbers() -> None:
    loader = DataLoader(Samples(), num_workers=1, persistent_workers=True)
    next(iter(loader))
    assert hasattr(loader._iterator, "_rank")
    assert not [name for name in facts_of(loader).numbers or {} if "_iterator" in name]


def test_what_a_stream_draws_as_it_begins_is_seen() -> None:
    class Shuffled(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(random.sample(range(4), 4))

    loader = DataLoader(Shuffled(), batch_size=2)
    observer = LoaderObserver(loader)
    observer.before_batch(starts_epoch=True)
    batches = iter(loader)
    drawn = []
    for _ in range(2):
        next(batches)
        drawn.append(observer.after_batch().drew)
        observer.before_batch()
    assert drawn == [("python",), ()]


def test_facts_of_a_dataset_that_lists_files() -> None:
    dataset = Samples()
    listings = []
    for files in (["a.png", "b.png"], ["b.png", "a.png"]):
        dataset.files = files  # type: ignore[attr-defined]
        listings.append((facts_of(DataLoader(dataset)).listing or {})["files"])
    (order, names), (other_order, same_names) = listings
    assert order != other_order
    assert names == same_names


@pytest.mark.parametrize(("number", "listed"), [(64, True), (65, False)])
def test_facts_of_a_batch_have_its_indices_or_a_digest_of_many(number: int, listed: bool) -> None:
    facts = loader_facts([], BatchProvenance(indices=tuple(range(number))))
    reordered = loader_facts([], BatchProvenance(indices=tuple(reversed(range(number)))))
    assert (facts.indices is not None) is listed
    assert facts.indices_digest != reordered.indices_digest
    assert facts.indices_sorted == reordered.indices_sorted


def test_any_iterable_has_facts() -> None:
    assert facts_of(iter([1])).sampler is None


class Mixed:
    """A user's own wrapper, which draws once the batch is there."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return (batch * random.random() for batch in self.loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_wrapper_draws_is_seen_beside_what_its_loader_draws(workers: int) -> None:
    source = Mixed(DataLoader(Samples(), batch_size=2, num_workers=workers))
    observer = LoaderObserver(source)
    observer.before_batch()
    for _ in source:
        worker = "worker0." if workers else ""
        assert set(observer.after_batch().drew) >= {f"{worker}torch", "python"}
        observer.before_batch()


def numbered(iterable: bool) -> Any:
    class Counted(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            info = torch.utils.data.get_worker_info()
            worker, workers = (info.id, info.num_workers) if info else (0, 1)
            return (index for index in range(20) if index // 2 % workers == worker and (random.random() or True))

    return Counted() if iterable else list(range(20))


@pytest.mark.parametrize("iterable", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_batches_are_not_mistaken_for_those_that_come(workers: int, prepared: bool, iterable: bool) -> None:
    from accelerate import Accelerator
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    Accelerator(cpu=True)
    loader: Any = DataLoader(numbered(iterable), batch_size=2, num_workers=workers)
    if prepared:
        loader = prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)
    skipping = skip_first_batches(loader, 3) if iterable else None  # which makes a sampler of its own for a stream
    observer = LoaderObserver(loader if skipping is None else skipping)
    for _ in range(2):
        for number, batch in enumerate(skip_first_batches(loader, 3) if skipping is None else skipping):
            provenance = observer.after_batch()
            assert batch.tolist() == [2 * number + 6, 2 * number + 7]
            assert provenance.indices == (None if iterable else tuple(batch.tolist()))
            if iterable and workers:
                assert provenance.drew == (f"worker{(3 + number) % 2}.python",)
    for batch in loader if skipping is None else ():
        assert observer.after_batch().indices == tuple(batch.tolist())


class EverySecond:
    """A user's sampler that leaves batches out."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        return (indices for number, indices in enumerate(self.sampler) if number % 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_a_users_sampler_leaves_out_are_not_mistaken_for_those_that_come(workers: int) -> None:
    loader: Any = DataLoader(numbered(False), batch_size=2, num_workers=workers)
    observer = LoaderObserver(loader)
    other: Any = DataLoader(
        loader.dataset,
        batch_sampler=EverySecond(loader.batch_sampler),
        collate_fn=loader.collate_fn,
        num_workers=workers,
    )
    for batch in other:
        assert observer.after_batch().indices == tuple(batch.tolist())


class ListTypes(Dataset[bool]):
    """Whether the indices of the batch came as a plain list."""

    def __len__(self) -> int:
        return 4

    def __getitems__(self, indices: Any) -> list[bool]:
        return [type(indices) is list] * len(indices)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dataset_gets_plain_lists_of_indices(workers: int) -> None:
    loader = DataLoader(ListTypes(), batch_size=2, num_workers=workers)
    LoaderObserver(loader)
    assert all(batch.all() for batch in loader)


def test_the_indices_of_batches_that_arrive_in_any_order_are_unknown() -> None:
    loader: Any = DataLoader(numbered(False), batch_size=2, num_workers=2, in_order=False)
    observer = LoaderObserver(loader)
    for _ in loader:
        assert observer.after_batch().indices is None
