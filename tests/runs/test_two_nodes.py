"""Ranks on two machines without a shared disk: traces in two folders, nodes in findings, a node that dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tpcheck
from tests.runs import two_agents, two_nodes
from tpcheck import Topology, UsageError
from tpcheck.world.groups import reserve_port


def start(folder: Path, command: list[str], **variables: str) -> subprocess.Popen[str]:
    """Start a process of a node, in a folder and with temporary files of its own."""
    (folder / "tmp").mkdir(parents=True)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "MASTER"))}
    environ |= {"TMPDIR": str(folder / "tmp"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env={**environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_rank(folder: Path, node: int, port: int, where: str) -> subprocess.Popen[str]:
    """Start the rank of a node as srun does."""
    return start(
        folder,
        [str(Path(two_nodes.__file__)), where],
        SLURM_PROCID=str(node),
        SLURM_NTASKS="2",
        SLURM_NODEID=str(node),
        SLURM_STEP_NODELIST="127.0.0.[1-2]",
        MASTER_PORT=str(port),
    )


def start_agent(folder: Path, node: int, port: int) -> subprocess.Popen[str]:
    """Start the torchrun of a node."""
    options = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    script = str(Path(two_agents.__file__))
    return start(folder, ["-m", "torch.distributed.run", *options, "--nproc-per-node", "1", script])


def test_two_nodes_write_a_trace_each_and_end_soon_when_one_dies(tmp_path: Path) -> None:
    folders = [tmp_path / "node0", tmp_path / "node1"]
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
        ranks = [start_rank(folder, node, port, "guard") for node, folder in enumerate(folders)]
        model, optimizer = two_nodes.build()
        two_nodes.record(tmp_path / "one.trace", model, optimizer, Topology(), replays=2)
        two_nodes.record(tmp_path / "later.trace", model, optimizer, Topology(), replays=2)
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
    trained_further = tpcheck.compare_traces(traces, tmp_path / "later.trace")
    assert trained_further.findings[0].where["nodes"] == {"node-0": [0], "node-1": [1]}
    with pytest.raises(UsageError, match="give the folders of all nodes"):
        tpcheck.compare_traces(traces[:1], tmp_path / "one.trace")


@pytest.mark.skipif(os.environ.get("TPCHECK_LOOPS") != "all", reason="takes as long as three loops: see ci/loops")
def test_two_agents_of_torchrun_record_a_deepspeed_run(tmp_path: Path) -> None:
    folders = [tmp_path / "node0", tmp_path / "node1"]
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
    agents = [start_agent(folder, node, port) for node, folder in enumerate(folders)]
    model = two_agents.build()
    optimizer = two_agents.make_optimizer(model)
    with tpcheck.record(model, tmp_path / "one.trace", optimizer=optimizer, replays=2):
        for step in range(2):
            two_agents.loss_of(model, two_agents.batch_of(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    for agent in agents:
        _, errors = agent.communicate(timeout=240)
        assert agent.returncode == 0, errors

    report = tpcheck.compare_traces([folder / "run.trace" for folder in folders], tmp_path / "one.trace")
    assert report.passed, report.to_text()
    counts = {check.check: check.compared for check in report.verdict.checks}
    assert min(counts[f"{kind}_match_reference"] for kind in ("outputs", "gradients", "updates")) > 40
    report = tpcheck.compare_traces([folder / "wrong.trace" for folder in folders], tmp_path / "one.trace")
    first = report.findings[0]
    assert (first.check, first.where["parameter"]) == ("gradients_match_reference", "model.norm.weight")
    assert (first.where["step"], first.where["ranks"], first.cause) == (1, [1], "gradient_scaled")
