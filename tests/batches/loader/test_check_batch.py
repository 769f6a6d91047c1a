"""`check_batch` returns the same findings on every rank, and raises nothing for a mismatch."""

from __future__ import annotations

from typing import Any

from tests.batches.loader.loops import batches
from tpcheck import Rank, World, check_batch


def test_a_batch_that_agrees_has_no_findings(square: World) -> None:
    assert square.run(lambda rank: check_batch(batches(rank)[0], topology=rank.topology)) == ((),) * 4


def test_findings_are_returned_on_every_rank(square: World) -> None:
    def check(rank: Rank) -> list[Any]:
        found = []
        for batch in batches(rank):
            if rank.rank == 1:
                batch["labels"][2] = 77
            found.append(check_batch(batch, topology=rank.topology))
        return found

    answers = square.run(check)
    assert answers.count(answers[0]) == 4
    assert [findings[0].where["field"] for findings in answers[0]] == ["labels"] * 4
    assert answers[0][0][0].where["index"] == [2]


def test_replicas_with_one_batch_are_found(square: World) -> None:
    (findings, *_) = square.run(lambda rank: check_batch(batches(rank, shift=1)[0], topology=rank.topology))
    assert [finding.check for finding in findings] == ["batches_differ_across_dp"]
