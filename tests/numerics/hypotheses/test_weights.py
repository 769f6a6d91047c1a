"""Weights before the first step: their bits show what happened, put together or rank by rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.numerics.evidence import suspect
from tpcheck.core.causes import Cause, Explanation
from tpcheck.numerics.evidence import SiblingWeights
from tpcheck.numerics.hypotheses import explain

CHANCE = torch.Generator().manual_seed(0)
EXPECTED, OTHER = torch.randn(2, 8, 4, generator=CHANCE, dtype=torch.float64)
SHARDS = EXPECTED.chunk(2)


def found(*parts: torch.Tensor, is_full: bool = True, **fields: Any) -> Explanation | None:
    full = torch.cat(parts) if is_full else None
    where = {"parameter": "attn.q_proj.weight"}
    return explain(
        suspect("weight", parts, EXPECTED, **{"actual": full, "expected_parts": SHARDS, "where": where, **fields})
    )


def test_shards_in_another_order_are_seen_in_the_whole_weight() -> None:
    explanation = found(*SHARDS[::-1])
    assert explanation is not None
    assert explanation.cause is Cause.SHARD_ORDER_SWAPPED
    assert explanation.evidence["story"]["dim"] == 0


def test_rows_that_are_no_shards_may_move_for_other_reasons() -> None:
    quarters = EXPECTED.chunk(4)
    moved = torch.cat([quarters[1], quarters[0], quarters[2], quarters[3]])
    explanation = found(*moved.chunk(2))
    assert explanation is None or explanation.cause is not Cause.SHARD_ORDER_SWAPPED


@pytest.mark.parametrize(
    ("parameter", "wrong", "right", "cause"),
    [
        ("attn.k_proj.weight", "attn.v_proj.weight", "attn.q_proj.weight", Cause.HEAD_MAPPING_WRONG),
        ("attn.key.weight", "attn.value.weight", "attn.query.weight", Cause.HEAD_MAPPING_WRONG),
        ("attn.k_proj.weight", "attn.q_proj.weight", "attn.v_proj.weight", Cause.SHARD_ORDER_SWAPPED),
        ("mlp.up_proj.weight", "attn.v_proj.weight", "attn.q_proj.weight", Cause.SHARD_ORDER_SWAPPED),
    ],
)
def test_keys_and_values_that_move_beside_right_queries_are_heads(
    parameter: str, wrong: str, right: str, cause: Cause
) -> None:
    siblings = SiblingWeights(wrong=(wrong,), right=(right,))
    explanation = found(*SHARDS[::-1], where={"parameter": parameter}, siblings=siblings)
    assert explanation is not None
    assert explanation.cause is cause


@pytest.mark.parametrize(
    ("part", "cause"),
    [
        (SHARDS[1].bfloat16().double(), Cause.DTYPE_ROUNDED),
        (SHARDS[1].t().contiguous(), Cause.TRANSPOSED),
        (SHARDS[1] * 0, Cause.ALL_ZERO),
        (SHARDS[1] * 2, Cause.DUPLICATE_REDUCE),
        (SHARDS[1] * torch.nan, Cause.NOT_FINITE),
        (OTHER.chunk(2)[1], Cause.TENSOR_OF_ANOTHER_LAYER),
        (SHARDS[1] + 1, None),
    ],
)
def test_the_wrong_shard_of_one_rank_shows_its_cause(part: torch.Tensor, cause: Cause | None) -> None:
    others = {"layers.1.weight": (OTHER, *OTHER.chunk(2))}
    explanation = found(SHARDS[0], part, is_full=False, others=others)
    assert (explanation.cause if explanation else None) is cause


def test_ranks_whose_shards_show_different_causes_have_none() -> None:
    assert found(SHARDS[0] * 0, SHARDS[1].bfloat16().double(), is_full=False) is None
