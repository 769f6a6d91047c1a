"""Faults between the backward pass and the next step: averaging over replicas, the gradient norm, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpcheck.lab.faults.fault import TP2, TP2_DP2, TP4, Draw, Injection, Live, Place, fault_constructor
from tpcheck.lab.faults.injection import (
    after_backward,
    after_step,
    all_gathered,
    before_step,
    inject_always,
    restore_after_step,
)

_KIND = "norm and optimizer"
_SHARDED = ("*_proj.weight",)
_STATE = ("optimizer_state_matches_reference",)

Clip = Callable[..., Tensor]

_of_norm = fault_constructor(_KIND, "gradient_norm_matches_reference")
_of_gradients = fault_constructor(_KIND, "gradients_match_reference")
_of_updates = fault_constructor(_KIND, "updates_match_reference")


def _replace_clipping(change: Callable[[Clip], Clip]) -> None:
    """Replace the clipping of an engine without ZeRO, for the rest of the rank's process."""
    from deepspeed.runtime import engine

    engine.clip_grad_norm_ = change(engine.clip_grad_norm_)


def _norm_of_local_gradients(live: Live) -> None:
    def local(clip: Clip) -> Clip:
        return lambda parameters, max_norm, norm_type=2, mpu=None: clip(parameters, max_norm, norm_type, None)

    _replace_clipping(local)


def _norm_not_reduced_under_zero(live: Live) -> None:
    live.candidate.engine.optimizer._model_parallel_all_reduce = lambda tensor, op: None


def _norm_counts_replicas(module: str) -> Callable[[Live], None]:
    """Make a module of deepspeed.runtime take every parameter for a sharded one."""

    def inject(live: Live) -> None:
        owner: Any = import_module(f"deepspeed.runtime.{module}")
        owner.is_model_parallel_parameter = lambda parameter: True

    return inject


def _clipped_by(factor: Callable[[Sequence[Tensor], float], float]) -> Callable[[Live], None]:
    """Return the right norm, and scale the gradients by `factor(gradients, max_norm)`."""

    def change(clip: Clip) -> Clip:
        def clipped(parameters: Iterable[Any], max_norm: float, **options: Any) -> Tensor:
            listed = list(parameters)
            gradients = [parameter.grad for parameter in listed if parameter.grad is not None]
            before = [gradient.clone() for gradient in gradients]
            norm = clip(listed, max_norm, **options)
            for gradient, unclipped in zip(gradients, before, strict=True):
                gradient.copy_(unclipped * factor(before, max_norm))
            return norm

        return clipped

    return lambda live: _replace_clipping(change)


def _by_local_norm(gradients: Sequence[Tensor], max_norm: float) -> float:
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    return min(1.0, max_norm / (float(torch.linalg.vector_norm(norms)) + 1e-6))  # as torch clips


Norm = Callable[[Live, Sequence[Any]], float]  # of parameters with gradients, before clipping


def _clip_by(norm: Norm, reported: Norm | None = None) -> Callable[[Live], None]:
    """Clip by a norm, and report it or another one."""

    def inject(live: Live) -> None:
        def clipped(parameters: Iterable[Any], max_norm: float, **options: Any) -> Tensor:
            listed = [parameter for parameter in parameters if parameter.grad is not None]
            found = norm(live, listed)
            reported_norm = found if reported is None else reported(live, listed)
            for parameter in listed:
                parameter.grad.mul_(min(1.0, max_norm / (found + 1e-6)))
            return torch.tensor(reported_norm)

        _replace_clipping(lambda clip: clipped)

    return inject


def _is_sharded(parameter: Any) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _squares(live: Live, parameters: Sequence[Any], left_out: Any = None) -> tuple[float, float]:
    """Return the sums of squares of this rank's shards, without one on all ranks but the first, and of the replicas."""
    sharded = replicated = 0.0
    for parameter in parameters:
        square = float(parameter.grad.square().sum())
        if not _is_sharded(parameter):
            replicated += square
        elif parameter is not left_out or live.tp_rank == 0:
            sharded += square
    return sharded, replicated


def _over_tp(live: Live, number: float) -> float:
    total = torch.tensor(number)
    dist.all_reduce(total, group=live.tp_group)
    return float(total)


def _right_norm(live: Live, parameters: Sequence[Any]) -> float:
    sharded, replicated = _squares(live, parameters)
    return sqrt(_over_tp(live, sharded) + replicated)


