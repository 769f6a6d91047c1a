"""Tensor parallelism of transformers before `DistributedConfig(tp_size=...)`: DTensors, then shards without a word."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from tpcheck.adapters import Candidate, Layout, TrainingOptions
from tpcheck.adapters.protocols import RankLike
from tpcheck.backends.dtensor.candidate import DTensorCandidate
from tpcheck.backends.sgd import Sgd
from tpcheck.backends.transformers.loading import loaded
from tpcheck.errors import UsageError

IS_INSTALLED = "tp_size" not in {field.name for field in fields(DistributedConfig)}
_SETTINGS = ("tp_plan",)


def resolved_options(options: TrainingOptions) -> TrainingOptions:
    """Return the options without clipping: nobody makes a norm of shards that do not say that they are some.

    Raises:
        UsageError: A setting that this version does not take.
    """
    for name in options.config:
        if name not in _SETTINGS:
            raise UsageError("config", name, _SETTINGS)
    return replace(options, max_grad_norm=0.0)


def shard_by_plan(model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
    """Return the model as `from_pretrained(tp_plan="auto")` shards it. Collective over the world.

    Raises:
        UsageError: There is more than one DP rank.
    """
    topology = rank.topology
    if topology.dp > 1:
        raise UsageError("dp", topology.dp, "1: this version of transformers shards over tp alone")
    plan: dict[str, Any] = {"tp_plan": options.config.get("tp_plan", "auto"), "tp_size": topology.tp}
    sharded = loaded(model, plan, options.dtype)
    tells = all(isinstance(one.data, DTensor) for one in sharded.parameters())
    told = {} if tells else _layouts(model, loaded(_numbered(model), plan, torch.float64), rank)
    return _Shards(sharded, rank, Sgd(list(sharded.parameters()), options, None), told)


class _Shards(DTensorCandidate):
    """A model whose parameters may be plain shards, and where those lie."""

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


def _numbered(model: nn.Module) -> nn.Module:
    """Return a copy in whose parameters each element is its own position, exact in float64."""
    twin = copy.deepcopy(model).to(torch.float64)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape))
    return twin


def _layouts(model: nn.Module, twin: nn.Module, rank: RankLike) -> dict[str, Layout]:
    """Read off the numbered twin which elements of plain tensors each rank holds, whatever the plan's styles do.

    Collective over TP.
    """
    plain = {
        name: one for name, one in twin.named_parameters(remove_duplicate=False) if not isinstance(one.data, DTensor)
    }
    own = {name: one.detach().to(torch.int64) for name, one in plain.items()}
    everyone: list[dict[str, torch.Tensor]] = [{}] * rank.topology.tp
    dist.all_gather_object(everyone, own, group=rank.group("tp"))
    shapes = {name: tuple(one.shape) for name, one in model.named_parameters(remove_duplicate=False)}
    return {name: _layout(shapes[name], [held[name] for held in everyone]) for name in own if name in shapes}


def _layout(shape: tuple[int, ...], held: list[torch.Tensor]) -> Layout:
    local_shapes = tuple(tuple(one.shape) for one in held)
    if all(local == shape for local in local_shapes):
        return Layout.replicated(shape, len(held))
    source = torch.zeros(prod(shape), dtype=torch.int64)
    ids = torch.cat([one.reshape(-1) for one in held])
    source[ids] = torch.arange(len(ids))
    return Layout(shape, local_shapes, source)
