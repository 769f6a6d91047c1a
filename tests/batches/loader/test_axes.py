"""Ranks of pipeline stages and slices of a sequence are neither replicas nor copies, however the batch is cut."""

from __future__ import annotations

from typing import Any

import pytest

import tpcheck
from tests.batches.loader.loops import run_loop
from tpcheck import Rank, Topology, World


def sequences(rank: Rank, cut: str = "") -> Any:
    """Return batches of 4 sequences; with `cut`, this rank's slice of each: its half, or the zigzag of Megatron."""
    import torch

    batches = []
    for step in range(3):
        tokens = torch.randint(50_000, (4, 16), generator=torch.Generator().manual_seed(step))
        first, second, third, fourth = tokens.chunk(4, dim=1)
        halves = {"halves": ((first, second), (third, fourth)), "zigzag": ((first, fourth), (second, third))}.get(cut)
        batches.append({"tokens": tokens if halves is None else torch.cat(halves[rank.rank // 2], dim=1)})
    return batches


def halves(rank: Rank) -> Any:
    return sequences(rank, "halves")


def zigzag(rank: Rank) -> Any:
    return sequences(rank, "zigzag")


CP, PP = Topology(tp=2, cp=2), Topology(tp=2, pp=2)


@pytest.mark.parametrize(("topology", "make"), [(PP, sequences), (CP, sequences), (CP, halves), (CP, zigzag)])
def test_the_same_batches_and_slices_of_them_are_right(square: World, topology: Topology, make: Any) -> None:
    for result in square.run(run_loop, make=make, topology=topology, over_steps="warn"):
        assert (result.error, result.batches, result.warned) == (None, 3, ())


def other_tokens_on_rank_3(rank: Rank, batches: Any) -> None:
    if rank.rank == 3:
        batches[1]["tokens"][2, 5] += 1


def test_a_tp_group_is_compared_within_its_stage(square: World) -> None:
    results = square.run(run_loop, other_tokens_on_rank_3, make=sequences, topology=PP)
    assert [result.error for result in results] == [None, None, "BatchMismatch", "BatchMismatch"]
    assert results[3].findings[0].where["ranks"] == [2, 3]


def test_the_last_line_names_what_is_not_compared(square: World) -> None:
    def watch(rank: Rank) -> str:
        from tpcheck.batches.options import WatchOptions
        from tpcheck.batches.watcher import Watcher

        watcher = Watcher(WatchOptions(topology=CP))
        watcher.check(sequences(rank)[0])
        return watcher._tally.conclusion()

    assert square.run(watch)[0] == (
        "1 batch compared within TP group (0, 1), from topology; not compared across cp (ranks 0, 2); no difference"
    )


def test_the_last_line_counts_the_batch_that_differs(square: World) -> None:
    def watch(rank: Rank) -> str:
        from tpcheck.batches.options import WatchOptions
        from tpcheck.batches.watcher import Watcher

        watcher, batch = Watcher(WatchOptions(topology=CP)), sequences(rank)[0]
        batch["tokens"][0, 0] += rank.rank % 2
        with pytest.raises(tpcheck.BatchMismatch):
            watcher.check(batch)
        return watcher._tally.conclusion()

    assert square.run(watch)[0].startswith("1 batch compared within TP group (0, 1), from topology")
    assert square.run(watch)[0].endswith("; 1 finding, reported above")
