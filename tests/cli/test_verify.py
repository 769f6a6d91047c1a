"""`tpcheck verify`: options reach the API, reports reach people and files, and the exit status says how it went."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from tests.report.examples import ERROR, FAILED, PASSED, SKIPPED
from tests.schema import document, schema
from tpcheck.core.errors import RankFailure, RankOutcome, UsageError
from tpcheck.core.topology import Topology
from tpcheck.model.options import RunOptions
from tpcheck.report.report import Report

Run = Callable[..., Any]
VERDICTS = {"good": PASSED, "bad": FAILED, "ugly": ERROR, "absent": SKIPPED}


def verify_family(family: str, **options: Any) -> Report:
    return Report(replace(VERDICTS[family], subject={**VERDICTS[family].subject, "family": family}))


def test_every_option_reaches_the_api(run: Run) -> None:
    seen: dict[str, Any] = {}

    def remember(family: str, **options: Any) -> Report:
        seen.update(options, family=family)
        return Report(PASSED)

    result = run(
        *"verify llama --backend other --tp 4 --dp 2 --zero 1 --dtype bfloat16 --steps 3 --seed 7".split(),
        *"--set head_dim=8 --set act=gelu --ignore-plan --timeout 30 --optimizer adamw --accumulate 2".split(),
        *"--loss token_mean --attention sdpa --experts batched_mm --checkpointing --reentrant --compile".split(),
        *"--compile-layers --lora 4 --loop trainer --device cpu".split(),
        *["--config", '{"gradient_clipping": 1.0}'],
        verify_family=remember,
    )
    assert result.exit_code == 0
    assert seen == {
        "family": "llama",
        "topology": Topology(tp=4, dp=2),
        "backend": "other",
        "dtype": "bfloat16",
        "device": "cpu",
        "steps": 3,
        "zero_stage": 1,
        "optimizer": "adamw",
        "accumulate": 2,
        "loss": "token_mean",
        "attention": "sdpa",
        "experts": "batched_mm",
        "checkpointing": True,
        "reentrant": True,
        "compile": True,
        "compile_layers": True,
        "lora": 4,
        "full": False,
        "loop": "trainer",
        "config": {"gradient_clipping": 1.0},
        "checks": None,
        "seed": 7,
        "settings": {"head_dim": 8, "act": "gelu"},
        "ignore_plan": True,
        "timeout": 30.0,
        "batch": None,
        "replays": 8,
    }


@pytest.mark.parametrize(("family", "status"), [("good", 0), ("bad", 1), ("ugly", 3), ("absent", 0)])
def test_the_exit_status_follows_from_the_verdict(run: Run, family: str, status: int) -> None:
    assert run("verify", family, verify_family=verify_family).exit_code == status


@pytest.mark.parametrize(
    ("families", "status"),
    [(["good", "absent"], 0), (["good", "ugly"], 3), (["ugly", "bad", "good"], 1)],
)
def test_of_several_families_findings_count_before_crashes(run: Run, families: list[str], status: int) -> None:
    assert run("verify", *families, verify_family=verify_family).exit_code == status


def test_a_single_report_is_shown_in_full(run: Run) -> None:
    result = run("verify", "good", verify_family=lambda family, **options: Report(PASSED))
    assert result.stdout == Report(PASSED).to_text()
    assert result.stderr == ""


def test_verbose_shows_every_finding(run: Run) -> None:
    assert run("verify", "bad", "--verbose", verify_family=verify_family).stdout.count("  where ") == 6


def test_several_reports_end_in_a_table(run: Run) -> None:
    result = run("verify", "good", "ugly", "absent", verify_family=verify_family)
    assert result.stdout == Report(replace(ERROR, subject={**ERROR.subject, "family": "ugly"})).to_text() + (
        "\n"
        "good    passed      6.1 s  worst margin 0.113  outputs_match_reference\n"
        "ugly    error       3.0 s  ValueError: style\n"
        "absent  skipped     0.0 s  two ranks need two GPUs\n"
        "\n"
        "1 passed, 1 error, 1 skipped\n"
    )


def test_progress_is_a_line_for_each_family_where_there_is_no_terminal(run: Run) -> None:
    result = run("verify", "good", "bad", verify_family=verify_family)
    assert result.stderr == (
        "1 of 2: good (deepspeed, tp=2) passed\n2 of 2: bad (deepspeed, tp=2, dp=2, zero=1) failed\n"
    )


def test_a_crash_of_one_family_never_ends_the_run(run: Run) -> None:
    def crash(family: str, **options: Any) -> Report:
        if family == "broken":
            outcome = RankOutcome(1, "died", signal="SIGKILL")
            raise RankFailure("rank 1 died by SIGKILL", first=1, outcomes=(outcome,))
        return verify_family(family)

    result = run("verify", "broken", "good", verify_family=crash)
    assert result.exit_code == 3
    assert "RankFailure: rank 1 died by SIGKILL" in result.stdout
    assert "1 passed, 1 error" in result.stdout


def test_jobs_run_concurrently_and_are_shown_in_the_requested_order(run: Run) -> None:
    both_are_in = threading.Barrier(2, timeout=10)

    def together(family: str, **options: Any) -> Report:
        both_are_in.wait()
        return verify_family(family)

    result = run("verify", "good", "absent", "--jobs", "2", verify_family=together)
    assert result.exit_code == 0
    assert result.stdout.index("good") < result.stdout.index("absent")


@pytest.mark.parametrize("rank", [0, 1])
def test_under_a_launcher_only_rank_0_writes_output(
    run: Run, rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("verify", "bad", "good", "--json", str(tmp_path / "f"), "--jobs", "2", verify_family=verify_family)
    assert result.exit_code == 1
    assert bool(result.output) == (tmp_path / "f").exists() == (rank == 0)


def test_bad_usage_is_one_sentence_and_exit_status_2(run: Run) -> None:
    def refuse(family: str, **options: Any) -> Report:
        raise UsageError("family", family, "a causal language model type; did you mean llama?")

    result = run("verify", "lama", verify_family=refuse)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "tpcheck: family='lama': expected a causal language model type; did you mean llama?\n"
    assert run("verify", "lama", "llama", verify_family=refuse).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--tp", "0"], "tp=0: expected a positive integer"),
        (["--set", "x"], "set='x': expected KEY=VALUE"),
        (["--jobs", "0"], "jobs=0: expected a positive integer"),
        (["--config", "[]"], "config='[]': expected a JSON object"),
        (["--json", "/none/f"], "json='/none/f': expected a file in a folder that exists"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(run: Run, arguments: list[str], sentence: str) -> None:
    def never(family: str, **options: Any) -> Report:
        raise AssertionError

    result = run("verify", "llama", *arguments, verify_family=never)
    assert (result.exit_code, result.stderr) == (2, f"tpcheck: {sentence}\n")


def test_an_interrupt_is_quiet(run: Run) -> None:
    def interrupt(family: str, **options: Any) -> Report:
        raise KeyboardInterrupt

    result = run("verify", "llama", verify_family=interrupt)
    assert (result.exit_code, result.output) == (130, "")


def test_one_family_is_written_as_one_report(run: Run, tmp_path: Path) -> None:
    json_file, junit_file = tmp_path / "report.json", tmp_path / "report.xml"
    run("verify", "bad", "--json", str(json_file), "--junit", str(junit_file), verify_family=verify_family)
    assert document(json_file, "report")["verdict"] == "failed"
    assert ET.parse(junit_file).getroot().find("testsuite") is not None
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.json", "report.xml"]


def test_a_report_that_cannot_be_written_is_one_line_and_the_others_are_written(run: Run, tmp_path: Path) -> None:
    def remove_the_folder(family: str, **options: Any) -> Report:
        (tmp_path / "gone").rmdir()
        return verify_family(family)

    (tmp_path / "gone").mkdir()
    lost, kept = tmp_path / "gone" / "report.json", tmp_path / "report.xml"
    result = run("verify", "good", "--json", str(lost), "--junit", str(kept), verify_family=remove_the_folder)
    assert (result.exit_code, result.stderr) == (2, f"tpcheck: {lost} cannot be written: No such file or directory\n")
    assert "passed" in result.stdout
    assert kept.exists()


def test_several_families_are_written_as_a_list_of_reports(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    run("verify", "good", "ugly", "bad", "--json", str(file), verify_family=verify_family)
    data = document(file, "matrix")
    assert (data["schema"], data["verdict"]) == (1, "failed")
    assert [report["subject"]["family"] for report in data["reports"]] == ["good", "ugly", "bad"]


def test_a_configuration_sets_the_flags_that_are_not_given(run: Run, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def remember(family: str, **options: Any) -> Report:
        seen.update(options)
        return Report(PASSED)

    file = tmp_path / "ds_config.json"
    config = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}, "tensor_parallel": {"autotp_size": 4}}
    file.write_text(json.dumps({**config, "gradient_accumulation_steps": 3}))
    assert run("verify", "llama", "--config", str(file), verify_family=remember).exit_code == 0
    assert (seen["topology"].tp, seen["zero_stage"], seen["dtype"], seen["accumulate"]) == (4, 2, "bfloat16", 3)
    same = run("verify", "llama", "--config", str(file), "--tp", "4", "--dtype", "bf16", verify_family=remember)
    assert same.exit_code == 0
    result = run("verify", "llama", "--config", str(file), "--tp", "2", verify_family=remember)
    assert result.exit_code == 2
    assert result.stderr == (
        "tpcheck: tp='2': expected 4, as tensor_parallel.autotp_size of the configuration says, or no --tp\n"
    )


def test_another_backend_takes_its_configuration_as_it_is(run: Run) -> None:
    config = '{"zero_optimization": {"stage": 2}}'
    seen: list[int] = []

    def remember(family: str, **options: Any) -> Report:
        seen.append(options["zero_stage"])
        return Report(PASSED)

    run("verify", "llama", "--backend", "other", "--config", config, verify_family=remember)
    assert seen == [0]


def test_a_target_that_does_not_exist_is_bad_usage_before_anything_runs(run: Run) -> None:
    result = run("verify", "llama", "nothing.py:build", verify_family=verify_family)
    assert result.exit_code == 2
    assert result.stderr == "tpcheck: target='nothing.py:build': expected a file that exists; nothing.py does not\n"


def test_a_matrix_of_other_runs_is_not_overwritten(run: Run, tmp_path: Path) -> None:
    def verify_family(family: str, **options: Any) -> Report:
        return Report(replace(VERDICTS[family], subject=RunOptions(**options).subject(family)))

    file = tmp_path / "matrix.json"
    run("verify", "good", "bad", "--json", str(file), verify_family=verify_family)
    before = file.read_text()
    for targets in (["good"], ["absent"], ["absent", "good"]):
        result = run("verify", *targets, "--json", str(file), verify_family=verify_family)
        assert result.exit_code == 2
        assert "expected another file, or --fresh: it holds" in result.stderr
        assert file.read_text() == before
    assert run("verify", "good", "bad", "--json", str(file), verify_family=verify_family).exit_code == 1
    assert run("verify", "good", "--json", str(file), "--fresh", verify_family=verify_family).exit_code == 0
    assert run("verify", "absent", "--json", str(file), verify_family=verify_family).exit_code == 0  # a single run


def test_a_single_run_has_a_page_of_its_own(run: Run, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    run("verify", "bad", "--html", str(page), verify_family=verify_family)
    assert page.read_text().count('<section class="finding">') == len(FAILED.findings)
    run("verify", "bad", "good", "--html", str(page), verify_family=verify_family)
    assert '<section class="finding">' not in page.read_text()


def test_the_schema_is_printed(run: Run) -> None:
    assert json.loads(run("--json-schema").stdout) == schema()
