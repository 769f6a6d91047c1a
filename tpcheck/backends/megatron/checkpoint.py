"""Saves a training by megatron-core's `dist_checkpointing`, and goes on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint, sharded_state_dict_default
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def save_training(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Save weights, moments and rates. Collective over the world; runs under the groups of the topology."""
    dist_checkpointing.save(_training_state(module, _wrapped(module, optimizer)), str(folder))


def load_training(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load them, at these or other sizes of the axes. Collective over the world, under its groups."""
    wrapped = _wrapped(module, optimizer)
    state = dist_checkpointing.load(_training_state(module, wrapped, is_loading=True), str(folder))
    module.load_state_dict(state["model"])
    wrapped.load_state_dict(state["optimizer"])


def _wrapped(module: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Return Megatron's wrapper of the optimizer, whose methods take its state apart and put it together."""
    return FP32Optimizer(optimizer, OptimizerConfig(), lambda inner, config: get_optimizer_state_dict(module, inner))


def _training_state(module: nn.Module, wrapped: Any, *, is_loading: bool = False) -> dict[str, Any]:
    model = _model_state(module)
    return {"model": model, "optimizer": wrapped.sharded_state_dict(model, is_loading=is_loading)}


def _model_state(module: Any, prefix: str = "") -> dict[str, Any]:
    """Return the sharded state of a module, that of Megatron's modules inside one of torch included.

    Megatron's own default takes all that lies inside a module of torch for replicated.
    """
    if hasattr(module, "sharded_state_dict"):
        state: dict[str, Any] = sharded_state_dict_default(module, prefix)
        return state
    tensors: dict[str, Any] = {}
    module._save_to_state_dict(tensors, "", keep_vars=True)
    state = make_sharded_tensors_for_checkpoint(tensors, prefix)
    for name, child in module.named_children():
        state |= _model_state(child, f"{prefix}{name}.")
    return state
