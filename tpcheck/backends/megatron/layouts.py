"""The layouts of Megatron's parameters over the TP group, by the marks that its layers leave on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from tpcheck.backends.interface import RankLike
from tpcheck.backends.layout import Layout
from tpcheck.core.errors import UsageError
from tpcheck.core.placement import Replicate, Shard

Shape = tuple[int, ...]


def parameter_layouts(sharded: nn.Module, model: nn.Module, tp: int) -> dict[str, Layout]:
    """Return the layout of each parameter of `model` over the TP group that `sharded` was built for.

    Raises:
        UsageError: The two are not the same model at two tensor-parallel sizes.
    """
    shards = dict(sharded.named_parameters(remove_duplicate=False))
    full = dict(model.named_parameters(remove_duplicate=False))
    if shards.keys() != full.keys():
        names = ", ".join(sorted(shards.keys() ^ full.keys()))
        raise UsageError("build", names, "a model with the same parameters at every tensor-parallel size")
    return {name: _layout(name, shard, tuple(full[name].shape), tp) for name, shard in shards.items()}


def layouts_by_marks(model: nn.Module) -> dict[str, Layout]:
    """Return the layouts of a live model that Megatron built in another program, without its unsharded shapes."""
    if not parallel_state.model_parallel_is_initialized():
        return {}
    tp = dist.get_world_size(parallel_state.get_tensor_model_parallel_group())
    layouts = {}
    parameters: Iterable[tuple[str, Any]] = model.named_parameters(remove_duplicate=False)
    for name, parameter in parameters:
        shape = list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False):
            shape[parameter.partition_dim] *= tp
        layouts[name] = _layout(name, parameter, tuple(shape), tp)
    return layouts


def _layout(name: str, shard: Any, shape: Shape, tp: int) -> Layout:
    """Return the layout of one parameter: cut along the dim that is smaller, in as many blocks as its stride.

    The gate and up projections of `linear_fc1` are one parameter of stride 2.

    Raises:
        UsageError: `tp` shards do not make up the full shape.
    """
    local = tuple(shard.shape)
    cut = [dim for dim, sizes in enumerate(zip(shape, local, strict=False)) if len(set(sizes)) > 1]
    if not cut and len(shape) == len(local):
        return Layout.from_placement(shape, Replicate(), tp)
    if len(shape) != len(local) or len(cut) > 1 or local[cut[0]] * tp != shape[cut[0]]:
        raise UsageError(
            "build",
            f"{name} of shape {shape} unsharded and {local} at tp={tp}",
            "a model of the same sizes at every tensor-parallel size: pad the vocabulary for the largest",
        )
    is_marked = getattr(shard, "tensor_model_parallel", False) and shard.partition_dim in cut
    return Layout.from_placement(shape, Shard(cut[0], blocks=shard.partition_stride if is_marked else 1), tp)


def fill_shards(sharded: nn.Module, model: nn.Module, layouts: Mapping[str, Layout], rank: RankLike) -> None:
    """Copy this rank's part of the parameters of `model` to `sharded`."""
    tp_rank = rank.topology.coordinate(rank.rank)["tp"]
    full = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in sharded.named_parameters(remove_duplicate=False):
            parameter.copy_(layouts[name].local(full[name], tp_rank))
            parameter.requires_grad_(full[name].requires_grad)
