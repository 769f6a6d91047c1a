"""How the shards of a Megatron model lie: by their shapes, and the strides that its layers mark them with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import nn

from tpcheck.adapters import Layout
from tpcheck.adapters.protocols import RankLike
from tpcheck.errors import UsageError
from tpcheck.placement import Replicate, Shard

Shape = tuple[int, ...]


def layouts(shards: nn.Module, model: nn.Module, rank: RankLike) -> dict[str, Layout]:
    """Return how each parameter of `model` lies over the TP group that `shards` was built for.

    Raises:
        UsageError: The two are not the same model at two tensor-parallel sizes.
    """
    whole = dict(model.named_parameters(remove_duplicate=False))
    held = dict(shards.named_parameters(remove_duplicate=False))
    if held.keys() != whole.keys():
        names = ", ".join(sorted(held.keys() ^ whole.keys())[:4])
        raise UsageError("build", names, "a model with the same parameters at every tensor-parallel size")
    tp = rank.topology.tp
    return {name: _layout(name, one, tuple(whole[name].shape), tp) for name, one in held.items()}


def fill(shards: nn.Module, model: nn.Module, found: Mapping[str, Layout], rank: RankLike) -> None:
    """Give `shards` this rank's part of what `model` holds."""
    tp_rank = rank.topology.coordinate(rank.rank)["tp"]
    whole = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, parameter in shards.named_parameters(remove_duplicate=False):
            parameter.copy_(found[name].local(whole[name], tp_rank))
            parameter.requires_grad_(whole[name].requires_grad)


def live_layouts(model: nn.Module) -> dict[str, Layout]:
    """Return the layouts of a model that Megatron has built in somebody's program, by its marks alone."""
    if not parallel_state.model_parallel_is_initialized():
        return {}
    tp = dist.get_world_size(parallel_state.get_tensor_model_parallel_group())
    found = {}
    parameters: Iterable[tuple[str, Any]] = model.named_parameters(remove_duplicate=False)
    for name, parameter in parameters:
        shape = list(parameter.shape)
        if getattr(parameter, "tensor_model_parallel", False):
            shape[parameter.partition_dim] *= tp
        found[name] = _layout(name, parameter, tuple(shape), tp)
    return found


def _layout(name: str, parameter: Any, whole: Shape, tp: int) -> Layout:
    """Return the layout of one parameter: cut along the dim that is smaller, in as many blocks as its stride says.

    The gate and up projections of `linear_fc1` are one parameter of stride 2.

    Raises:
        UsageError: `tp` shards of this shape do not make up the whole.
    """
    local = tuple(parameter.shape)
    cut = [dim for dim, sizes in enumerate(zip(whole, local, strict=False)) if len(set(sizes)) > 1]
    if not cut and len(whole) == len(local):
        return Layout.placed(whole, Replicate(), tp)
    if len(whole) != len(local) or len(cut) > 1 or local[cut[0]] * tp != whole[cut[0]]:
        raise UsageError(
            "build",
            f"{name} of shape {whole} unsharded and {local} at tp={tp}",
            "a model of the same sizes at every tensor-parallel size; a vocabulary is padded for the largest of them",
        )
    is_marked = getattr(parameter, "tensor_model_parallel", False) and parameter.partition_dim in cut
    return Layout.placed(whole, Shard(cut[0], blocks=parameter.partition_stride if is_marked else 1), tp)
