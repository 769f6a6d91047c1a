"""Faults of what gradients go through before the step: the mean over replicas, the loss's scale, accumulation."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import Live
from tpcheck.lab.faults.injection import after_backward, after_step, before_step, everywhere, optimizer_fault

_GRADIENTS = ("gradients_match_reference",)

_TP4 = Topology(tp=4)
_DP2 = Topology(tp=2, dp=2)


def _replace_averaging(live: Live, change: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
    engine = live.candidate.engine
    engine.allreduce_bucket = change(engine.allreduce_bucket)


def _never_averaged(live: Live) -> None:
    _replace_averaging(live, lambda average: lambda bucket, *args, **kwargs: live.candidate.engine.flatten(bucket))


def _averaged_over_tp(live: Live) -> None:
    group = live.rank.group("tp")
    _replace_averaging(live, lambda average: lambda bucket, *args, **kwargs: average(bucket, group))


def _averaged_times(power: int) -> Callable[[Live], None]:
    """The mean over the replicas, times their number or divided by it once more."""

    def plant(live: Live) -> None:
        factor = float(live.rank.topology.dp) ** power
        _replace_averaging(live, lambda average: lambda *args, **kwargs: average(*args, **kwargs) * factor)

    return plant


def _averaged_over_all_ranks(live: Live) -> None:
    """A data-parallel wrapper that knows nothing of TP averages over the whole world."""

    def average(step: int) -> None:
        for _, parameter in live.candidate.module.named_parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()

    after_backward(live, average)


def _loss_scaled(live: Live) -> None:
    engine = live.candidate.engine
    backward = engine.backward
    engine.backward = lambda loss, *args, **kwargs: backward(loss * live.tp, *args, **kwargs)


def _micro_batch_counted_twice(live: Live) -> None:
    """The gradients of one micro-batch are accumulated twice."""
    for _, parameter in live.candidate.module.named_parameters():
        parameter.register_hook(lambda gradient: gradient * 2)


def _gradients_kept(live: Live) -> None:
    """The gradients of a step are still there when the next one accumulates its own."""
    kept: dict[str, Tensor] = {}

    def keep(step: int) -> None:
        kept.update(
            {name: one.grad.clone() for name, one in live.candidate.module.named_parameters() if one.grad is not None}
        )

    def give_back(step: int) -> None:
        for name, parameter in live.candidate.module.named_parameters():
            parameter.grad = kept[name]

    before_step(live, keep)
    after_step(live, give_back)


FAULTS = (
    optimizer_fault(
        "data_parallel_mean_skipped",
        "gradients are not averaged over data parallelism",
        everywhere(_never_averaged),
        checks=_GRADIENTS,
        causes=("missing_reduce",),
        topology=_DP2,
    ),
    optimizer_fault(
        "data_parallel_mean_over_the_tp_group",
        "gradients are averaged over the TP group in place of the data-parallel one",
        everywhere(_averaged_over_tp),
        checks=_GRADIENTS,
        causes=("wrong_group",),
        topology=_DP2,
    ),
    optimizer_fault(
        "data_parallel_sum_for_mean",
        "gradients are summed over data parallelism instead of averaged",
        everywhere(_averaged_times(1)),
        checks=_GRADIENTS,
        causes=("sum_instead_of_mean",),
        topology=_DP2,
    ),
    optimizer_fault(
        "gradients_averaged_over_all_ranks",
        "gradients are averaged over all ranks, those of TP included",
        everywhere(_averaged_over_all_ranks),
        checks=_GRADIENTS,
        causes=("wrong_group",),
        family="gemma3_text",
        topology=_DP2,
    ),
    optimizer_fault(
        "data_parallel_mean_twice",
        "gradients are divided by the number of replicas twice",
        everywhere(_averaged_times(-1)),
        checks=_GRADIENTS,
        causes=("mean_instead_of_sum",),
        topology=_DP2,
    ),
    optimizer_fault(
        "loss_times_tp",
        "the loss is scaled by the number of TP ranks",
        everywhere(_loss_scaled),
        checks=_GRADIENTS,
        causes=("gradient_scaled",),
        topology=_TP4,
    ),
    optimizer_fault(
        "loss_times_tp_under_zero_3",
        "the loss is scaled by the number of TP ranks, under ZeRO 3",
        everywhere(_loss_scaled),
        checks=_GRADIENTS,
        causes=("gradient_scaled",),
        topology=_DP2,
        zero_stage=3,
    ),
    optimizer_fault(
        "micro_batch_counted_twice",
        "gradient accumulation counts a micro-batch twice",
        everywhere(_micro_batch_counted_twice),
        checks=_GRADIENTS,
        causes=("gradient_scaled",),
        topologies=(Topology(tp=2), Topology(tp=4)),  # twice is also what a sum over two replicas gives
    ),
    optimizer_fault(
        "gradients_of_the_last_step_kept",
        "gradients are not cleared before the next step accumulates its own",
        everywhere(_gradients_kept),
        checks=_GRADIENTS,
        causes=(None,),
    ),
)
