"""Tensor parallelism of transformers before `DistributedConfig(tp_size=...)`: DTensors, then shards without a word."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from tpcheck.backends.dtensor.candidate import DTensorCandidate
from tpcheck.backends.layout import Layout
from tpcheck.backends.protocols import Candidate, RankLike, TrainingOptions
from tpcheck.backends.sgd import Sgd
from tpcheck.core.errors import UsageError


def loaded(model: nn.Module, how: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Return the model as `from_pretrained` shards it, told `how` by its arguments. Collective over the world.

    Raises:
        UsageError: The model is none of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise UsageError("build", type(model).__name__, "a transformers.PreTrainedModel: it is loaded by transformers")
    with _shared_folder() as folder:
        model.save_pretrained(folder)  # it is the first rank alone that writes
        if dist.is_initialized():
            dist.barrier()
        sharded: PreTrainedModel = type(model).from_pretrained(
            folder, config=copy.deepcopy(model.config), dtype=dtype, **how
        )
    _take_over_settings(sharded, model)
    return sharded


@contextmanager
def _shared_folder() -> Iterator[str]:
    """Make a folder that every rank on this machine reads; it is removed when the last one is done."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    names = [tempfile.mkdtemp(prefix="tpcheck-loaded-") if is_first else ""]
    try:
        if dist.is_initialized():
            dist.broadcast_object_list(names)
        yield names[0]
        if dist.is_initialized():
            dist.barrier()
    finally:
        if is_first:
            shutil.rmtree(names[0], ignore_errors=True)


def _take_over_settings(sharded: nn.Module, model: nn.Module) -> None:
    """Set what files do not carry: training mode, frozen parameters, and dropout that was switched off."""
    sharded.train(model.training)
    modules = dict(model.named_modules())
    for name, module in sharded.named_modules():
        for setting, value in vars(modules[name]).items() if name in modules else ():
            if isinstance(value, float) and not value and getattr(module, setting, None):
                setattr(module, setting, value)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, parameter in sharded.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)


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
