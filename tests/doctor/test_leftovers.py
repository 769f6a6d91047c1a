"""Leftovers of killed runs are reported, files that a live process uses are not."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from tpcheck.doctor.diagnosis import diagnose, extension_caches, leaked_shared_memory, stale_locks


def test_a_lock_that_no_process_holds_is_stale(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    (advice,) = stale_locks([tmp_path, tmp_path])
    assert advice.fix == f"rm {lock}"
    assert advice.what == (f"{lock} is left over from a killed build: the next build of deepspeed_shm_comm will hang")


def test_a_lock_that_a_process_holds_is_not_stale(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w"):
        assert list(stale_locks([tmp_path])) == []


def test_a_cache_that_is_not_there_holds_no_lock(tmp_path: Path) -> None:
    assert list(stale_locks([tmp_path / "none"])) == []


def test_a_cache_that_may_not_be_looked_into_holds_no_lock() -> None:
    assert list(stale_locks([Path("/" + 300 * "x")])) == []  # refused to root, too


def test_the_doctor_needs_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert diagnose().versions


def test_caches_are_torch_s_default_and_the_one_that_was_chosen(tmp_path: Path) -> None:
    default = tmp_path / ".cache" / "torch_extensions"
    assert extension_caches({}, tmp_path) == (default,)
    assert extension_caches({"TORCH_EXTENSIONS_DIR": "/build"}, tmp_path) == (Path("/build"), default)


def test_segments_that_no_process_maps_are_leaked(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / f"deepspeed_allreduce_buffer_0_127.0.0.1_29500_{rank}").write_bytes(b"x" * 4096)
    (tmp_path / "other").touch()
    (advice,) = leaked_shared_memory(tmp_path)
    assert advice.what.startswith(f"2 segments in {tmp_path} (0 MiB) belong to no process")
    assert advice.fix == f"rm {tmp_path}/deepspeed_allreduce_buffer_0_127.0.0.1_29500_0 " + (
        f"{tmp_path}/deepspeed_allreduce_buffer_0_127.0.0.1_29500_1"
    )


def test_a_segment_that_a_process_maps_is_not_leaked(tmp_path: Path) -> None:
    segment = tmp_path / "deepspeed_allreduce_buffer_0_127.0.0.1_29500_0"
    segment.write_bytes(b"x" * 4096)
    with segment.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        assert list(leaked_shared_memory(tmp_path)) == []


def test_many_segments_are_named_by_a_pattern(tmp_path: Path) -> None:
    for rank in range(5):
        (tmp_path / f"deepspeed_allreduce_buffer_{rank}").touch()
    (advice,) = leaked_shared_memory(tmp_path)
    assert advice.fix == f"rm {tmp_path}/deepspeed_allreduce_buffer_*"


def test_maps_of_processes_may_name_files_that_are_no_text(tmp_path: Path) -> None:
    segment = tmp_path / "deepspeed_allreduce_buffer_0"
    segment.touch()
    (tmp_path / "proc" / "7").mkdir(parents=True)
    line = b"7f0000000000-7f0000200000 rw-p 00000000 08:01 17   "
    (tmp_path / "proc" / "7" / "maps").write_bytes(line + b"/opt/\xff.so\n" + line + os.fsencode(segment) + b"\n")
    assert list(leaked_shared_memory(tmp_path, tmp_path / "proc")) == []
