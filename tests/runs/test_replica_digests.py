"""Items that ranks share, who votes for what, and which ranks differ, on hand-made data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from tpcheck.runs.guarding.replica_digests import (
    Difference,
    Holding,
    Item,
    SharedItems,
    Vote,
    decide_replicas,
    differences,
    merged,
)

WEIGHT = ("weight", "norm.weight", "")


def item(tp_piece: str | None, dp_piece: str = "local", *, axes: str = "tp dp") -> Item:
    return Item(WEIGHT, b"bits", "", tp_piece, dp_piece, frozenset(axes.split()))


# ---- identities


def test_items_of_the_same_elements_have_one_identity_on_all_ranks() -> None:
    assert item("all").identity("tp", {}) == item("all").identity("tp", {})
    assert item("rows 0 to 3").identity("tp", {}) != item("rows 4 to 7").identity("tp", {})


def test_an_unknown_layout_has_an_identity_over_tp_once_ranks_are_known_to_be_replicas() -> None:
    assert item(None).identity("tp", {}) is None
    assert item(None).identity("tp", {"norm.weight": None}) is None
    assert item(None).identity("tp", {"norm.weight": False}) is None
    assert item(None).identity("tp", {"norm.weight": True}) is not None
    assert item(None).identity("dp", {}) is not None


def test_an_item_of_one_axis_is_not_compared_on_the_other() -> None:
    assert item("all", axes="dp").identity("tp", {}) is None


def test_numbers_are_the_same_only_where_their_bits_are() -> None:
    assert Item.number("option", "lr", 0.1).digest != Item.number("option", "lr", 0.1 + 1e-17 + 1e-16).digest
    assert Item.number("option", "lr", 0.1) == Item.number("option", "lr", 0.1)


# ---- what is shared


def test_each_set_of_ranks_that_share_items_has_one_digest() -> None:
    shared = SharedItems.of([[1, 2, 3], [1, 2], [1, 3], [1]])
    assert shared.classes == ((0, 1), (0, 1, 2, 3), (0, 2))
    own = {1: b"a", 2: b"b", 3: b"c"}
    joined = [shared.joined_digests(held) for held in (own, {1: b"a", 2: b"X"}, {1: b"a", 3: b"c"}, {1: b"a"})]
    assert {len(each) for each in joined} == {48}
    assert shared.differing(joined) == {(0, 1)}


def test_equal_elements_are_replicas_where_their_module_returned_the_same_on_all_ranks() -> None:
    ones = Vote(b"ones", is_constant=True, is_whole=False)
    outputs = {"same": ("a", "a"), "other": ("a", "b"), "unknown": ("", ""), "on one rank": ("a", "")}
    votes = [{name: replace(ones, output=said[rank]) for name, said in outputs.items()} for rank in range(2)]
    assert decide_replicas(votes) == {"same": True, "other": None, "unknown": None, "on one rank": None}


def test_a_partition_that_no_other_rank_holds_is_not_compared() -> None:
    shared = SharedItems.of([[1], [2]])
    assert shared.classes == ()
    assert shared.joined_digests({1: b"a"}) == b""


def test_the_order_of_items_makes_no_difference() -> None:
    shared = SharedItems.of([[1, 2], [2, 1]])
    assert shared.joined_digests({1: b"a", 2: b"b"}) == shared.joined_digests({2: b"b", 1: b"a"})


# ---- layouts that nobody knows


def vote(digest: bytes, *, is_constant: bool = False, is_whole: bool = False) -> Mapping[str, Vote]:
    return {"weight": Vote(digest, is_constant, is_whole)}


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([vote(b"a"), vote(b"a")], True),
        ([vote(b"a"), vote(b"b")], False),
        ([vote(b"a", is_constant=True), vote(b"a", is_constant=True)], None),
        ([vote(b"a", is_constant=True, is_whole=True)] * 2, True),
        ([vote(b"a", is_whole=True), vote(b"b", is_whole=True)], True),
        ([vote(b"a"), {}], False),
    ],
    ids=["equal", "different", "zeros", "ones of a norm", "norms that differ already", "not on every rank"],
)
def test_ranks_with_equal_bits_hold_replicas_unless_all_elements_are_equal(
    votes: list[Mapping[str, Vote]], expected: bool | None
) -> None:
    assert decide_replicas(votes) == {"weight": expected}


# ---- differences


def held(digest: bytes, right_at: int | None = 4) -> Mapping[int, Holding]:
    return {1: Holding(WEIGHT, digest, "", right_at)}


def test_of_three_ranks_the_one_that_differs_is_named() -> None:
    (found,) = differences((0, 2, 4), [held(b"a"), held(b"b"), held(b"a")])
    assert (found.label, found.ranks, found.right_at) == (WEIGHT, (2,), 4)


def test_of_two_ranks_both_are_named() -> None:
    (found,) = differences((0, 1), [held(b"a"), held(b"b")])
    assert found.ranks == (0, 1)


def test_an_item_that_a_rank_saw_for_the_first_time_was_never_right() -> None:
    (found,) = differences((0, 1), [held(b"a"), held(b"b", None)])
    assert found.right_at is None


def test_equal_items_are_no_difference() -> None:
    assert differences((0, 1), [held(b"a"), held(b"a")]) == []


def difference(digests: Mapping[int, bytes], right_at: int | None = 4) -> Difference:
    return Difference(WEIGHT, digests, dict.fromkeys(digests, ""), right_at)


def test_a_rank_that_its_tp_and_its_dp_group_find_is_the_one_that_differs() -> None:
    over_tp, over_dp = difference({0: b"a", 1: b"b"}), difference({1: b"b", 3: b"a"}, 2)
    (found,) = merged([over_tp, over_dp])
    assert (found.ranks, found.right_at) == ((1,), 2)


def test_differences_are_joined_through_a_third() -> None:
    (found,) = merged(
        [difference({0: b"a", 1: b"b"}), difference({2: b"a", 3: b"b"}), difference({1: b"b", 3: b"b", 2: b"a"})]
    )
    assert set(found.digests) == {0, 1, 2, 3}


def test_shards_of_other_tp_ranks_stay_apart() -> None:
    found = merged([difference({0: b"a", 2: b"b"}), difference({1: b"c", 3: b"d"})])
    assert [each.ranks for each in found] == [(0, 2), (1, 3)]
