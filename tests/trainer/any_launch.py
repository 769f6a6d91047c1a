"""A training script with every hook in it, which runs alone, and under a launcher with TP or without.

any_launch.py FOLDER [TP]
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

import tpcheck

folder, tp = sys.argv[1], int(sys.argv[2])
if "RANK" in os.environ:
    dist.init_process_group("gloo")
rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
torch.manual_seed(0)
model: Any = nn.Linear(4, 1)
if tp > 1:
    model._device_mesh = dist.init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("dp", "tp"))
elif world > 1:
    model = nn.parallel.DistributedDataParallel(model)
data = [(row, row.sum(0, keepdim=True)) for row in torch.randn(24, 4, generator=torch.Generator().manual_seed(0))]
sampler: Any = DistributedSampler(data, world // tp, rank // tp) if world > tp else None  # type: ignore[arg-type]
loader: Any = DataLoader(data, batch_size=2, sampler=sampler)  # type: ignore[arg-type]
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with ExitStack() as hooks:
    hooks.enter_context(tpcheck.watch_model(model, loader=loader))
    hooks.enter_context(tpcheck.record(model, f"{folder}/run.trace", optimizer=optimizer))
    hooks.enter_context(tpcheck.guard(model, optimizer=optimizer, every=4))
    for _ in range(2):
        for x, y in loader:
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
if dist.is_initialized():
    dist.destroy_process_group()
