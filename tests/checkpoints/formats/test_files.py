"""Only files inside the folder are opened, and a file that changes is an error.

JSON of a checkpoint is an object without repeated keys; an index names files in its folder.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tpcheck.checkpoints.formats import files as files_module
from tpcheck.checkpoints.formats.files import Files, inside, merge_files, parse_json, read_config, read_index, read_json
from tpcheck.core.errors import CheckpointError


@pytest.mark.parametrize("name", ["a", "a/b", "./a", "ü.bin", "a b"])
def test_names_below_the_folder_are_taken(tmp_path, name):
    assert inside(tmp_path, name) == tmp_path / name


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../a", "a/../../b", "a\0b", "a\\b", "..", None, 3, ["a"]])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"names a file .*\.$"):
        inside(tmp_path, name)


def test_a_folder_that_is_a_link_out_is_refused_and_a_file_that_is_one_is_not(tmp_path):
    folder, outside = tmp_path / "folder", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "blob").write_bytes(b"1")
    (folder / "link").symlink_to(outside)
    (folder / "model").symlink_to(outside / "blob")
    assert inside(folder, "model").read_bytes() == b"1"
    with pytest.raises(CheckpointError, match="link out of it"):
        inside(folder, "link/blob")


def test_a_name_in_a_cycle_of_links_is_refused(tmp_path, files):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointError, match="too many levels"):
        files.open(inside(tmp_path, "a"))
    with pytest.raises(CheckpointError):
        files.open(inside(tmp_path, "a/model"))


def _folder(path: Path) -> None:
    path.mkdir()


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.symlink_to("nowhere"), "no such file"),
        (_folder, "a folder, where a file should be"),
        (os.mkfifo, "not a regular file"),
        (lambda path: path.touch(), "is empty"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    ],
)
def test_anything_but_a_regular_file_is_refused_at_once(tmp_path, files, make, message):
    make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message) as caught:
        files.open(tmp_path / "model")
    assert "model" in str(caught.value)


def test_a_socket_is_refused(tmp_path, files, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    _socket(Path("model"))
    with pytest.raises(CheckpointError, match="model cannot be opened"):
        files.open(Path("model"))


@pytest.fixture
def as_nobody():
    """Run without the permissions of root, which can read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_file_without_permission_is_refused(tmp_path, files, as_nobody):
    with pytest.raises(CheckpointError, match="permission denied"):
        files.open(_unreadable(tmp_path / "model"))


def _unreadable(path: Path) -> Path:
    user = os.geteuid()
    os.seteuid(os.getuid())
    path.write_bytes(b"1")
    path.chmod(0)
    os.seteuid(user)
    return path


def test_reads_are_exact(tmp_path, files):
    (tmp_path / "model").write_bytes(bytes(range(100)))
    file = files.open(tmp_path / "model")
    assert file.read(10, 3) == bytes([10, 11, 12])
    assert file.read_tensor(0, (2, 1), torch.int16).tolist() == [[0x100], [0x302]]
    assert file.read_tensor(0, (0, 3), torch.int16).shape == (0, 3)
    for offset, nbytes in [(99, 2), (-1, 1), (0, -1), (1 << 70, 1), (0, 1 << 70)]:
        with pytest.raises(CheckpointError, match="100 bytes"):
            file.read(offset, nbytes)


def test_a_file_that_is_truncated_while_it_is_read_is_an_error(tmp_path, files):
    (tmp_path / "model").write_bytes(bytes(100))
    file = files.open(tmp_path / "model")
    os.truncate(tmp_path / "model", 50)
    with pytest.raises(CheckpointError, match="truncated while it was read"):
        file.read(0, 100)


@pytest.mark.parametrize("change", ["write", "replace", "remove"])
def test_a_file_that_changes_is_an_error(tmp_path, files, change):
    path = tmp_path / "model"
    path.write_bytes(b"old")
    files.open(path)
    files.require_unchanged()
    if change == "write":
        path.write_bytes(b"new!")
    elif change == "replace":
        (tmp_path / "other").write_bytes(b"old")
        (tmp_path / "other").replace(path)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match="while it was read"):
        files.require_unchanged()


def test_more_files_than_descriptors_are_read(tmp_path, files, monkeypatch):
    monkeypatch.setattr(files_module, "MAX_DESCRIPTORS", 2)
    for number in range(6):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 10)
    for _ in range(2):
        assert [files.open(tmp_path / str(number)).read(5, 1)[0] for number in range(6)] == list(range(6))
    (tmp_path / "5").write_bytes(b"other")
    with pytest.raises(CheckpointError, match="changed"):
        files.open(tmp_path / "5").read(0, 1)


def test_threads_read_the_same_file(tmp_path, files):
    data = bytes(range(256)) * 64
    (tmp_path / "model").write_bytes(data)
    with ThreadPoolExecutor(8) as threads:
        parts = threads.map(lambda start: files.open(tmp_path / "model").read(start, 64), range(0, len(data), 64))
    assert b"".join(parts) == data


def test_closing_removes_scratch_folders_and_descriptors(tmp_path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    files = Files()
    (tmp_path / "model").write_bytes(b"1")
    files.open(tmp_path / "model")
    scratch = files.scratch()
    assert scratch.stat().st_mode & 0o777 == 0o700
    files.close()
    assert not scratch.exists()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


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
    monkeypatch.setattr(files_module, "MAX_JSON_NBYTES", 3)
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


@dataclass(frozen=True)
class Contents:
    tensors: Mapping[str, int]
    unread: Mapping[str, str] = field(default_factory=dict)


def test_files_are_merged_and_tensors_that_the_index_does_not_list_are_not_read() -> None:
    contents = {X: Contents({"a": 1, "c": 3}), Y: Contents({"b": 2}, {"d": "is sparse", "e": "is sparse"})}
    tensors, unread = merge_files(Path("index"), {"a": X, "b": Y, "d": Y}, contents.__getitem__)
    assert tensors == {"a": 1, "b": 2}
    not_listed = "index does not list it, though one of its files holds it"
    assert unread == {"c": not_listed, "d": "is sparse", "e": not_listed}


def test_files_that_contradict_the_index_or_each_other_are_refused() -> None:
    index = {"a": X, "b": Y}
    with pytest.raises(CheckpointError, match="Tensor 'a' is both in x and in y"):
        merge_files(Path("index"), index, {X: Contents({"a": 1}), Y: Contents({"b": 2}, {"a": ""})}.__getitem__)
    with pytest.raises(CheckpointError, match="index says that tensor 'b' is in y, which lacks it"):
        merge_files(Path("index"), index, {X: Contents({"a": 1, "b": 2}), Y: Contents({})}.__getitem__)
