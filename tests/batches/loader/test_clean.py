"""Batches that agree cause no finding."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest

from tests.batches.loader.loops import LoopResult, batches, run_loop
from tpcheck import Rank, World


def plain(rank: Rank) -> Any:
    return batches(rank)


def with_nan(rank: Rank) -> Any:
    given = batches(rank)
    for batch in given:
        batch["pixels"][0, 0] = math.nan
        batch["loss"] = float("nan")
    return given


def empty(rank: Rank) -> Any:
    import torch

    return [{"x": torch.zeros(0, 3), "y": torch.zeros(3, 0)}, {}, [], torch.zeros(0), None]


def no_batches(rank: Rank) -> Any:
    return []


def generator(rank: Rank) -> Iterator[Any]:
    yield from batches(rank)


def sets_and_other_orders(rank: Rank) -> Any:
    names = ["b", "a"] if rank.rank % 2 else ["a", "b"]
    return [{name: {"ids": frozenset(names)} for name in names}]


def sparse_and_nested(rank: Rank) -> Any:
    import torch

    rows = [torch.ones(2) + rank.dp_rank, torch.ones(3)]
    return [
        {
            "sparse": torch.eye(3).to_sparse() * (1 + rank.dp_rank),
            "jagged": torch.nested.nested_tensor(rows, layout=torch.jagged),
            "bits": torch.tensor([True, False]),
            "half": torch.ones(2, dtype=torch.bfloat16),
        }
    ]


CLEAN = (plain, with_nan, empty, no_batches, generator, sets_and_other_orders, sparse_and_nested)


def run_each(rank: Rank, overlap: bool) -> list[LoopResult]:
    return [run_loop(rank, make=make, overlap=overlap, epochs=2) for make in CLEAN]


@pytest.mark.parametrize("overlap", [False, True])
def test_batches_that_agree_pass(square: World, overlap: bool) -> None:
    for results in square.run(run_each, overlap):
        for make, result in zip(CLEAN, results, strict=True):
            assert (result.error, result.warned) == (None, ()), (make.__name__, result.text)


def test_the_memory_format_makes_no_difference(pair: World) -> None:
    def fault(rank: Rank, given: list[Any]) -> None:
        import torch

        for batch in given:
            if rank.rank:
                batch["pixels"] = batch["pixels"].contiguous(memory_format=torch.channels_last)

    assert {each.error for each in pair.run(run_loop, fault)} == {None}


def test_a_world_without_tp_compares_replicas_alone(pair: World) -> None:
    from tpcheck import Topology

    for result in pair.run(run_loop, topology=Topology(dp=2), make=lambda rank: batches(rank, shift=rank.rank)):
        assert result.error is None
    for result in pair.run(run_loop, topology=Topology(dp=2)):  # rank.dp_rank is 0 on both: the same samples
        assert result.error == "BatchMismatch"
        assert result.findings[0].check == "batches_differ_across_dp"
