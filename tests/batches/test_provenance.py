"""Watching a loader tells who drew what, and changes neither batches nor streams."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tpcheck.batches.provenance import loader_facts, observe_workers
from tpcheck.batches.sampling import Made

WORKERS: tuple[dict[str, Any], ...] = (
    {},
    {"num_workers": 2, "multiprocessing_context": "fork"},
    {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": True, "prefetch_factor": 3},
    {"num_workers": 1, "multiprocessing_context": "spawn"},
)


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


def batches(dataset: Any, watched: bool, **options: Any) -> tuple[list[torch.Tensor], list[Made]]:
    """Two epochs, and the state of torch's generator after them."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    loader = DataLoader(dataset, batch_size=2, shuffle=isinstance(dataset, Samples), **options)
    seen, made = [], []
    observation = observe_workers(loader) if watched else None
    for _ in range(2):
        for batch in loader:
            seen.append(batch)
            if observation is not None:
                made.append(observation.made())
    return [*seen, torch.default_generator.get_state()], made


@pytest.mark.parametrize("options", WORKERS, ids=str)
@pytest.mark.parametrize("dataset", [Samples, Stream])
def test_batches_and_streams_are_those_of_an_unwatched_loader(dataset: Any, options: dict[str, Any]) -> None:
    watched, made = batches(dataset(), True, **options)
    bare, _ = batches(dataset(), False, **options)
    assert all(torch.equal(one, other) for one, other in zip(watched, bare, strict=True))
    assert len(made) == len(bare) - 1
    assert all(each.exact for each in made)


@pytest.mark.parametrize("options", WORKERS, ids=str)
def test_each_batch_is_told_with_its_indices_and_generators(options: dict[str, Any]) -> None:
    _, made = batches(Samples(), True, **options)
    for each in made:
        worker = f"worker{each.number % options['num_workers']}." if options else ""
        expected = {f"{worker}torch"}
        expected |= {f"{worker}python"} if 5 in (each.indices or ()) else set()
        expected |= {f"{worker}numpy:dataset.rng"} if 7 in (each.indices or ()) else set()
        assert set(each.drew) == expected
        assert expected <= set(each.rng)
        assert each.sampler_drew == ("torch",)  # RandomSampler draws its seed
    assert sorted(index for each in made[:5] for index in each.indices or ()) == list(range(10))


def test_a_loader_that_is_pickled_or_copied_is_not_watched() -> None:
    loader = DataLoader(Samples(), batch_size=2, worker_init_fn=seed_by_numpy)
    collate = loader.collate_fn
    observe_workers(loader)
    for other in (pickle.loads(pickle.dumps(loader)), copy.deepcopy(loader)):
        assert other.collate_fn is collate
        assert other.worker_init_fn is seed_by_numpy
        assert type(other.batch_sampler).__name__ == "BatchSampler"


def test_what_was_put_in_is_taken_out() -> None:
    loader = DataLoader(Samples(), batch_size=2)
    before = dict(vars(loader))
    with observe_workers(loader):
        assert loader.collate_fn is not before["collate_fn"]
        assert isinstance(loader.batch_sampler, torch.utils.data.BatchSampler)
        assert len(loader) == 5
    assert vars(loader) == before


def test_a_watched_loader_that_nobody_asks_about_does_not_hang() -> None:
    loader = DataLoader(torch.zeros(3000, 1), num_workers=1, batch_size=1)
    observe_workers(loader)
    assert sum(1 for _ in loader) == 3000  # far more lines than the pipe holds


def test_a_loader_that_is_left_early_begins_anew() -> None:
    loader = DataLoader(Samples(), batch_size=2)
    observation = observe_workers(loader)
    next(iter(loader))
    for number, _ in enumerate(loader):
        assert observation.made().number == number


