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
