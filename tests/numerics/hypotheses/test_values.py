"""Elements that are no numbers, zeros, or numbers of a lower dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.numerics.evidence import suspect
from tpcheck.core.causes import Cause
from tpcheck.numerics.hypotheses import explain

CHANCE = torch.Generator().manual_seed(0)
EXPECTED, OTHER = torch.randn(2, 4, 8, generator=CHANCE, dtype=torch.float64)


def the_cause(parts: Any, expected: Any = EXPECTED, *, kind: Any = "activation", **fields: Any) -> Cause | None:
    found = explain(suspect(kind, parts, expected, **fields))
    return found.cause if found else None


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