def test_no_descriptor_is_left_open() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        observe_workers(DataLoader(Samples(), num_workers=1)).remove()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_a_plain_generator_is_seen_from_outside() -> None:
    def stream() -> Iterator[float]:
        while True:
            yield random.random()

    source = stream()
    observation = observe_workers(source)
    observation.asked()
    next(source)
    made = observation.made()
    assert (made.drew, made.exact, made.indices) == (("python",), False, None)


def test_the_seeds_that_a_loader_draws_when_it_starts_are_not_the_batchs() -> None:
    def stream() -> Iterator[Any]:
        yield from DataLoader(torch.zeros(4, 1), shuffle=True)

    source = stream()
    observation = observe_workers(source)
    observation.asked()
    next(source)
    assert observation.made().drew == ()


def test_facts_of_a_loader_name_the_worker_init_fn_and_the_sampler() -> None:
    facts = loader_facts(DataLoader(Samples(), num_workers=2, worker_init_fn=seed_by_numpy, shuffle=True))
    assert facts["worker_init_fn"].endswith("seed_by_numpy")
    assert (facts["sampler"], facts["num_workers"], facts["dataset"]) == ("RandomSampler", 2, "Samples")
    pickle.dumps(facts)


def test_facts_of_a_distributed_sampler() -> None:
    sampler = torch.utils.data.DistributedSampler(Samples(), num_replicas=4, rank=3, seed=7)  # type: ignore[arg-type]
    facts = loader_facts(DataLoader(Samples(), sampler=sampler))
    share = {name: facts[name] for name in ("num_replicas", "rank", "sampler_seed", "shuffle", "epoch")}
    assert share == {"num_replicas": 4, "rank": 3, "sampler_seed": 7, "shuffle": True, "epoch": 0}


def test_any_iterable_has_facts() -> None:
    assert loader_facts(iter([1]))["loader"] == "list_iterator"


class Mixed:
    """A user's own wrapper, which draws once the batch is there."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        return (batch * random.random() for batch in self.loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_wrapper_draws_is_seen_beside_the_loaders_own(workers: int) -> None:
    source = Mixed(DataLoader(Samples(), batch_size=2, num_workers=workers))
    observation = observe_workers(source)
    observation.asked()
    for _ in source:
        worker = "worker0." if workers else ""
        assert set(observation.made().drew) >= {f"{worker}torch", "python"}
        observation.asked()


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
def test_batches_that_are_skipped_are_not_taken_for_those_that_come(
    workers: int, prepared: bool, iterable: bool
) -> None:
    from accelerate import Accelerator
    from accelerate.data_loader import prepare_data_loader, skip_first_batches

    Accelerator(cpu=True)
    loader: Any = DataLoader(numbered(iterable), batch_size=2, num_workers=workers)
    if prepared:
        loader = prepare_data_loader(loader, num_processes=1, process_index=0, put_on_device=False)
    skipping = skip_first_batches(loader, 3) if iterable else None  # which makes a sampler of its own for a stream
    observation = observe_workers(loader if skipping is None else skipping)
    for _ in range(2):
        for number, batch in enumerate(skip_first_batches(loader, 3) if skipping is None else skipping):
            made = observation.made()
            assert batch.tolist() == [2 * number + 6, 2 * number + 7]
            assert made.indices == (None if iterable else tuple(batch.tolist()))
            assert made.exact
            if iterable and workers:
                assert made.drew == (f"worker{(3 + number) % 2}.python",)
    for batch in loader if skipping is None else ():
        assert observation.made().indices == tuple(batch.tolist())


class EverySecond:
    """A user's own way to leave batches out."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        return (indices for number, indices in enumerate(self.sampler) if number % 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_where_others_deal_with_what_the_sampler_gives_no_wrong_indices_are_told(workers: int) -> None:
    loader: Any = DataLoader(numbered(False), batch_size=2, num_workers=workers)
    observation = observe_workers(loader)
    other: Any = DataLoader(loader.dataset, batch_sampler=EverySecond(loader.batch_sampler), num_workers=workers)
    for batch in other:
        assert observation.made().indices in (None, tuple(batch.tolist()))