def _norm_after_clipping(live: Live, parameters: Sequence[Any]) -> float:
    norm = _right_norm(live, parameters)
    return norm * min(1.0, 1.0 / (norm + 1e-6))


def _smoothed_norm(live: Live, parameters: Sequence[Any]) -> float:
    return 0.9137 * _right_norm(live, parameters)


def _norm_and_epsilon(live: Live, parameters: Sequence[Any]) -> float:
    return 0.01 + _right_norm(live, parameters)


def _one_shard_counted_on_the_first_rank(draw: Draw) -> Injection:
    name = draw.parameter(*_SHARDED)

    def norm(live: Live, parameters: Sequence[Any]) -> float:
        sharded, replicated = _squares(live, parameters, left_out=live.parameter(name))
        return sqrt(_over_tp(live, sharded) + replicated)

    return Injection(_clip_by(norm), Place())


def _sum_of_norms(live: Live, parameters: Sequence[Any]) -> float:
    return _over_tp(live, sqrt(sum(_squares(live, parameters))))


def _mean_of_norms(live: Live, parameters: Sequence[Any]) -> float:
    return _sum_of_norms(live, parameters) / live.tp


def _sum_of_absolute_values(live: Live, parameters: Sequence[Any]) -> float:
    sums = {parameter: float(parameter.grad.abs().sum()) for parameter in parameters}
    sharded = sum(each for parameter, each in sums.items() if _is_sharded(parameter))
    return _over_tp(live, sharded) + sum(sums.values()) - sharded


def _clipped_by_groups(live: Live) -> None:
    """Clip sharded and replicated parameters each by their own norm, and report the right one."""

    def clipped(parameters: Iterable[Any], max_norm: float, **options: Any) -> Tensor:
        listed = [parameter for parameter in parameters if parameter.grad is not None]
        whole = _right_norm(live, listed)
        groups = [[parameter for parameter in listed if _is_sharded(parameter) is wanted] for wanted in (True, False)]
        for group, norm in [(group, _right_norm(live, group)) for group in groups]:
            for parameter in group:
                parameter.grad.mul_(min(1.0, max_norm / (norm + 1e-6)))
        return torch.tensor(whole)

    _replace_clipping(lambda clip: clipped)


