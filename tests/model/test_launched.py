"""Under torchrun the launcher's ranks are used, and one of them speaks."""

import os
import subprocess
import sys

import pytest

ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD_SIZE", "PYTEST"))}


@pytest.mark.parametrize("hash_seeds", ["random"])  # of each process its own, as launchers leave it
def test_verify_uses_the_ranks_of_torchrun(hash_seeds: str) -> None:
    command = "torch.distributed.run --standalone --nproc-per-node 2 -m tpcheck verify gemma3_text --tp 2"
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        env={**ENVIRON, "PYTHONHASHSEED": hash_seeds, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("passed  gemma3_text  deepspeed, tp=2") == 1
