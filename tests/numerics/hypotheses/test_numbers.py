"""Causes that take more numbers: what a mistake would have made, lower dtypes, the shares of a step."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.numerics.hypotheses.test_explain import EXPECTED, TERMS, suspect
from tpcheck.core.causes import Cause
from tpcheck.numerics.evidence import Hypothesis
from tpcheck.numerics.hypotheses.explain import explain

CHANCE = torch.Generator().manual_seed(0)
WIDE = torch.randn(4, 8, generator=CHANCE, dtype=torch.float64)
OTHER = torch.randn(4, 8, generator=CHANCE, dtype=torch.float64)


def cause(kind: str, parts: tuple[Any, ...], **others: Any) -> str | None:
    fields = {"expected": WIDE, "expected_parts": (WIDE,) * len(parts), **others}
    found = explain(suspect(kind, parts, **fields))
    return None if found is None else found.cause.slug


def rounded(tensor: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return tensor.to(dtype).to(tensor.dtype)


@pytest.mark.parametrize("kind", ["activation", "input_gradient", "gradient", "update"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_tensor_in_a_lower_dtype_is_recognised(kind: str, dtype: torch.dtype) -> None:
    assert cause(kind, (rounded(WIDE, dtype), WIDE), observed=1e-3) == "dtype_rounded"


@pytest.mark.parametrize(
    "part",
    [
        rounded(WIDE) + 1e-9,  # nearly a bfloat16, to no bit
        rounded(OTHER),  # a bfloat16 of something else
    ],
)
def test_what_is_only_near_a_lower_dtype_is_not_rounded(part: torch.Tensor) -> None:
    assert cause("activation", (part, part), observed=1e-3) is None


def test_a_tensor_that_is_exact_in_any_dtype_proves_nothing() -> None:
    ones = torch.ones(4, 8, dtype=torch.float64)
    found = cause("activation", (ones + 2**-7,) * 2, expected=ones, expected_parts=(ones, ones), observed=1e-3)
    assert found is None


@pytest.mark.parametrize(
    ("factors", "expected"),
    [((1.0, 1.7), "gradient_scaled"), ((0.5, 0.5), "gradient_scaled"), ((2.0, 2.1), "gradient_scaled")],
)
def test_a_gradient_times_a_constant_is_scaled(factors: tuple[float, ...], expected: str) -> None:
    assert cause("gradient", tuple(WIDE * factor for factor in factors)) == expected


def test_one_number_is_a_multiple_of_any_other() -> None:
    one = torch.ones(1, dtype=torch.float64)
    assert cause("gradient", (one * 3, one), expected=one, expected_parts=(one, one)) is None


def test_equal_terms_are_a_scaled_gradient_and_no_partial_one() -> None:
    assert cause("gradient", (WIDE / 2, WIDE / 2)) == "gradient_scaled"
    assert cause("input_gradient", (WIDE / 2, WIDE / 2)) == "gradient_scaled"  # nothing says that a module made it


@pytest.mark.parametrize(
    ("num_replicas", "every_parameter", "expected"),
    [
        (2, True, "sum_instead_of_mean"),
        (2, False, "gradient_scaled"),  # as many TP ranks as replicas: a parameter alone tells nothing of averaging
        (1, True, "gradient_scaled"),
    ],
)
def test_a_factor_is_due_to_averaging_where_all_parameters_have_it(
    num_replicas: int, every_parameter: bool, expected: str
) -> None:
    evidence = {"every_parameter": True} if every_parameter else {}
    assert cause("gradient", (WIDE * 2, WIDE * 2), num_replicas=num_replicas, evidence=evidence) == expected


def test_features_that_are_partial_are_told_from_those_that_are_reduced() -> None:
    first, second = WIDE.clone(), WIDE.clone()
    first[:, 5:], second[:, 5:] = WIDE[:, 5:] * 0.3 + 0.1, WIDE[:, 5:] * 0.7 - 0.1
    found = explain(suspect("input_gradient", (first, second), expected=WIDE, expected_parts=(WIDE, WIDE)))
    assert found is not None
    assert found.cause.slug == "missing_reduce"
    assert found.evidence["partial_features"] == "3 of 8"


@pytest.mark.parametrize("slug", ["tensor_of_another_layer", "stale_weight"])
@pytest.mark.parametrize("parts", [(OTHER, OTHER), (OTHER, WIDE)])
def test_the_wrong_ranks_hold_what_a_mistake_gives_them(slug: str, parts: tuple[Any, ...]) -> None:
    kind = "gradient" if slug == "tensor_of_another_layer" else "update"
    assert cause(kind, parts, hypotheses=(Hypothesis(Cause[slug.upper()], (OTHER, OTHER)),)) == slug
    assert cause(kind, (OTHER + 0.1, WIDE), hypotheses=(Hypothesis(Cause[slug.upper()], (OTHER, OTHER)),)) in (
        None,
        "replica_drift",
    )


def test_updates_of_some_replicas_have_drifted_and_of_all_have_not() -> None:
    assert cause("update", (WIDE, WIDE + 1e-7), observed=1e-7) == "replica_drift"
    assert cause("update", (WIDE + 1e-7, WIDE + 1e-7), observed=1e-7) is None


@pytest.mark.parametrize(
    ("implied", "expected"),
    [([3.0, 4.0], "norm_is_local"), ([6.0, 6.0], "norm_counts_replicas"), ([5.5, 5.5], None)],
)
def test_a_step_tells_by_which_norm_it_was_clipped(implied: list[float], expected: str | None) -> None:
    evidence = {
        "norm_implied": implied,
        "norm_of_each_rank_alone": [3.0, 4.0],
        "norm_with_replicas_counted": 6.0,
    }
    assert cause("update", (WIDE * 1.1, WIDE * 1.1), evidence=evidence) == expected


def test_a_gradient_that_never_comes_back_is_missing() -> None:
    nothing = torch.zeros_like(WIDE)
    assert cause("input_gradient", (nothing, nothing)) == "gradient_missing"


def test_terms_of_a_sum_are_recognised_in_a_vector() -> None:
    vector, terms = EXPECTED.reshape(-1), tuple(term.reshape(-1) for term in TERMS)
    assert cause("gradient", terms, expected=vector, expected_parts=(vector, vector)) == "partial_gradient_on_replica"


@pytest.mark.parametrize("kind", ["activation", "input_gradient", "gradient", "update"])
def test_what_is_not_a_number_is_evidence_for_nothing_else(kind: str) -> None:
    nans = torch.full_like(WIDE, torch.nan)
    assert cause(kind, (nans, WIDE), observed=torch.inf) == "not_finite"
    assert (
        cause(kind, (nans, OTHER), observed=torch.inf, hypotheses=(Hypothesis(Cause.STALE_WEIGHT, (OTHER, OTHER)),))
        is None
    )


@pytest.mark.parametrize("kind", ["activation", "input_gradient"])
@pytest.mark.parametrize(("factor", "slug"), [(2.0, "duplicate_reduce"), (0.5, "mean_instead_of_sum")])
def test_one_rank_alone_may_reduce_wrongly(kind: str, factor: float, slug: str) -> None:
    found = explain(
        replace(
            suspect(kind, (WIDE, WIDE * factor), expected=WIDE, expected_parts=(WIDE, WIDE)), where={"field": "input 0"}
        )
    )
    assert found is not None
    assert found.cause.slug == slug
    halves = WIDE.chunk(2, dim=1)
    scaled = (halves[0], halves[1] * factor)
    assert cause("activation", scaled, expected_parts=halves, replicated=False) is None


def test_gradients_of_another_ranks_shard_are_told() -> None:
    halves = WIDE.chunk(2, dim=1)
    assert cause("gradient", halves[::-1], expected_parts=halves, replicated=False) == "shard_order_swapped"
    assert cause("gradient", (halves[0], halves[0]), expected_parts=halves, replicated=False) == "shard_repeated"


@pytest.mark.parametrize("note", ["differed_at_start", "gradients_differ"])
def test_replicas_that_something_else_tells_apart_have_not_drifted(note: str) -> None:
    assert cause("update", (WIDE, WIDE + 1e-7), observed=1e-7, evidence={note: True}) is None


def test_replicas_over_dp_drift_too() -> None:
    halves = WIDE.chunk(2, dim=1)
    parts = (halves[0], halves[1] + 1e-7)
    fields = {"expected_parts": halves, "replicated": False, "observed": 1e-7}
    assert cause("update", parts, **fields) is None
    assert cause("update", parts, evidence={"replicas_over_dp_differ": True}, **fields) == "replica_drift"
