"""`tpcheck faults`: options select runs, and results reach people and files; no world is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lab.faults.fault_examples import CLEAN, ELSEWHERE, FALSE_POSITIVE, MISSED, RIGHT
from tests.schema import document
from tpcheck.lab.faults import runs as fault_runs_module
from tpcheck.lab.faults.results import CONTROL, FaultResult
from tpcheck.lab.faults.runs import FaultRun

Run = Callable[..., Any]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return a function that replaces the runs by results, and returns the arguments of the API."""

    def replaced(
        faults: list[FaultResult | BaseException], controls: tuple[FaultResult, ...] = (CLEAN,)
    ) -> dict[str, Any]:
        asked: dict[str, Any] = {}

        def fault_runs(names: Any, kinds: Any, *, dtype: str, seeds: Any) -> list[FaultRun]:
            asked.update(names=list(names), kinds=list(kinds), dtype=dtype, seeds=list(seeds))
            return [run_of(row) for row in faults]

        def control_runs(*, dtype: str, seeds: Any) -> list[FaultRun]:
            asked.update(controls=dtype)
            return [run_of(row) for row in controls]

        monkeypatch.setattr(fault_runs_module, "fault_runs", fault_runs)
        monkeypatch.setattr(fault_runs_module, "control_runs", control_runs)
        monkeypatch.setattr(fault_runs_module, "versions", lambda: {"torch": "2.13.0"})
        return asked

    return replaced


def run_of(row: FaultResult | BaseException) -> FaultRun:
    if isinstance(row, BaseException):
        return FaultRun("raises", "layout", "a run that ends in an error of its own", 0, raising(row))
    return FaultRun(row.fault, row.kind, row.what, row.seed, lambda: row)


def raising(error: BaseException) -> Callable[[], FaultResult]:
    def run() -> FaultResult:
        raise error

    return run


def test_every_option_reaches_the_api(run: Run, table: Any) -> None:
    asked = table([RIGHT])
    assert run(*"faults a b --kind layout --dtype bfloat16 --seed 3 --seeds 2 --controls".split()).exit_code == 0
    assert asked == {
        "names": ["a", "b"],
        "kinds": ["layout"],
        "dtype": "bfloat16",
        "seeds": [3, 4],
        "controls": "bfloat16",
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [("", True), ("--no-controls", False), ("a", False), ("--kind layout", False), ("a --controls", True)],
)
def test_controls_run_with_all_faults_or_when_asked_for(run: Run, table: Any, options: str, expected: bool) -> None:
    asked = table([RIGHT])
    run("faults", *options.split())
    assert ("controls" in asked) == expected


@pytest.mark.parametrize(
    ("faults", "controls", "status"),
    [
        ([RIGHT], (CLEAN,), 0),
        ([RIGHT, MISSED], (CLEAN,), 1),
        ([RIGHT, ELSEWHERE], (CLEAN,), 1),
        ([RIGHT], (CLEAN, FALSE_POSITIVE), 1),
    ],
)
def test_the_exit_status_says_whether_the_table_is_good(
    run: Run, table: Any, faults: list[FaultResult], controls: tuple[FaultResult, ...], status: int
) -> None:
    table(faults, controls)
    assert run("faults").exit_code == status


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_that_raises_is_a_result_and_the_others_continue(run: Run, table: Any, jobs: str) -> None:
    table([RIGHT, RuntimeError("boom"), ELSEWHERE])
    result = run("faults", "--jobs", jobs)
    assert result.exit_code == 1
    assert "  error   raises" in result.stdout
    assert "          RuntimeError: boom\n" in result.stdout
    assert "caught    2 of 3 faults" in result.stdout


def test_an_interrupt_keeps_the_results_so_far(run: Run, table: Any, tmp_path: Path) -> None:
    table([RIGHT, KeyboardInterrupt(), ELSEWHERE])
    result = run("faults", "--json", str(tmp_path / "table.json"))
    assert result.exit_code == 130
    assert "caught    1 of 1 fault\n" in result.stdout
    assert [row["fault"] for row in document(tmp_path / "table.json", "faults")["faults"]] == [RIGHT.fault]


def test_every_kind_of_file_is_written(run: Run, table: Any, tmp_path: Path) -> None:
    table([RIGHT])
    files = [tmp_path / name for name in ("table.json", "table.html", "table.xml")]
    run("faults", *[word for file in files for word in (f"--{file.suffix[1:].replace('xml', 'junit')}", str(file))])
    assert document(files[0], "faults")["verdict"] == "passed"
    assert files[1].read_text().startswith("<!doctype html>")
    assert files[2].read_text().startswith("<testsuites")


def test_each_result_is_printed_when_its_run_completes(run: Run, table: Any) -> None:
    table([RIGHT, ELSEWHERE])
    lines = run("faults").stderr.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["caught", RIGHT.fault],
        ["caught", ELSEWHERE.fault],
        ["clean", "llama"],
    ]


def test_a_list_runs_nothing(run: Run, table: Any) -> None:
    table([RuntimeError("must not run")])
    result = run("faults", "--list")
    assert (result.exit_code, result.stdout) == (0, "layout\n  raises  a run that ends in an error of its own\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("row_parallel_reduce_skiped", "did you mean row_parallel_reduce_skipped"),
        ("--kind layouts", "tpcheck: kind='layouts': expected one of forward collectives"),
        ("--dtype int8", "tpcheck: dtype='int8': expected one of float64, float32, bfloat16"),
        ("--jobs 0", "tpcheck: jobs=0: expected a positive integer"),
        ("--seeds 0", "tpcheck: seeds=0: expected a positive integer"),
        ("--seed -1", "tpcheck: seed=-1: expected a number from 0"),
        ("--html /nowhere/table.html", "expected a file in a folder that exists"),
    ],
)
def test_bad_usage_is_one_sentence(run: Run, arguments: str, sentence: str) -> None:
    result = run("faults", *arguments.split())
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_shows_examples_and_the_exit_status(run: Run) -> None:
    text = run("faults", "--help").stdout
    assert "tpcheck faults --kind checkpoint --kind data" in text
    assert "Exit status" in text


def test_a_control_that_crashes_is_no_clean_run(run: Run, table: Any) -> None:
    crashed = FaultResult("opt", CONTROL, "no fault is injected", "error", message="boom")
    table([RIGHT], (crashed,))
    result = run("faults")
    assert result.exit_code == 1
    assert "alarm   opt  seed 0  boom" in result.stdout
