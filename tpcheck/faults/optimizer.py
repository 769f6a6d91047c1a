"""Faults between the backward pass and the next forward pass: averaging, the norm that clips, the step itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpcheck.faults.fault import Draw, Live, ModelFault, Place, Planting
from tpcheck.faults.live_collectives import all_gathered
from tpcheck.faults.training import after_backward, after_step, before_step, stale_after_step
from tpcheck.topology import Topology

_KIND = "norm and optimizer"
_GRADIENTS = ("gradients_match_reference",)
_NORM = ("gradient_norm_matches_reference",)
_UPDATE = ("updates_match_reference",)
_SHARDED = ("*_proj.weight",)

_TP4 = Topology(tp=4)
_DP2 = Topology(tp=2, dp=2)

Clip = Callable[..., Tensor]


def _everywhere(plant: Callable[[Live], None]) -> Callable[[Draw], Planting]:
    """A fault of the whole run, which no draw changes."""
    return lambda draw: Planting(plant, Place())


def _replace_clipping(change: Callable[[Clip], Clip]) -> None:
    """Replace the clipping of an engine without ZeRO; a rank is a process of its own, so nothing is left behind."""
    from deepspeed.runtime import engine

    engine.clip_grad_norm_ = change(engine.clip_grad_norm_)


def _norm_of_own_gradients(live: Live) -> None:
    def local(clip: Clip) -> Clip:
        return lambda parameters, max_norm, norm_type=2, mpu=None: clip(parameters, max_norm, norm_type, None)

    _replace_clipping(local)


def _norm_not_reduced_under_zero(live: Live) -> None:
    live.candidate.engine.optimizer._model_parallel_all_reduce = lambda tensor, op: None


def _norm_counts_replicas(live: Live) -> None:
    from deepspeed.runtime import utils

    utils.is_model_parallel_parameter = lambda parameter: True


def _norm_counts_replicas_under_zero(live: Live) -> None:
    from deepspeed.runtime.zero import stage_1_and_2

    stage_1_and_2.is_model_parallel_parameter = lambda parameter: True


def _gradients_of(parameters: Iterable[Any]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _clipped_per_rank(live: Live) -> None:
    def change(clip: Clip) -> Clip:
        def clipped(parameters: Iterable[Any], max_norm: float, **options: Any) -> Tensor:
            listed = list(parameters)
            kept = [gradient.clone() for gradient in _gradients_of(listed)]
            norm = clip(listed, max_norm, **options)
            own = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(one) for one in kept])))
            for gradient, whole in zip(_gradients_of(listed), kept, strict=True):
                gradient.copy_(whole * min(1.0, max_norm / (own + 1e-6)))
            return norm

        return clipped

    _replace_clipping(change)


def _never_clipped(live: Live) -> None:
    def change(clip: Clip) -> Clip:
        def measured(parameters: Iterable[Any], max_norm: float, **options: Any) -> Tensor:
            listed = list(parameters)
            kept = [gradient.clone() for gradient in _gradients_of(listed)]
            norm = clip(listed, max_norm, **options)
            for gradient, whole in zip(_gradients_of(listed), kept, strict=True):
                gradient.copy_(whole)
            return norm

        return measured

    _replace_clipping(change)


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


def _group_of_its_own(names: Sequence[str], **factors: float) -> Callable[[Live], None]:
    """Some parameters step with settings that are those of the others times a factor."""

    def plant(live: Live) -> None:
        optimizer = live.candidate.engine.optimizer
        own = [live.parameter(name) for name in names]
        ids = {id(parameter) for parameter in own}
        group = optimizer.param_groups[0]
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
        settings = {key: value for key, value in group.items() if key != "params"}
        settings |= {key: settings[key] * factor for key, factor in factors.items()}
        optimizer.add_param_group({"params": own, **settings})

    return plant


def _other_settings(*patterns: str, **factors: float) -> Callable[[Draw], Planting]:
    def draw(chance: Draw) -> Planting:
        names = chance.parameters_fitting(*patterns)
        return Planting(_group_of_its_own(names, **factors), Place(parameters=names))

    return draw


def _momentum_of(change: Callable[[Live, Tensor], Tensor]) -> Callable[[Draw], Planting]:
    """After the first step the momentum of sharded parameters is not what it was."""

    def draw(chance: Draw) -> Planting:
        names = chance.parameters_fitting(*_SHARDED)

        def plant(live: Live) -> None:
            def changed(step: int) -> None:
                for name in names:
                    state = live.candidate.engine.optimizer.state[live.parameter(name)]
                    state["momentum_buffer"] = change(live, state["momentum_buffer"])

            after_step(live, changed)

        return Planting(plant, Place(parameters=names))

    return draw


def _of_rank_zero(live: Live, momentum: Tensor) -> Tensor:
    """The state was loaded from the first rank's file on all of them."""
    return all_gathered(momentum, live.rank.group("tp"))[0].clone()


