"""Every fault in a batch is found at its step, with its field and rank, and with the same error on every rank."""

from __future__ import annotations

from typing import Any

from tests.batches.loader.loops import LoopResult, batches, run_loop
from tpcheck import Rank, World, check_batch
from tpcheck.core.findings import Finding


def labels_alone(batch: Any) -> None:
    batch["labels"][1] += 1


def dtype_alone(batch: Any) -> None:
    batch["labels"] = batch["labels"].int()


def one_bit(batch: Any) -> None:
    import torch

    batch["pixels"].view(torch.int32)[1, 0, 3, 2] ^= 1


def sign_of_zero(batch: Any) -> None:
    batch["extra"]["weight"] = -0.0


def missing_key(batch: Any) -> None:
    del batch["extra"]["name"]


def another_text(batch: Any) -> None:
    batch["extra"]["name"] = "test"


def shape_alone(batch: Any) -> None:
    batch["pixels"] = batch["pixels"][:, :, :2]


def nested_tensor(batch: Any) -> None:
    batch["extra"]["boxes"][0][1, 3] = float("nan")


def scalar_tensor(batch: Any) -> None:
    batch["scale"] += 1


def longer_list(batch: Any) -> None:
    batch["extra"]["boxes"].append(1)


def tuple_for_list(batch: Any) -> None:
    batch["extra"]["boxes"] = tuple(batch["extra"]["boxes"])


FAULTS = {
    labels_alone: ("labels", "bits", [1]),
    dtype_alone: ("labels", "dtype", None),
    one_bit: ("pixels", "bits", [1, 0, 3, 2]),
    sign_of_zero: ("extra.weight", "bits", None),
    missing_key: ("extra.name", "structure", None),
    another_text: ("extra.name", "bits", None),
    shape_alone: ("pixels", "shape", None),
    nested_tensor: ("extra.boxes.0", "bits", [1, 3]),
    scalar_tensor: ("scale", "bits", None),
    longer_list: ("extra.boxes.2", "structure", None),
    tuple_for_list: ("extra.boxes", "type", None),
}


def other_labels_at(step: int) -> Any:
    def fault(rank: Any, given: list[Any]) -> None:
        given[step]["labels"] += rank.rank

    return fault


def other_labels_from_the_second_batch(rank: Any, given: list[Any]) -> None:
    for batch in given[1:]:
        batch["labels"] += rank.rank


def the_finding(results: tuple[LoopResult, ...], error: str = "BatchMismatch") -> Finding:
    """Return the one finding that all ranks have."""
    assert {each.error for each in results} == {error}, [each.text for each in results]
    assert len({each.text for each in results}) == 1
    (finding,) = results[0].findings
    assert isinstance(finding, Finding)
    return finding


def check_each_fault(rank: Rank) -> list[Finding]:
    findings: list[Finding] = []
    for fault in FAULTS:
        (batch,) = batches(rank, number=1)
        if rank.rank == 2:
            fault(batch)
        findings += check_batch(batch, topology=rank.topology)
    return findings


def test_every_fault_is_found_by_field_and_rank(four: World) -> None:
    findings_by_rank = four.run(check_each_fault)
    assert findings_by_rank.count(findings_by_rank[0]) == 4
    for finding, (field, differs, index) in zip(findings_by_rank[0], FAULTS.values(), strict=True):
        assert finding.check == "batches_agree_within_tp"
        assert (finding.where["field"], finding.evidence["differs"]) == (field, differs)
        assert finding.where["ranks"] == [2]  # against the majority
        assert finding.where.get("index") == index


def test_a_fault_ends_the_loop_at_its_step(four: World) -> None:
    results = four.run(run_loop, lambda rank, given: one_bit(given[2]) if rank.rank == 2 else None)
    finding = the_finding(results)
    assert (finding.where["field"], finding.where["step"], finding.where["ranks"]) == ("pixels", 2, [2])
    assert {each.batches for each in results} == {2}


def test_a_mismatch_counts_elements_and_samples_and_shows_both_values(four: World) -> None:
    def fault(rank: Any, given: list[Any]) -> None:
        if rank.rank == 3:
            given[1]["pixels"][1:, 1, 2, 3] = 7.0

    finding = the_finding(four.run(run_loop, fault))
    evidence = finding.evidence
    assert finding.observed == evidence["count_differing"] == 2
    assert evidence["count_total"] == 96
    assert (evidence["samples_differing"], evidence["samples_total"], evidence["first_sample"]) == (2, 3, 1)
    assert evidence["values"]["rank 3"] == 7.0
    assert evidence["values"]["rank 0"] != 7.0


def test_several_fields_are_one_finding(pair: World) -> None:
    def fault(rank: Any, given: list[Any]) -> None:
        if rank.rank:
            given[0]["labels"] += 1
            given[0]["pixels"] += 1
            given[0]["more"] = 1

    finding = the_finding(pair.run(run_loop, fault))
    assert finding.where["field"] == "more"
    assert finding.evidence["also"] == [
        {"field": "pixels", "differs": "bits"},
        {"field": "labels", "differs": "bits"},
    ]


def test_ranks_of_other_replicas_end_with_the_same_error(square: World) -> None:
    results = square.run(run_loop, lambda rank, given: one_bit(given[2]) if rank.rank == 3 else None)
    finding = the_finding(results)
    assert finding.where["dp_rank"] == 1
    assert finding.where["ranks"] == [2, 3]


def test_a_large_tensor_is_compared_in_pieces(pair: World) -> None:
    def make(rank: Any) -> list[Any]:
        import torch

        data = torch.arange(3 << 20, dtype=torch.int32).reshape(3, 1 << 20)
        data[:, 5::1000] += rank.rank
        return [{"x": data}]

    finding = the_finding(pair.run(run_loop, make=make))
    assert finding.where["index"] == [0, 5]
    assert finding.observed == 3 * len(range(5, 1 << 20, 1000))


def test_with_every_2_every_other_batch_is_compared(pair: World) -> None:
    assert {each.error for each in pair.run(run_loop, other_labels_at(1), every=2)} == {None}
    assert the_finding(pair.run(run_loop, other_labels_at(2), every=2)).where["step"] == 2


def test_warn_warns_once_for_each_field_and_goes_on(pair: World) -> None:
    results = pair.run(run_loop, other_labels_from_the_second_batch, on_mismatch="warn")
    for result in results:
        assert (result.error, result.batches, len(result.warned)) == (None, 4, 1)
    assert "batches_agree_within_tp  labels\n  where" in results[0].warned[0]
    assert results[1].warned[0] == (
        "tpcheck: batches_agree_within_tp labels at step 1 on ranks 0, 1 (cause unknown); rank 0 prints the report"
    )


def test_a_callable_gets_every_report(pair: World) -> None:
    for result in pair.run(run_loop, other_labels_from_the_second_batch, on_mismatch="call"):
        assert (result.error, result.batches, result.reports) == (None, 4, 3)


def test_with_overlap_a_mismatch_is_reported_one_step_later(pair: World) -> None:
    results = pair.run(run_loop, lambda rank, given: one_bit(given[2]) if rank.rank else None, overlap=True)
    finding = the_finding(results)
    assert finding.where["step"] == 2
    assert finding.where["index"] == [1, 0, 3, 2]
    assert {each.batches for each in results} == {3}


def test_with_overlap_the_last_batch_is_reported_at_the_end(pair: World) -> None:
    assert the_finding(pair.run(run_loop, other_labels_at(3), overlap=True)).where["step"] == 3