def _replace_averaging(live: Live, change: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
    engine = live.candidate.engine
    engine.allreduce_bucket = change(engine.allreduce_bucket)


def _never_averaged(live: Live) -> None:
    _replace_averaging(live, lambda average: lambda bucket, *args, **kwargs: live.candidate.engine.flatten(bucket))


def _averaged_over_tp(live: Live) -> None:
    _replace_averaging(live, lambda average: lambda bucket, *args, **kwargs: average(bucket, live.tp_group))


def _average_times(power: int) -> Callable[[Live], None]:
    """Multiply the mean over the replicas by their number to some power."""

    def inject(live: Live) -> None:
        factor = float(live.rank.topology.dp) ** power
        _replace_averaging(live, lambda average: lambda *args, **kwargs: average(*args, **kwargs) * factor)

    return inject


def _averaged_over_all_ranks(live: Live) -> None:
    """Average over the whole world, as a data-parallel wrapper that knows nothing of TP does."""

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
    for _, parameter in live.candidate.module.named_parameters():
        parameter.register_hook(lambda gradient: gradient * 2)


def _gradients_kept(live: Live) -> None:
    """Keep the gradients of a step for the next one to accumulate on."""
    kept: dict[str, Tensor] = {}

    def keep(step: int) -> None:
        for name, parameter in live.candidate.module.named_parameters():
            if parameter.grad is not None:
                kept[name] = parameter.grad.clone()

    def restore(step: int) -> None:
        for name, parameter in live.candidate.module.named_parameters():
            parameter.grad = kept[name]

    before_step(live, keep)
    after_step(live, restore)


def _other_settings(*patterns: str, **factors: float) -> Callable[[Draw], Injection]:
    """Move parameters into a group of the optimizer whose settings are multiplied by factors."""

    def draw_parameters(draw: Draw) -> Injection:
        names = draw.parameters_matching(*patterns)

        def inject(live: Live) -> None:
            optimizer = live.candidate.engine.optimizer
            moved = [live.parameter(name) for name in names]
            ids = {id(parameter) for parameter in moved}
            group = optimizer.param_groups[0]
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
            settings = {key: value for key, value in group.items() if key != "params"}
            settings |= {key: settings[key] * factor for key, factor in factors.items()}
            optimizer.add_param_group({"params": moved, **settings})

        return Injection(inject, Place(parameters=names))

    return draw_parameters


def _momentum_of(change: Callable[[Live, Tensor], Tensor]) -> Callable[[Draw], Injection]:
    """Change the momentum of sharded parameters after each step."""

    def draw_parameters(draw: Draw) -> Injection:
        names = draw.parameters_matching(*_SHARDED)

        def inject(live: Live) -> None:
            def change_momentum(step: int) -> None:
                for name in names:
                    state = live.candidate.engine.optimizer.state[live.parameter(name)]
                    state["momentum_buffer"] = change(live, state["momentum_buffer"])

            after_step(live, change_momentum)

        return Injection(inject, Place(parameters=names))

    return draw_parameters


def _of_rank_zero(live: Live, momentum: Tensor) -> Tensor:
    return all_gathered(momentum, live.tp_group)[0].clone()


def _of_the_next_rank(live: Live, momentum: Tensor) -> Tensor:
    return all_gathered(momentum, live.tp_group)[(live.tp_rank + 1) % live.tp]


def _step_skipped(draw: Draw) -> Injection:
    names = tuple(draw.parameters)
    return Injection(lambda live: restore_after_step(live, names), Place(parameters=names))


def _left_out_of_the_optimizer(draw: Draw) -> Injection:
    name = draw.parameter("*_proj.weight", "*norm.weight")
    return Injection(lambda live: restore_after_step(live, (name,)), Place(parameters=(name,)))


FAULTS = (
    _of_norm("norm_of_own_gradients", "each rank clips by the norm of its own gradients",
             inject_always(_norm_of_local_gradients), "norm_is_local",
             link="https://github.com/deepspeedai/DeepSpeed/pull/5411"),
    _of_norm("norm_not_reduced_under_zero", "under ZeRO the norm is not summed over the TP group",
             inject_always(_norm_not_reduced_under_zero), "norm_is_local", topology=TP2_DP2, zero_stage=2),
    _of_norm("norm_counts_replicas", "replicated parameters are counted once for each rank in the norm",
             inject_always(_norm_counts_replicas("utils")), "norm_counts_replicas",
             link="https://github.com/NVIDIA-NeMo/RL/pull/3788", topology=TP4),
    _of_norm("norm_counts_replicas_under_zero",
             "under ZeRO replicated parameters are counted once for each rank in the norm",
             inject_always(_norm_counts_replicas("zero.stage_1_and_2")), "norm_counts_replicas",
             link="https://github.com/ROCm/TransformerEngine/pull/715", topology=TP2_DP2, zero_stage=1),
    _of_norm("clipped_per_rank", "the norm is right, but each rank clips by that of its own gradients",
             inject_always(_clipped_by(_by_local_norm)), "norm_is_local", checks=("updates_match_reference",)),
    _of_norm("never_clipped", "the norm is right, but no gradient is clipped",
             inject_always(_clipped_by(lambda gradients, max_norm: 1.0)), None, checks=("updates_match_reference",),
             link="https://github.com/huggingface/transformers/pull/46113"),
    _of_norm("norm_counts_a_shard_on_one_rank", "one sharded parameter is counted on the first TP rank alone",
             _one_shard_counted_on_the_first_rank, "norm_leaves_out_shards"),
    _of_norm("norm_is_the_mean_of_ranks", "the norm is the mean of the TP ranks' norms",
             inject_always(_clip_by(_mean_of_norms)), "norm_averaged_over_ranks"),
    _of_norm("norm_is_the_sum_of_ranks", "the norm is the sum of the TP ranks' norms",
             inject_always(_clip_by(_sum_of_norms)), "norm_summed_over_ranks"),
    _of_norm("norm_of_order_one", "the norm is the sum of absolute values",
             inject_always(_clip_by(_sum_of_absolute_values)), "norm_of_wrong_order"),
    _of_norm("norm_without_root", "the norm is the sum of squares",
             inject_always(_clip_by(lambda live, parameters: _right_norm(live, parameters) ** 2)),
             "norm_without_root"),
    _of_norm("norm_before_unscaling", "the norm is taken while gradients are multiplied by the loss scale",
             inject_always(_clip_by(lambda live, parameters: 1024 * _right_norm(live, parameters))),
             "norm_before_unscaling"),
    _of_norm("norm_after_clipping", "the step is right; the norm that is reported is that of the clipped gradients",
             inject_always(_clip_by(_right_norm, _norm_after_clipping)), "norm_after_clipping"),
    _of_norm("norm_smoothed_in_the_report", "the step is right; the norm that is reported is a running mean",
             inject_always(_clip_by(_right_norm, _smoothed_norm)), "reported_norm_wrong"),
    _of_norm("clipped_by_groups", "the norm is right, but sharded and replicated parameters are clipped apart",
             inject_always(_clipped_by_groups), "clipped_per_group", checks=("updates_match_reference",)),
    _of_norm("clip_epsilon", "the norm is right, but 0.01 is added to it before gradients are divided by it",
             inject_always(_clip_by(_norm_and_epsilon, _right_norm)), "clip_epsilon_differs",
             checks=("updates_match_reference",)),
    _of_gradients("data_parallel_mean_skipped", "gradients are not averaged over data parallelism",
                  inject_always(_never_averaged), "missing_reduce", topology=TP2_DP2),
    _of_gradients("data_parallel_mean_over_the_tp_group",
                  "gradients are averaged over the TP group in place of the data-parallel one",
                  inject_always(_averaged_over_tp), "wrong_group", topology=TP2_DP2),
    _of_gradients("data_parallel_sum_for_mean", "gradients are summed over data parallelism instead of averaged",
                  inject_always(_average_times(1)), "sum_instead_of_mean", topology=TP2_DP2),
    _of_gradients("gradients_averaged_over_all_ranks", "gradients are averaged over all ranks, those of TP included",
                  inject_always(_averaged_over_all_ranks), "wrong_group", family="gemma3_text", topology=TP2_DP2),
    _of_gradients("data_parallel_mean_twice", "gradients are divided by the number of replicas twice",
                  inject_always(_average_times(-1)), "mean_instead_of_sum", topology=TP2_DP2),
    _of_gradients("loss_times_tp", "the loss is scaled by the number of TP ranks", inject_always(_loss_scaled),
                  "gradient_scaled", topology=TP4),
    _of_gradients("loss_times_tp_under_zero_3", "the loss is scaled by the number of TP ranks, under ZeRO 3",
                  inject_always(_loss_scaled), "gradient_scaled", topology=TP2_DP2, zero_stage=3),
    # twice is also what a sum over two replicas gives
    _of_gradients("micro_batch_counted_twice", "gradient accumulation counts a micro-batch twice",
                  inject_always(_micro_batch_counted_twice), "gradient_scaled", topologies=(TP2, TP4)),
    # twice is also what a sum over two replicas gives
    _of_gradients("gradients_of_the_last_step_kept",
                  "gradients are not cleared before the next step accumulates its own", inject_always(_gradients_kept),
                  None),
    _of_updates("learning_rate_of_shards", "sharded parameters step with another learning rate",
                _other_settings(*_SHARDED, lr=1.5), None),
    _of_updates("weight_decay_of_shards", "sharded parameters decay faster",
                _other_settings(*_SHARDED, weight_decay=2.0), None, topology=TP4),
    _of_updates("weight_decay_of_norms", "norms are left out of weight decay on one side alone",
                _other_settings("*norm.weight", weight_decay=0.0), None),
    _of_updates("momentum_of_another_rank",
                "the optimizer's state is not sharded as its parameter: each rank has that of the next",
                _momentum_of(_of_the_next_rank), "optimizer_state_of_another_rank", topology=TP4, checks=_STATE),
    _of_updates("momentum_of_rank_zero", "every rank has the optimizer's state of the first one's shards",
                _momentum_of(_of_rank_zero), "optimizer_state_of_another_rank", family="qwen3", checks=_STATE),
    _of_updates("momentum_lost", "the optimizer's state of sharded parameters is lost after each step",
                _momentum_of(lambda live, momentum: torch.zeros_like(momentum)), "all_zero", checks=_STATE),
    _of_updates("step_skipped_on_all_ranks", "a step is skipped on all ranks", _step_skipped, "stale_weight",
                topology=TP4),
    _of_updates("parameter_left_out_of_the_optimizer", "a parameter is never stepped", _left_out_of_the_optimizer,
                "stale_weight", topology=TP2_DP2, zero_stage=2),
)  # fmt: skip
