"""Under torchrun the launcher's ranks are used, and one of them reports."""

import os
import subprocess
import sys
from pathlib import Path

ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE", "PYTEST"))}


def test_verify_uses_the_ranks_of_torchrun() -> None:
    command = "torch.distributed.run --standalone --nproc-per-node 2 -m tpcheck verify gemma3_text --tp 2"
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        env={**ENVIRON, "PYTHONHASHSEED": "random", "OMP_NUM_THREADS": "1"},  # a different seed for each rank
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed  gemma3_text  deepspeed, tp=2") == 1


def test_ranks_that_part_are_told_at_once() -> None:
    target = f"{Path(__file__).with_name('launched_parting.py')}:build"
    command = f"torch.distributed.run --standalone --nproc-per-node 2 -m tpcheck verify {target}"
    done = subprocess.run(
        [sys.executable, "-m", *command.split(), "--backend", "custom", "--tp", "2", "--steps", "1"],
        env={**ENVIRON, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert "did not issue the all_reduce over tp in the forward of row that rank 0 issued" in done.stdout, done.stderr
