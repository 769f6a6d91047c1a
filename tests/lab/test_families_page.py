"""The page of what works, by family: counts, one column a backend, and where other layouts differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.report.examples import PASSED, SKIPPED, SUBJECT
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import Finding, Verdict
from tpcheck.lab.families_page import counts_table, differences_table, families_page, families_table, partly_run
from tpcheck.lab.known import JudgedVerdict, KnownBug
from tpcheck.report.report import Report
from tpcheck.report.table import table_markdown
from tpcheck.report.words import as_text

BUG = KnownBug("a-bug", ("phi3",), "deepspeed", {}, "error", "It says no.", "tpcheck verify phi3")
REFUSED = replace(PASSED, verdict="error", checks=(), message="no\nplan")
GRADIENT = Finding("gradients_match_reference", {"phase": "backward"}, 1.0, 0.0)
WRONG = replace(PASSED, verdict="failed", checks=(), findings=(GRADIENT,))


def _row(
    verdict: Verdict, family: str, backend: str = "deepspeed", bug: KnownBug | None = None, **options: int
) -> JudgedVerdict:
    subject = {**SUBJECT, "family": family, "backend": backend, "tp": 2, "dp": 1, "zero": 0, **options}
    return JudgedVerdict(replace(verdict, subject=subject), "known" if bug else "", bug)


ROWS = (
    _row(PASSED, "llama"),
    _row(REFUSED, "phi3", bug=BUG),
    _row(SKIPPED, "odd"),
    _row(REFUSED, "llama", "other"),
    _row(PASSED, "phi3", "other"),
    _row(PASSED, "llama", dp=2),
    _row(REFUSED, "phi3", bug=BUG, dp=2),
    _row(WRONG, "llama", dp=2, zero=1),
    _row(REFUSED, "phi3", bug=BUG, dp=2, zero=1),
    _row(WRONG, "llama", dp=2, zero=2),
    _row(REFUSED, "llama", dp=2, zero=3),
    _row(PASSED, "llama", "other", tp=4),
    _row(PASSED, "phi3", "other", tp=4),
)


def _markdown(rows: Sequence[JudgedVerdict]) -> list[str]:
    return list(table_markdown(families_table(rows)))


def test_a_backend_has_one_column_that_of_its_first_layout() -> None:
    assert _markdown(ROWS) == [
        "| family | deepspeed, tp=2 | other, tp=2 |",
        "| --- | --- | --- |",
        "| llama | ✓ passed | ! error: no |",
        "| phi3 | ! error (a-bug) | ✓ passed |",
        "| odd | · skipped: two ranks need two GPUs |  |",
    ]


def test_verdicts_of_other_layouts_are_listed_where_they_differ_and_equal_ones_share_a_row() -> None:
    assert list(table_markdown(differences_table(ROWS)))[2:] == [
        "| llama | deepspeed | tp=2, dp=2, zero=1; tp=2, dp=2, zero=2 | ✗ failed: gradients_match_reference |",
        "| llama | deepspeed | tp=2, dp=2, zero=3 | ! error: no |",
        "| llama | other | tp=4 | ✓ passed |",
    ]


def test_nothing_differs_where_all_layouts_agree_or_there_is_one() -> None:
    assert differences_table(ROWS[:5]).rows == ()
    assert differences_table([row for row in ROWS if row.verdict.subject["family"] == "phi3"]).rows == ()


def test_a_family_that_only_another_layout_has_differs() -> None:
    (row,) = differences_table([*ROWS[:3], _row(PASSED, "new", dp=2)]).rows
    assert [cell.text for cell in row.cells] == ["new", "deepspeed", "tp=2, dp=2", "✓ passed"]


def test_a_layout_that_was_not_run_for_all_says_for_which_in_the_shorter_way() -> None:
    assert list(partly_run(ROWS)) == [
        "- deepspeed, tp=2, dp=2: run for all but odd.",
        "- deepspeed, tp=2, dp=2, zero=1: run for all but odd.",
        "- deepspeed, tp=2, dp=2, zero=2: run for llama.",
        "- deepspeed, tp=2, dp=2, zero=3: run for llama.",
        "- other, tp=2: run for all but odd.",
        "- other, tp=4: run for all but odd.",
    ]
    assert list(partly_run([row for row in ROWS if row.verdict.subject["family"] == "llama"])) == []


def test_every_layout_is_counted() -> None:
    lines = list(table_markdown(counts_table(ROWS)))
    assert lines[0] == "| backend | layout | families | passed | failed | not sharded | error | skipped |"
    assert lines[2] == "| deepspeed | tp=2 | 3 | 1 | 0 | 0 | 1 (1) | 1 |"
    assert lines[4] == "| deepspeed | tp=2, dp=2, zero=1 | 2 | 0 | 1 | 0 | 1 (1) | 0 |"


def test_the_page_joins_the_files_of_several_layouts(tmp_path: Path) -> None:
    files = []
    for number, row in enumerate((ROWS[0], ROWS[7])):
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(Report(row.verdict).to_json())
    text = as_text(families_page(files))
    assert "| deepspeed | tp=2, dp=2, zero=1 | 1 |" in text
    assert "## Where another layout differs" in text
    assert "## Where another layout differs" not in as_text(families_page(files[:1]))


def test_the_page_ends_with_each_known_bug_and_where_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = replace(BUG, verdict="failed", link="https://x.y", script="docs/upstream/a.py")
    monkeypatch.setattr("tpcheck.lab.families_page.register", lambda: (BUG, reported))
    (tmp_path / "f.json").write_text(Report(PASSED).to_json())
    assert as_text(families_page([tmp_path / "f.json"])).endswith(
        "- **a-bug** (loud; deepspeed): It says no. `tpcheck verify phi3`\n"
        "- **a-bug** (silent; deepspeed): It says no. `tpcheck verify phi3`; "
        "[reported](https://x.y), `docs/upstream/a.py` shows it\n"
    )


def test_a_file_without_verdicts_is_refused_also_beside_another(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(Report(PASSED).to_json())
    (tmp_path / "empty.json").write_text("{}")
    with pytest.raises(UsageError, match=r"empty\.json"):
        families_page([tmp_path / "good.json", tmp_path / "empty.json"])
