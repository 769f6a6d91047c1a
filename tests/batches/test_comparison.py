"""Summaries of all ranks in, differences out."""

from __future__ import annotations

import pytest

from tpcheck.batches.comparison import (
    batches_agree_within_tp,
    batches_differ_across_dp,
    deviating_ranks,
    leaf_differences,
    same_samples,
)
from tpcheck.batches.records import BatchSummary, Leaf


def leaf(
    path: str, digest: str = "0", *, dtype: str = "int64", shape: tuple[int, ...] = (2,), device: str = "cpu"
) -> Leaf:
    return Leaf(path, "tensor", dtype, shape, device, digest)


def summaries(*of_ranks: tuple[Leaf, ...]) -> dict[int, BatchSummary]:
    return {4 + number: BatchSummary(leaves=leaves) for number, leaves in enumerate(of_ranks)}


def test_equal_leaves_do_not_differ() -> None:
    one = (leaf("a"), leaf("b", device="cuda:0"))
    other = (leaf("b", device="cuda:1"), leaf("a"))
    assert leaf_differences(summaries(one, other)) == ()


@pytest.mark.parametrize(
    ("deviating", "differs"),
    [
        (leaf("a", "1"), "bits"),
        (leaf("a", dtype="int32"), "dtype"),
        (leaf("a", "1", shape=(3,)), "shape"),
        (leaf("a", device="cuda:0"), "device"),
        (Leaf("a", "value", "int", (), "", "0"), "type"),
    ],
)
def test_the_first_aspect_that_differs_is_named(deviating: Leaf, differs: str) -> None:
    (found,) = leaf_differences(summaries((leaf("a"),), (leaf("a"),), (deviating,)))
    assert (found.path, found.differs, found.deviating, found.reference) == ("a", differs, (6,), 4)


def test_missing_leaves_come_first_and_the_size_around_them_is_left_out() -> None:
    around = [Leaf("", "value", "dict", (size,), "", "0") for size in (1, 2)]
    one, other = (around[0], leaf("a")), (around[1], leaf("a", "1"), leaf("b"))
    found = leaf_differences(summaries(one, other))
    assert [(each.path, each.differs) for each in found] == [("b", "structure"), ("a", "bits")]


def test_ranks_deviate_from_the_majority() -> None:
    assert deviating_ranks({0: "a", 1: "a"}) == ((), 0)
    assert deviating_ranks({0: "b", 1: "a", 2: "a"}) == ((0,), 1)
    assert deviating_ranks({0: "b", 1: "a", 2: "a", 3: "b"}) == ((0, 1, 2, 3), 0)
    assert deviating_ranks({0: "a", 1: "b"}) == ((0, 1), 0)


def test_replicas_with_the_same_samples_are_found_in_any_order() -> None:
    found = same_samples({0: ["x", "y"], 1: ["y", "x"], 2: ["x", "z"], 3: [], 4: []})
    assert [(each.replicas, each.num_samples, each.reordered) for each in found] == [((0, 1), 2, True)]
    assert same_samples({0: ["x", "x", "y"], 1: ["x", "y", "y"]}) == ()


def test_a_finding_has_the_values_of_the_reference_and_of_each_deviating_rank() -> None:
    differences = leaf_differences(summaries((leaf("a"), leaf("b")), (leaf("a"), leaf("b")), (leaf("a", shape=(3,)),)))
    finding = batches_agree_within_tp(differences, step=2, located={}, where={"dp_rank": 1})
    assert finding.where == {"step": 2, "field": "b", "ranks": [6], "dp_rank": 1}
    assert finding.evidence == {"differs": "structure", "missing_on": [6], "also": [{"field": "a", "differs": "shape"}]}
    shapes = batches_agree_within_tp(differences[1:], step=2, located={}, where={})
    assert shapes.evidence["by_rank"] == {"rank 4": (2,), "rank 6": (3,)}


def test_the_largest_set_of_replicas_with_the_same_samples_is_reported() -> None:
    same = same_samples({0: ["x"], 1: ["y"], 2: ["y"], 3: ["x"], 4: ["x"]})
    finding = batches_differ_across_dp(same, field="ids", step=1, replicas=[(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)])
    assert finding.where == {"step": 1, "field": "ids", "ranks": [0, 1, 6, 7, 8, 9]}
    assert finding.evidence == {"replicas": [0, 3, 4], "order": "the same order", "also": [{"replicas": [1, 2]}]}
