"""Shards and heads that stand elsewhere are told from one another, and from what is merely wrong."""

import pytest
import torch

from tpcheck.core.causes import Cause
from tpcheck.numerics.evidence import Hypothesis, Suspect
from tpcheck.numerics.hypotheses.explain import explain

B, L, D = 2, 4, 16
EXPECTED = torch.randn(B, L, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
HALVES = EXPECTED.chunk(2, dim=-1)


def cause(parts: tuple[torch.Tensor, ...], *, replicated: bool = True, **others: object) -> str | None:
    own = tuple(EXPECTED for _ in parts) if replicated else HALVES
    fields = {"expected": EXPECTED, "expected_parts": own, "where": {"field": "output 0"}, **others}
    suspect = Suspect(
        check="any", observed=0.7, allowed=1e-15, kind="activation", parts=parts, replicated=replicated, **fields
    )  # type: ignore[arg-type]
    found = explain(suspect)
    return found.cause.slug if found else None


@pytest.mark.parametrize("dim", [1, 2])
def test_replicas_put_together_in_another_order_are_told(dim: int) -> None:
    swapped = torch.cat(EXPECTED.chunk(2, dim)[::-1], dim)
    repeated = torch.cat([EXPECTED.chunk(2, dim)[0]] * 2, dim)
    assert cause((EXPECTED, swapped)) == "shard_order_swapped"
    assert cause((repeated, repeated)) == "shard_repeated"


def test_shards_of_another_rank_are_told() -> None:
    assert cause((HALVES[1], HALVES[0]), replicated=False) == "shard_order_swapped"
    assert cause((HALVES[0], HALVES[0]), replicated=False) == "shard_repeated"
    assert cause((HALVES[0], HALVES[1] + 1e-3), replicated=False) is None


def test_attention_over_the_values_of_other_heads_shows_at_the_first_token() -> None:
    heads = HALVES[0].chunk(2, dim=-1)
    mixed = torch.cat(heads[::-1], dim=-1).clone()
    mixed[:, 1:] += 0.5  # later tokens see several values, by weights that nobody can tell
    parts = (mixed, HALVES[1])
    assert cause(parts, replicated=False, where={"field": "input 0 of attn.o_proj"}) == "head_mapping_wrong"
    assert cause(parts, replicated=False) is None  # what comes out of a module is no result of attention


def test_zeros_and_what_is_no_number_are_told_where_only_they_are_wrong() -> None:
    zeros, nans = EXPECTED.clone(), EXPECTED.clone()
    zeros[..., 3:9], nans[0, 1] = 0.0, float("nan")
    assert cause((EXPECTED, zeros)) == "all_zero"
    assert cause((nans, EXPECTED)) == "not_finite"
    zeros[0, 0, 0] += 1.0
    assert cause((EXPECTED, zeros)) is None


def test_a_mistake_is_named_only_where_its_numbers_hold() -> None:
    biased = EXPECTED + torch.linspace(1, 2, D, dtype=torch.float64)
    hypotheses = (Hypothesis(Cause.BIAS_ADDED_PER_RANK, (biased, biased)),)
    assert cause((biased, biased), hypotheses=hypotheses) == "bias_added_per_rank"
    assert cause((biased + 0.01, biased), hypotheses=hypotheses) is None


def test_the_same_collectives_over_other_ranks_are_a_wrong_group() -> None:
    over_tp, over_dp = ([{"name": "all_reduce", "ranks": ranks}] for ranks in ([0, 1], [0, 2]))
    parts = (EXPECTED + 1, EXPECTED + 2)
    assert cause(parts, evidence={"collectives": over_dp, "collectives_expected": over_tp}) == "wrong_group"
    assert cause(parts, evidence={"collectives": [], "collectives_expected": over_tp}) is None
