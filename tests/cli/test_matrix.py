"""`tpcheck verify` of many cells: which there are, what a run before it left, and what is known upstream."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.report.examples import ERROR, FAILED, PASSED
from tests.schema import document
from tpcheck.core.errors import UsageError
from tpcheck.lab import known
from tpcheck.lab.known import KnownBug
from tpcheck.lab.matrix import cells, combinations, stored_verdicts
from tpcheck.model.options import RunOptions
from tpcheck.report.report import Report

Run = Callable[..., Any]
BUG = KnownBug("bad-qkv", ("bad",), "deepspeed", {}, "failed", "It is cut wrongly.", "tpcheck verify bad")
VERDICTS = {"bad": FAILED, "ugly": ERROR}


@pytest.fixture(autouse=True)
def register(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "register", lambda: (BUG,))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


def verify_family(family: str, **options: Any) -> Report:
    """Answer as the API does: by the family's name, with the subject that the options make."""
    verdict = VERDICTS.get(family, PASSED)
    return Report(replace(verdict, environment={}, subject=RunOptions(**options).subject(family)))


def test_lists_make_a_matrix(run: Run) -> None:
    seen: set[tuple[Any, ...]] = set()

    def remember(family: str, **options: Any) -> Report:
        seen.add((family, options["backend"], options["topology"].tp, options["zero_stage"]))
        return verify_family(family, **options)

    result = run("verify", "a", "b", *"--backend x,y --tp 2,4 --zero 0,1".split(), verify_family=remember)
    assert result.exit_code == 0
    assert len(seen) == 16
    assert "16 passed" in result.stdout
    assert "a  x, tp=2          passed" in result.stdout
    assert "b  y, tp=4, zero=1  passed" in result.stdout


def test_cells_are_asked_for_once_and_those_of_a_family_stand_together() -> None:
    implementations = cells(["a"], combinations(attention=["eager", "sdpa"], experts=["eager", "batched_mm"]))
    assert [(cell.options.attention, cell.options.experts) for cell in implementations] == [
        ("eager", "eager"), ("eager", "batched_mm"), ("sdpa", "eager"), ("sdpa", "batched_mm")
    ]  # fmt: skip
    made = cells(["b", "a", "b"], combinations(tp=[2, 4, 2]))
    assert [(cell.family, cell.options.topology.tp) for cell in made] == [("b", 2), ("b", 4), ("a", 2), ("a", 4)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tp", "2,x"], "tp='2,x': expected an integer, or several with commas between them"),
        (["--tp", "2,0"], "tp=0: expected a positive integer"),
        (["--backend", ","], "backend=',': expected a name, or several with commas between them"),
    ],
)
def test_a_list_that_is_none_is_bad_usage(run: Run, arguments: list[str], sentence: str) -> None:
    result = run("verify", "a", *arguments, verify_family=verify_family)
    assert (result.exit_code, result.stderr) == (2, f"tpcheck: {sentence}\n")


def test_families_are_named_or_all_of_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpcheck.families.build.causal_types", lambda: ("a", "b"))
    assert "2 passed" in run("verify", "--all", verify_family=verify_family).stdout
    assert run("verify", "--tp", "2", verify_family=verify_family).exit_code == 2
    assert run("verify", "a", "--all", verify_family=verify_family).exit_code == 2


def refuse_zero(family: str, **options: Any) -> Report:
    if options["zero_stage"]:
        raise UsageError("zero_stage", options["zero_stage"], "0: no ZeRO here")
    return verify_family(family, **options)


def test_a_combination_that_a_backend_cannot_do_is_skipped_with_the_reason(run: Run) -> None:
    result = run("verify", "a", "--zero", "0,1", verify_family=refuse_zero)
    assert result.exit_code == 0
    assert "a  deepspeed, tp=2, zero=1  skipped     0.0 s  zero_stage=1: expected 0: no ZeRO here" in result.stdout