def _of_the_next_rank(live: Live, momentum: Tensor) -> Tensor:
    every = [torch.empty_like(momentum) for _ in range(live.tp)]
    dist.all_gather(every, momentum.contiguous(), group=live.rank.group("tp"))
    return every[(live.tp_rank + 1) % live.tp]


def _step_skipped(draw: Draw) -> Planting:
    names = tuple(draw.parameters)
    return Planting(lambda live: stale_after_step(live, names), Place(parameters=names))


def _left_out_of_the_optimizer(draw: Draw) -> Planting:
    name = draw.parameter("*_proj.weight", "*norm.weight")
    return Planting(lambda live: stale_after_step(live, (name,)), Place(parameters=(name,)))


FAULTS = (
    ModelFault(
        "norm_of_own_gradients",
        _KIND,
        "each rank clips by the norm of its own gradients",
        _everywhere(_norm_of_own_gradients),
        checks=_NORM,
        causes=("norm_is_local",),
        link="https://github.com/deepspeedai/DeepSpeed/pull/5411",
    ),
    ModelFault(
        "norm_not_reduced_under_zero",
        _KIND,
        "under ZeRO the norm is not summed over the TP group",
        _everywhere(_norm_not_reduced_under_zero),
        checks=_NORM,
        causes=("norm_is_local",),
        topology=_DP2,
        zero_stage=2,
    ),
    ModelFault(
        "norm_counts_replicas",
        _KIND,
        "replicated parameters are counted once for each rank in the norm",
        _everywhere(_norm_counts_replicas),
        checks=_NORM,
        causes=("norm_counts_replicas",),
        link="https://github.com/NVIDIA-NeMo/RL/pull/3788",
        topology=_TP4,
    ),
    ModelFault(
        "norm_counts_replicas_under_zero",
        _KIND,
        "under ZeRO replicated parameters are counted once for each rank in the norm",
        _everywhere(_norm_counts_replicas_under_zero),
        checks=_NORM,
        causes=("norm_counts_replicas",),
        link="https://github.com/ROCm/TransformerEngine/pull/715",
        topology=_DP2,
        zero_stage=1,
    ),
    ModelFault(
        "clipped_per_rank",
        _KIND,
        "the norm is right, but each rank clips by that of its own gradients",
        _everywhere(_clipped_per_rank),
        checks=_UPDATE,
        causes=("norm_is_local",),
    ),
    ModelFault(
        "never_clipped",
        _KIND,
        "the norm is right, but no gradient is clipped",
        _everywhere(_never_clipped),
        checks=_UPDATE,
        causes=(None,),
        link="https://github.com/huggingface/transformers/pull/46113",
    ),
    ModelFault(
        "data_parallel_mean_skipped",
        _KIND,
        "gradients are not averaged over data parallelism",
        _everywhere(_never_averaged),
        checks=_GRADIENTS,
        causes=("missing_reduce",),
        topology=_DP2,
    ),
    ModelFault(
        "data_parallel_mean_over_the_tp_group",
        _KIND,
        "gradients are averaged over the TP group in place of the data-parallel one",
        _everywhere(_averaged_over_tp),
        checks=_GRADIENTS,
        causes=("wrong_group",),
        topology=_DP2,
    ),
    ModelFault(
        "data_parallel_sum_for_mean",
        _KIND,
        "gradients are summed over data parallelism instead of averaged",
        _everywhere(_averaged_times(1)),
        checks=_GRADIENTS,
        causes=("sum_instead_of_mean",),
        topology=_DP2,
    ),
    ModelFault(
        "gradients_averaged_over_all_ranks",
        _KIND,
        "gradients are averaged over all ranks, those of TP included",
        _everywhere(_averaged_over_all_ranks),
        checks=_GRADIENTS,
        causes=("wrong_group",),
        family="gemma3_text",
        topology=_DP2,
    ),
    ModelFault(
        "data_parallel_mean_twice",
        _KIND,
        "gradients are divided by the number of replicas twice",
        _everywhere(_averaged_times(-1)),
        checks=_GRADIENTS,
        causes=("mean_instead_of_sum",),
        topology=_DP2,
    ),
    ModelFault(
        "loss_times_tp",
        _KIND,
        "the loss is scaled by the number of TP ranks",
        _everywhere(_loss_scaled),
        checks=_GRADIENTS,
        causes=("gradient_scaled",),
        topology=_TP4,
    ),
    ModelFault(
        "loss_times_tp_under_zero_3",
        _KIND,
        "the loss is scaled by the number of TP ranks, under ZeRO 3",
        _everywhere(_loss_scaled),
        checks=_GRADIENTS,
        causes=("gradient_scaled",),
        topology=_DP2,
        zero_stage=3,
    ),
    ModelFault(
        "micro_batch_counted_twice",
        _KIND,
        "gradient accumulation counts a micro-batch twice",
        _everywhere(_micro_batch_counted_twice),
        checks=_GRADIENTS,
        causes=("gradient_scaled",),
        topologies=(Topology(tp=2), Topology(tp=4)),  # twice is also what a sum over two replicas gives
    ),
    ModelFault(
        "gradients_of_the_last_step_kept",
        _KIND,
        "gradients are not cleared before the next step accumulates its own",
        _everywhere(_gradients_kept),
        checks=_GRADIENTS,
        causes=(None,),
    ),
    ModelFault(
        "learning_rate_of_shards",
        _KIND,
        "sharded parameters step with another learning rate",
        _other_settings(*_SHARDED, lr=1.5),
        checks=_UPDATE,
        causes=(None,),
    ),
    ModelFault(
        "weight_decay_of_shards",
        _KIND,
        "sharded parameters decay faster",
        _other_settings(*_SHARDED, weight_decay=2.0),
        checks=_UPDATE,
        causes=(None,),
        topology=_TP4,
    ),
    ModelFault(
        "weight_decay_of_norms",
        _KIND,
        "norms are left out of weight decay on one side alone",
        _other_settings("*norm.weight", weight_decay=0.0),
        checks=_UPDATE,
        causes=(None,),
    ),
    ModelFault(
        "momentum_of_another_rank",
        _KIND,
        "the optimizer's state is not sharded as its parameter: each rank has that of the next",
        _momentum_of(_of_the_next_rank),
        checks=_UPDATE,
        causes=("shard_order_swapped",),
        topology=_TP4,
    ),
    ModelFault(
        "momentum_of_rank_zero",
        _KIND,
        "every rank has the optimizer's state of the first one's shards",
        _momentum_of(_of_rank_zero),
        checks=_UPDATE,
        causes=("shard_repeated",),
        family="qwen3",
    ),
    ModelFault(
        "momentum_lost",
        _KIND,
        "the optimizer's state of sharded parameters is lost after each step",
        _momentum_of(lambda live, momentum: torch.zeros_like(momentum)),
        checks=_UPDATE,
        causes=(None,),
    ),
    ModelFault(
        "step_skipped_on_all_ranks",
        _KIND,
        "a step is skipped on all ranks",
        _step_skipped,
        checks=_UPDATE,
        causes=("stale_weight",),
        topology=_TP4,
    ),
    ModelFault(
        "parameter_left_out_of_the_optimizer",
        _KIND,
        "a parameter is never stepped",
        _left_out_of_the_optimizer,
        checks=_UPDATE,
        causes=("stale_weight",),
        topology=_DP2,
        zero_stage=2,
    ),
)
