"""The order of a set of strings differs between processes, unless PYTHONHASHSEED is set."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SCRIPT = """
import json, sys
import tpcheck
from tests.batches.pipelines.odd import from_a_set
topology = tpcheck.Topology(tp=2)
rank = tpcheck.attach(topology)

def finding(ordered):
    try:
        list(tpcheck.watch(from_a_set(rank, ordered=ordered), topology=topology, timeout=20))
    except tpcheck.BatchMismatch as mismatch:
        return [mismatch.report.findings[0].cause, dict(mismatch.report.findings[0].evidence)]

found = [finding(ordered=False), finding(ordered=True)]
if rank.rank == 0:
    sys.stdout.write(json.dumps(found))
"""


def findings_of_launched_ranks(folder: Path, **env: str) -> Any:
    """Run the script as a launcher would: each rank is a new process, with other hashes. Unordered, then ordered."""
    script = folder / "train.py"
    script.write_text(SCRIPT)
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


def test_words_in_the_order_of_a_set_differ_until_they_are_sorted(tmp_path: Path) -> None:
    (cause, evidence), ordered = findings_of_launched_ranks(tmp_path)
    assert cause == "order_differs"
    assert (evidence["dataset_lists_in_another_order"], evidence["hash_differs"]) == ("names", True)
    assert evidence["PYTHONHASHSEED"] == "unset"
    assert "PYTHONHASHSEED" in evidence["advice"]
    assert ordered is None


def test_with_one_hash_seed_the_order_of_a_set_is_equal(tmp_path: Path) -> None:
    assert findings_of_launched_ranks(tmp_path, PYTHONHASHSEED="0") == [None, None]
