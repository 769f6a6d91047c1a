"""Summaries of all ranks in, differences out."""

from __future__ import annotations

import pytest

from tpcheck.batches.comparison import (
    batches_agree_within_tp,
    batches_differ_across_dp,
    deviating_ranks,
    leaf_differences,
    same_samples,
    uneven_batches,
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


def test_the_size_of_a_container_is_left_out_only_around_a_missing_leaf() -> None:
    sizes = [Leaf("boxes", "value", "list", (size,), "", "0") for size in (1, 2)]
    other = [Leaf("name", "value", "str", (), "", digest) for digest in "ab"]
    found = leaf_differences(summaries((sizes[0], other[0]), (sizes[1], other[1], leaf("x"))))
    assert [(each.path, each.differs) for each in found] == [("x", "structure"), ("boxes", "shape"), ("name", "bits")]


def test_a_container_that_has_a_missing_part_may_differ_in_more_than_its_size() -> None:
    types = [Leaf("boxes", "value", kind, (size,), "", "0") for size, kind in enumerate(("list", "tuple"))]
    tensor, part = Leaf("boxes", "tensor", "int64", (3,), "cpu", "0"), leaf("boxes.0")
    assert [each.path for each in leaf_differences(summaries((types[0],), (types[1], part)))] == ["boxes.0", "boxes"]
    assert [each.path for each in leaf_differences(summaries((tensor,), (types[1], part)))] == ["boxes.0", "boxes"]
    shapes = [Leaf("boxes", "tensor", "int64", (size,), "cpu", "0") for size in range(2)]
    assert [each.path for each in leaf_differences(summaries((shapes[0],), (shapes[1], part)))] == ["boxes.0", "boxes"]


def test_the_size_of_a_container_is_left_out_where_a_rank_lacks_its_part() -> None:
    sizes = [Leaf("boxes", "value", "list", (size,), "", "0") for size in (1, 2)]
    parts = [leaf("boxes.0"), leaf("boxes.1")]
    found = leaf_differences(summaries((sizes[0], parts[0]), (sizes[1], *parts), (sizes[1], *parts, leaf("x"))))
    assert [(each.path, each.differs) for each in found] == [("boxes.1", "structure"), ("x", "structure")]


def test_ranks_deviate_from_the_majority() -> None:
    assert deviating_ranks({0: "a", 1: "a"}) == ((), 0)
    assert deviating_ranks({0: "b", 1: "a", 2: "a"}) == ((0,), 1)
    assert deviating_ranks({0: "b", 1: "a", 2: "a", 3: "b"}) == ((0, 1, 2, 3), 0)
    assert deviating_ranks({0: "a", 1: "b"}) == ((0, 1), 0)


def test_replicas_with_the_same_samples_are_found_in_any_order() -> None:
    found = same_samples({0: ["x", "y"], 1: ["y", "x"], 2: ["x", "z"], 3: [], 4: []})
    assert [(each.replicas, each.num_samples, each.reordered) for each in found] == [((0, 1), 2, True)]
    assert same_samples({0: ["x", "x", "y"], 1: ["x", "y", "y"]}) == ()


def test_replicas_with_other_questions_on_the_same_images_have_other_samples() -> None:
    rows = {replica: [1, 2] for replica in range(3)}
    (found,) = same_samples(rows, {0: b"a", 1: b"b", 2: b"a"})
    assert found.replicas == (0, 2)


def test_a_finding_has_the_values_of_the_reference_and_of_each_deviating_rank() -> None:
    differences = leaf_differences(summaries((leaf("a"), leaf("b")), (leaf("a"), leaf("b")), (leaf("a", shape=(3,)),)))
    finding = batches_agree_within_tp(differences, step=2, located={}, where={"dp_rank": 1})
    assert finding.where == {"step": 2, "field": "b", "ranks": [6], "dp_rank": 1}
    assert finding.evidence == {"differs": "structure", "missing_on": [6], "also": [{"field": "a", "differs": "shape"}]}
    shapes = batches_agree_within_tp(differences[1:], step=2, located={}, where={})
    assert shapes.evidence["by_rank"] == {"rank 4": (2,), "rank 6": (3,)}
    assert (shapes.observed, shapes.allowed) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("deviating", "by_rank"),
    [
        (leaf("", dtype="int32"), {"rank 4": "int64", "rank 5": "int32"}),
        (Leaf("", "value", "int", (), "", "0"), {"rank 4": "int64", "rank 5": "int"}),
        (leaf("", device="cuda:0"), {"rank 4": "cpu", "rank 5": "cuda:0"}),
        (leaf("", "1"), None),  # of bits `locate` knows more
    ],
)
def test_a_finding_on_the_whole_batch_has_the_values_of_two_ranks(deviating: Leaf, by_rank: dict[str, str]) -> None:
    differences = leaf_differences(summaries((leaf(""),), (deviating,)))
    finding = batches_agree_within_tp(differences, step=2, located={"index": [1], "count_differing": 7}, where={})
    assert finding is not None
    assert finding.where == {"step": 2, "field": "(the whole batch)", "ranks": [4, 5], "index": [1]}
    assert finding.evidence.get("by_rank") == by_rank
    assert "index" not in finding.evidence
    assert finding.observed == 7


