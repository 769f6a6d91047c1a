"""The parallel styles of DTensor one by one: what each replaces, and what it takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from tpcheck.backends.interface import LayerSizes, LayerTable, ParallelLayer, RankLike
from tpcheck.backends.plain_layers import HeadWithLoss, Mlp


def layer_table() -> LayerTable:
    """Return every style of `torch.distributed.tensor.parallel`, with the layouts that its users write."""
    return LayerTable(_LAYERS, {}, lambda options: loss_parallel())


def _by(
    style: ParallelStyle | None = None, plan: Mapping[str, ParallelStyle] | None = None
) -> Callable[[nn.Module, RankLike], nn.Module]:
    """Return a function that shards a module's children by a plan, and the module itself by a style."""

    def shard(module: nn.Module, rank: RankLike) -> nn.Module:
        mesh = DeviceMesh.from_group(rank.group("tp"), rank.device.type, mesh_dim_names=("tp",))
        if plan is not None:
            parallelize_module(module, mesh, dict(plan), src_data_rank=None)
        return module if style is None else parallelize_module(module, mesh, style, src_data_rank=None)

    return shard


class _LocalOutput(nn.Module):
    """A module whose output is given as this rank's part."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        output: Any = self.module(hidden)
        local: torch.Tensor = output.to_local()
        return local

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.named_parameters(*args, **kwargs)


def _with_local_loss(module: nn.Module, rank: RankLike) -> nn.Module:
    head = ColwiseParallel(use_local_output=False)
    return _LocalOutput(_by(plan={"head": head})(module, rank))


_SEQUENCE: dict[str, Any] = {"rows_dim": 1, "num_rows": 2}


def _norm_of_rows(name: str, plain: Callable[[LayerSizes], nn.Module]) -> ParallelLayer:
    """Return the row of a norm that each rank applies to its part of the sequence."""
    shard = _by(SequenceParallel(use_local_output=True))
    name = f"SequenceParallel of {name}"
    return ParallelLayer(name, plain, "rows", "rows", shard=shard, replicates=("",), **_SEQUENCE)


_TO_REPLICATE: dict[str, Any] = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
_TO_SHARD: dict[str, Any] = {"output_layouts": (Replicate(),), "desired_output_layouts": (Shard(1),)}
_DTENSOR_BETWEEN = {"up": ColwiseParallel(), "down": RowwiseParallel(use_local_output=False)}
_LAYERS = (
    ParallelLayer("ColwiseParallel", output="part", shard=_by(ColwiseParallel())),
    ParallelLayer("ColwiseParallel, output Replicate", shard=_by(ColwiseParallel(output_layouts=Replicate()))),
    ParallelLayer(
        "ColwiseParallel, input Shard(1)",
        input="rows",
        output="part",
        shard=_by(ColwiseParallel(input_layouts=Shard(1))),
        **_SEQUENCE,
    ),
    ParallelLayer(
        "ColwiseParallel, output Shard(1)",
        output="rows",
        shard=_by(ColwiseParallel(output_layouts=Shard(1))),
        **_SEQUENCE,
    ),
    ParallelLayer("ColwiseParallel of an embedding", "embedding", output="part", shard=_by(ColwiseParallel())),
    ParallelLayer(
        "ColwiseParallel of an embedding, output Replicate",
        "embedding",
        shard=_by(ColwiseParallel(output_layouts=Replicate())),
    ),
    ParallelLayer("RowwiseParallel", input="part", shard=_by(RowwiseParallel())),
    ParallelLayer("RowwiseParallel, input Replicate", shard=_by(RowwiseParallel(input_layouts=Replicate()))),
    ParallelLayer(
        "RowwiseParallel, output Shard(1)",
        input="part",
        output="rows",
        shard=_by(RowwiseParallel(output_layouts=Shard(1))),
        **_SEQUENCE,
    ),
    ParallelLayer(
        "RowwiseParallel of an embedding", "embedding", shard=_by(RowwiseParallel(input_layouts=Replicate()))
    ),
    ParallelLayer(
        "RowwiseParallel of an embedding, output Shard(1)",
        "embedding",
        output="rows",
        shard=_by(RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))),
        **_SEQUENCE,
    ),
    _norm_of_rows("LayerNorm", lambda sizes: nn.LayerNorm(sizes.inputs, bias=sizes.bias)),
    _norm_of_rows("RMSNorm", lambda sizes: nn.RMSNorm(sizes.inputs, eps=1e-5)),
    ParallelLayer(
        "PrepareModuleInput",
        Mlp,
        "rows",
        "rows",
        shard=_by(
            PrepareModuleInput(**_TO_REPLICATE),
            {"up": ColwiseParallel(), "down": RowwiseParallel(output_layouts=Shard(1))},
        ),
        **_SEQUENCE,
    ),
    ParallelLayer(
        "PrepareModuleOutput",
        Mlp,
        "whole",
        "rows",
        shard=_by(PrepareModuleOutput(**_TO_SHARD), _DTENSOR_BETWEEN),
        **_SEQUENCE,
    ),
    ParallelLayer(
        "PrepareModuleInputOutput",
        Mlp,
        "rows",
        "rows",
        shard=_by(PrepareModuleInputOutput(**_TO_REPLICATE, **_TO_SHARD), _DTENSOR_BETWEEN),
        **_SEQUENCE,
    ),
    ParallelLayer("loss_parallel", HeadWithLoss, shard=_with_local_loss),
)
