"""Two runs made by hand, right and wrong: what the comparison says of them."""

from __future__ import annotations

import pytest

from tests.runs.hand_made import run
from tpcheck.report.report import Report
from tpcheck.runs.comparing import compare_recordings


def report_of(**options: object) -> Report:
    return compare_recordings(run(**options), run(rounding=1.0, seed=5))


def require_passed(report: Report) -> None:
    assert report.passed, report.to_text(findings=None)


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("layouts", [True, False])
def test_a_right_run_passes_at_any_topology(tp: int, dp: int, layouts: bool) -> None:
    require_passed(report_of(tp=tp, dp=dp, layouts=layouts))