def test_a_plain_value_of_another_type_differs_in_type() -> None:
    values = [Leaf("a", "value", kind, (), "", "0") for kind in ("int", "bool")]
    (found,) = leaf_differences(summaries(*((value,) for value in values)))
    assert found.differs == "type"


def test_the_largest_set_of_replicas_with_the_same_samples_is_reported() -> None:
    same = same_samples({0: ["x"], 1: ["y"], 2: ["y"], 3: ["x"], 4: ["x"]})
    finding = batches_differ_across_dp(same, field="ids", step=1, replicas=[(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)])
    assert finding.where == {"step": 1, "field": "ids", "ranks": [0, 1, 6, 7, 8, 9]}
    assert finding.evidence == {"replicas": [0, 3, 4], "order": "the same order", "also": [{"replicas": [1, 2]}]}
    assert (finding.observed, finding.allowed) == (1.0, 0.0)


def test_samples_in_another_order_are_reported_as_such() -> None:
    finding = batches_differ_across_dp(
        same_samples({0: ["x", "y"], 1: ["y", "x"]}), field="ids", step=1, replicas=[(0,), (1,)]
    )
    assert finding is not None
    assert finding.evidence["order"] == "another order"


RANKS, REPLICAS = ((4,), (5,), (6,)), ((0, 1), (2, 3), (4, 5))


@pytest.mark.parametrize(
    ("counts", "ended", "ranks"),
    [
        ([3, 3, 3], [], None),  # all have a batch
        ([3, 3, 3], [0, 1, 2], None),  # all have ended together
        ([3, 3, 3], [1], [5]),
        ([3, 2, 3], [1], [5]),
        ([3, 2, 3], [0, 1, 2], [4, 5, 6]),  # rounds are several batches apart
        ([3, 2, 3], [], [4, 5, 6]),
    ],
)
def test_ranks_that_have_no_more_batches_than_others_are_reported(
    counts: list[int], ended: list[int], ranks: list[int] | None
) -> None:
    finding = uneven_batches(counts, ended=ended, axis="tp", step=2, members=RANKS)
    assert (finding and finding.where["ranks"]) == ranks


def test_uneven_batches_are_counted_by_rank_within_tp_and_by_replica_across_dp() -> None:
    within = uneven_batches([3, 1, 3], ended=[1], axis="tp", step=2, members=RANKS)
    assert within is not None
    assert within.check == "batches_agree_within_tp"
    assert (within.observed, within.allowed) == (2.0, 0.0)
    assert within.evidence["batches"] == {"rank 4": 3, "rank 5": 1, "rank 6": 3}
    across = uneven_batches([3, 3, 3], ended=[2, 1], axis="dp", step=2, members=REPLICAS)
    assert across is not None
    assert across.check == "batches_differ_across_dp"
    assert across.observed == 1.0
    assert across.where == {"step": 2, "field": "number of batches", "ranks": [2, 3, 4, 5]}
    assert across.evidence["ended"] == ["replica 2", "replica 1"]
