"""Slices are found again wherever they went, and their runs show what happened to the shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics.exact.tensors import stored
from tpcheck.core.causes import Cause
from tpcheck.numerics.exact import checkpoint_tensor, slice_matching
from tpcheck.numerics.exact.slice_matching import Run, Slices, explain_slices, find_runs, slice_digests


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_digest_is_that_of_the_slice_alone(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(5, 4, 3)
    digests = slice_digests(stored(tensor), dim)
    order = torch.randperm(tensor.shape[dim])
    assert torch.equal(slice_digests(stored(tensor.index_select(dim, order).contiguous()), dim), digests[order])
    monkeypatch.setattr(checkpoint_tensor, "PIECE", 60)
    monkeypatch.setattr(slice_matching, "_BLOCK", 13)
    assert torch.equal(slice_digests(stored(tensor), dim), digests)


def test_digests_of_rows_are_those_of_the_columns_of_the_transpose() -> None:
    tensor = torch.randn(6, 4, dtype=torch.bfloat16)
    assert torch.equal(slice_digests(stored(tensor), 0), slice_digests(stored(tensor.T.contiguous()), 1))


def test_digests_depend_on_every_bit_and_on_the_order() -> None:
    slices = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, -2.0], [0.0, 0.0], [0.0, -0.0]])
    assert len(set(slice_digests(stored(slices), 0).tolist())) == 5


def test_runs_are_as_long_as_they_can_be() -> None:
    assert find_runs([0, 1, 2], [0, 1, 2]) == (Run(0, 3, 0),)
    assert find_runs([2, 3, 9, 0, 1], [0, 1, 2, 3]) == (Run(0, 2, 2), Run(2, 1, None), Run(3, 2, 0))


def test_a_slice_that_stands_at_several_places_continues_its_run() -> None:
    assert find_runs([7, 7, 1, 7, 7, 2], [7, 7, 1, 7, 7, 2]) == (Run(0, 6, 0),)
    assert find_runs([5, 7], [7, 5, 7]) == (Run(0, 2, 1),)


def test_too_many_runs_are_none() -> None:
    assert find_runs(list(range(10_000))[::-1], list(range(10_000))) == ()


@given(st.permutations(range(8)))
def test_the_runs_of_a_permutation_are_the_permutation(order: list[int]) -> None:
    runs = find_runs(order, range(8))
    assert [run.source + i for run in runs for i in range(run.length)] == order  # type: ignore[operator]


WHOLE = list(range(16))
NEW = 99  # a slice that the expected tensor does not have


def chunks(num_ranks: int, rows: list[int] = WHOLE) -> list[list[int]]:
    size = -(-len(rows) // num_ranks)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def rank_by_rank(blocks: list[list[int]], num_ranks: int) -> list[int]:
    return [row for rank in range(num_ranks) for block in blocks for row in chunks(num_ranks, block)[rank]]


FOUR = chunks(4)
CASES: dict[str, tuple[list[int], Cause | None, dict[str, Any]]] = {
    "the second rank of two": (chunks(2)[1], Cause.SHARD_MISSING, {"tp_rank": 1, "tp": 2, "from": 8}),
    "the last rank, which has fewer": (WHOLE[10:], Cause.SHARD_MISSING, {"tp_rank": 1, "tp": 2, "from": 10}),
    "no rank's slice": (WHOLE[1:4], Cause.SHARD_MISSING, {"tp_rank": None, "tp": None, "from": 1}),
    "one rank of two fused blocks": (
        [0, 1, 2, 3, 8, 9, 10, 11],
        Cause.SHARD_MISSING,
        {"tp_rank": 0, "tp": 2, "blocks": [8, 8]},
    ),
    "two copies": (WHOLE * 2, Cause.NOT_SHARDED, {"copies": 2}),
    "swapped": (FOUR[2] + FOUR[1] + FOUR[0] + FOUR[3], Cause.SHARD_ORDER_SWAPPED, {"order": [2, 1, 0, 3], "tp": 4}),
    "swapped, of two sizes": (
        WHOLE[5:] + WHOLE[:5],
        Cause.SHARD_ORDER_SWAPPED,
        {"sizes": [11, 5], "from": [5, 0]},
    ),
    "reversed": (WHOLE[::-1], None, {}),
    "repeated": (FOUR[0] + FOUR[0] + FOUR[2] + FOUR[2], Cause.SHARD_REPEATED, {"order": [0, 0, 2, 2], "tp": 4}),
    "each of two shards on two ranks": (
        WHOLE[:8] * 2 + WHOLE[8:] * 2,
        Cause.SHARD_REPEATED,
        {"order": [0, 0, 1, 1], "tp": 4, "copies": 2},
    ),
    "fused, rank by rank": (
        rank_by_rank([WHOLE[:8], WHOLE[8:12], WHOLE[12:]], 2),
        Cause.FUSED_BLOCKS_INTERLEAVED,
        {"blocks": [8, 4, 4], "parts": 2, "runs_over": "ranks"},
    ),
    "padded": (
        WHOLE[:8] + [NEW] * 2 + WHOLE[8:] + [NEW] * 2,
        Cause.WRONG_SHARD_BOUNDARY,
        {"padding": [[8, 10], [18, 20]]},
    ),
    "shifted": (
        WHOLE[:8] + WHOLE[7:15],
        Cause.WRONG_SHARD_BOUNDARY,
        {"first_wrong": 8, "holds": 7, "shift": 1},
    ),
    "five slices of two places": (
        [0, 1, 8, 9, 10],
        Cause.WRONG_SHARD_BOUNDARY,
        {"first_wrong": 2, "holds": 8, "shift": -6},
    ),
    "of two fused blocks those of different ranks": (
        [0, 1, 2, 3, 12, 13, 14, 15],
        Cause.WRONG_SHARD_BOUNDARY,
        {"first_wrong": 4, "holds": 12, "shift": -8},
    ),
    "a shard with another slice": ([*WHOLE[:7], NEW], None, {}),
    "without the last slice": (WHOLE[:15], None, {}),
    "another slice at the end": ([*WHOLE[:15], NEW], None, {}),
    "one and a half copies": (WHOLE + WHOLE[:8], None, {}),
    "swapped, one of them twice": (FOUR[1] + FOUR[0] + FOUR[0] + FOUR[3], None, {}),
    "repeated, beside other slices": (FOUR[0] + FOUR[0] + FOUR[2] + [NEW] * 4, None, {}),
    "swapped around padding": (WHOLE[8:] + [NEW] * 2 + WHOLE[:8], None, {}),
    "mostly other slices": ([0, 1] + [NEW] * 14, None, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_runs_name_what_happened(name: str) -> None:
    actual, cause, evidence = CASES[name]
    explanation = explain_slices(Slices(find_runs(actual, WHOLE), len(actual), len(WHOLE)))
    assert (explanation.cause if explanation else None) == cause
    assert explanation is None or explanation.evidence == evidence


def test_one_element_of_a_vector_may_equal_another_by_chance() -> None:
    def of_a_vector(elements: list[int]) -> Any:
        return explain_slices(Slices(find_runs(elements, WHOLE), len(elements), len(WHOLE), min_length=2))

    assert of_a_vector([*WHOLE[:12], 5, *WHOLE[13:]]) is None
    assert of_a_vector([*WHOLE[:12], 13, 14, 14, 15]).cause is Cause.WRONG_SHARD_BOUNDARY
    assert of_a_vector(FOUR[0] + FOUR[0] + FOUR[2] + FOUR[2]).cause is Cause.SHARD_REPEATED


def test_two_slices_in_each_others_place_are_two_shards() -> None:
    explanation = explain_slices(Slices(find_runs([1, 0], [0, 1]), 2, 2))
    assert explanation is not None
    assert explanation.cause is Cause.SHARD_ORDER_SWAPPED
    assert explanation.evidence == {"order": [1, 0], "tp": 2}


def test_of_a_vocabulary_a_shift_is_an_offset() -> None:
    for actual in (WHOLE[:8] + WHOLE[7:15], [*WHOLE, NEW]):
        explanation = explain_slices(Slices(find_runs(actual, WHOLE), len(actual), 16, is_vocabulary=True))
        assert explanation is not None
        assert explanation.cause == Cause.VOCAB_OFFSET_WRONG


def test_tokens_may_be_offset_in_any_order() -> None:
    actual = WHOLE[8:] + [NEW] * 2 + WHOLE[:8]
    explanation = explain_slices(Slices(find_runs(actual, WHOLE), len(actual), 16, is_vocabulary=True))
    assert explanation is not None
    assert explanation.cause == Cause.VOCAB_OFFSET_WRONG
    assert explanation.evidence == {"first_wrong": 0, "holds": 8, "shift": -8}


def test_without_runs_or_slices_nothing_is_shown() -> None:
    assert explain_slices(Slices((), 16, 16)) is None
    assert explain_slices(Slices(find_runs([NEW] * 16, WHOLE), 16, 16)) is None


def test_a_slice_that_stands_at_several_places_is_its_own_before_a_later_one() -> None:
    assert find_runs([1, 7, 7, 2], [7, 7, 7, 2]) == (Run(0, 1, None), Run(1, 3, 1))
    assert find_runs([7, 3, 7], [0, 7, 3, 1, 7]) == (Run(0, 2, 1), Run(2, 1, 4))


def test_four_chunks_with_the_middle_ones_exchanged_are_fused_blocks_only_by_name() -> None:
    runs = find_runs(FOUR[0] + FOUR[2] + FOUR[1] + FOUR[3], WHOLE)
    causes = [explain_slices(Slices(runs, 16, 16, is_fused=fused)).cause for fused in (False, True)]  # type: ignore[union-attr]
    assert causes == [Cause.SHARD_ORDER_SWAPPED, Cause.FUSED_BLOCKS_INTERLEAVED]


@pytest.mark.parametrize("test", slice_matching.TESTS, ids=lambda test: test.__name__)
def test_every_test_names_a_case_that_no_other_does(test: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def explanations() -> list[Any]:
        slices = [Slices(find_runs(rows, WHOLE), len(rows), 16) for rows, *_ in CASES.values()]
        exchanged = Slices(find_runs(WHOLE[8:] + WHOLE[:8], WHOLE), 16, 16, may_exchange=Cause.GATE_UP_EXCHANGED)
        return list(map(explain_slices, [*slices, exchanged]))

    before = explanations()
    monkeypatch.setattr(slice_matching, "TESTS", tuple(other for other in slice_matching.TESTS if other is not test))
    assert explanations() != before
