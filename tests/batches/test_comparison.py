"""Facts of all ranks in, differences out."""

from __future__ import annotations

import pytest

from tpcheck.batches.comparison import deviating_ranks, leaf_differences, same_samples
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
    ("other", "what"),
    [
        (leaf("a", "1"), "bits"),
        (leaf("a", dtype="int32"), "dtype"),
        (leaf("a", "1", shape=(3,)), "shape"),
        (leaf("a", device="cuda:0"), "device"),
        (Leaf("a", "value", "int", (), "", "0"), "type"),
    ],
)
def test_the_first_thing_that_differs_is_named(other: Leaf, what: str) -> None:
    (found,) = leaf_differences(summaries((leaf("a"),), (leaf("a"),), (other,)))
    assert (found.path, found.differs, found.deviating, found.reference) == ("a", what, (6,), 4)


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
