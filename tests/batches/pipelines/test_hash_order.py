"""The order of a set of strings is another one in every process, unless PYTHONHASHSEED says otherwise."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = """
import json, sys
import tpcheck
from tests.batches.pipelines.odd import from_a_set
topology = tpcheck.Topology(tp=2)
rank = tpcheck.attach(topology)
try:
    list(tpcheck.watch(from_a_set(rank, ordered={ordered}), topology=topology, timeout=20))
    found = None
except tpcheck.BatchMismatch as mismatch:
    found = mismatch.report.findings[0]
if rank.rank == 0:
    sys.stdout.write(json.dumps(found and [found.cause, dict(found.evidence)]))
"""


def found_by_launched_ranks(folder: Path, ordered: bool, **env: str) -> Any:
    """Run the script as a launcher would: each rank is a process of its own, with hashes of its own."""
    script = folder / "train.py"
    script.write_text(SCRIPT.format(ordered=ordered))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    environ |= {"PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", **env}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    done = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], done
    return json.loads(done[0][0])


def test_words_in_the_order_of_a_set_differ(tmp_path: Path) -> None:
    cause, evidence = found_by_launched_ranks(tmp_path, ordered=False)
    assert cause == "order_differs"
    assert (evidence["dataset_lists_in_another_order"], evidence["hash_differs"]) == ("names", True)
    assert evidence["PYTHONHASHSEED"] == "unset"
    assert "PYTHONHASHSEED" in evidence["advice"]


@pytest.mark.parametrize(("ordered", "env"), [(True, {}), (False, {"PYTHONHASHSEED": "0"})])
def test_after_either_advised_change_it_is_clean(tmp_path: Path, ordered: bool, env: dict[str, str]) -> None:
    assert found_by_launched_ranks(tmp_path, ordered, **env) is None
