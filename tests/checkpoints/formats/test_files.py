"""Only files inside the folder are opened, and a file that changes is an error."""

from __future__ import annotations

import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tpcheck.checkpoints.formats import files as files_module
from tpcheck.checkpoints.formats.files import Files, inside
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
