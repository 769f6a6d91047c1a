"""A model whose rank 1 leaves out a reduction, for `tpcheck verify` under torchrun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpcheck.placement import Shard


class Row(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.rank: int | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rank is None:
            return x @ self.weight
        y: torch.Tensor = x.chunk(2, -1)[self.rank] @ self.weight
        if self.rank == 0:
            dist.all_reduce(y.detach())
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.row = Row()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.row(x).square().mean()
        return loss


def build() -> nn.Module:
    return Model()


def batch(coordinate: Mapping[str, int], step: int) -> dict[str, torch.Tensor]:
    return {"x": torch.ones(2, 4)}


def shard(model: Any, rank: Any) -> None:
    model.row.rank = rank.rank
    model.row.weight = nn.Parameter(model.row.weight.chunk(2)[rank.rank].clone())


layout = {"row.weight": Shard(0)}
