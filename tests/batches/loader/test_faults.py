"""Every fault in a batch is found at its step, named by field and rank, with the same error on every rank."""

from __future__ import annotations

from typing import Any

import pytest

from tests.batches.loader.loops import Seen, follow
from tpcheck import World
from tpcheck.core.findings import Finding


def labels_alone(given: list[Any]) -> None:
    given[2]["labels"][1] += 1


def dtype_alone(given: list[Any]) -> None:
    given[2]["labels"] = given[2]["labels"].int()


def one_bit(given: list[Any]) -> None:
    import torch

    given[2]["pixels"].view(torch.int32)[1, 0, 3, 2] ^= 1


def sign_of_zero(given: list[Any]) -> None:
    given[2]["extra"]["weight"] = -0.0


def missing_key(given: list[Any]) -> None:
    del given[2]["extra"]["name"]


def another_text(given: list[Any]) -> None:
    given[2]["extra"]["name"] = "test"


def shape_alone(given: list[Any]) -> None:
    given[2]["pixels"] = given[2]["pixels"][:, :, :2]


def nested_tensor(given: list[Any]) -> None:
    given[2]["extra"]["boxes"][0][1, 3] = float("nan")


def longer_list(given: list[Any]) -> None:
    given[2]["extra"]["boxes"].append(1)


def tuple_for_list(given: list[Any]) -> None:
    given[2]["extra"]["boxes"] = tuple(given[2]["extra"]["boxes"])


FAULTS = {
    labels_alone: ("labels", "bits", [1]),
    dtype_alone: ("labels", "dtype", None),
    one_bit: ("pixels", "bits", [1, 0, 3, 2]),
    sign_of_zero: ("extra.weight", "bits", None),
    missing_key: ("extra.name", "structure", None),
    another_text: ("extra.name", "bits", None),
    shape_alone: ("pixels", "shape", None),
    nested_tensor: ("extra.boxes.0", "bits", [1, 3]),
    longer_list: ("extra.boxes.2", "structure", None),
    tuple_for_list: ("extra.boxes", "type", None),
}


def other_labels_at(step: int) -> Any:
    def fault(rank: Any, given: list[Any]) -> None:
        given[step]["labels"] += rank.rank

    return fault


def the_finding(seen: tuple[Seen, ...], error: str = "BatchMismatch") -> Finding:
    """Return the one finding that all ranks have."""
    assert {each.error for each in seen} == {error}, [each.text for each in seen]
    assert len({each.text for each in seen}) == 1
    (finding,) = seen[0].findings
    assert isinstance(finding, Finding)
    return finding


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_found_at_its_step_by_field(four: World, fault: Any) -> None:
    seen = four.run(follow, lambda rank, given: fault(given) if rank.rank == 2 else None)
    field, differs, index = FAULTS[fault]
    finding = the_finding(seen)
    assert finding.check == "batches_agree_within_tp"
    assert finding.where["field"] == field
    assert finding.where["step"] == 2
    assert finding.where["ranks"] == [2]  # against the majority
    assert finding.where.get("index") == index
    assert finding.evidence["differs"] == differs
    assert {each.batches for each in seen} == {2}


def test_a_mismatch_counts_elements_and_samples_and_shows_both_values(four: World) -> None:
    def fault(rank: Any, given: list[Any]) -> None:
        if rank.rank == 3:
            given[1]["pixels"][1:, 1, 2, 3] = 7.0

    finding = the_finding(four.run(follow, fault))
    evidence = finding.evidence
    assert finding.observed == evidence["count_differing"] == 2
    assert evidence["count_total"] == 96
    assert (evidence["samples_differing"], evidence["samples_total"], evidence["first_sample"]) == (2, 3, 1)
    assert evidence["values"]["rank 3"] == 7.0
    assert evidence["values"]["rank 0"] != 7.0


def test_two_ranks_have_no_majority(pair: World) -> None:
    finding = the_finding(pair.run(follow, lambda rank, given: labels_alone(given) if rank.rank else None))
    assert finding.where["ranks"] == [0, 1]


def test_several_fields_are_one_finding(pair: World) -> None:
    def fault(rank: Any, given: list[Any]) -> None:
        if rank.rank:
            given[0]["labels"] += 1
            given[0]["pixels"] += 1
            given[0]["more"] = 1

    finding = the_finding(pair.run(follow, fault))
    assert finding.where["field"] == "more"
    assert finding.evidence["also"] == [
        {"field": "pixels", "differs": "bits"},
        {"field": "labels", "differs": "bits"},
    ]


def test_ranks_of_other_replicas_stop_with_the_same_error(square: World) -> None:
    seen = square.run(follow, lambda rank, given: one_bit(given) if rank.rank == 3 else None)
    finding = the_finding(seen)
    assert finding.where["dp_rank"] == 1
    assert finding.where["ranks"] == [2, 3]


def test_a_large_tensor_is_searched_in_pieces(pair: World) -> None:
    def made(rank: Any) -> list[Any]:
        import torch

        data = torch.arange(3 << 20, dtype=torch.int32).reshape(3, 1 << 20)
        data[:, 5::1000] += rank.rank
        return [{"x": data}]

    finding = the_finding(pair.run(follow, made=made))
    assert finding.where["index"] == [0, 5]
    assert finding.observed == 3 * len(range(5, 1 << 20, 1000))


def test_every_other_batch_is_compared(pair: World) -> None:
    assert {each.error for each in pair.run(follow, other_labels_at(1), every=2)} == {None}
    assert the_finding(pair.run(follow, other_labels_at(2), every=2)).where["step"] == 2


def test_warn_warns_once_for_each_field_and_goes_on(pair: World) -> None:
    def fault(rank: Any, given: list[Any]) -> None:
        for batch in given[1:]:
            batch["labels"] += rank.rank

    for seen in pair.run(follow, fault, on_mismatch="warn"):
        assert (seen.error, seen.batches, len(seen.warned)) == (None, 4, 1)
        assert "batches_agree_within_tp  labels" in seen.warned[0]


def test_a_callable_gets_every_report(pair: World) -> None:
    def fault(rank: Any, given: list[Any]) -> None:
        for batch in given[1:]:
            batch["labels"] += rank.rank

    for seen in pair.run(follow, fault, on_mismatch="call"):
        assert (seen.error, seen.batches, seen.reports) == (None, 4, 3)


def test_overlapped_a_mismatch_is_told_one_step_later(pair: World) -> None:
    seen = pair.run(follow, lambda rank, given: one_bit(given) if rank.rank else None, overlap=True)
    finding = the_finding(seen)
    assert finding.where["step"] == 2
    assert finding.where["index"] == [1, 0, 3, 2]
    assert {each.batches for each in seen} == {3}


def test_overlapped_the_last_batch_is_told_of_at_the_end(pair: World) -> None:
    assert the_finding(pair.run(follow, other_labels_at(3), overlap=True)).where["step"] == 3
