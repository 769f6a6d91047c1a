"""transformers before `DistributedConfig` had a `tp_size`: `tp_plan="auto"`, whose shards may be plain tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from tpcheck.backends.dtensor.candidate import DTensorCandidate
from tpcheck.backends.interface import Candidate, RankLike, TrainingOptions
from tpcheck.backends.layout import Layout
from tpcheck.backends.sgd import Sgd
from tpcheck.backends.transformers.loading import save_and_load
from tpcheck.core.errors import UsageError

IS_INSTALLED = "tp_size" not in {field.name for field in fields(DistributedConfig)}
_SETTINGS = ("tp_plan",)


def resolved(options: TrainingOptions) -> TrainingOptions:
    """Return the options without clipping: torch cannot tell that a plain tensor is a shard, so its norm is local.

    Raises:
        UsageError: A setting that this version does not take.
    """
    for name in options.config:
        if name not in _SETTINGS:
            raise UsageError("config", name, _SETTINGS)
    return replace(options, max_grad_norm=0.0)


def shard(model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
    """Return the model as `from_pretrained(tp_plan="auto")` shards it. Collective over the world.

    Raises:
        UsageError: There is more than one DP rank.
    """
    topology = rank.topology
    if topology.dp > 1:
        raise UsageError("dp", topology.dp, "1: this version of transformers shards over tp alone")
    plan = {"tp_plan": options.config.get("tp_plan", "auto"), "tp_size": topology.tp}
    sharded = save_and_load(model, options.dtype, **plan)
    if all(isinstance(parameter.data, DTensor) for parameter in sharded.parameters()):
        layouts: dict[str, Layout] = {}
    else:
        layouts = _layouts(model, save_and_load(_with_positions(model), torch.float64, **plan), rank)
    return _PlainShardsCandidate(sharded, rank, Sgd(list(sharded.parameters()), options, None), layouts)


class _PlainShardsCandidate(DTensorCandidate):
    """A model whose shards may be plain tensors, with their layouts."""

    def __init__(self, module: nn.Module, rank: RankLike, sgd: Sgd, layouts: Mapping[str, Layout]) -> None:
        super().__init__(module, rank, sgd)
        self._layouts = layouts
        self._named = super()._parameters()  # a row-parallel layer hides its bias in the first forward pass

    def _parameters(self) -> dict[str, nn.Parameter]:
        return self._named

    def group_ranks(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        mesh: Any = self.module._device_mesh
        return {"tp": (tuple(dist.get_process_group_ranks(mesh.get_group())),)}

    def layouts(self) -> Mapping[str, Layout]:
        return {**super().layouts(), **self._layouts}


def _with_positions(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters hold the flat position of each of their elements, exact in float64."""
    twin = copy.deepcopy(model).to(torch.float64)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape))
    return twin


def _layouts(model: nn.Module, twin: nn.Module, rank: RankLike) -> dict[str, Layout]:
    """Return the layouts of plain tensors from the positions in the sharded twin, whatever the plan's styles do.

    Collective over TP.
    """
    shards = {
        name: parameter.detach().to(torch.int64)
        for name, parameter in twin.named_parameters(remove_duplicate=False)
        if not isinstance(parameter.data, DTensor)
    }
    by_rank: list[dict[str, torch.Tensor]] = [{}] * rank.topology.tp
    dist.all_gather_object(by_rank, shards, group=rank.group("tp"))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return {name: layout_of(shapes[name], [rank[name] for rank in by_rank]) for name in shards if name in shapes}


def layout_of(shape: tuple[int, ...], shards: list[torch.Tensor]) -> Layout:
    """Return the layout of shards that hold positions; replicated where every shard has the full shape."""
    if all(tuple(shard.shape) == shape for shard in shards):
        return Layout.replicated(shape, len(shards))
    return Layout.from_positions(shape, shards)
