"""Under a launcher a process finds its own rank, or hears what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tpcheck import Topology, UsageError, attach

_SCRIPT = """
import sys
from tpcheck import Topology, attach
rank = attach(Topology(tp=2))
sys.stdout.write(f"{rank!r} {rank.gather(rank.rank)} {rank.group('tp').size()} {rank.device}\\n")
"""


def test_a_process_under_torchrun_is_its_rank(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "<Rank 0 of 2: dp=0, tp=0> (0, 1) 2 cpu",
        "<Rank 1 of 2: dp=0, tp=1> (0, 1) 2 cpu",
    ]


def test_slurm_names_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT.replace("tp=2", "tp=1"))
    names = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    for name, value in {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.stdout == "<Rank 0 of 1: dp=0, tp=0> (0,) 1 cpu\n", done.stderr


def test_without_a_launcher_it_says_so() -> None:
    with pytest.raises(UsageError, match="the variables that torchrun or srun set"):
        attach(Topology(tp=2))


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_a_world_of_another_size_is_refused(names: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(names[0], "0")
    monkeypatch.setenv(names[1], "8")
    with pytest.raises(UsageError, match="expected one of 8 ranks, as many as the launcher has started"):
        attach(Topology(tp=2))


def test_a_variable_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK='first': expected a number"):
        attach(Topology(tp=2))


def test_the_meeting_place_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    with pytest.raises(UsageError, match="MASTER_ADDR=None: expected where rank 0 is to be met"):
        attach(Topology(tp=1))
