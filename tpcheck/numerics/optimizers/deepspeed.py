"""The view of a DeepSpeed engine: which fragments of which parameters lie in the tensors of its inner optimizer.

Nothing of DeepSpeed is imported. The attributes are those of 0.19.8; the inner torch optimizer steps at an accumulation
boundary alone, on gradients that are accumulated, reduced over DP, unscaled and clipped:

- ZeRO 1 and 2 (zero/stage_1_and_2.py:step): once for each group, on this rank's flat partition of it, whose gradient
  exists during that call alone (`_optimizer_step` puts the one group into `param_groups`).
- ZeRO 1 in bfloat16 with float32 accumulation (bf16_optimizer.py:step): once, on a flat partition for each group.
- ZeRO 3 (zero/stage3.py:step): once for each sub-group, on the partitions of its parameters one after the other;
  `param_groups` are empty between the calls.
- Without ZeRO in float16 or bfloat16: on float32 copies, one by one (fp16/unfused_optimizer.py), or flat for each group
  where the optimizer is DeepSpeed's FusedAdam (fp16/fused_optimizer.py). Both step once more while they are made.
- Without ZeRO in float32: on the parameters, as torch does.

Weights are copied from what was stepped, and gathered over DP, after that call. Parameters that got no gradient are
stepped with zeros, except in the last case. Unscaling uses the loss scale that `_update_scale` has just set, so the
gradients of a step at which a dynamic scale grows are divided by the new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import torch

from tpcheck.backends.live_groups import LiveGroups
from tpcheck.core.errors import UsageError
from tpcheck.numerics.optimizer_view import Part
from tpcheck.numerics.optimizers.plain import Group, Slice, Stepped, TorchView, torch_optimizer


def engine_in(model: Any) -> Any:
    """Return the DeepSpeed engine that the model is, or that is around it; None where there is none."""
    while model is not None:
        if hasattr(model, "get_global_grad_norm") and hasattr(model, "optimizer"):
            return model
        model = getattr(model, "module", None)
    return None


def engine_optimizer_in(optimizer: Any) -> Any:
    """Return DeepSpeed's own optimizer that this is or wraps; None where there is none."""
    while optimizer is not None:
        if type(optimizer).__module__.startswith("deepspeed.runtime."):
            return optimizer
        optimizer = getattr(optimizer, "optimizer", None)
    return None


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Return whether a ZeRO optimizer holds this parameter's partition."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


