"""Worlds in containers: as PID 1, without /dev/shm, with a home that is read-only, as a user without a name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import os
from tpcheck import Topology, spawn

def total(rank):
    import torch
    number = torch.tensor(rank.rank + 1)
    torch.distributed.all_reduce(number)
    return int(number)

with spawn(Topology(tp=2), preload=["torch"]) as world:
    print(os.getpid() == 1, os.getuid(), world.run(total))
"""
_READ_ONLY = 'mount -t tmpfs -o ro none /dev/shm && mount -t tmpfs -o ro none "$HOME" && exec "$@"'
_AS_PID_1 = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", _READ_ONLY, "sh"]
_NAMELESS = ["unshare", "--user", "--map-user=12345"]


@pytest.mark.parametrize(
    ("place", "is_pid_1"),
    [(_AS_PID_1, True), (_NAMELESS, False)],
    ids=["pid_1_without_shared_memory_and_home", "user_without_a_name"],
)
def test_a_world_runs(place: list[str], is_pid_1: bool, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    environ = {
        name: value for name, value in os.environ.items() if name not in ("USER", "LOGNAME", "LNAME", "USERNAME")
    }
    environ |= {"HOME": str(home)}
    try:
        subprocess.run([*place, "true"], env=environ, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no namespaces here: {error}")
    done = subprocess.run(
        [*place, sys.executable, "-c", _SCRIPT], env=environ, capture_output=True, text=True, timeout=300
    )
    uid = os.getuid() if is_pid_1 else 12345
    assert (done.stdout, done.returncode) == (f"{is_pid_1} {uid} (3, 3)\n", 0), done.stderr
    assert not list(home.iterdir())
