"""A cause explains a suspect where little of the difference remains."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, sqrt

import pytest
import torch

from tests.numerics.evidence import suspect
from tpcheck.core.causes import Cause
from tpcheck.numerics.differences import frobenius_distance
from tpcheck.numerics.evidence import Suspect
from tpcheck.numerics.hypotheses.proof import (
    Hypothesis,
    explanation_if_equal,
    first_confirmed,
    largest_residual,
    observed_distance,
    wrong_tp_ranks,
)

ZEROS, ONES = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)


def test_replicas_are_as_far_off_as_the_farthest_and_shards_together() -> None:
    parts = [ONES, ONES * 2]
    assert observed_distance(suspect("activation", parts, ZEROS)) == 4.0
    assert observed_distance(suspect("activation", parts, ZEROS, expected_parts=(ZEROS, ZEROS))) == sqrt(4 + 16)


def test_tensors_of_other_shapes_are_as_far_off_as_was_observed() -> None:
    assert observed_distance(suspect("activation", [ONES[:2]], ONES, observed=0.5)) == 1.0
    assert observed_distance(suspect("weight", [ONES[:2]], ONES, observed=2.0, allowed=0.0)) == 0.0  # counts elements
    assert frobenius_distance(ONES, ONES[:2]) == inf


@pytest.mark.parametrize(("allowed_error", "share"), [(0.0, 1e-3), (1e-4, 1e-3), (0.1, 0.05), (10.0, 0.1)])
def test_what_may_remain_is_little_of_the_difference_or_what_rounding_does(allowed_error: float, share: float) -> None:
    limit = largest_residual(suspect("activation", [ONES], ZEROS, allowed_error=allowed_error))
    assert limit == pytest.approx(2 * share)


def test_a_cause_explains_what_it_leaves_little_of() -> None:
    wrong = suspect("activation", [ONES * 2], ONES)
    near, far = ONES * (1 + 0.5e-3), ONES * (1 + 2e-3)
    found = explanation_if_equal(Cause.DUPLICATE_REDUCE, near, ONES, wrong)
    assert found is not None
    assert found.residual == pytest.approx(0.5e-3)
    assert explanation_if_equal(Cause.DUPLICATE_REDUCE, far, ONES, wrong) is None
    assert explanation_if_equal(Cause.DUPLICATE_REDUCE, near[:2], ONES, wrong) is None


def test_nothing_explains_numbers_that_are_lost() -> None:
    for lost in (torch.nan, inf):
        wrong = suspect("activation", [ONES * lost], ONES)
        assert explanation_if_equal(Cause.DUPLICATE_REDUCE, ONES * lost, ONES, wrong) is None
        assert explanation_if_equal(Cause.DUPLICATE_REDUCE, ONES, ONES, wrong) is None


def test_infinities_of_a_mask_do_not_hide_a_cause() -> None:
    masked = torch.tensor([1.0, 1.0, 1.0, -inf], dtype=torch.float64)
    found = explanation_if_equal(Cause.DUPLICATE_REDUCE, masked, masked, suspect("activation", [masked * 2], masked))
    assert found is not None
    assert found.residual == 0


def test_ranks_are_wrong_beyond_what_may_remain() -> None:
    assert wrong_tp_ranks(suspect("update", [ONES, ONES * (1 + 1e-6), ONES * 2], ONES)) == [2]


def one_more(suspect: Suspect) -> Iterator[Hypothesis]:
    yield Hypothesis(Cause.STALE_WEIGHT, (ONES * 5,) * 2)
    yield Hypothesis(Cause.TRANSPOSED, (ONES * 2,) * 2, {"by": 1})


def test_the_first_hypothesis_that_the_wrong_ranks_confirm_is_named() -> None:
    test = first_confirmed(one_more)
    for parts in ([ONES * 2, ONES * 2], [ONES, ONES * 2]):
        found = test(suspect("update", parts, ONES))
        assert found is not None
        assert (found.cause, found.evidence) == (Cause.TRANSPOSED, {"by": 1})
    assert test(suspect("update", [ONES * 2, ONES * 2.1], ONES)) is None
    assert test(suspect("update", [ONES[:2]] * 2, ONES[:2])) is None  # of another shape
    assert test(suspect("update", (), ONES)) is None
