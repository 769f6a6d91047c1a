"""Replicas that train on the same samples are told; what only looks alike is not."""

from __future__ import annotations

from typing import Any

import pytest

from tests.batches.loader.loops import batches, follow
from tpcheck import Rank, World


def same(rank: Rank) -> Any:
    return batches(rank, shift=0)


def same_in_another_order(rank: Rank) -> Any:
    given = batches(rank, shift=0)
    order = [2, 0, 1] if rank.dp_rank else [0, 1, 2]
    return [{key: batch[key][order] for key in ("pixels", "labels")} for batch in given]


@pytest.mark.parametrize(("made", "order"), [(same, "the same order"), (same_in_another_order, "another order")])
def test_the_same_samples_on_two_replicas_are_a_finding(square: World, made: Any, order: str) -> None:
    seen = square.run(follow, made=made)
    assert {each.error for each in seen} == {"BatchMismatch"}
    assert len({each.text for each in seen}) == 1
    (finding,) = seen[0].findings
    assert finding.check == "batches_differ_across_dp"
    assert finding.cause == "duplicate_dp_batch"
    assert finding.where["ranks"] == [0, 1, 2, 3]
    assert finding.where["field"] == "pixels"
    assert finding.where["step"] == 0
    assert finding.observed == 3
    assert finding.evidence["order"] == order


def test_by_default_they_warn_once(square: World) -> None:
    for seen in square.run(follow, made=same, across_dp="warn"):
        assert (seen.error, seen.batches) == (None, 4)
        assert len(seen.warned) == 1


def test_they_can_be_ignored(square: World) -> None:
    for seen in square.run(follow, made=same, across_dp="ignore"):
        assert (seen.error, seen.warned) == (None, ())


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
    ours, common = batches(rank), batches(rank, shift=9)
    for one, other in zip(ours, common, strict=True):
        one["pixels"][0], one["labels"][0] = other["pixels"][0], other["labels"][0]
    return ours


@pytest.mark.parametrize(
    "made", [labels_only, constants, same_masks_and_positions, some_samples_in_common], ids=lambda made: made.__name__
)
def test_what_cannot_be_told_is_no_finding(square: World, made: Any) -> None:
    for seen in square.run(follow, made=made):
        assert (seen.error, seen.warned) == (None, ()), seen.text


def test_small_samples_are_told_after_some_steps(square: World) -> None:
    def made(rank: Rank) -> Any:
        import torch

        return list(torch.arange(64).split(4))

    seen = square.run(follow, made=made)
    assert {each.error for each in seen} == {"BatchMismatch"}
    assert 0 < seen[0].findings[0].where["step"] < 8
