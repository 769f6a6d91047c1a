"""Shards a model as users of transformers do: saved, and loaded with a distributed configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from tpcheck.backends.dtensor.candidate import DTensorCandidate, clip_by_mesh
from tpcheck.backends.interface import Candidate, LayerTable, RankLike, TrainingOptions
from tpcheck.backends.sgd import Sgd
from tpcheck.backends.transformers import before_tp_size
from tpcheck.backends.transformers.loading import save_and_load
from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology


class TransformersBackend:
    """The model's tp_plan, over FSDP2 where dp is above 1, trained as transformers' Trainer trains."""

    name = "transformers"

    def versions(self) -> dict[str, str]:
        return {"transformers": transformers.__version__}

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        if options.zero_stage:
            raise UsageError("zero_stage", options.zero_stage, "0: transformers shards over dp with FSDP2, not ZeRO")
        if options.ignore_plan:
            raise UsageError(
                "ignore_plan", True, "False: transformers has no heuristics; give a plan of your own as config.tp_plan"
            )
        if before_tp_size.IS_INSTALLED:
            return before_tp_size.resolved(options)
        require_known_fields(options.config)
        return options

    def layer_table(self) -> LayerTable:
        from tpcheck.backends.transformers.layer_table import layer_table  # imports names that other versions lack

        return layer_table()

    def session(self, options: TrainingOptions) -> AbstractContextManager[None]:
        return nullcontext()

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        if before_tp_size.IS_INSTALLED:
            return before_tp_size.shard(model, rank, options)
        config = distributed_config(options.config, rank.topology)
        sharded = save_and_load(model, options.dtype, distributed_config=config)
        sync_replicated_parameters(sharded)
        return TransformersCandidate(sharded, rank, Sgd(list(sharded.parameters()), options, clip_by_mesh))


def require_known_fields(config: Mapping[str, Any]) -> None:
    """Check the fields of the user's `DistributedConfig` before a model is sharded.

    Raises:
        UsageError: `DistributedConfig` has no such field, or the field asks for pipeline parallelism.
    """
    known = [field.name for field in fields(DistributedConfig)]
    for name in config:
        if name not in known:
            raise UsageError("config", name, known)
    if config.get("pp_size") not in (None, 1):
        raise UsageError("config.pp_size", config["pp_size"], "1: pipelines are not verified")


def distributed_config(config: Mapping[str, Any], topology: Topology) -> DistributedConfig:
    """Return the configuration for `from_pretrained`: TP innermost, FSDP2 over the DP ranks.

    Raises:
        UsageError: The user's configuration contradicts the topology.
    """
    replicas = config.get("dp_replicate_size") or 1
    if topology.dp % replicas:
        raise UsageError("config.dp_replicate_size", replicas, f"a divisor of dp={topology.dp}")
    sizes = {"tp_size": topology.tp, "fsdp_size": topology.dp // int(replicas)}
    for name, size in sizes.items():
        if config.get(name) not in (None, size):
            raise UsageError(f"config.{name}", config[name], f"{size}, as the topology requires")
    return DistributedConfig(**{**sizes, **config})


def sync_replicated_parameters(model: nn.Module) -> None:
    """Broadcast plain parameters from the first rank, and average their gradients over all ranks.

    The same as `Trainer._sync_replicated_trainable_parameters` of transformers 5.23, whose hooks run before those that
    the parallel styles register in the first forward pass; importing the Trainer takes seconds.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for parameter in model.parameters():
        if parameter.requires_grad and not isinstance(parameter.data, DTensor):
            with torch.no_grad():
                dist.broadcast(parameter.data, src=0)
            parameter.register_post_accumulate_grad_hook(_average_gradient)  # type: ignore[no-untyped-call]


def _average_gradient(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)  # a sum, since gloo has no AVG
    parameter.grad.div_(dist.get_world_size())


class TransformersCandidate(DTensorCandidate):
    """A model that transformers has sharded, with the public ways to save it."""

    def ways_to_save(self) -> Mapping[str, Callable[[Path], None]]:
        model: transformers.PreTrainedModel = self.module
        return {
            "save_pretrained": lambda folder: model.save_pretrained(str(folder)),
            "save_pretrained, distributed": lambda folder: model.save_pretrained(
                str(folder), distributed_checkpoint=True
            ),
        }
