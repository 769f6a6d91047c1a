"""One of two ranks that srun starts on two machines: records, watches and guards a small model, until rank 1 dies.

The argument says where it dies: in the comparison of batches, `watch`, or in a collective of the model, `guard`.
"""

from __future__ import annotations

import copy
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tpcheck
from tpcheck import Rank, Report, Topology
from tpcheck.world import exchange


def build(*, tp: int = 1) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8), nn.LayerNorm(8)).double()
    if tp > 1:
        parallelize_module(model, init_device_mesh("cpu", (tp,)), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def batch_of(step: int) -> torch.Tensor:
    return torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> None:
    loss: torch.Tensor = model(batch).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()


def record(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, topology: Topology, replays: int) -> None:
    with tpcheck.record(model, path, optimizer=optimizer, topology=topology, replays=replays):
        for step in range(2):
            train(model, optimizer, batch_of(step))


def find_differences(rank: Rank, model: nn.Sequential, optimizer: torch.optim.Optimizer) -> list[Report]:
    """Return what is found of a batch, and of a bias, that rank 1 has otherwise."""
    reports: list[Report] = []
    for _ in tpcheck.watch([batch_of(0) + rank.rank], topology=rank.topology, on_mismatch=reports.append):
        pass
    saved = copy.deepcopy(model.state_dict())
    with tpcheck.guard(model, optimizer=optimizer, topology=rank.topology, every=1, on_mismatch=reports.append):
        train(model, optimizer, batch_of(0))
        with torch.no_grad():
            model[3].bias.add_(float(rank.rank))
        train(model, optimizer, batch_of(0))
    model.load_state_dict(saved)
    return reports


def train_until_rank_1_dies(rank: Rank, model: nn.Module, optimizer: torch.optim.Optimizer, where: str) -> None:
    batches = tpcheck.watch(
        [batch_of(step) for step in range(3)], topology=rank.topology, every=1 if where == "watch" else 9
    )
    with tpcheck.guard(model, optimizer=optimizer, topology=rank.topology, every=100):
        for number, batch in enumerate(batches):
            if number == 2 and rank.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            train(model, optimizer, batch)


def main() -> None:
    node = f"node-{os.environ['SLURM_NODEID']}"
    socket.gethostname = lambda: node
    exchange.this_machine = lambda: (node, "")
    rank = tpcheck.attach(Topology(tp=2), device="cpu")
    model, optimizer = build(tp=2)
    record(Path("run.trace"), model, optimizer, rank.topology, replays=0)
    for report in find_differences(rank, model, optimizer):
        sys.stdout.write(f"{report.findings[0].where['nodes']}\n")
    started = time.monotonic()
    try:
        train_until_rank_1_dies(rank, model, optimizer, sys.argv[1])
    except tpcheck.RankFailure as failure:
        sys.stdout.write(f"{failure}\n{time.monotonic() - started}\n")
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
