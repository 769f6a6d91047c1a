"""Ranks of a launcher divide one comparison."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tpcheck import Rank, verify_checkpoint
from tpcheck.checkpoints.division import Division
from tpcheck.core.errors import CheckpointError, UsageError

TENSORS = {f"layers.{layer}.weight": torch.arange(12.0).reshape(3, 4) + layer for layer in range(7)}


def saved(folder: Path, name: str, **changed: torch.Tensor) -> Path:
    file = folder / f"{name}.safetensors"
    save_file(TENSORS | {name.replace("_", "."): tensor for name, tensor in changed.items()}, file)
    return file


@pytest.mark.tpcheck(dp=2)
def test_every_rank_returns_the_report_that_one_process_makes(tp_rank: Rank, tmp_path: Path) -> None:
    folder = tmp_path / str(tp_rank.rank)
    folder.mkdir()
    reference = saved(folder, "reference")
    wrong = {"layers_2_weight": TENSORS["layers.2.weight"].flip(0), "layers_5_weight": torch.zeros(3, 4)}
    actual = saved(folder, "actual", **wrong)
    divided = verify_checkpoint(actual, reference, rank=tp_rank).verdict
    alone = verify_checkpoint(actual, reference).verdict
    assert (divided.findings, divided.coverage) == (alone.findings, alone.coverage)
    assert [finding.where["parameter"] for finding in divided.findings] == ["layers.2.weight", "layers.5.weight"]


@pytest.mark.tpcheck(dp=2)
def test_an_error_of_one_rank_ends_all(tp_rank: Rank, tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    path = missing if tp_rank.rank == 1 else saved(tmp_path, "actual")
    with pytest.raises((UsageError, CheckpointError)) as raised:
        verify_checkpoint(path, TENSORS, rank=tp_rank)
    prefix = "" if tp_rank.rank == 1 else "rank 1: "
    assert str(raised.value) == f"{prefix}actual={str(missing)!r}: expected a file or folder that exists"


@pytest.mark.tpcheck(dp=2)
def test_ranks_that_read_other_files_are_refused(tp_rank: Rank) -> None:
    actual = TENSORS if tp_rank.rank == 0 else {"layers.0.weight": torch.ones(2)}
    with pytest.raises(CheckpointError, match="read different files: actual differs between rank 0 and rank 1"):
        verify_checkpoint(actual, TENSORS, rank=tp_rank)


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_shares_make_the_whole_and_results_keep_their_order(count: int) -> None:
    values = range(7)
    shares = [list(Division(index, count, 1, lambda value: (value,)).share(values)) for index in range(count)]
    assert sorted(value for share in shares for value in share) == list(values)
    division = Division(0, count, 1, lambda _: tuple(("step", share) for share in shares))
    assert division.joined("step", shares[0]) == tuple(values)


@pytest.mark.slow
def test_under_a_launcher_one_report_is_written(tmp_path: Path) -> None:
    reference, actual = saved(tmp_path, "reference"), saved(tmp_path, "actual", layers_2_weight=torch.zeros(3, 4))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "tpcheck"]
    command = [*launcher, "checkpoint", str(actual), str(reference)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"})
    assert process.returncode == 1
    assert process.stdout.count("checkpoint_matches_reference  layers.2.weight") == 1
    assert process.stdout.count("coverage  7 of 7 tensors compared") == 1
