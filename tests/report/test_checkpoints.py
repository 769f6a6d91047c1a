"""Every cause of a checkpoint has a phrase, and tensors with one explanation are reported together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tpcheck.core.check_names import CHECKPOINT_CHECK
from tpcheck.core.findings import Finding
from tpcheck.report import checkpoints


def finding(cause: str | None, parameter: str = "a", where: dict[str, Any] | None = None, **details: Any) -> Finding:
    place = {"parameter": parameter, **(where or {})}
    return Finding(CHECKPOINT_CHECK, place, 1.0, 0.0, cause, {"story": details, "count_tensors": 9})


PHRASES: dict[str, tuple[Finding, str]] = {
    "a rank's slice": (
        finding("shard_missing", dim=0, tp_rank=1, tp=4),
        "shard_missing: the tensor is TP rank 1's slice of the reference along dim 0, of 4 ranks",
    ),
    "a rank's slice of blocks": (
        finding("shard_missing", dim=0, tp_rank=1, tp=2, blocks=[8, 4]),
        "shard_missing: the tensor is TP rank 1's slice of the reference along dim 0, of 2 ranks, of each of the "
        "blocks of [8, 4]",
    ),
    "another slice": (
        finding("shard_missing", dim=1, tp_rank=None, **{"from": 3}),
        "shard_missing: the tensor is a slice of the reference along dim 1, from index 3",
    ),
    "an order": (
        finding("shard_order_swapped", dim=0, order=[1, 0]),
        "shard_order_swapped: the tensor holds the reference's shards [1, 0] along dim 0",
    ),
    "fused": (
        finding("fused_blocks_interleaved", dim=0, blocks=[8, 4, 4], parts=2),
        "fused_blocks_interleaved: fused blocks of [8, 4, 4], in 2 parts each, are in another order than in the "
        "reference along dim 0",
    ),
    "padding": (
        finding("vocab_offset_wrong", dim=0, padding=[[8, 10], [18, 20]]),
        "vocab_offset_wrong: the reference is complete along dim 0, with padding at 8 to 9, 18 to 19",
    ),
    "a shift": (
        finding("wrong_shard_boundary", dim=0, first_wrong=8, holds=7),
        "wrong_shard_boundary: index 8 along dim 0 holds the reference's 7",
    ),
    "a tie": (
        finding("tied_weight_dropped", tied_with=["b", "c"]),
        "tied_weight_dropped: the reference ties it with b, c",
    ),
    "another name": (
        finding("tensor_missing", stands_as="b"),
        "tensor_missing: its bits are there under the name b",
    ),
    "copies": (finding("not_sharded", copies=2), "not_sharded: the tensor is 2 whole copies, concatenated"),
    "bit 0": (finding("bit_flipped", bit=0), "bit_flipped: bit 0 of one element differs"),
    "no details": (finding("tensor_missing"), "tensor_missing: the tensor is absent"),
    "a cause of a third party": (finding("other"), "other"),
    "no cause": (finding(None), "unknown: none of the known causes explains it"),
}


@pytest.mark.parametrize("name", PHRASES)
def test_a_cause_is_a_phrase(name: str) -> None:
    of, phrase = PHRASES[name]
    assert checkpoints.cause(of) == phrase


def test_findings_are_grouped_by_cause_and_rank_but_not_by_length() -> None:
    shards = [finding("shard_missing", name, tp_rank=0, tp=2, **{"from": length}) for length, name in enumerate("abc")]
    others = [finding("shard_missing", "d", tp_rank=1, tp=2), finding("all_zero", "e")]
    groups = checkpoints.group_by_explanation([*others, *shards])
    assert [[one.where["parameter"] for one in group] for group in groups] == [["a", "b", "c"], ["d"], ["e"]]


def test_each_way_to_save_is_a_group() -> None:
    findings = [finding("all_zero", where={"field": way}) for way in ("save_16bit_model", "save_checkpoint")]
    assert len(checkpoints.group_by_explanation(findings)) == 2


def test_what_differs_beside_values_is_said() -> None:
    def amount(**evidence: Any) -> str | None:
        return checkpoints.amount(Finding(CHECKPOINT_CHECK, {}, 1.0, 0.0, None, evidence))

    assert amount(only_in="actual") == "only in actual"
    assert amount(only_in="reference") == "only in the reference"
    dtypes = {"dtype_actual": "float16", "dtype_expected": "float32"}
    assert amount(**dtypes, same_values=True) == "dtype float16, expected float32; the values are the same"
    assert amount(count_differing=3) is None
    assert checkpoints.amount(finding("replica_drift")) == "its copies differ"


def test_tensors_that_the_reference_lacks_are_not_counted_among_its_own() -> None:
    extra = [finding("tensor_unexpected", name) for name in "ab"]
    extra = [replace(each, evidence={**each.evidence, "only_in": "actual"}) for each in extra]
    assert checkpoints.group_summary(extra).head == "2 tensors"
    assert checkpoints.group_summary([finding("all_zero", name) for name in "ab"]).head == "2 of 9 tensors"
