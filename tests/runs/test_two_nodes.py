"""Ranks on two machines without a shared disk: traces in two folders, nodes in findings, a node that dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tpcheck
from tests.runs import two_nodes
from tpcheck import Topology, UsageError
from tpcheck.world.groups import reserve_port


def start(folder: Path, node: int, port: int, where: str) -> subprocess.Popen[str]:
    """Start the rank of a node, in a folder and with temporary files of its own."""
    (folder / "tmp").mkdir(parents=True)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MASTER"))}
    environ |= {
        "SLURM_PROCID": str(node),
        "SLURM_NTASKS": "2",
        "SLURM_NODEID": str(node),
        "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
        "MASTER_PORT": str(port),
        "TMPDIR": str(folder / "tmp"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, str(Path(two_nodes.__file__)), where]
    return subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_nodes_write_a_trace_each_and_end_soon_when_one_dies(tmp_path: Path) -> None:
    folders = [tmp_path / "node0", tmp_path / "node1"]
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
        ranks = [start(folder, node, port, "guard") for node, folder in enumerate(folders)]
        model, optimizer = two_nodes.build()
        two_nodes.record(tmp_path / "one.trace", model, optimizer, Topology(), replays=2)
        output, errors = ranks[0].communicate(timeout=120)
        ranks[1].communicate(timeout=120)
    assert ranks[0].returncode == 0, errors
    of_batch, of_bias, failure, seconds = output.splitlines()
    assert of_batch == of_bias == "{'node-0': [0], 'node-1': [1]}"
    assert failure.startswith("rank 1 (node-1) of TP group (0, 1) died, which made this rank fail with: ")
    assert float(seconds) < 30

    traces = [str(folder / "run.trace") for folder in folders]
    report = tpcheck.compare_traces(traces, tmp_path / "one.trace")
    assert report.passed, report.to_text()
    assert report.verdict.coverage.compared
    with pytest.raises(UsageError, match="give the folders of all nodes"):
        tpcheck.compare_traces(traces[:1], tmp_path / "one.trace")
