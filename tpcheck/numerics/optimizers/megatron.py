"""The view of megatron-core's optimizers: float32 copies of parameters, whole or this rank's shards over DP.

Nothing of Megatron is imported. The attributes are those of core 0.16.1. `main_grad`, which DistributedDataParallel
accumulates and `finalize_model_grads` reduces, becomes the `.grad` of what the inner torch optimizer steps in
`prepare_grads`, and is unscaled and clipped there before that steps (optimizer/optimizer.py:step):

- FP32Optimizer: of the parameters.
- Float16OptimizerWithFloat16Params: of a float32 copy of each parameter of 16 bits, and of the others.
- DistributedOptimizer (optimizer/distrib_optimizer.py:_build_model_and_main_param_groups): of this DP rank's range of
  each flattened parameter; of those of 16 bits a float32 copy. The gradient is `decoupled_grad` where the
  precision-aware optimizer of Transformer Engine is on, whose state then has the masters.
- ChainedOptimizer: one after the other (experts, and all else).

Masters are copied to weights, and these gathered over DP, after the inner step (the latter in the next forward pass
with `overlap_param_gather`). `step` returns the norm and keeps it nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tpcheck.backends.live_groups import LiveGroups
from tpcheck.core.errors import UsageError
from tpcheck.numerics.optimizers.plain import Group, Slice, Stepped, TorchView


def megatron_optimizers_in(optimizer: Any) -> tuple[Any, ...]:
    """Return Megatron's optimizers that this is, chains or wraps; none where it is another's."""
    if optimizer is None or not any("megatron.core.optimizer" in base.__module__ for base in type(optimizer).__mro__):
        return ()
    chained = getattr(optimizer, "chained_optimizers", None)
    members = (optimizer,) if chained is None else chained
    return tuple(member for member in members if not getattr(member, "is_stub_optimizer", False))


def is_copied(parameter: torch.Tensor) -> bool:
    """Return whether an optimizer of Megatron steps a copy of this parameter."""
    return hasattr(parameter, "main_param")


def has_distributed_optimizer(module: Any) -> bool:
    """Return whether this is Megatron's DistributedDataParallel with gradients that are sharded over DP."""
    return bool(getattr(getattr(module, "ddp_config", None), "use_distributed_optimizer", False))


class MegatronView(TorchView):
    """Megatron's optimizers around the parameters of a module."""

    def __init__(self, model: Any, optimizer: Any, groups: LiveGroups | None) -> None:
        self._megatron = megatron_optimizers_in(optimizer)
        super().__init__(model, None, groups)
        if not any(group.names for group in self._groups()):
            raise UsageError("optimizer", type(optimizer).__name__, "an optimizer of this model's parameters")

    @property
    def stepping(self) -> tuple[torch.optim.Optimizer, ...]:
        return tuple(member.optimizer for member in self._megatron)

    @property
    def weights_follow_the_hook(self) -> bool:  # type: ignore[override]
        return any(hasattr(member, "model_fp32_groups") or _copies_of(member) for member in self._megatron)

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        return any(optimizer is known for known in self.stepping)

    def loss_scale(self) -> float:
        return float(self._megatron[0].get_loss_scale())

    def _groups(self) -> Iterator[Group]:
        for member in self._megatron:
            for number, options in enumerate(member.optimizer.param_groups):
                stepped = tuple(self._stepped_in_group(member, number, options))
                names = dict.fromkeys(slice_.name for item in stepped for slice_ in item.slices)
                yield Group(member.optimizer, options, stepped, tuple(names))

    def _stepped_in_group(self, member: Any, group: int, options: Any) -> Iterator[Stepped]:
        if hasattr(member, "model_fp32_groups"):  # DistributedOptimizer
            yield from self._shards(member, member.model_fp32_groups[group], member.shard_fp32_groups[group])
            shards = zip(member.shard_fp32_from_float16_groups[group], member.shard_float16_groups[group], strict=True)
            stepped = [shard if copy is None else copy for copy, shard in shards]  # None: precision-aware
            yield from self._shards(member, member.model_float16_groups[group], stepped)
            return
        copies = _copies_of(member)
        for tensor in options["params"]:
            parameter = copies.get(id(tensor), tensor)
            if id(parameter) in self._names:
                slices = (Slice(self._names[id(parameter)], 0, 0, parameter.numel()),)
                yield Stepped(tensor, slices, is_master=tensor.dtype != parameter.dtype)

    def _shards(self, member: Any, parameters: Sequence[Any], tensors: Sequence[torch.Tensor]) -> Iterator[Stepped]:
        for parameter, tensor in zip(parameters, tensors, strict=True):
            if id(parameter) in self._names:
                held = member._get_model_param_range_map(parameter)["param"]
                slices = (Slice(self._names[id(parameter)], 0, held.start, held.end - held.start),)
                yield Stepped(tensor, slices, is_master=tensor.dtype != parameter.dtype)


def _copies_of(member: Any) -> dict[int, torch.Tensor]:
    """Return the parameters of a Float16OptimizerWithFloat16Params by the ids of their float32 copies."""
    copied = zip(getattr(member, "fp32_from_float16_groups", ()), getattr(member, "float16_groups", ()), strict=True)
    return {id(copy): of for copies, originals in copied for copy, of in zip(copies, originals, strict=True)}
