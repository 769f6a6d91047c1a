"""Gradients that are missing, scaled, or those of other parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.numerics.evidence import cause_of, suspect
from tpcheck.core.causes import Cause
from tpcheck.numerics.evidence import BackwardFacts, GradientFacts
from tpcheck.numerics.hypotheses import explain
from tpcheck.numerics.hypotheses.gradients import multiple

CHANCE = torch.Generator().manual_seed(0)
EXPECTED, OTHER = torch.randn(2, 4, 8, generator=CHANCE, dtype=torch.float64)


def the_cause(kind: Any, parts: Any, expected: Any = EXPECTED, **fields: Any) -> Cause | None:
    return cause_of(suspect(kind, parts, expected, **fields))


@pytest.mark.parametrize("factors", [(1.0, 1.7), (0.5, 0.5), (2.0, 2.1), (-1.0, -1.0)])
def test_a_gradient_times_a_constant_is_scaled(factors: tuple[float, ...]) -> None:
    found = explain(suspect("gradient", [EXPECTED * factor for factor in factors], EXPECTED))
    assert found is not None
    assert (found.cause, found.evidence) == (Cause.GRADIENT_SCALED, {"factors": list(factors)})


def test_shards_are_scaled_like_replicas() -> None:
    halves = EXPECTED.chunk(2, dim=1)
    doubled = [half * 2 for half in halves]
    assert the_cause("gradient", doubled, expected_parts=halves) is Cause.GRADIENT_SCALED


def test_few_numbers_are_multiples_of_any_others() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert the_cause("gradient", (one * 3, one), one) is None


def test_a_gradient_that_never_comes_back_is_missing() -> None:
    nothing = torch.zeros_like(EXPECTED)
    assert the_cause("input_gradient", (nothing, nothing)) is Cause.GRADIENT_MISSING
    assert the_cause("input_gradient", (nothing, OTHER)) is None
    assert the_cause("gradient", (nothing, nothing), gradient=GradientFacts(missing_on=(1,))) is Cause.GRADIENT_MISSING


def lost(gradient: torch.Tensor = EXPECTED, at: slice = slice(3), dim: int = -1) -> torch.Tensor:
    cut = gradient.clone()
    cut.movedim(dim, 0)[at] = 0
    return cut


@pytest.mark.parametrize("kind", ["input_gradient", "gradient"])
@pytest.mark.parametrize("dim", [-1, -2])
def test_a_gradient_that_comes_back_to_some_features_alone_is_missing_at_the_others(kind: Any, dim: int) -> None:
    found = explain(suspect(kind, (lost(dim=dim),) * 2, EXPECTED))
    assert found is not None
    assert found.cause is Cause.GRADIENT_MISSING
    assert found.evidence == {"no_gradient_at": [0, 1, 2], "along_dim": dim, "size": EXPECTED.shape[dim]}


def test_it_may_be_missing_on_one_rank_as_a_whole_or_in_part() -> None:
    assert the_cause("input_gradient", (EXPECTED, lost())) is Cause.GRADIENT_MISSING
    assert the_cause("input_gradient", (EXPECTED, torch.zeros_like(EXPECTED))) is Cause.GRADIENT_MISSING
    assert the_cause("input_gradient", (lost(at=slice(2)), lost(at=slice(1, 3)))) is None


def test_it_is_not_missing_where_others_are_wrong_or_zeros_are_right() -> None:
    assert the_cause("input_gradient", (lost(EXPECTED + 0.1 * OTHER),) * 2) is None
    assert the_cause("input_gradient", (lost(),) * 2, lost()) is None
    assert the_cause("input_gradient", (lost(EXPECTED[:1, :3], slice(1)),) * 2, EXPECTED[:1, :3]) is None  # one number


def test_behind_a_collective_that_autograd_does_not_see_it_is_the_collectives() -> None:
    facts = BackwardFacts(unseen=("all_reduce",))
    assert the_cause("input_gradient", (lost(),) * 2, backward=facts) is Cause.COLLECTIVE_WITHOUT_BACKWARD
    assert the_cause("input_gradient", (EXPECTED, lost()), backward=facts) is Cause.GRADIENT_MISSING


@pytest.mark.parametrize(
    ("through", "wrong"), [(["norm"], (0, 1)), (["a residual"], (1,)), (["norm", "a residual"], (0,))]
)
def test_a_branch_that_sends_nothing_back_is_named(through: list[str], wrong: tuple[int, ...]) -> None:
    third = 0.3 * OTHER + 0.1
    branches = {"norm": OTHER, "mlp": third, "a residual": EXPECTED - OTHER - third}
    left = EXPECTED - sum(branches[name] for name in through)
    facts = BackwardFacts(branches={name: (part, part) for name, part in branches.items()})
    parts = [left if rank in wrong else EXPECTED for rank in range(2)]
    found = explain(suspect("input_gradient", parts, EXPECTED, backward=facts))
    assert found is not None
    assert (found.cause, found.evidence) == (Cause.GRADIENT_MISSING, {"lost_through": through})


def test_a_branch_may_be_reduced_once_more_or_left_as_terms() -> None:
    """As where a router, which every rank has whole, stands beside experts."""
    facts = BackwardFacts(branches={"router": (OTHER, OTHER), "experts": (EXPECTED - OTHER,) * 2})
    terms = (0.3 * EXPECTED - 0.1, 0.7 * EXPECTED + 0.1 - OTHER)
    for parts, cause, through in (
        ((EXPECTED + OTHER,) * 2, Cause.DUPLICATE_REDUCE, ["router"]),
        ([term + OTHER for term in terms], Cause.MISSING_REDUCE, ["experts"]),
    ):
        found = explain(suspect("input_gradient", parts, EXPECTED, backward=facts))
        assert found is not None
        assert (found.cause, found.evidence["through"]) == (cause, through)
    assert the_cause("input_gradient", (EXPECTED + 1.3 * OTHER,) * 2, backward=facts) is None


def test_a_sum_lacks_a_term_that_does_not_come_back_on_some_ranks() -> None:
    facts = BackwardFacts(lost_on=(1,))
    assert the_cause("input_gradient", (OTHER, OTHER), backward=facts) is Cause.GRADIENT_MISSING


def test_zeros_in_the_place_of_zeros_or_of_nothing_known_are_not_missing() -> None:
    nothing = torch.zeros_like(EXPECTED)
    assert the_cause("input_gradient", (nothing, nothing), nothing) is None
    assert explain(suspect("input_gradient", (nothing, nothing), None, expected_parts=(EXPECTED, OTHER[:2]))) is None
    assert explain(suspect("input_gradient", (), EXPECTED)) is None


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((EXPECTED[:2] * 2,) * 2, EXPECTED),  # of another shape
        ((), EXPECTED),
        ((EXPECTED * 2, EXPECTED * 0), EXPECTED),  # a gradient times nothing
        ((EXPECTED, EXPECTED), EXPECTED * 0),  # a multiple of nothing
        ((EXPECTED * 2, EXPECTED * 2 + OTHER), EXPECTED),
    ],
)
def test_what_is_no_multiple_is_not_scaled(parts: tuple[torch.Tensor, ...], expected: torch.Tensor) -> None:
    assert multiple(suspect("gradient", parts, expected)) is None


def test_a_common_factor_of_four_numbers_is_no_accident() -> None:
    four = torch.arange(1.0, 5.0, dtype=torch.float64)
    assert the_cause("gradient", (four * 3, four), four) is Cause.GRADIENT_SCALED
    assert the_cause("gradient", (four[:3] * 3, four[:3]), four[:3]) is None


def test_a_tied_gradient_is_taken_off_where_it_has_the_same_shape() -> None:
    untied = GradientFacts(untied={"bias": (OTHER[0], OTHER[0]), "lost": (None, None), "head": (OTHER, OTHER)})
    found = explain(suspect("gradient", (EXPECTED - OTHER,) * 2, EXPECTED, gradient=untied))
    assert found is not None
    assert (found.cause, found.evidence) == (Cause.TIED_WEIGHT_UNTIED, {"tied_with": "head"})


@pytest.mark.parametrize("parts", [(OTHER, OTHER), (OTHER, EXPECTED)])
def test_the_gradient_of_another_parameter_is_named(parts: tuple[torch.Tensor, ...]) -> None:
    found = explain(suspect("gradient", parts, EXPECTED, others={"b.weight": (OTHER, OTHER, OTHER)}))
    assert found is not None
    assert (found.cause, found.evidence) == (Cause.TENSOR_OF_ANOTHER_LAYER, {"it_is_of": "b.weight"})
