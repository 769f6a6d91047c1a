"""Shards that are lost, and shards and heads that stand elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.numerics.evidence import cause_of, suspect
from tpcheck.core.causes import Cause
from tpcheck.numerics.evidence import ShardFacts
from tpcheck.numerics.hypotheses import explain

B, L, D = 2, 4, 16
EXPECTED = torch.randn(B, L, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HALVES = EXPECTED.chunk(2, dim=-1)


def the_cause(parts: Any, expected: Any = EXPECTED, *, kind: Any = "activation", **fields: Any) -> Cause | None:
    return cause_of(suspect(kind, parts, expected, **fields))


@pytest.mark.parametrize(
    ("size", "shard_sizes", "cause"),
    [
        (8, (4, 0), Cause.SHARD_MISSING),
        (7, (4, 0), Cause.SHARD_MISSING),
        (8, (3, 0), None),  # a shard of 5 beside one of 3
        (9, (4, 4), Cause.WRONG_SHARD_BOUNDARY),
        (9, (4, 3), None),
        (8, (4, 4), None),  # nothing is lost
        (8, (0, 0), None),
    ],
)
def test_the_sizes_of_shards_show_what_is_lost(size: int, shard_sizes: tuple[int, ...], cause: Cause | None) -> None:
    facts = ShardFacts(0, size, shard_sizes)
    assert the_cause((), None, kind="sharding", where={"parameter": "up.weight"}, shards=facts) is cause


def test_without_the_sizes_of_its_shards_an_incomplete_parameter_has_no_cause() -> None:
    assert the_cause((), None, kind="sharding", where={"parameter": "up.weight"}) is None


@pytest.mark.parametrize("dim", [1, 2])
def test_replicas_put_together_in_another_order_are_recognised(dim: int) -> None:
    swapped = torch.cat(EXPECTED.chunk(2, dim)[::-1], dim)
    repeated = torch.cat([EXPECTED.chunk(2, dim)[0]] * 2, dim)
    found = explain(suspect("activation", (EXPECTED, swapped), EXPECTED))
    assert found is not None
    assert (found.cause, found.evidence) == (Cause.SHARD_ORDER_SWAPPED, {"order": [1, 0], "dim": dim})
    assert the_cause((repeated, repeated)) is Cause.SHARD_REPEATED


def test_ranks_may_hold_the_shards_of_others() -> None:
    assert the_cause(HALVES[::-1], expected_parts=HALVES) is Cause.SHARD_ORDER_SWAPPED
    assert the_cause((HALVES[0], HALVES[0]), expected_parts=HALVES) is Cause.SHARD_REPEATED
    assert the_cause((HALVES[0], HALVES[1] + 1e-3), expected_parts=HALVES) is None


def test_the_order_of_shards_has_no_dim() -> None:
    found = explain(suspect("activation", HALVES[::-1], EXPECTED, expected_parts=HALVES))
    assert found is not None
    assert found.evidence == {"order": [1, 0]}


THIRDS = EXPECTED[..., :15].chunk(3, dim=-1)


def reordered(*order: int) -> torch.Tensor:
    return torch.cat([THIRDS[piece] for piece in order], dim=-1)


def test_replicas_in_different_orders_are_told_rank_by_rank() -> None:
    parts = (reordered(1, 0, 2), reordered(0, 1, 2), reordered(0, 2, 1))
    found = explain(suspect("activation", parts, reordered(0, 1, 2)))
    assert found is not None
    assert (found.cause, found.evidence) == (Cause.SHARD_ORDER_SWAPPED, {"order": [[1, 0, 2], [0, 2, 1]], "dim": 2})


@pytest.mark.parametrize(
    "parts",
    [
        (reordered(1, 0, 2), reordered(0, 1, 2) + 1, reordered(0, 1, 2)),  # one is wrong otherwise
        (reordered(1, 0, 2), reordered(0, 0, 2), reordered(0, 1, 2)),  # one is swapped, one repeated
    ],
)
def test_replicas_with_different_mistakes_have_no_cause(parts: tuple[torch.Tensor, ...]) -> None:
    assert explain(suspect("activation", parts, reordered(0, 1, 2))) is None


def test_parts_of_other_shapes_are_not_moved() -> None:
    assert explain(suspect("activation", (EXPECTED[:1], EXPECTED), EXPECTED)) is None


def test_gradients_may_be_those_of_another_ranks_shard() -> None:
    assert the_cause(HALVES[::-1], kind="gradient", expected_parts=HALVES) is Cause.SHARD_ORDER_SWAPPED
    assert the_cause((HALVES[0], HALVES[0]), kind="gradient", expected_parts=HALVES) is Cause.SHARD_REPEATED


def test_orders_that_are_neither_a_permutation_nor_a_repetition_have_no_cause() -> None:
    parts = (THIRDS[1], THIRDS[0], THIRDS[0])
    assert explain(suspect("activation", parts, EXPECTED[..., :15], expected_parts=THIRDS)) is None


def test_attention_over_the_values_of_other_heads_shows_at_the_first_token() -> None:
    heads = HALVES[0].chunk(2, dim=-1)
    mixed = torch.cat(heads[::-1], dim=-1).clone()
    mixed[:, 1:] += 0.5  # later tokens see several values, by weights that are unknown
    parts = (mixed, HALVES[1])
    found = explain(suspect("activation", parts, EXPECTED, expected_parts=HALVES, role="input"))
    assert found is not None
    assert (found.cause, found.evidence) == (Cause.HEAD_MAPPING_WRONG, {"heads": [[1, 0], [2, 3]]})
    assert the_cause(parts, expected_parts=HALVES, role="output") is None  # which is no result of attention


def test_replicas_are_no_heads_of_other_ranks() -> None:
    mixed = torch.cat([HALVES[0][..., 4:], HALVES[0][..., :4], HALVES[1]], dim=-1)
    mixed[:, 1:] += 0.5
    assert explain(suspect("activation", (mixed, EXPECTED), EXPECTED, role="input")) is None


def test_parts_that_are_cut_along_two_dims_show_no_heads() -> None:
    quarters = [half[:, :2] for half in HALVES]
    assert explain(suspect("activation", quarters[::-1], EXPECTED, expected_parts=HALVES, role="input")) is None
    parts = [quarters[0].flip(-1), quarters[1]]
    assert explain(suspect("activation", parts, EXPECTED, expected_parts=quarters, role="input")) is None


def test_the_last_of_four_dims_is_no_result_of_attention() -> None:
    full = EXPECTED[None]
    shards = full.chunk(2, dim=-1)
    heads = torch.cat(shards[0].chunk(2, dim=-1)[::-1], dim=-1)
    heads[..., 1:, :] += 0.5
    assert explain(suspect("activation", (heads, shards[1]), full, expected_parts=shards, role="input")) is None


def test_slopes_of_other_heads_are_found_along_the_dim_of_heads() -> None:
    slopes = torch.rand(4, L, L, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts, shards = (slopes[[0, 2]], slopes[[1, 3]]), slopes.chunk(2)
    assert the_cause(parts, slopes, expected_parts=shards, role="input") is Cause.HEAD_MAPPING_WRONG
