"""Shards a model as users of transformers do: saved, and loaded with a distributed configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.tensor import DTensor

from tpcheck.backends.dtensor.candidate import DTensorCandidate, clip_by_mesh
from tpcheck.backends.protocols import Candidate, LayerTable, RankLike, TrainingOptions
from tpcheck.backends.sgd import Sgd
from tpcheck.backends.transformers import loading
from tpcheck.backends.transformers.config import distributed_config, require_supported, require_usual
from tpcheck.backends.transformers.loading import loaded


def sync_replicated_parameters(model: nn.Module) -> None:
    """Broadcast plain parameters from the first rank, and average their gradients over all ranks.

    The same as `Trainer._sync_replicated_trainable_parameters` of transformers 5.23, whose hooks stand before those
    that the parallel styles register in the first forward pass; importing the Trainer takes seconds.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for parameter in model.parameters():
        if parameter.requires_grad and not isinstance(parameter.data, DTensor):
            with torch.no_grad():
                dist.broadcast(parameter.data, src=0)
            parameter.register_post_accumulate_grad_hook(_average_gradient)  # type: ignore[no-untyped-call]


def _average_gradient(parameter: torch.Tensor) -> None:
    # gloo has no AVG
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad.div_(dist.get_world_size())


class TransformersBackend:
    """The model's own tp_plan, over FSDP2 where dp is above 1, trained as transformers' Trainer trains."""

    name = "transformers"

    def versions(self) -> dict[str, str]:
        return {"transformers": transformers.__version__}

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        if loading.IS_INSTALLED:
            return loading.resolved_options(require_usual(options))
        return require_supported(options)

    def layer_table(self) -> LayerTable:
        from tpcheck.backends.transformers.layer_table import layer_table  # names that other versions do not have

        return layer_table()

    def session(self, options: TrainingOptions) -> AbstractContextManager[None]:
        return nullcontext()

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        if loading.IS_INSTALLED:
            return loading.shard_by_plan(model, rank, options)
        how = {"distributed_config": distributed_config(options, rank.topology)}
        sharded = loaded(model, how, options.dtype)
        sync_replicated_parameters(sharded)
        return TransformersCandidate(sharded, rank, Sgd(list(sharded.parameters()), options, clip_by_mesh))


class TransformersCandidate(DTensorCandidate):
    """A model that transformers has sharded, and its public ways to save."""

    def ways_to_save(self) -> Mapping[str, Callable[[Path], None]]:
        model: transformers.PreTrainedModel = self.module
        return {
            "save_pretrained": lambda folder: model.save_pretrained(str(folder)),
            "save_pretrained, distributed": lambda folder: model.save_pretrained(
                str(folder), distributed_checkpoint=True
            ),
        }
