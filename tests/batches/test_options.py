"""The options of the hooks: from the code, the environment, the project, the defaults."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import tpcheck
from tpcheck import UsageError
from tpcheck.batches.options import WatchArguments, WatchOptions


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("TPCHECK", raising=False)
    (tmp_path / "package").mkdir()
    monkeypatch.chdir(tmp_path / "package")
    file = tmp_path / "pyproject.toml"
    file.write_text("[tool.other]\n")
    return file


def test_the_defaults_are_the_last_resort() -> None:
    assert WatchOptions.resolve(every=None) == WatchOptions()


def test_the_projects_options_are_read(project: Path) -> None:
    project.write_text('[tool.tpcheck]\nevery = 10\nacross_dp = "ignore"\n')
    assert WatchOptions.resolve() == WatchOptions(every=10, across_dp="ignore")


def test_the_code_overrides_the_environment_and_that_overrides_the_project(
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


def test_an_unknown_option_raises_with_the_accepted_ones(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write_text("[tool.tpcheck]\nevry = 10\n")
    with pytest.raises(
        UsageError, match=r"\[tool.tpcheck\] of .*pyproject.toml={'evry': 10}: expected one of every, on_mismatch"
    ):
        WatchOptions.resolve()
    project.write_text("")
    monkeypatch.setenv("TPCHECK", "loud")
    with pytest.raises(UsageError, match="TPCHECK='loud': expected 0"):
        WatchOptions.resolve()


def test_a_wrong_value_in_the_project_raises_with_its_file(project: Path) -> None:
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


def test_watch_and_check_batch_use_the_same_options(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write_text("[tool.tpcheck]\nevery = 10\ntimeout = 7\n")
    monkeypatch.setenv("TPCHECK", "warn")
    watcher = tpcheck.watch([1], every=2).watcher
    assert watcher is not None
    assert watcher.options == WatchOptions(every=2, timeout=7, on_mismatch="warn")
    monkeypatch.setenv("TPCHECK", "loud")
    with pytest.raises(UsageError, match="TPCHECK='loud': expected 0"):
        tpcheck.check_batch({})


def test_with_hooks_turned_off_a_watched_loader_gives_its_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCHECK", "0")
    loader = tpcheck.watch([1, 2])
    assert [*loader, *loader] == [1, 2, 1, 2]  # there is no process group: no peers were looked up
    assert (len(loader), loader.watcher) == (2, None)
    assert tpcheck.check_batch({}) == ()
    with pytest.raises(UsageError, match="every=0: expected a positive integer"):
        tpcheck.watch([1], every=0)


HOOKS = [tpcheck.watch, tpcheck.watch_model, tpcheck.TpcheckCallback]
NAMES = [field.name for field in fields(WatchOptions)]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_every_hook_shows_the_options_by_name(hook: Callable[..., Any]) -> None:
    parameters = inspect.signature(hook).parameters.values()
    others = ("loader", "record", "guard")
    keywords = [each for each in parameters if each.kind is each.KEYWORD_ONLY and each.name not in others]
    assert [each.name for each in keywords] == NAMES == list(WatchArguments.__annotations__)
    assert {each.default for each in keywords} == {None}


def test_an_option_that_no_hook_has_raises() -> None:
    for value in (1, None):
        with pytest.raises(TypeError, match="unexpected keyword argument 'evry'"):
            tpcheck.watch([1], evry=value)  # type: ignore[call-arg]


def test_the_documentation_lists_every_option_with_its_default() -> None:
    document = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for field in fields(WatchOptions):
        if field.default is not None:
            default = str(field.default).lower() if isinstance(field.default, bool) else f"{field.default}"
            shown = f"`{default}`" if isinstance(field.default, str) else default.removesuffix(".0")
            assert f"| `{field.name}` | {shown} |" in document
        assert f"{field.name}: " in str(WatchOptions.__doc__)
