"""`attach` reads the variables of the launcher, and names the variable that is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tpcheck import Topology, UsageError, attach
from tpcheck.world.attach import is_launched, launched_rank, master_address, num_local_ranks

_SCRIPT = """
import sys
from torch import distributed
from tpcheck import Topology, attach
from tpcheck.world.attach import collectives_checked, exchange_through_store
from tpcheck.world.groups import is_checked

logger = distributed.Logger
with collectives_checked():
    rank = attach(Topology(tp=2))
sys.stdout.write(f"{rank!r} {rank.gather(rank.rank)} {rank.group('tp').size()} {rank.device}\\n")
assert exchange_through_store(rank, rank.rank, name="first", limit_s=60) == {0: 0, 1: 1}
assert exchange_through_store(rank, rank.rank, name=f"of {rank.rank}", limit_s=0.1) == {rank.rank: rank.rank}
with collectives_checked():
    assert is_checked(attach(Topology(dp=2)).group("tp"))
assert not is_checked(attach(Topology(dp=2)).group("tp"))
assert distributed.Logger is logger
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


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
# mpirun in a job of Slurm starts a daemon on each node with srun.
DAEMON_OF_MPIRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}
STEP_OF_SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "5",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[007,009-010]",
    "SLURM_NODELIST": "gpu[001-020]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_NODEID": "2",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (3, 4, 1)),
        ({"RANK": "3", "WORLD_SIZE": "4"}, (3, 4, 0)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}, (3, 4, 1)),
        ({"PROCID": "3", "NTASKS": "4", "LOCALID": "1"}, (3, 4, 1)),
        (OPEN_MPI, (3, 4, 1)),
        ({**OPEN_MPI, **DAEMON_OF_MPIRUN}, (3, 4, 1)),
        ({**OPEN_MPI, "RANK": "2", "WORLD_SIZE": "8"}, (2, 8, 0)),
        ({"MV2_COMM_WORLD_RANK": "3", "MV2_COMM_WORLD_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", **DAEMON_OF_MPIRUN}, (3, 4, 1)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "PMI_LOCAL_RANK": "1"}, (3, 4, 1)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, (3, 4, 0)),
        # srun --mpi=pmi2
        ({"PMI_RANK": "3", "PMI_SIZE": "4", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}, (3, 4, 1)),
    ],
)
def test_the_variables_of_torchrun_come_before_those_of_mpi_and_slurm(
    environ: dict[str, str], expected: tuple[int, int, int]
) -> None:
    assert launched_rank(environ) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, False),  # a batch script
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, True),
        (OPEN_MPI, True),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, False),  # one process under mpirun
    ],
)
def test_a_batch_script_of_slurm_is_not_launched(
    environ: dict[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert is_launched() == expected


def test_a_process_without_a_launcher_is_refused() -> None:
    with pytest.raises(UsageError, match="the variables that torchrun, srun or mpirun sets; start the script"):
        attach(Topology(tp=2))


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_a_world_of_another_size_is_refused(names: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(names[0], "0")
    monkeypatch.setenv(names[1], "8")
    with pytest.raises(UsageError, match="expected a topology of 8 ranks, as many as the launcher has started"):
        attach(Topology(tp=2))


def test_a_rank_that_is_not_a_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="RANK='first': expected a number"):
        attach(Topology(tp=2))


def test_a_missing_address_of_rank_0_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "1")
    with pytest.raises(UsageError, match="MASTER_ADDR=None: expected the address of rank 0"):
        attach(Topology(tp=1))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (STEP_OF_SLURM, ("gpu007", 15000 + 4711 + 202)),
        ({**STEP_OF_SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}, ("10.0.0.1", 29500)),
        ({**STEP_OF_SLURM, "MASTER_PORT": "29500"}, ("gpu007", 29500)),
    ],
)
def test_the_address_of_rank_0_is_that_of_the_first_node_of_slurm(
    environ: dict[str, str], expected: tuple[str, int]
) -> None:
    assert master_address(environ) == expected


def test_the_daemons_of_mpirun_do_not_say_where_rank_0_is() -> None:
    with pytest.raises(UsageError, match="MASTER_ADDR=None: expected the address of rank 0"):
        master_address({**STEP_OF_SLURM, **OPEN_MPI})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (STEP_OF_SLURM, 1),
        ({**STEP_OF_SLURM, "SLURM_NODEID": "1"}, 2),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, 2),
        ({"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, 4),
        (OPEN_MPI, 5),
    ],
)
def test_the_launcher_says_how_many_ranks_are_on_this_machine(environ: dict[str, str], expected: int) -> None:
    assert num_local_ranks(environ, 5) == expected
