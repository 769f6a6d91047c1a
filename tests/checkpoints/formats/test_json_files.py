"""JSON of a checkpoint is an object without repeated keys; an index names files in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tpcheck import CheckpointError
from tpcheck.checkpoints.formats import json_files
from tpcheck.checkpoints.formats.files import Files
from tpcheck.checkpoints.formats.json_files import merge_files, parse_json, read_config, read_index, read_json


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' is duplicated"),
        ('{"a": NaN}', "NaN is not a number of JSON"),
        ('{"a": "\\ud800"}', "is not valid JSON"),
        ("[1]", "does not hold a JSON object"),
        ("{", "is not valid JSON"),
        ('{"a":' * 100_000, "nested too deeply|not valid JSON"),
    ],
)
def test_strict_json_is_refused(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"It .*({message})"):
        parse_json(text.encode(), "It", strict=True)


def test_a_configuration_may_hold_infinities_and_be_absent(tmp_path: Path, files: Files) -> None:
    assert read_config(tmp_path, files) == {}
    (tmp_path / "config.json").write_text('{"limit": Infinity, "limit": Infinity}')
    assert read_config(tmp_path, files) == {"limit": float("inf")}


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_NBYTES", 3)
    (tmp_path / "a.json").write_text("{   }")
    with pytest.raises(CheckpointError, match="has 5 bytes, which is more than"):
        read_json(tmp_path / "a.json", files)


def test_an_index_gives_the_path_of_each_tensor(tmp_path: Path, files: Files) -> None:
    (tmp_path / "x.bin").touch()
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": {"a": "x.bin", "b": "x.bin"}}))
    assert read_index(tmp_path / "index.json", files) == {"a": tmp_path / "x.bin", "b": tmp_path / "x.bin"}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "x.bin", "b": "y.bin"}, r"names 'y\.bin', which is missing"),
        ({"a": 3}, "which is not a file name"),
        ({}, "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_an_index_names_files_that_exist(tmp_path: Path, files: Files, weight_map: object, message: str) -> None:
    (tmp_path / "x.bin").touch()
    (tmp_path / "index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path / "index.json", files)


X, Y = Path("x"), Path("y")


def test_files_are_merged_with_tensors_that_the_index_does_not_list() -> None:
    contents = {X: {"a": 1, "c": 3}, Y: {"b": 2}}
    assert merge_files(Path("index"), {"a": X, "b": Y}, contents.__getitem__) == {"a": 1, "b": 2, "c": 3}


def test_files_that_contradict_the_index_or_each_other_are_refused() -> None:
    with pytest.raises(CheckpointError, match="Tensor 'a' is both in x and in y"):
        merge_files(Path("index"), {"a": X, "b": Y}, {X: {"a": 1}, Y: {"a": 1, "b": 2}}.__getitem__)
    with pytest.raises(CheckpointError, match="index says that tensor 'b' is in y, which lacks it"):
        merge_files(Path("index"), {"a": X, "b": Y}, {X: {"a": 1, "b": 2}, Y: {}}.__getitem__)