class DeepSpeedView(TorchView):
    """An engine, or DeepSpeed's optimizer around the parameters of a module."""

    def __init__(self, model: Any, optimizer: Any, groups: LiveGroups | None) -> None:
        self._engine = engine_in(model)
        self._engine_optimizer = engine_optimizer_in(optimizer)
        self._options: list[Any] = []
        super().__init__(model, None, groups)
        if self.engine_optimizer is None:
            raise UsageError("optimizer", None, "an engine that was made with an optimizer")
        if not any(group.names for group in self._groups()):
            raise UsageError("optimizer", type(optimizer).__name__, "an optimizer of this model's parameters")

    @property
    def engine_optimizer(self) -> Any:
        """What the engine steps: a torch optimizer, or DeepSpeed's around one."""
        return self._engine_optimizer if self._engine is None else self._engine.optimizer

    @property
    def stepping(self) -> tuple[torch.optim.Optimizer, ...]:
        # ZeRO replaces an Adagrad, and steps another optimizer of the same kind for what it keeps off the CPU.
        other = getattr(self.engine_optimizer, "backup_optimizer", None)
        return (torch_optimizer(self.engine_optimizer), *(() if other is None else (other,)))

    @property
    def weights_follow_the_hook(self) -> bool:  # type: ignore[override]
        return not isinstance(self.engine_optimizer, torch.optim.Optimizer)

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        return any(optimizer is known for known in self.stepping)

    def weights(self) -> Iterator[Part]:
        for name, parameter in self._parameters.items():
            partition = getattr(parameter, "ds_tensor", None)
            if partition is None:
                yield self._part("weight", name, "", parameter)
            elif partition.numel() < partition.ds_numel:
                self._not_viewed[name] = "its weights are on disk (NVMe) between the steps"
            else:
                for slice_ in self._zero3_slices([parameter]):
                    flat = partition.detach().reshape(-1)[: slice_.numel]
                    yield self._fragment("weight", name, "", flat, slice_.first)

    def accumulated(self) -> Iterator[Part]:
        """Yield gradients only where they accumulate in `.grad`: ZeRO takes them away as they come."""
        if isinstance(self.engine_optimizer, torch.optim.Optimizer):
            yield from super().accumulated()

    def is_discarded(self) -> bool:
        return False  # the engine decides which steps are skipped, and counts them

    def supports_replays(self) -> str:
        has_partitions = any(hasattr(parameter, "ds_tensor") for parameter in self._parameters.values())
        return "ZeRO 3 gathers parameters only inside its own hooks" if has_partitions else super().supports_replays()

    def reported_norm(self) -> float | None:
        """Return the norm that was clipped by.

        Without ZeRO in float32 the engine discards it. FP16_UnfusedOptimizer tells the norm of gradients that are still
        scaled, and one that is local to the TP rank where the engine has no `mpu`.
        """
        owner = self.engine_optimizer if hasattr(self.engine_optimizer, "_global_grad_norm") else self._engine
        norm = getattr(owner, "_global_grad_norm", None)
        return None if norm is None else float(norm)

    def loss_scale(self) -> float:
        scale = getattr(self.engine_optimizer, "loss_scale", None)
        return 1.0 if scale is None else float(scale)

    def num_skipped(self) -> int:
        return int(getattr(self._engine, "skipped_steps", 0))

    def _groups(self) -> Iterator[Group]:
        if isinstance(self.engine_optimizer, torch.optim.Optimizer):
            yield from super()._groups()
            return
        inner = self.stepping[0]
        if len(inner.param_groups) >= len(self._options):  # ZeRO 1 and 2 leave one group in it while they step
            self._options = list(inner.param_groups)
        for number, options in enumerate(self._options):
            parameters, stepped = self._stepped_in_group(self.engine_optimizer, number)
            names = tuple(self._names[id(parameter)] for parameter in parameters if id(parameter) in self._names)
            yield Group(inner, options, tuple(stepped), names)

    def _stepped_in_group(self, zero: Any, group: int) -> tuple[Sequence[Any], list[Stepped]]:
        """Return the parameters of a group, and what its options step on this rank."""
        if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO 3
            numbers = [number for number, owner in zero.sub_group_to_group_id.items() if owner == group]
            subgroups = [zero.fp16_groups[number] for number in numbers]
            flats = [zero.fp32_partitioned_groups_flat[number] for number in numbers]
            stepped = [
                self._stepped(flat, subgroup, self._zero3_slices(subgroup))
                for flat, subgroup in zip(flats, subgroups, strict=True)
            ]
            return [parameter for subgroup in subgroups for parameter in subgroup], stepped
        if hasattr(zero, "fp32_groups"):  # FP16_UnfusedOptimizer
            parameters = zero.fp16_groups[group]
            pairs = zip(zero.fp32_groups[group], parameters, strict=True)
            return parameters, [
                self._stepped(copy, [of], self._flat_slices([of], [0], 0, of.numel())) for copy, of in pairs
            ]
        if hasattr(zero, "fp32_groups_flat"):  # FP16_Optimizer
            parameters, flat = zero.fp16_groups[group], zero.fp32_groups_flat[group]
            starts = _starts(parameters)
            return parameters, [self._stepped(flat, parameters, self._flat_slices(parameters, starts, 0, flat.numel()))]
        if hasattr(zero, "fp32_groups_flat_partition"):  # BF16_Optimizer
            parameters, flat = zero.bf16_groups[group], zero.fp32_groups_flat_partition[group]
            starts = _starts(parameters)
        else:  # DeepSpeedZeroOptimizer; `_hp_mapping` is wrong under round_robin_gradients
            parameters, flat = zero.round_robin_bit16_groups[group], zero.single_partition_of_fp32_groups[group]
            offsets = getattr(zero, "round_robin_bit16_offsets", None)
            starts = _starts(parameters) if offsets is None else offsets[group]
        begin = torch.distributed.get_rank(zero.real_dp_process_group[group]) * flat.numel()
        return parameters, [self._stepped(flat, parameters, self._flat_slices(parameters, starts, begin, flat.numel()))]

    def _stepped(self, tensor: torch.Tensor, parameters: Sequence[Any], slices: Iterator[Slice]) -> Stepped:
        return Stepped(tensor, tuple(slices), is_master=any(tensor.dtype != of.dtype for of in parameters))

    def _flat_slices(self, parameters: Sequence[Any], starts: Sequence[int], begin: int, numel: int) -> Iterator[Slice]:
        """Yield where parameters that start there in a flat tensor lie in its part of `numel` elements from `begin`."""
        for parameter, start in zip(parameters, starts, strict=True):
            first, end = max(start, begin), min(start + parameter.numel(), begin + numel)
            if first < end and id(parameter) in self._names:
                yield Slice(self._names[id(parameter)], first - begin, first - start, end - first)

    def _zero3_slices(self, parameters: Sequence[Any]) -> Iterator[Slice]:
        """Yield this rank's partition of each parameter; partitions are of one size, the last ones padded."""
        start = 0
        for parameter in parameters:
            size = parameter.ds_tensor.ds_numel
            first = torch.distributed.get_rank(parameter.ds_process_group) * size
            numel = max(0, min(size, prod(parameter.ds_shape) - first))
            if numel and id(parameter) in self._names:
                yield Slice(self._names[id(parameter)], start, first, numel)
            start += size


def _starts(parameters: Sequence[torch.Tensor]) -> list[int]:
    """Return where each parameter starts in the concatenation of all."""
    return list(accumulate((parameter.numel() for parameter in parameters), initial=0))[:-1]
