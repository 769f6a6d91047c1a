"""The environment of a rank is complete where the user has no home, no cache folder, or a long path."""

from __future__ import annotations

import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from tpcheck import Topology
from tpcheck.world import forkserver, forkserver_client
from tpcheck.world.environment import rank_environ

TOO_LONG = "/" + 300 * "x"  # no system can read it, not even as root


def environ_of_rank_1(base: dict[str, str], scratch: str = "/tmp/world") -> dict[str, str]:
    return rank_environ(base, topology=Topology(tp=2), rank=1, port=29400, device="cpu", scratch=scratch, extra={})


def extensions_dir(scratch: Path) -> str:
    return environ_of_rank_1({}, str(scratch))["TORCH_EXTENSIONS_DIR"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "1"),
        ("LOCAL_RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("LOCAL_SIZE", "2"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29400"),
        ("TORCHELASTIC_RUN_ID", None),
        ("SLURM_PROCID", None),
        ("OMPI_COMM_WORLD_LOCAL_RANK", None),
        ("PMI_RANK", None),
        ("PMIX_RANK", None),
        ("MV2_COMM_WORLD_RANK", None),
        ("MPI_LOCALRANKID", None),
        ("GROUP_RANK", None),
        ("NODE_RANK", None),
        ("ACCELERATE_MIXED_PRECISION", "7"),  # an option, not a rank or a size
    ],
)
def test_variables_of_a_launcher_around_the_controller_do_not_reach_ranks(name: str, value: str | None) -> None:
    assert environ_of_rank_1({name: "7"}).get(name) == value


def test_extensions_are_built_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert extensions_dir(tmp_path / "world") == str(tmp_path / ".cache" / "tpcheck" / "torch_extensions")


@pytest.mark.parametrize("home", [None, TOO_LONG, "/proc"])
def test_extensions_are_built_in_the_folder_of_the_world_where_no_cache_is_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("tpcheck.world.environment.os.access", lambda path, mode: str(path) != "/proc")
    if home is None:
        monkeypatch.delenv("HOME")
        monkeypatch.setattr(pwd, "getpwuid", _unknown)
    else:
        monkeypatch.setenv("HOME", home)
    assert extensions_dir(tmp_path) == str(tmp_path / "tpcheck" / "torch_extensions")


def _unknown(uid: int) -> None:
    raise KeyError(uid)


@pytest.mark.parametrize(
    ("folder", "used"),
    [
        ("/tmp", "/tmp"),
        ("/scratch/me", "/scratch/me"),
        ("/" + 62 * "x", "/" + 62 * "x"),
        ("/" + 63 * "x", "/tmp"),
        ("/" + 32 * "\u00fc", "/tmp"),  # of 65 bytes
        ("/not_text_\udcff", "/tmp"),
    ],
)
def test_folders_of_worlds_have_paths_that_sockets_and_torch_accept(folder: str, used: str) -> None:
    assert forkserver_client._folder_for_sockets(folder) == used


_LOADER = """
import os
import torch
from torch.utils.data import DataLoader
from tpcheck import Topology, spawn

def load(rank):
    return sum(int(batch.sum()) for batch in DataLoader(torch.arange(8), num_workers=1))

with spawn(Topology(tp=1), preload=["torch"]) as world:
    print(world.run(load), world.run(lambda rank: os.environ["TPCHECK_WORLD"])[0])
"""


def test_workers_of_data_loaders_run_where_tmpdir_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / (100 * "x")
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    done = subprocess.run([sys.executable, "-c", _LOADER], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("(28,) /tmp/tpcheck-"), done.stderr
    assert not Path(done.stdout.split()[-1]).exists()
    assert list(folder.iterdir()) == []


def test_memory_maps_of_files_with_undecodable_names_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = tmp_path / "maps"
    maps.write_bytes(
        b"7f0000000000-7f0000200000 rw-p 00000000 00:00 0 \n"
        b"7f0000200000-7f0000400000 rw-p 00000000 08:01 17   /opt/\xff/libtorch.so\n"
    )
    monkeypatch.setattr(forkserver, "Path", lambda name: maps)
    assert list(forkserver._anonymous_regions()) == [(0x7F0000000000, 0x7F0000200000)]
