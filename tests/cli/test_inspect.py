"""`tpcheck topology`, `tpcheck families` and `tpcheck doctor`, and what commands say of themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tpcheck.doctor.diagnosis
from tests.schema import document
from tpcheck.backends.registry import backend_names
from tpcheck.cli.verify import BACKENDS
from tpcheck.doctor.deepspeed import Advice
from tpcheck.doctor.diagnosis import Diagnosis

Run = Callable[..., Any]


def test_topology_shows_the_coordinates_of_every_rank(run: Run) -> None:
    assert (
        run(*"topology --world 4 --tp 2".split()).stdout
        == """\
world 4: dp=2, tp=2 (the last axis is innermost)

  rank    dp    tp
     0     0     0
     1     0     1
     2     1     0
     3     1     1

  tp groups (0, 1) (2, 3)
  dp groups (0, 2) (1, 3)
"""
    )


def test_a_tp_size_that_does_not_divide_the_world_is_bad_usage(run: Run) -> None:
    result = run(*"topology --world 4 --tp 3".split())
    assert (result.exit_code, result.stderr) == (2, "tpcheck: tp=3: expected a divisor of world_size=4\n")


def test_families_are_listed_with_their_plans(run: Run) -> None:
    pytest.importorskip("transformers")
    lines = run("families").stdout.splitlines()
    found = {line.split()[0]: "tp_plan" in line.split()[1:] for line in lines if line.strip()}
    assert (found["llama"], found["opt"]) == (True, False)
    assert {"t5", "bert"} <= set(found)  # which verify takes, too
    assert lines[-1].endswith("with a tp_plan of their own")


@pytest.fixture
def diagnosed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def diagnosed(*advice: Advice) -> None:
        diagnosis = Diagnosis({"torch": "2.13.0", "deepspeed": None}, ("2 CPU cores",), advice)
        monkeypatch.setattr(tpcheck.doctor.diagnosis, "diagnose", lambda config: diagnosis)

    return diagnosed


def test_the_doctor_finds_no_problems(run: Run, diagnosed: Callable[..., None]) -> None:
    diagnosed()
    result = run("doctor")
    assert result.exit_code == 0
    assert (
        result.stdout
        == """\
  versions  torch 2.13.0, deepspeed is not installed
  devices   2 CPU cores

no problems
"""
    )


def test_the_doctor_shows_every_problem_and_its_fix(run: Run, diagnosed: Callable[..., None]) -> None:
    diagnosed(
        Advice("stale_lock", "a lock was left", "rm lock", "https://example.org"),
        Advice("other", "so it is", severity="trap"),
    )
    result = run("doctor")
    assert result.exit_code == 1
    assert (
        result.stdout
        == """\
  versions  torch 2.13.0, deepspeed is not installed
  devices   2 CPU cores

broken: stale_lock
  what      a lock was left
  fix       rm lock
  see       https://example.org

trap: other
  what      so it is

2 findings: 1 broken, 1 trap
"""
    )


@pytest.mark.parametrize(("severity", "status"), [("broken", 1), ("trap", 0), ("advice", 0)])
def test_only_what_is_broken_is_an_exit_status_of_1(
    run: Run, diagnosed: Callable[..., None], tmp_path: Path, severity: Any, status: int
) -> None:
    diagnosed(Advice("rule", "so it is", severity=severity))
    result = run("doctor", "--json", str(tmp_path / "doctor.json"))
    assert result.exit_code == status
    data = document(tmp_path / "doctor.json", "doctor")
    assert (data["schema"], data["verdict"]) == (1, "failed" if status else "passed")
    assert data["findings"] == [{"rule": "rule", "what": "so it is", "fix": None, "link": None, "severity": severity}]


def test_a_topology_is_written_as_json(run: Run, tmp_path: Path) -> None:
    assert run(*"topology --world 4 --tp 2 --json".split(), str(tmp_path / "t.json")).exit_code == 0
    assert document(tmp_path / "t.json", "topology") == {
        "schema": 1,
        "world_size": 4,
        "sizes": {"dp": 2, "tp": 2},
        "ranks": [{"rank": rank, "dp": rank // 2, "tp": rank % 2} for rank in range(4)],
        "groups": {"dp": [[0, 2], [1, 3]], "tp": [[0, 1], [2, 3]]},
    }


def test_a_configuration_that_does_not_exist_is_bad_usage(run: Run, tmp_path: Path) -> None:
    result = run("doctor", str(tmp_path / "none.json"))
    assert result.exit_code == 2
    assert result.stderr.startswith("tpcheck: ds_config=")


def test_a_folder_with_a_comma_in_its_name_is_one(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a,b").mkdir()
    Path("c").mkdir()
    assert run("compare", "a,b", "c,d").stderr.startswith("tpcheck: expected='d': expected a file or folder")


def test_help_names_every_backend_that_comes_with_tpcheck() -> None:
    assert set(BACKENDS) == set(backend_names())
