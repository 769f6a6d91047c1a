"""One script, with every hook in it, is started in every way: it runs, and says on one rank what it did."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.trainer.training import save_model

SCRIPT = Path(__file__).with_name("any_launch.py")
OF_TRAINER = SCRIPT.with_name("trainer_any_launch.py")
LAUNCHER = ("-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--nproc-per-node")
ALONE = [
    "this process has no other rank to compare with (no TP, no DP)",
    "guard: looked at 7 steps; no replicas to compare, all finite",
    "24 batches of a process alone; no other rank to compare with; no samples came again",
]
STARTS = {
    "alone": ((), "1", ALONE),
    "one rank": ((*LAUNCHER, "1"), "1", ALONE),
    "replicas": (
        (*LAUNCHER, "2"),
        "1",
        [
            "there is no TP here: ranks 0, 1 are data-parallel replicas (DistributedDataParallel)",
            "guard: 4 tensors of rank 0 compared at 4 checks; no difference",
            "12 batches compared across 2 data-parallel replicas (DistributedDataParallel); no samples in common",
        ],
    ),
    "TP": (
        (*LAUNCHER, "2"),
        "2",
        [
            "guard: 2 tensors of rank 0 compared at 7 checks; no difference",
            "24 batches compared within TP group (0, 1), from the model's device mesh; no difference",
        ],
    ),
}


ALONE_WITH_TRAINER = [
    "this process has no other rank to compare with (no TP, no DP)",
    "guard: looked at 3 steps; no replicas to compare, all finite",
    "4 batches of a process alone; no other rank to compare with; no samples came again",
]
STARTS_OF_TRAINER = {
    "alone": ((), "1", ALONE_WITH_TRAINER),
    "one rank": ((*LAUNCHER, "1"), "1", ALONE_WITH_TRAINER),
    "replicas": (
        (*LAUNCHER, "2"),
        "1",
        [
            "there is no TP here: ranks 0, 1 are data-parallel replicas (topology)",
            "guard: 60 tensors of rank 0 compared at 3 checks; no difference",
            "4 batches compared across 2 data-parallel replicas (topology); no samples in common",
        ],
    ),
    "TP": (
        (*LAUNCHER, "2"),
        "2",
        [
            "guard: 27 tensors of rank 0 compared at 3 checks; no difference",
            "4 batches compared within TP group (0, 1), from the model's device mesh; no difference",
        ],
    ),
}


@pytest.mark.parametrize(
    ("script", "starts"), [(SCRIPT, STARTS), pytest.param(OF_TRAINER, STARTS_OF_TRAINER, marks=pytest.mark.slow)]
)
def test_a_script_runs_however_it_is_started_and_says_what_it_did(
    tmp_path: Path, script: Path, starts: Mapping[str, tuple[tuple[str, ...], str, list[str]]]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "TPCHECK")}
    environment["PYTHONPATH"] = str(SCRIPT.parents[2])
    started = {}
    for name, (launcher, tp, _) in starts.items():
        folder = tmp_path / name
        folder.mkdir()
        if script == OF_TRAINER:
            save_model(folder / "model")
        command = [sys.executable, *launcher, str(script), str(folder), tp]
        started[name] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    said = {}
    for name, process in started.items():
        errors = process.communicate(timeout=300)[1]
        assert process.returncode == 0, errors
        lines = [line.removeprefix("tpcheck: ") for line in errors.splitlines() if line.startswith("tpcheck: ")]
        said[name] = lines
        assert (tmp_path / name / "run.trace").is_dir()
    assert said == {name: lines for name, (_, _, lines) in starts.items()}
