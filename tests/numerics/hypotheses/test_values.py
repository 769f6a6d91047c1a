"""Elements that are no numbers, zeros, or numbers of a lower dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.numerics.evidence import cause_of, suspect
from tpcheck.core.causes import Cause
from tpcheck.numerics.hypotheses import explain

CHANCE = torch.Generator().manual_seed(0)
EXPECTED, OTHER = torch.randn(2, 4, 8, generator=CHANCE, dtype=torch.float64)


def the_cause(parts: Any, expected: Any = EXPECTED, *, kind: Any = "activation", **fields: Any) -> Cause | None:
    return cause_of(suspect(kind, parts, expected, **fields))


def rounded(tensor: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return tensor.to(dtype).to(tensor.dtype)


def test_zeros_and_what_is_no_number_are_named_where_only_they_are_wrong() -> None:
    zeros, nans = EXPECTED.clone(), EXPECTED.clone()
    zeros[:, 3:6], nans[0, 1] = 0.0, torch.nan
    assert the_cause((EXPECTED, zeros)) is Cause.ALL_ZERO
    assert the_cause((nans, EXPECTED)) is Cause.NOT_FINITE
    zeros[0, 0] += 1.0
    assert the_cause((EXPECTED, zeros)) is None


def test_few_zeros_prove_nothing() -> None:
    zeros = EXPECTED.clone()
    zeros[0, :7] = 0.0
    assert the_cause((EXPECTED, zeros)) is None
    zeros[0, :8] = 0.0
    assert the_cause((EXPECTED, zeros)) is Cause.ALL_ZERO


def test_infinities_beside_other_wrong_elements_have_no_cause() -> None:
    nans = EXPECTED.clone()
    nans[0, 1], nans[0, 2] = torch.nan, 7.0
    assert the_cause((nans, EXPECTED)) is None


def test_parts_of_other_shapes_have_no_values_to_compare() -> None:
    assert the_cause((EXPECTED[:2] * torch.nan,) * 2) is None
    assert the_cause((EXPECTED[:2] * 0,) * 2) is None
    assert the_cause((rounded(EXPECTED[:2]),) * 2, observed=1e-3) is None


def test_few_elements_or_integers_are_not_rounded() -> None:
    assert the_cause((rounded(EXPECTED[0, :7]),) * 2, EXPECTED[0, :7], observed=1e-3) is None
    assert the_cause((rounded(EXPECTED[0, :8]),) * 2, EXPECTED[0, :8], observed=1e-3) is Cause.DTYPE_ROUNDED
    integers = torch.arange(1000, 1016).reshape(2, 8)
    assert the_cause((integers.bfloat16().long(),) * 2, integers, observed=1e-3) is None


def test_a_tensor_is_not_rounded_to_its_own_dtype() -> None:
    expected = EXPECTED.float()
    assert the_cause((expected * (1 + 1e-6),) * 2, expected, observed=1e-6) is None
    assert the_cause((rounded(expected),) * 2, expected, observed=1e-3) is Cause.DTYPE_ROUNDED


def test_infinities_that_are_expected_are_no_loss_of_numbers() -> None:
    mask = torch.full((4, 8), -torch.inf, dtype=torch.float64)
    assert the_cause((mask + 0.0, mask * 2), mask) is None


@pytest.mark.parametrize("kind", ["activation", "input_gradient", "gradient", "update"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_tensor_in_a_lower_dtype_is_recognised(kind: str, dtype: torch.dtype) -> None:
    found = explain(suspect(kind, (rounded(EXPECTED, dtype), EXPECTED), EXPECTED, observed=1e-3))  # type: ignore[arg-type]
    assert found is not None
    assert found.cause is Cause.DTYPE_ROUNDED
    assert found.evidence == {"rounded_to": str(dtype).removeprefix("torch.")}


@pytest.mark.parametrize("part", [rounded(EXPECTED) + 1e-9, rounded(OTHER)])
def test_what_is_only_near_a_lower_dtype_or_something_else_is_not_rounded(part: torch.Tensor) -> None:
    assert the_cause((part, part), observed=1e-3) is None


def test_a_tensor_that_is_exact_in_any_dtype_proves_nothing() -> None:
    ones = torch.ones(4, 8, dtype=torch.float64)
    assert the_cause((ones + 2**-7,) * 2, ones, observed=1e-3) is None
