"""Under torchrun the launcher's ranks are used, and one of them reports."""

import os
import subprocess
import sys

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
