"""Leaves nothing of a rank or a world: no process, no file, no shared memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tpcheck.world.environment import WORLD_MARK

_PATIENCE_S = 2.0  # for helpers that clean up by themselves once everybody who talked to them is gone
_SHARED_MEMORY = Path("/dev/shm")
# They unlink what the dead left behind when their pipe ends; killed, they would leave it.
_SELF_CLEANING = ("multiprocessing.resource_tracker", "torch_shm_manager")


def remove_traces(scratch: str, port: int) -> None:
    """Remove a world's files, and the shared memory that DeepSpeed names after the world's port."""
    shutil.rmtree(scratch, ignore_errors=True)
    if _SHARED_MEMORY.is_dir():
        for segment in _SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            segment.unlink(missing_ok=True)


def end_processes(groups: set[int], *, also: Iterable[int], reap: Callable[[], None]) -> None:
    """End what ranks started and left: every member of their process groups, and `also` where they still run.

    `reap` collects exit statuses, without which a dead process would still be seen.
    """
    suspects = {pid for pid in _running() if _group_of(pid) in groups} | set(also)
    helpers = {pid for pid in suspects if _cleans_up_by_itself(pid)}
    for pid in suspects - helpers:
        _kill(pid)
    _wait_for(suspects, reap)
    for pid in helpers & suspects:
        _kill(pid)
    _wait_for(suspects, reap)


def children(pid: int) -> list[int]:
    """Return the children of a process, wherever they put themselves."""
    return _children(pid, recursive=False)


def descendants(pid: int) -> list[int]:
    """Return the children of a process and theirs, wherever they put themselves."""
    return _children(pid, recursive=True)


def world_of(pid: int) -> str | None:
    """Return the folder of the world whose rank started this process; None if it does not bear the mark."""
    try:
        folder: str | None = psutil.Process(pid).environ().get(WORLD_MARK)
    except psutil.Error:
        return None
    return folder


def _children(pid: int, *, recursive: bool) -> list[int]:
    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=recursive)]
    except psutil.Error:
        return []


def _running() -> list[int]:
    pids: list[int] = psutil.pids()
    return pids


def _group_of(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except OSError:
        return None


def _cleans_up_by_itself(pid: int) -> bool:
    try:
        command = " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False
    return any(name in command for name in _SELF_CLEANING)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)


def _wait_for(pids: set[int], reap: Callable[[], None]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while pids and time.monotonic() < deadline:
        reap()
        pids -= {pid for pid in pids if _group_of(pid) is None}
        if pids:
            time.sleep(0.001)
