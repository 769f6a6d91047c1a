"""Many verdicts as text, JSON, Markdown and an HTML page; a matrix goes on with those of the same subject."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.examples import ERROR, FAILED, PASSED, SKIPPED, SUBJECT
from tests.schema import document
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import CheckResult, Finding, Verdict
from tpcheck.lab.known import JudgedVerdict, KnownBug
from tpcheck.lab.matrix import (
    LABELS,
    SIGNS,
    Cell,
    cells,
    combinations,
    counts,
    done_before,
    judged_json,
    label,
    matrix_html,
    matrix_junit,
    matrix_lines,
    matrix_markdown,
    num_other_results,
    require_usable,
    require_usable_values,
    stored_verdicts,
    summary_line,
    verdict_of,
    versions,
    whole_json,
)
from tpcheck.model.options import RunOptions
from tpcheck.report.json_values import verdict_json
from tpcheck.report.report import Report
from tpcheck.report.words import as_text

NOT_SHARDED = replace(
    PASSED,
    verdict="failed",
    subject={**SUBJECT, "family": "lfm2", "backend": "other"},
    findings=(Finding("parameters_are_sharded", {"phase": "start"}, 1.0, 0.0, cause="not_sharded"),),
    checks=(CheckResult("parameters_are_sharded", 1, 0.0),),
)
BUG = KnownBug("a-bug", ("phi3",), "deepspeed", {}, "error", "It <says> no.", "tpcheck verify phi3", link="https://x.y")
EVIL = replace(ERROR, subject={**SUBJECT, "family": "<script>alert(1)</script>"}, message="</pre><script>alert(2)")
ROWS = (
    JudgedVerdict(PASSED),
    JudgedVerdict(replace(FAILED, subject=SUBJECT | {"family": "phi"}), "new"),
    JudgedVerdict(ERROR, "known", BUG),
    JudgedVerdict(NOT_SHARDED),
    JudgedVerdict(SKIPPED),
    JudgedVerdict(replace(PASSED, subject=SUBJECT | {"family": "mamba"}), "gone", BUG),
    JudgedVerdict(EVIL),
)


class Page(HTMLParser):
    """Counts what a page holds, and checks that every element is closed in turn."""

    VOID = ("meta", "input", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[dict[str, str | None]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes.append({"": tag, **dict(attrs)})
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_has_a_row_for_each_verdict_and_its_report() -> None:
    page = Page(matrix_html(ROWS))
    assert page.open == []
    assert page.tags["details"] == page.tags["pre"] == len(ROWS)
    outcomes = Counter(tag["data-outcome"] for tag in page.attributes if "data-outcome" in tag)
    assert outcomes == {"passed": 2, "failure": 2, "error": 2, "skipped": 1}
    assert sum(tag.get("data-expected") == "false" for tag in page.attributes) == 4
    text = matrix_html(ROWS)
    assert "again     tpcheck verify qwen3 --tp 2 --ignore-plan" in text
    assert "upstream  a-bug: It &lt;says&gt; no." in text
    assert "https://x.y" in text


def test_the_page_needs_no_other_file_and_escapes_what_it_shows() -> None:
    text = matrix_html(ROWS)
    page = Page(text)
    assert page.tags["script"] == 1
    assert not [tag for tag in page.attributes if "src" in tag or "href" in tag]
    assert "alert(1)</script>" not in text
    assert "&lt;script&gt;alert(2)" in text


def test_verdicts_differ_without_colours() -> None:
    text = matrix_html(ROWS)
    assert all(f"{SIGNS[name]} {name}" in text for name in LABELS)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium")
def test_a_browser_filters_the_page(tmp_path: Path) -> None:
    act = """<script>
    document.querySelector("input[value=passed]").click();
    const rows = [...document.querySelectorAll("tr[data-outcome]:not([hidden])")];
    document.title = rows.map(row => row.dataset.outcome).join();
    </script></body>"""
    (tmp_path / "page.html").write_text(matrix_html(ROWS).replace("</body>", act))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"--user-data-dir={tmp_path}/u"]
    done = subprocess.run([*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120)
    assert "<title>failure,error,failure,skipped,error</title>" in done.stdout


def test_a_model_that_the_backend_left_whole_is_not_sharded() -> None:
    assert label(NOT_SHARDED) == "not sharded"
    (finding,) = NOT_SHARDED.findings
    for other in (replace(finding, cause="shard_missing"), replace(finding, check="outputs_match_reference")):
        assert label(replace(NOT_SHARDED, findings=(other,))) == "failed"
    assert counts(ROWS) == "2 passed, 1 failed, 1 not sharded, 2 error (1 known), 1 skipped"


def test_text_ends_with_the_unexpected_cells() -> None:
    text = as_text(matrix_lines(ROWS))
    assert [line.split() for line in text.splitlines() if line.startswith("phi3")] == [
        "phi3 deepspeed, tp=2 error 3.0 s ValueError: style known: a-bug".split()
    ]
    assert [line.split()[-1] for line in text.splitlines() if line.startswith(("phi ", "mamba"))] == ["new", "gone"]
    assert text.endswith(
        "  new       phi (deepspeed, tp=2): failed, and no entry of tpcheck/lab/known.toml describes this\n"
        "  gone      mamba (deepspeed, tp=2) passed, but a-bug is registered for these versions: It <says> no. "
        "If it is fixed, limit its versions in tpcheck/lab/known.toml.\n"
    )


@pytest.mark.parametrize("verdict", [PASSED, FAILED, ERROR, SKIPPED, NOT_SHARDED], ids=label)
def test_a_verdict_is_equal_after_writing_and_reading(verdict: Verdict) -> None:
    data = verdict_json(verdict)
    assert verdict_json(verdict_of(json.loads(json.dumps(data)))) == data


def test_a_file_of_verdicts_is_equal_after_writing_and_reading(tmp_path: Path) -> None:
    text = whole_json([judged_json(row) for row in ROWS], [row.verdict.verdict for row in ROWS], pending=3)
    (tmp_path / "f").write_text(text)
    data = document(text, "matrix")
    assert (data["schema"], data["verdict"], data["pending"]) == (1, "failed", 3)
    assert data["reports"][2]["upstream"] == {"standing": "known", "bug": "a-bug"}
    assert [verdict_json(verdict) for verdict in stored_verdicts(tmp_path / "f")] == [
        verdict_json(row.verdict) for row in ROWS
    ]


def test_a_row_is_summed_up_by_its_first_finding() -> None:
    (finding, *_) = FAILED.findings
    assert summary_line(FAILED) == f"{finding.check}  {finding.where['parameter']}  {finding.cause}"


def test_a_file_has_the_worst_verdict_that_was_reached() -> None:
    assert [
        json.loads(whole_json([], verdicts, pending=0))["verdict"]
        for verdicts in (["skipped", "passed"], ["passed", "error"], ["error", "failed"], [])
    ] == ["passed", "error", "failed", "skipped"]


def test_markdown_lists_what_did_not_pass() -> None:
    text = matrix_markdown(ROWS)
    assert "- **gone** mamba (deepspeed, tp=2) passed" in text
    assert "| phi3 | deepspeed, tp=2 | ! error, known | ValueError: style |" in text
    assert "| qwen3 |" not in text
    assert "<script>" not in text


def test_junit_skips_known_bugs_and_fails_bugs_that_are_gone() -> None:
    text = matrix_junit(ROWS)
    assert 'skipped message="known upstream bug a-bug: It &lt;says&gt; no."' in text
    assert 'failure message="mamba (deepspeed, tp=2) passed' in text
    assert "<failure" not in matrix_junit([JudgedVerdict(PASSED)])


@pytest.mark.parametrize(
    ("config", "goes_on"),
    [({"plan": {"a": [1, 2.5]}}, True), ({"plan": {"a": object()}}, False), ({"plan": {("a", 1): "colwise"}}, False)],
)
def test_a_configuration_that_json_cannot_hold_is_run_again(
    config: dict[str, object], goes_on: bool, tmp_path: Path
) -> None:
    wanted = cells(["llama"], combinations(RunOptions(config=config), backend=["dtensor"]))
    verdict = Verdict("passed", wanted[0].subject, versions("dtensor"))
    (tmp_path / "matrix.json").write_text(Report(verdict).to_json())
    assert list(done_before(tmp_path / "matrix.json", wanted)) == list(wanted) * goes_on


def test_a_folder_is_not_run_again_and_code_of_the_users_own_is(tmp_path: Path) -> None:
    subject = {**SUBJECT, "target": "folder", "configuration": {"layers": [2]}}
    (tmp_path / "matrix.json").write_text(Report(Verdict("passed", subject, versions("deepspeed"))).to_json())
    folder, own_code = (Cell(name, of_target=subject) for name in ("saved/llama", "model.py:build"))
    assert list(done_before(tmp_path / "matrix.json", [folder, own_code])) == [folder]
    changed = replace(folder, of_target={**subject, "family": "opt", "configuration": {"layers": [3]}})
    assert done_before(tmp_path / "matrix.json", [changed]) == {}


def test_a_changed_folder_replaces_its_own_result_alone(tmp_path: Path) -> None:
    subject = {**SUBJECT, "target": "saved/llama", "configuration": {"layers": [2]}}
    (tmp_path / "matrix.json").write_text(
        whole_json([judged_json(JudgedVerdict(Verdict("passed", subject, {})))], [], 0)
    )
    changed = Cell("saved/llama", of_target={**subject, "family": "opt", "configuration": {"layers": [3]}})
    assert num_other_results(tmp_path / "matrix.json", [changed]) == 0
    assert num_other_results(tmp_path / "matrix.json", [Cell("qwen3")]) == 1


def test_a_value_is_usable_if_one_combination_takes_it() -> None:
    by_value = combinations(zero=[0, 7])
    require_usable(by_value[::-1])
    with pytest.raises(UsageError, match="zero_stage=7"):
        require_usable(combinations(zero=[7, 8]))
    with pytest.raises(UsageError, match="zero_stage=7"):
        require_usable_values(by_value)
    reentrant = RunOptions(reentrant=True)
    require_usable_values([reentrant, RunOptions(reentrant=True, checkpointing=True)])
    with pytest.raises(UsageError, match="reentrant"):
        require_usable_values([reentrant, RunOptions()])
