"""A report answers for itself, and raises what its verdict says."""

from __future__ import annotations

import pytest

from tests.report.examples import ERROR, FAILED, PASSED, SKIPPED
from tpcheck.core.errors import BackendError, Mismatch
from tpcheck.report.report import Report


def test_only_a_run_that_agreed_has_passed() -> None:
    assert [Report(verdict).passed for verdict in (PASSED, FAILED, ERROR, SKIPPED)] == [True, False, False, False]


def test_a_mismatch_carries_its_report() -> None:
    report = Report(FAILED)
    with pytest.raises(Mismatch) as error:
        report.raise_if_failed()
    assert error.value.report is report
    assert str(error.value) == report.to_text() == str(report)


def test_a_crash_of_the_backend_is_no_mismatch() -> None:
    with pytest.raises(BackendError, match="not supported"):
        Report(ERROR).raise_if_failed()


def test_passed_and_skipped_raise_nothing() -> None:
    Report(PASSED).raise_if_failed()
    Report(SKIPPED).raise_if_failed()


def test_findings_are_those_of_the_verdict() -> None:
    assert Report(FAILED).findings == FAILED.findings


def test_the_page_has_every_finding_and_every_check() -> None:
    page = Report(FAILED).to_html()
    assert page.count('data-outcome="failure"') == len(FAILED.findings) + 2  # of three checks
    assert page.count('data-outcome="passed"') == 1
    assert "partial_gradient_on_replica: the sum of the ranks&#39; gradients equals the expected one" in page
    assert "ValueError: style" in Report(ERROR).to_html()
