"""Shards a model with torch alone: `parallelize_module` over TP, `fully_shard` over DP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

from tpcheck.adapters import Candidate, TrainingOptions
from tpcheck.adapters.protocols import RankLike
from tpcheck.backends.dtensor.clipping import clip_by_mesh
from tpcheck.backends.dtensor.saving import SavingCandidate
from tpcheck.backends.dtensor.styles import styles
from tpcheck.backends.sgd import Sgd
from tpcheck.errors import UsageError

_SETTINGS = ("plan", "loss_parallel")


class DTensorBackend:
    """The plan in `config["plan"]`, or the model's own tp_plan in torch's styles.

    With `config["loss_parallel"]`, forward and backward run in torch's `loss_parallel`. Above dp=1, FSDP2 wraps each
    layer of every `ModuleList`, and the model.
    """

    name = "dtensor"

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        if options.zero_stage:
            raise UsageError("zero_stage", options.zero_stage, "0: above dp=1 the model is wrapped by fully_shard")
        if options.ignore_plan:
            raise UsageError("ignore_plan", True, "False: torch has no heuristics; give a plan as config.plan")
        for name in options.config:
            if name not in _SETTINGS:
                raise UsageError("config", name, _SETTINGS)
        styles(options.config.get("plan", {}))
        return options

    def session(self, options: TrainingOptions) -> AbstractContextManager[None]:
        return nullcontext()

    def shard(self, model: nn.Module, rank: RankLike, options: TrainingOptions) -> Candidate:
        require_unsharded(model)
        plan = options.config.get("plan") or own_plan(model)
        mesh = init_device_mesh(rank.device.type, tuple(rank.topology.sizes.values()), mesh_dim_names=("dp", "tp"))
        if rank.topology.tp > 1:
            parallelize_module(model, mesh["tp"], styles(plan), src_data_rank=None)
            _tie_again(model)
        if rank.topology.dp > 1:
            for layer in _layers(model):
                fully_shard(layer, mesh=mesh["dp"])
            fully_shard(model, mesh=mesh["dp"])
        around = loss_parallel if options.config.get("loss_parallel") else nullcontext
        return SavingCandidate(model, rank, Sgd(list(model.parameters()), options, clip_by_mesh), around=around)


def require_unsharded(model: nn.Module) -> None:
    """Check that the model is no candidate already.

    Raises:
        UsageError: It is made of DTensors, so that there is nothing to compare it with.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, DTensor):
            raise UsageError(
                "build", f"{name}, a DTensor", "the unsharded model; what shards it goes to verify(shard=...)"
            )


def own_plan(model: nn.Module) -> Mapping[str, Any]:
    """Return the plan of a transformers model, under the names of its modules.

    Raises:
        UsageError: It has none.
    """
    plan: Mapping[str, Any] | None = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not plan:
        raise UsageError("config.plan", None, f"a dict of styles by module pattern: {type(model).__name__} has no plan")
    return plan


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module


def _tie_again(model: nn.Module) -> None:
    """Tie embeddings that were tied: parallelize_module gives each module a parameter of its own."""
    config = getattr(model, "config", None)
    tie: Callable[[], None] | None = getattr(model, "tie_weights", None)
    if tie is not None and getattr(config, "tie_word_embeddings", False):
        tie()