def test_a_matrix_without_any_run_has_not_passed(run: Run) -> None:
    result = run("verify", "a", "--zero", "1,2", verify_family=refuse_zero)
    assert result.exit_code == 2
    assert result.stderr.endswith("tpcheck: nothing could be run\n")


def test_a_family_that_cannot_be_built_is_skipped_among_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(family: str, **options: Any) -> Report:
        if family == "odd":
            raise UsageError("family", family, "settings that it can be built from")
        return verify_family(family, **options)

    monkeypatch.setattr("tpcheck.families.build.causal_types", lambda: ("a", "odd"))
    assert run("verify", "--all", verify_family=refuse).exit_code == 0
    assert run("verify", "a", "odd", verify_family=refuse).exit_code == 2


def test_a_run_continues_an_interrupted_one(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "matrix.json"

    def interrupt(family: str, **options: Any) -> Report:
        if family == "c":
            raise KeyboardInterrupt
        return verify_family(family, **options)

    arguments = ["verify", "a", "b", "c", "--json", str(file), "--jobs", "1"]
    first = run(*arguments, verify_family=interrupt)
    assert first.exit_code == 130
    assert "interrupted after 2 of 3 cells" in first.stderr
    assert document(file, "matrix")["pending"] == 1
    again: list[str] = []

    def remember(family: str, **options: Any) -> Report:
        again.append(family)
        return verify_family(family, **options)

    second = run(*arguments, verify_family=remember)
    assert (second.exit_code, again) == (0, ["c"])
    assert second.stderr.startswith(f"2 of 3 cells are in {file} already; --fresh runs them again\n")
    assert "3 passed" in second.stdout
    data = document(file, "matrix")
    assert (data["pending"], [one["subject"]["family"] for one in data["reports"]]) == (0, ["a", "b", "c"])


@pytest.mark.parametrize("change", [["--seed", "1"], ["--set", "x=1"], ["--tp", "4"]])
@pytest.mark.parametrize("families", [["a", "b"], ["a"]], ids=["matrix", "single"])
def test_a_file_with_results_of_other_runs_is_not_overwritten(
    run: Run, tmp_path: Path, families: list[str], change: list[str]
) -> None:
    file = tmp_path / "matrix.json"
    run("verify", "a", "b", "--json", str(file), verify_family=verify_family)
    before = file.read_text()
    result = run("verify", *families, "--json", str(file), *change, verify_family=verify_family)
    assert (result.exit_code, file.read_text()) == (2, before)
    assert "expected another file, or --fresh: it holds 2 results of other runs" in result.stderr
    fresh = run("verify", *families, "--json", str(file), *change, "--fresh", verify_family=verify_family)
    assert (fresh.exit_code, file.read_text() != before) == (0, True)


def test_one_cell_of_a_matrix_does_not_overwrite_the_others(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "matrix.json"
    run("verify", "a", "b", "--json", str(file), verify_family=verify_family)
    before = file.read_text()
    result = run("verify", "a", "--json", str(file), verify_family=verify_family)
    assert (result.exit_code, file.read_text()) == (2, before)
    assert "it holds 1 result of other runs" in result.stderr


def test_without_a_terminal_no_row_is_printed_twice(run: Run) -> None:
    result = run("verify", "a", "bad", "--no-known", verify_family=verify_family)
    rows = [line for line in result.stdout.splitlines() if line.startswith(("a ", "bad "))]
    progress = result.stderr.splitlines()
    assert len(rows) == len(progress) == 2
    assert not any(row.strip() in line for row in rows for line in progress)


def test_cells_with_other_versions_run_again(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "matrix.json"
    run("verify", "a", "b", "--json", str(file), verify_family=verify_family)
    monkeypatch.setattr("tpcheck.lab.matrix.package_versions", lambda: {"torch": "9.9"})
    assert "already" not in run("verify", "a", "b", "--json", str(file), verify_family=verify_family).stderr


@pytest.mark.parametrize("text", ["", "{", "[]", '{"reports": 1}', '{"reports": [{}]}', "null"])
def test_a_file_that_is_no_report_contains_no_verdicts(tmp_path: Path, text: str) -> None:
    (tmp_path / "f").write_text(text)
    assert stored_verdicts(tmp_path / "f") == []


def test_the_file_is_complete_json_after_every_cell(run: Run, tmp_path: Path) -> None:
    file, seen = tmp_path / "matrix.json", []

    def look(family: str, **options: Any) -> Report:
        seen.append(len(json.loads(file.read_text())["reports"]) if file.exists() else 0)
        return verify_family(family, **options)

    run("verify", "a", "b", "c", "--json", str(file), "--jobs", "1", verify_family=look)
    assert seen == [0, 1, 2]


def test_jobs_fill_the_cores_by_default(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpcheck.cli.matrix.num_cores", lambda: 4)
    both_are_in = threading.Barrier(4, timeout=20)

    def together(family: str, **options: Any) -> Report:
        both_are_in.wait()
        return verify_family(family, **options)

    assert run("verify", "a", "b", "c", "d", verify_family=together).exit_code == 0


@pytest.mark.parametrize(
    ("families", "options", "status", "text"),
    [
        (["a", "bad"], ["--known"], 0, "(1 known)"),
        (["a", "bad"], [], 1, "known: bad-qkv"),
        (["a", "ugly"], ["--known"], 3, "no entry of tpcheck/lab/known.toml describes this"),
        (["a", "bad", "worse"], ["--known"], 1, "new       worse"),
    ],
)
def test_a_known_bug_is_no_finding_when_results_are_compared_with_the_register(
    run: Run, families: list[str], options: list[str], status: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VERDICTS, "worse", FAILED)
    FAILED_PLAIN = replace(FAILED, subject={})  # its example ignores the plan, which is another run
    monkeypatch.setitem(VERDICTS, "bad", FAILED_PLAIN)
    result = run("verify", *families, *options, verify_family=verify_family)
    assert result.exit_code == status
    assert text in result.stdout


def test_a_known_bug_that_is_gone_is_a_finding(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VERDICTS, "bad", PASSED)
    result = run("verify", "a", "bad", "--known", verify_family=verify_family)
    assert result.exit_code == 1
    assert (
        "bad-qkv is registered for these versions: It is cut wrongly. If it is fixed, limit its versions"
        in result.stdout
    )


def test_a_single_known_bug_is_a_finding_with_a_name(run: Run) -> None:
    result = run("verify", "bad", verify_family=verify_family)
    assert result.exit_code == 1
    assert result.stdout.endswith("  upstream  bad-qkv: It is cut wrongly.\n")


def test_the_summary_of_github_gets_a_table(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = tmp_path / "summary"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    run("verify", "a", "bad", verify_family=verify_family)
    text = summary.read_text()
    assert text.startswith("before\n### tpcheck\n\n1 passed, 1 failed (1 known)\n")
    assert "| bad | deepspeed, tp=2 | ✗ failed, known |" in text
    assert "| a |" not in text


def test_pages_and_junit_are_written(run: Run, tmp_path: Path) -> None:
    html, junit = tmp_path / "m.html", tmp_path / "m.xml"
    run("verify", "a", "bad", "--known", "--html", str(html), "--junit", str(junit), verify_family=verify_family)
    assert "bad-qkv" in html.read_text()
    assert 'skipped message="known upstream bug bad-qkv' in junit.read_text()


def test_the_subject_of_a_cell_is_what_the_api_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from tpcheck.model import verify

    seen: list[dict[str, Any]] = []

    def caught(request: Any, subject: dict[str, Any], again: str | None, notes: tuple[str, ...]) -> Report:
        seen.append(subject)
        return Report(PASSED)

    monkeypatch.setattr(verify, "run", caught)
    others = RunOptions.of(settings={"a": 1}, config={"b": {}}, checks=["replicas_agree"], ignore_plan=True)
    for common in (RunOptions(), others):
        (cell,) = cells(["llama"], combinations(common, dp=[2], zero=[1], dtype=["bfloat16"]))
        verify.verify_family(cell.family, **cell.options.keywords())
        assert seen.pop() == cell.subject
