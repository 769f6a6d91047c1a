"""A watched loader can be used as the loader inside."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

import tpcheck
from tests.batches.loader.loops import batches
from tpcheck import Rank, Topology, UsageError, World


def test_attributes_and_length_are_those_of_the_loader_inside() -> None:
    import torch
    from torch.utils.data import DataLoader, DistributedSampler

    dataset = torch.arange(10)
    sampler = DistributedSampler(dataset, num_replicas=1, rank=0)  # type: ignore[arg-type]
    loader = DataLoader(dataset, batch_size=2, sampler=sampler)  # type: ignore[arg-type]
    watched = tpcheck.watch(loader, topology=Topology())
    assert len(watched) == 5
    assert watched.dataset is dataset
    assert watched.sampler is sampler
    assert watched.batch_size == 2
    watched.sampler.set_epoch(3)
    assert sampler.epoch == 3
    watched.note = "kept"
    assert loader.note == "kept"  # type: ignore[attr-defined]
    assert repr(watched).startswith("tpcheck.watch(<torch.utils.data.dataloader.DataLoader")


def test_state_goes_to_the_loader_inside() -> None:
    class Stateful:
        def __init__(self) -> None:
            self.state = {"at": 0}

        def __iter__(self) -> Iterator[int]:
            return iter(range(3))

        def state_dict(self) -> dict[str, int]:
            return self.state

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.state = state

    loader = Stateful()
    watched = tpcheck.watch(loader)
    watched.load_state_dict({"at": 2})
    assert watched.state_dict() == loader.state == {"at": 2}


def test_a_watched_loader_has_only_the_attributes_of_the_loader_inside() -> None:
    watched = tpcheck.watch(number for number in range(3))
    assert not hasattr(watched, "set_epoch")
    with pytest.raises(TypeError, match="has no len"):
        len(watched)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0: expected a positive integer"),
        ({"on_mismatch": "panic"}, "on_mismatch='panic': expected raise, warn, or a callable"),
        ({"across_dp": "stop"}, "across_dp='stop': expected one of raise, warn, ignore"),
        ({"timeout": 0}, "timeout=0: expected seconds above 0"),
    ],
)
def test_wrong_arguments_raise_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tpcheck.watch([1], **options)
    with pytest.raises(UsageError, match="loader='int': expected an iterable of batches"):
        tpcheck.watch(3)  # type: ignore[arg-type]


def test_the_last_line_names_what_is_not_looked_into() -> None:
    watched = tpcheck.watch([{"x": 1, "left": iter([1])}])
    list(watched)
    assert "; not looked into: left (list_iterator); " in watched.watcher._tally.conclusion()


def test_with_overlap_one_thread_stays_until_the_loader_is_gone() -> None:
    before = {*threading.enumerate()}
    watched = tpcheck.watch([1, 2, 3], overlap=True)
    for _ in range(3):
        assert list(watched) == [1, 2, 3]
    (thread,) = {*threading.enumerate()} - before
    del watched
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_a_process_alone_gets_its_batches() -> None:
    batches = [{"ids": [1, 2]}, {"ids": [3, 4]}]
    loader = tpcheck.watch(batches)
    assert [*loader] == [*loader] == batches
    assert tpcheck.check_batch(batches[0]) == ()


def test_where_a_launcher_has_started_ranks_that_have_not_met_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"expected initialised process groups"):
        next(iter(tpcheck.watch([1])))
    with pytest.raises(UsageError, match=r"expected initialised process groups"):
        tpcheck.check_batch({})


def loaders(rank: Rank) -> list[Any]:
    import torch
    from torch.utils.data import DataLoader, IterableDataset

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(torch.arange(8.0).unbind())

    dataset: Any = torch.arange(24.0)
    return [
        DataLoader(dataset, batch_size=4),
        DataLoader(dataset, batch_size=4, num_workers=2, persistent_workers=True),
        DataLoader(Stream(), batch_size=4),
        DataLoader(dataset, batch_size=None),
    ]


def test_torch_loaders_give_the_same_batches(pair: World) -> None:
    def compare(rank: Rank) -> list[bool]:
        import torch

        same = []
        for original, inner in zip(loaders(rank), loaders(rank), strict=True):
            expected = [*original, *original]
            watched = tpcheck.watch(inner, topology=rank.topology)
            actual = [*watched, *watched]
            same.append(len(actual) == len(expected) and all(map(torch.equal, actual, expected)))
        return same

    assert pair.run(compare) == ([True] * 4, [True] * 4)


def test_accelerate_loaders_are_watched(square: World) -> None:
    def prepared(rank: Rank) -> tuple[int, int, str]:
        import torch
        from accelerate.data_loader import prepare_data_loader
        from torch.utils.data import DataLoader

        dataset: Any = torch.arange(32.0 * 8).reshape(32, 8)
        loader = prepare_data_loader(
            DataLoader(dataset, batch_size=4), num_processes=2, process_index=rank.dp_rank, put_on_device=False
        )
        watched = tpcheck.watch(loader, topology=rank.topology, across_dp="raise")
        watched.set_epoch(1)
        return len(watched), sum(1 for _ in watched), type(watched._loader).__name__

    assert set(square.run(prepared)) == {(4, 4, "DataLoaderShard")}


def test_two_watched_loaders_take_turns(pair: World) -> None:
    def both(rank: Rank) -> int:
        train = tpcheck.watch(batches(rank), topology=rank.topology)
        evaluation = tpcheck.watch(batches(rank, number=2), topology=rank.topology)
        return sum(1 for _ in train for _ in evaluation)

    assert pair.run(both) == (8, 8)


def test_a_group_or_a_topology_may_be_given(square: World) -> None:
    def sources(rank: Rank) -> tuple[str, str]:
        by_group = tpcheck.watch(batches(rank), group=rank.group("tp"))
        by_both = tpcheck.watch(batches(rank), group=rank.group("tp"), topology=rank.topology)
        list(by_group)
        return by_group.watcher.source, by_both.watcher.source

    by_group, by_both = square.run(sources)[2]
    assert by_group == "TP group (2, 3), DP group (2), from the argument group"
    assert by_both == "TP group (2, 3), DP group (0, 2), from the arguments group and topology"
