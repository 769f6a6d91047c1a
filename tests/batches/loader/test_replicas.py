"""Replicas that train on the same samples are found; samples that are equal by chance are not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.batches.loader.loops import batches, run_loop
from tpcheck import Rank, World


def same(rank: Rank) -> Any:
    return batches(rank, shift=0)


def same_in_another_order(rank: Rank) -> Any:
    given = batches(rank, shift=0)
    order = [2, 0, 1] if rank.dp_rank else [0, 1, 2]
    return [{key: batch[key][order] for key in ("pixels", "labels")} for batch in given]


@pytest.mark.parametrize(("make", "order"), [(same, "the same order"), (same_in_another_order, "another order")])
def test_the_same_samples_on_two_replicas_are_a_finding(square: World, make: Any, order: str) -> None:
    results = square.run(run_loop, make=make)
    assert {each.error for each in results} == {"BatchMismatch"}
    assert len({each.text for each in results}) == 1
    (finding,) = results[0].findings
    assert finding.check == "batches_differ_across_dp"
    assert finding.cause == "duplicate_dp_batch"
    assert finding.where["ranks"] == [0, 1, 2, 3]
    assert finding.where["field"] == "pixels"
    assert finding.where["step"] == 0
    assert finding.observed == 3
    assert finding.evidence["order"] == order


def test_by_default_the_same_samples_warn_once(square: World) -> None:
    for result in square.run(run_loop, make=same, across_dp="warn"):
        assert (result.error, result.batches) == (None, 4)
        assert len(result.warned) == 1


def test_the_same_samples_can_be_ignored(square: World) -> None:
    for result in square.run(run_loop, make=same, across_dp="ignore"):
        assert (result.error, result.warned) == (None, ())


def labels_only(rank: Rank) -> Any:
    import torch

    return [{"labels": torch.tensor([0, 1, 1, 0])}, {"labels": torch.tensor([1, 1, 0, 0])}]


def constants(rank: Rank) -> Any:
    import torch

    return [{"x": torch.ones(4, 100), "mask": torch.zeros(4, 100, dtype=torch.bool)} for _ in range(9)]


def same_masks_and_positions(rank: Rank) -> Any:
    import torch

    generator = torch.Generator().manual_seed(rank.dp_rank)
    return [
        {
            "positions": torch.arange(64).repeat(4, 1),
            "mask": torch.ones(4, 64, 64),
            "ids": torch.randint(100, (4, 16), generator=generator),
        }
        for _ in range(3)
    ]


def some_samples_in_common(rank: Rank) -> Any:
    given, common = batches(rank), batches(rank, shift=9)
    for batch, shared in zip(given, common, strict=True):
        batch["pixels"][0], batch["labels"][0] = shared["pixels"][0], shared["labels"][0]
    return given


@pytest.mark.parametrize(
    "make", [labels_only, constants, same_masks_and_positions, some_samples_in_common], ids=lambda make: make.__name__
)
def test_samples_that_may_be_equal_by_chance_are_not_a_finding(square: World, make: Any) -> None:
    for result in square.run(run_loop, make=make):
        assert (result.error, result.warned) == (None, ()), result.text


def test_small_samples_are_found_after_some_steps(square: World) -> None:
    def make(rank: Rank) -> Any:
        import torch

        return list(torch.arange(64).split(4))

    results = square.run(run_loop, make=make)
    assert {each.error for each in results} == {"BatchMismatch"}
    assert 0 < results[0].findings[0].where["step"] < 8
