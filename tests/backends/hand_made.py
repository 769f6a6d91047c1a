"""A small language model, and hand-written tensor parallelism for it, as users write their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from tpcheck.core.placement import Placement, Shard

VOCABULARY, WIDTH, HIDDEN = 32, 16, 24
LAYOUT: dict[str, Placement] = {
    "layers.*.up.*": Shard(0),
    "layers.*.down.weight": Shard(1),
}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, hidden_BLD: torch.Tensor) -> torch.Tensor:
        return hidden_BLD + self.down(functional.gelu(self.up(self.norm(hidden_BLD))))


class Model(nn.Module):
    """Returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Mlp(), Mlp()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden_BLD = self.embed(tokens)
        for layer in self.layers:
            hidden_BLD = layer(hidden_BLD)
        logits_BLV = self.head(hidden_BLD)
        return functional.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def tokens(coordinate: Any, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + coordinate["dp"])
    return {"tokens": torch.randint(0, VOCABULARY, (2, 8), generator=generator)}


class CopyToRanks(torch.autograd.Function):
    """Identity forward, all-reduce backward."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        summed = gradients[0].clone()
        dist.all_reduce(summed, group=ctx.group)
        return summed, None


class ReduceFromRanks(torch.autograd.Function):
    """All-reduce forward, identity backward."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        summed = tensor.clone()
        dist.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def shard(model: nn.Module, rank: Any) -> None:
    """Make every `up` column-parallel and every `down` row-parallel."""
    group, tp, tp_rank = rank.group("tp"), rank.topology.tp, rank.topology.coordinate(rank.rank)["tp"]
    for layer in model.layers:
        for linear, dim in ((layer.up, 0), (layer.down, 1)):
            linear.weight.data = linear.weight.data.chunk(tp, dim)[tp_rank].clone()
        layer.up.bias.data = layer.up.bias.data.chunk(tp)[tp_rank].clone()
        layer.up.register_forward_pre_hook(lambda module, args: (CopyToRanks.apply(args[0], group),))
        layer.down.forward = _row_parallel(layer.down, group)


def shard_without_reduce(model: nn.Module, rank: Any) -> None:
    """Leave out the reduction of the second layer."""
    shard(model, rank)
    down = model.layers[1].down
    down.forward = lambda hidden: functional.linear(hidden, down.weight, down.bias)


def _row_parallel(linear: nn.Linear, group: Any) -> Any:
    return lambda hidden: ReduceFromRanks.apply(functional.linear(hidden, linear.weight), group) + linear.bias
