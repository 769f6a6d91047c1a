"""Where the hooks take from what the code leaves open."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpcheck import UsageError
from tpcheck.trainer.settings import chosen_settings
from tpcheck.watching import Settings


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TPCHECK", raising=False)
    (tmp_path / "package").mkdir()
    monkeypatch.chdir(tmp_path / "package")
    file = tmp_path / "pyproject.toml"
    file.write_text("[tool.other]\n")
    return file


def test_nothing_said_means_the_defaults() -> None:
    assert chosen_settings(every=None) == Settings()


def test_the_project_says_how_often(project: Path) -> None:
    project.write_text('[tool.tpcheck]\nevery = 10\nacross_dp = "ignore"\n')
    assert chosen_settings() == Settings(every=10, across_dp="ignore")


def test_the_code_goes_before_the_environment_and_that_before_the_project(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write_text('[tool.tpcheck]\nevery = 10\non_mismatch = "raise"\n')
    monkeypatch.setenv("TPCHECK", "warn")
    assert chosen_settings(every=2) == Settings(every=2, on_mismatch="warn")
    assert chosen_settings(on_mismatch="raise") == Settings(every=10, on_mismatch="raise")


@pytest.mark.parametrize(("switch", "on"), [("1", True), ("", True), ("0", False), ("off", False)])
def test_the_environment_turns_hooks_off(switch: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCHECK", switch)
    assert (chosen_settings() is not None) is on


def test_what_is_not_known_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write_text("[tool.tpcheck]\nevry = 10\n")
    with pytest.raises(UsageError, match=r"\[tool.tpcheck\]={'evry': 10}: expected one of every, on_mismatch"):
        chosen_settings()
    project.write_text("")
    monkeypatch.setenv("TPCHECK", "loud")
    with pytest.raises(UsageError, match="TPCHECK='loud': expected 0"):
        chosen_settings()
