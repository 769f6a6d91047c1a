"""A matrix goes on with verdicts of the same subject, and of no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpcheck.core.findings import Verdict
from tpcheck.lab.matrix.cells import cells, done_before, versions
from tpcheck.model.options import RunOptions
from tpcheck.report.report import Report


@pytest.mark.parametrize(
    ("config", "goes_on"),
    [({"plan": {"a": [1, 2.5]}}, True), ({"plan": {"a": object()}}, False), ({"plan": {("a", 1): "colwise"}}, False)],
)
def test_a_configuration_that_json_cannot_hold_is_run_again(
    config: dict[str, object], goes_on: bool, tmp_path: Path
) -> None:
    wanted = cells(["llama"], RunOptions(config=config), backend=["dtensor"])
    verdict = Verdict("passed", wanted[0].subject, versions("dtensor"))
    (tmp_path / "matrix.json").write_text(Report(verdict).to_json())
    assert list(done_before(tmp_path / "matrix.json", wanted)) == list(wanted) * goes_on
