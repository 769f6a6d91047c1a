"""Sums over ranks that are left out, done twice, divided, or done over another group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.numerics.evidence import cause_of, suspect
from tpcheck.core.causes import Cause
from tpcheck.numerics.evidence import GradientFacts, LinearTerms, SiblingCollectives
from tpcheck.numerics.hypotheses import explain

CHANCE = torch.Generator().manual_seed(0)
EXPECTED = torch.randn(4, 8, generator=CHANCE, dtype=torch.float64)
TERMS = (EXPECTED * 0.3 + 0.1, EXPECTED * 0.7 - 0.1)
HALVES = EXPECTED.chunk(2, dim=1)


def the_cause(kind: Any, parts: Any, expected: Any = EXPECTED, **fields: Any) -> Cause | None:
    return cause_of(suspect(kind, parts, expected, **fields))


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("activation", (TERMS[0], TERMS[1] + 1e-2)),  # not quite the sum
        ("gradient", (TERMS[0], TERMS[1] + 1e-2)),
        ("activation", (EXPECTED * 2, EXPECTED * 2.1)),  # not the same factor on every rank
        ("activation", (EXPECTED * 1.7, EXPECTED * 1.7)),  # a factor that tp does not explain
        ("activation", (EXPECTED[:2], EXPECTED[2:])),  # another shape
        ("gradient", (EXPECTED[:2], EXPECTED[2:])),
        ("activation", (EXPECTED * 3,)),  # one rank alone
    ],
)
def test_no_cause_is_better_than_a_wrong_one(kind: str, parts: tuple[torch.Tensor, ...]) -> None:
    assert the_cause(kind, parts) is None


def test_shards_are_no_terms() -> None:
    parts = tuple(half * 0.5 + 0.1 for half in HALVES)
    assert the_cause("gradient", parts, expected_parts=HALVES) is None


def test_replicas_without_an_expected_gradient_have_drifted() -> None:
    assert the_cause("replica", TERMS, None) is Cause.REPLICA_DRIFT


def test_gradients_that_are_partial_in_all_features_do_not_count_them() -> None:
    found = explain(suspect("gradient", TERMS, EXPECTED))
    assert found is not None
    assert found.evidence == {}


def test_the_gradient_of_one_replica_alone_lacks_the_mean() -> None:
    local = EXPECTED.flip(0)
    facts = GradientFacts(local_parts=(local, local))
    assert the_cause("gradient", (local, local), gradient=facts) is Cause.MISSING_REDUCE
    assert the_cause("gradient", (local, local)) is None


@pytest.mark.parametrize("name", ["all_gather", "all_reduce"])
def test_only_the_same_collectives_are_issued_over_another_group(name: str) -> None:
    collectives = SiblingCollectives(((name, (0, 2)),), (("all_reduce", (0, 1)),), "in layers.1")
    found = the_cause("activation", (EXPECTED + 1, EXPECTED + 2), collectives=collectives)
    assert found is (Cause.WRONG_GROUP if name == "all_reduce" else None)


def test_terms_of_a_vector_add_up_as_a_whole() -> None:
    vector, terms = EXPECTED.reshape(-1), tuple(term.reshape(-1) for term in TERMS)
    assert the_cause("gradient", terms, vector) is Cause.PARTIAL_GRADIENT_ON_REPLICA


def test_equal_terms_are_a_scaled_gradient_and_no_partial_one() -> None:
    assert the_cause("gradient", (EXPECTED / 2, EXPECTED / 2)) is Cause.GRADIENT_SCALED
    assert the_cause("input_gradient", (EXPECTED / 2, EXPECTED / 2)) is Cause.GRADIENT_SCALED  # of an output gradient


def test_features_may_be_partial_beside_reduced_ones() -> None:
    first, second = EXPECTED.clone(), EXPECTED.clone()
    first[:, 5:], second[:, 5:] = EXPECTED[:, 5:] * 0.3 + 0.1, EXPECTED[:, 5:] * 0.7 - 0.1
    found = explain(suspect("input_gradient", (first, second), EXPECTED))
    assert found is not None
    assert found.cause is Cause.MISSING_REDUCE
    assert found.evidence == {"partial_features": "3 of 8"}


def test_what_some_ranks_have_as_a_whole_and_others_not_at_all_is_no_sum_of_terms() -> None:
    lost = EXPECTED.clone()
    lost[:, 5:] = 0
    for kind in ("gradient", "input_gradient"):
        assert the_cause(kind, (EXPECTED, lost)) is Cause.GRADIENT_MISSING


@pytest.mark.parametrize(
    ("num_replicas", "is_every_parameter", "cause"),
    [
        (2, True, Cause.SUM_INSTEAD_OF_MEAN),
        (2, False, Cause.GRADIENT_SCALED),  # as many TP ranks as replicas: one parameter says nothing of averaging
        (1, True, Cause.GRADIENT_SCALED),
        (3, False, Cause.GRADIENT_SCALED),
    ],
)
def test_a_factor_is_due_to_averaging_where_nothing_else_has_that_number(
    num_replicas: int, is_every_parameter: bool, cause: Cause
) -> None:
    facts = GradientFacts(is_every_parameter=is_every_parameter)
    assert the_cause("gradient", (EXPECTED * 2,) * 2, num_replicas=num_replicas, gradient=facts) is cause


def test_a_mean_over_dp_that_is_taken_twice_divides_by_the_replicas() -> None:
    assert the_cause("gradient", (EXPECTED / 3,) * 2, num_replicas=3) is Cause.MEAN_INSTEAD_OF_SUM


@pytest.mark.parametrize("kind", ["activation", "input_gradient"])
@pytest.mark.parametrize(("factor", "cause"), [(2.0, Cause.DUPLICATE_REDUCE), (0.5, Cause.MEAN_INSTEAD_OF_SUM)])
def test_one_rank_alone_may_reduce_wrongly(kind: str, factor: float, cause: Cause) -> None:
    assert the_cause(kind, (EXPECTED, EXPECTED * factor), role="input") is cause
    shards = (HALVES[0], HALVES[1] * factor)
    assert the_cause("activation", shards, expected_parts=HALVES) is None


@pytest.mark.parametrize("kind", ["activation", "input_gradient"])
@pytest.mark.parametrize(("factor", "cause"), [(2.0, Cause.DUPLICATE_REDUCE), (0.5, Cause.MEAN_INSTEAD_OF_SUM)])
def test_shards_are_reduced_wrongly_on_all_ranks(kind: str, factor: float, cause: Cause) -> None:
    scaled = [half * factor for half in HALVES]
    assert the_cause(kind, scaled, expected_parts=HALVES, role="input") is cause


def test_activations_may_be_summed_over_the_replicas() -> None:
    assert the_cause("activation", (EXPECTED * 3,) * 2, num_replicas=3) is Cause.SUM_INSTEAD_OF_MEAN


def linear(tp: int) -> LinearTerms:
    """Return terms of a row-parallel layer that add up, with the bias, to the expected output."""
    bias = torch.arange(1.0, 9.0, dtype=torch.float64)
    terms = [torch.randn(4, 8, generator=CHANCE, dtype=torch.float64) for _ in range(tp - 1)]
    return LinearTerms((EXPECTED - bias - sum(terms), *terms), bias, (bias,) * tp, are_summed=True)


def test_terms_beside_a_bias_show_what_was_done_to_them() -> None:
    facts = linear(2)
    first, second = facts.by_rank
    examples = {
        Cause.MISSING_REDUCE: (first + facts.bias, second + facts.bias),
        Cause.MEAN_INSTEAD_OF_SUM: (facts.total / 2 + facts.bias,) * 2,
        Cause.DUPLICATE_REDUCE: (facts.total * 2 + facts.bias,) * 2,
        Cause.BIAS_ADDED_PER_RANK: (facts.total + 2 * facts.bias,) * 2,
    }
    assert {cause: the_cause("activation", parts, linear=facts) for cause, parts in examples.items()} == {
        cause: cause for cause in examples
    }


def test_the_term_of_one_rank_may_stand_on_all() -> None:
    facts = linear(3)
    for kind in ("activation", "input_gradient"):
        found = explain(suspect(kind, (facts.by_rank[1] + facts.bias,) * 3, EXPECTED, linear=facts))  # type: ignore[arg-type]
        assert found is not None
        assert (found.cause, found.evidence) == (Cause.MISSING_REDUCE, {"term_of_tp_rank": 1})


def test_a_sum_over_some_ranks_is_a_wrong_group() -> None:
    facts = linear(4)
    pairs = ((0, 1), (0, 1), (2, 3), (2, 3))
    parts = tuple(facts.by_rank[a] + facts.by_rank[b] + facts.bias for a, b in pairs)
    found = explain(suspect("activation", parts, EXPECTED, linear=facts))
    assert found is not None
    assert found.cause is Cause.WRONG_GROUP
    assert found.evidence == {"summed_over_tp_ranks": [list(pair) for pair in pairs]}


def test_what_the_terms_do_not_give_has_no_cause() -> None:
    for tp in (2, 3):
        parts = tuple(EXPECTED + torch.randn(4, 8, generator=CHANCE, dtype=torch.float64) for _ in range(tp))
        assert the_cause("activation", parts, linear=linear(tp)) is None


def test_groups_of_many_ranks_are_not_searched() -> None:
    facts = linear(7)
    parts = (facts.by_rank[0] + facts.by_rank[1] + facts.bias,) * 2 + (EXPECTED,) * 5
    assert the_cause("activation", parts, linear=facts) is None


def test_parts_of_another_shape_than_the_terms_show_nothing() -> None:
    shards = tuple(half + 1 for half in HALVES)
    assert the_cause("activation", shards, expected_parts=HALVES, linear=linear(2)) is None


def test_terms_of_a_layer_that_sums_nothing_show_nothing() -> None:
    facts = LinearTerms(HALVES, torch.zeros(8), HALVES, are_summed=False)
    assert the_cause("activation", tuple(half + 1 for half in HALVES), expected_parts=HALVES, linear=facts) is None


def test_gradients_summed_over_the_tp_group_are_a_wrong_group() -> None:
    total = HALVES[0] + HALVES[1]
    facts = GradientFacts(is_reduced_over_tp=True)
    assert the_cause("gradient", (total,) * 2, expected_parts=HALVES, gradient=facts) is Cause.WRONG_GROUP
    assert the_cause("gradient", (total,) * 2, expected_parts=HALVES) is None  # no sign of a reduction over TP


RESIDUAL = torch.randn(4, 8, generator=CHANCE, dtype=torch.float64)
BIAS = torch.arange(1.0, 9.0, dtype=torch.float64)
ADDENDS = {"input 0 of block": RESIDUAL, "norm.weight": torch.ones(8), "down.bias": BIAS}


@pytest.mark.parametrize(
    ("parts", "cause"),
    [
        ([term + BIAS for term in TERMS], Cause.MISSING_REDUCE),
        ([EXPECTED * 2 + BIAS] * 2, Cause.DUPLICATE_REDUCE),
        ([EXPECTED / 2 + BIAS] * 2, Cause.MEAN_INSTEAD_OF_SUM),
        ([EXPECTED + BIAS * 2] * 2, Cause.BIAS_ADDED_PER_RANK),
        ([EXPECTED + BIAS + RESIDUAL] * 2, Cause.DUPLICATE_REDUCE),
        ([EXPECTED + BIAS * 1.5] * 2, None),
        ([EXPECTED + BIAS, BIAS.expand(4, 8)], None),  # one rank has the whole sum, so that the other has no term of it
    ],
)
def test_a_module_may_add_a_bias_or_a_residual_to_a_sum_itself(parts: list[torch.Tensor], cause: Cause | None) -> None:
    """As where code multiplies by the weight of a linear layer, which is never called."""
    assert the_cause("activation", parts, EXPECTED + BIAS, addends=ADDENDS) is cause
    assert the_cause("activation", parts, EXPECTED + BIAS) is None


def test_replicas_of_which_one_alone_has_a_gradient_are_no_terms() -> None:
    assert the_cause("replica", TERMS) is Cause.PARTIAL_GRADIENT_ON_REPLICA
    assert the_cause("replica", (EXPECTED, EXPECTED * 0)) is not Cause.PARTIAL_GRADIENT_ON_REPLICA
