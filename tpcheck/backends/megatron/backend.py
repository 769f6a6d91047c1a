"""Shards a model as Megatron does: it is built once more, under process groups of the topology."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from tpcheck.backends.layout import Layout
from tpcheck.backends.megatron.candidate import MegatronCandidate, ended_groups, entered, of_one_rank, of_topology
from tpcheck.backends.megatron.config import (
    configured,
    megatron_config,
    require_configured,
    require_supported,
    stand_ins,
    transformer_config,
)
from tpcheck.backends.protocols import Candidate, RankLike, TrainingOptions
from tpcheck.backends.sgd import Sgd
from tpcheck.core.errors import UsageError
from tpcheck.core.placement import Replicate, Shard

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


def sgd_of(model: nn.Module, options: TrainingOptions) -> Sgd:
    """Return what steps the model's parameters, in place of Megatron's optimizers, which need CUDA."""
    parameters = [one for one in model.parameters() if one.requires_grad]

    def clip(masters: Sequence[torch.Tensor], max_norm: float) -> float:
        counted = [
            master.grad
            for parameter, master in zip(parameters, masters, strict=True)
            if master.grad is not None
            and param_is_not_shared(parameter)
            and param_is_not_tensor_parallel_duplicate(parameter)
        ]
        norm: float = get_grad_norm_fp32(counted, grad_stats_parallel_group=parallel_state.get_model_parallel_group())
        if max_norm > 0:
            clip_grads_with_norm_(masters, max_norm, torch.tensor(norm, dtype=torch.float64))
        return norm

    return Sgd(parameters, options, clip)


class MegatronBackend:
    """Megatron-core's own layers, DistributedDataParallel and `finalize_model_grads`.

    `build` makes the model with whatever process groups Megatron has: of one rank for the unsharded model, of the
    topology for the sharded one, whose shards are then filled from the unsharded weights.
    """

    name = "megatron"

    def versions(self) -> dict[str, str]:
        return {"megatron-core": megatron.core.__version__}

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        require_supported(options)
        return options

    @contextmanager
    def session(self, options: TrainingOptions) -> Iterator[None]:
        with ended_groups(), stand_ins(), configured(1, options.config), entered(of_one_rank()):
            yield

    def layouts_of(self, model: nn.Module) -> Mapping[str, Layout]:
        return live_layouts(model)

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        if options.rebuild is None:
            raise UsageError(
                "options.rebuild", None, "what makes the model once more: Megatron's is cut as it is built"
            )
        megatron_config(model)  # of one rank; it is there at all
        groups = of_topology(rank.topology)
        with entered(groups), configured(rank.topology.tp, options.config):
            shards = options.rebuild()
            require_configured(shards, rank.topology.tp, options.config)
            found = layouts(shards, model, rank)
            fill(shards, model, found, rank)
            config = transformer_config(shards, rank.topology.tp)
            ddp = DistributedDataParallel(config, DistributedDataParallelConfig(), shards)
        return MegatronCandidate(ddp, groups, found, sgd_of(shards, options))
