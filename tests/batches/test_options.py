"""Where watch, check_batch and the hooks take from what the code leaves open."""

from __future__ import annotations

from pathlib import Path

import pytest

import tpcheck
from tpcheck import UsageError
from tpcheck.batches.options import WatchOptions


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TPCHECK", raising=False)
    (tmp_path / "package").mkdir()
    monkeypatch.chdir(tmp_path / "package")
    file = tmp_path / "pyproject.toml"
    file.write_text("[tool.other]\n")
    return file


def test_nothing_said_means_the_defaults() -> None:
    assert WatchOptions.resolve(every=None) == WatchOptions()


def test_the_project_says_how_often(project: Path) -> None:
    project.write_text('[tool.tpcheck]\nevery = 10\nacross_dp = "ignore"\n')
    assert WatchOptions.resolve() == WatchOptions(every=10, across_dp="ignore")


def test_the_code_goes_before_the_environment_and_that_before_the_project(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write_text('[tool.tpcheck]\nevery = 10\non_mismatch = "raise"\n')
    monkeypatch.setenv("TPCHECK", "warn")
    assert WatchOptions.resolve(every=2) == WatchOptions(every=2, on_mismatch="warn")
    assert WatchOptions.resolve(on_mismatch="raise") == WatchOptions(every=10, on_mismatch="raise")


@pytest.mark.parametrize(("switch", "on"), [("1", True), ("", True), ("0", False), ("off", False)])
def test_the_environment_turns_hooks_off(switch: str, on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCHECK", switch)
    assert (WatchOptions.resolve() is not None) is on


def test_what_is_not_known_is_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write_text("[tool.tpcheck]\nevry = 10\n")
    with pytest.raises(
        UsageError, match=r"\[tool.tpcheck\] of .*pyproject.toml={'evry': 10}: expected one of every, on_mismatch"
    ):
        WatchOptions.resolve()
    project.write_text("")
    monkeypatch.setenv("TPCHECK", "loud")
    with pytest.raises(UsageError, match="TPCHECK='loud': expected 0"):
        WatchOptions.resolve()


def test_a_value_of_the_project_is_refused_with_its_place(project: Path) -> None:
    project.write_text('[tool.tpcheck]\nacross_dp = "stop"\n')
    with pytest.raises(
        UsageError, match=r"\[tool.tpcheck\] of .*pyproject.toml: across_dp='stop': expected one of raise"
    ):
        WatchOptions.resolve(across_dp="warn")
    project.write_text("[tool.tpcheck]\noverlap = 1\n")
    with pytest.raises(UsageError, match="overlap=1: expected one of True, False"):
        WatchOptions.resolve()
    project.write_text("[tool.tpcheck\n")
    with pytest.raises(UsageError, match=r"pyproject.toml='.*pyproject.toml': expected a TOML file"):
        WatchOptions.resolve()


def test_watch_and_check_batch_take_them_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write_text("[tool.tpcheck]\nevery = 10\ntimeout = 7\n")
    monkeypatch.setenv("TPCHECK", "warn")
    watcher = tpcheck.watch([1], every=2).watcher
    assert watcher is not None
    assert watcher.options == WatchOptions(every=2, timeout=7, on_mismatch="warn")
    monkeypatch.setenv("TPCHECK", "loud")
    with pytest.raises(UsageError, match="TPCHECK='loud': expected 0"):
        tpcheck.check_batch({})


def test_a_loader_that_is_not_watched_passes_for_the_one_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCHECK", "0")
    loader = tpcheck.watch([1, 2])
    assert [*loader, *loader] == [1, 2, 1, 2]  # there is no process group: nothing was looked for
    assert (len(loader), loader.watcher) == (2, None)
    assert tpcheck.check_batch({}) == ()
    with pytest.raises(UsageError, match="every=0: expected a positive integer"):
        tpcheck.watch([1], every=0)
