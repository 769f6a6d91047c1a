"""Where a message says to read on."""

from __future__ import annotations

import pickle

import pytest

from tests.report.examples import ERROR, FAILED
from tpcheck import UsageError
from tpcheck.core.causes import Cause, guide_of
from tpcheck.core.guides import GUIDE_OF_CHECK, Guide
from tpcheck.numerics.checks import CHECK_NAMES, ON_REQUEST
from tpcheck.report import Report


def test_every_check_has_a_guide() -> None:
    assert {*CHECK_NAMES, *ON_REQUEST} <= set(GUIDE_OF_CHECK)


@pytest.mark.parametrize(
    ("check", "slug", "expected"),
    [
        ("gradients_match_reference", None, Guide.LOSS_DIFFERS),
        ("gradients_match_reference", "missing_reduce", Guide.LOSS_DIFFERS),
        ("outputs_match_reference", Cause.NONDETERMINISM.slug, Guide.NOISE),
        ("checkpoint_matches_reference", "optimizer_state_of_another_rank", Guide.RESUME),
        ("batches_agree_within_tp", "gremlins", Guide.DATA_INCONSISTENCY),
        ("a_check_of_a_third_party", None, None),
    ],
)
def test_the_guide_of_a_cause_comes_before_that_of_the_check(
    check: str, slug: str | None, expected: Guide | None
) -> None:
    assert guide_of(check, slug) is expected


def test_an_error_ends_with_its_guide() -> None:
    error = UsageError("group", None, "a TP group", Guide.WHICH_RANKS)
    assert str(error).splitlines() == ["group=None: expected a TP group", f"read on: {Guide.WHICH_RANKS.url}"]
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize(("verdict", "guide"), [(FAILED, Guide.LOSS_DIFFERS), (ERROR, Guide.WHICH_MODELS)])
def test_a_report_ends_with_each_guide_once(verdict: object, guide: Guide) -> None:
    lines = Report(verdict).to_text().splitlines()  # type: ignore[arg-type]
    assert lines[-1] == f"  read on   {guide.url}"
    assert sum("read on" in line for line in lines) == 1
