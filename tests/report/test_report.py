"""A report answers for itself, and raises what its verdict says."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.report.examples import ERROR, FAILED, GRADIENT, PASSED, SKIPPED
from tpcheck.core.errors import BackendError, Mismatch
from tpcheck.core.findings import CheckResult
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


def test_a_check_that_another_one_speaks_for_has_not_passed() -> None:
    checks = (CheckResult("outputs_match_reference", 3, 2e4), CheckResult("replicas_agree", 3, 0.5))
    verdict = replace(FAILED, findings=(GRADIENT,), checks=checks)
    text, junit = Report(verdict).to_text(), Report(verdict).to_junit()
    assert re.search(r"outputs_match_reference +follows +3 +2\.0e\+04", text)
    assert re.search(r"replicas_agree +passed", text)
    assert 'message="differs, which follows from what failed first"' in junit
    assert "follows" in Report(verdict).to_html()
