"""Values of --set and --config, and the messages about bad ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpcheck.cli.option_values import json_object, name_or_object, settings, writable
from tpcheck.core.errors import UsageError
from tpcheck.core.findings import Verdict
from tpcheck.report.report import Report


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("true", True),
        ("False", False),
        ("None", None),
        ("null", None),
        ("8", 8),
        ("1e-5", 1e-5),
        ("[1, 2]", [1, 2]),
        ('{"rope_theta": 5}', {"rope_theta": 5}),
        ('"8"', "8"),
        ("gelu", "gelu"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_value_is_json_a_python_word_or_text(text: str, value: object) -> None:
    assert settings([f"key={text}"]) == {"key": value}


@pytest.mark.parametrize("pair", ["qk_layernorm", "=true", " =1"])
def test_a_setting_needs_a_key_and_a_value(pair: str) -> None:
    with pytest.raises(UsageError) as error:
        settings([pair])
    assert str(error.value) == f"set={pair!r}: expected KEY=VALUE"


def test_a_configuration_is_json_or_the_name_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"bf16": {}}')
    assert json_object("config", '{"bf16": {}}') == json_object("config", str(file)) == {"bf16": {}}


def test_bad_json_is_reported_with_its_position() -> None:
    with pytest.raises(UsageError) as error:
        json_object("config", '{"a": 1,}')
    assert "valid JSON; " in str(error.value)
    assert "at line 1, column 8" in str(error.value) or "at line 1, column 9" in str(error.value)


def test_a_configuration_is_an_object() -> None:
    with pytest.raises(UsageError) as error:
        json_object("config", "[1]")
    assert str(error.value) == "config='[1]': expected a JSON object"


def test_a_file_that_does_not_exist_is_bad_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a JSON object or a file that holds one \(No such file or directory\)"):
        json_object("config", str(tmp_path / "none.json"))


def test_a_file_that_cannot_be_written_is_bad_usage_before_the_run(tmp_path: Path) -> None:
    assert writable("json", None) is None
    assert writable("json", tmp_path / "report.json") == tmp_path / "report.json"
    for path in (tmp_path, tmp_path / "none" / "report.json"):
        with pytest.raises(UsageError, match="a file in a folder that exists"):
            writable("json", path)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that not even root can write to")
def test_a_folder_without_write_access_is_bad_usage_before_the_run() -> None:
    with pytest.raises(UsageError, match=r"json='/proc/x.json': expected a file that can be written \("):
        writable("json", Path("/proc/x.json"))


def test_results_replace_results_and_no_other_file(tmp_path: Path) -> None:
    """As where --json is written for --config."""
    path = tmp_path / "ds_config.json"
    for held in ("", '{"schema": 1, "verdict": "passed"}', '{\n"schema": 1,\n'):
        path.write_text(held)
        assert writable("json", path) == path
    path.write_text('{"bf16": {"enabled": true}}')
    for option in ("json", "html", "junit"):
        with pytest.raises(UsageError, match="expected a new file, or one of results"):
            writable(option, path)


@pytest.mark.parametrize("option", ["json", "html", "junit"])
def test_every_file_of_results_is_replaced_by_the_next(option: str, tmp_path: Path) -> None:
    report = Report(Verdict("passed", {}, {}))
    path = tmp_path / "results"
    path.write_text({"json": report.to_json, "html": report.to_html, "junit": report.to_junit}[option]())
    assert writable(option, path) == path


def test_a_name_that_ends_in_json_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lora.json").write_text('{"r": 4}')
    assert name_or_object("lora", "lora.json", marks=",-.") == {"r": 4}
    assert name_or_object("lora", "4,q_proj", marks=",-.") == "4,q_proj"
