"""Which view fits the optimizer of a model."""

from __future__ import annotations

from typing import Any

from tpcheck.backends.live_groups import LiveGroups
from tpcheck.core.errors import UsageError
from tpcheck.numerics.optimizer_view import OptimizerView
from tpcheck.numerics.optimizers.deepspeed import DeepSpeedView, engine_in, engine_optimizer_in, is_partitioned
from tpcheck.numerics.optimizers.megatron import (
    MegatronView,
    has_distributed_optimizer,
    is_copied,
    megatron_optimizers_in,
)
from tpcheck.numerics.optimizers.names import unwrapped
from tpcheck.numerics.optimizers.plain import TorchView, modules_of


def view_of(model: Any, optimizer: Any = None, *, groups: LiveGroups | None = None) -> OptimizerView:
    """Return the view of the optimizer that trains this model.

    Collective over the TP group where layouts have to be read from layers of DeepSpeed.

    Args:
        model: A module, a DistributedDataParallel, an FSDP2 or DTensor model, a DeepSpeed engine, a Megatron model.
        optimizer: A torch optimizer, several, or an engine's or Megatron's; None: the engine's own, or any torch
            optimizer that is found to step parameters of this model.
        groups: The groups of this rank; by default those that a library made.

    Raises:
        UsageError: The optimizer has no parameter of this model.
    """
    if engine_in(model) is not None or engine_optimizer_in(optimizer) is not None:
        return DeepSpeedView(model, optimizer, groups)
    if megatron_optimizers_in(optimizer):
        return MegatronView(model, optimizer, groups)
    parameters = list(unwrapped(model).parameters())
    if any(map(is_partitioned, parameters)):
        raise UsageError("model", type(model).__name__, "the DeepSpeed engine: ZeRO steps partitions of its parameters")
    if optimizer is None and (
        any(map(is_copied, parameters)) or any(map(has_distributed_optimizer, modules_of(model)))
    ):
        raise UsageError("optimizer", None, "Megatron's optimizer, which steps copies of the model's parameters")
    return TorchView(model, optimizer, groups)
