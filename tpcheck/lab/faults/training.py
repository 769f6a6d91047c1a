"""Faults of steps as people take them: micro-batches, losses over labels, optimizers and their state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tpcheck.lab.faults.fault import TP2, TP2_DP2, TP4, Draw, Injection, Live, Place, fault_constructor
from tpcheck.lab.faults.injection import after_step, all_gathered, fault_of_the_backend, inject_always

_KIND = "accumulation, losses, optimizers"
_ADAMW = {"optimizer": "adamw"}
_TWO = {"accumulate": 2}

_of_gradients = fault_constructor(_KIND, "gradients_match_reference", options=_TWO, steps=1)
_of_loss = fault_constructor(_KIND, "outputs_match_reference", topology=TP2_DP2, steps=1)
_of_updates = fault_constructor(_KIND, "updates_match_reference")
_of_state = fault_constructor(_KIND, "optimizer_state_matches_reference", options=_ADAMW)


def _accumulated_gradient_reduced(draw: Draw) -> Injection:
    """Make a norm's gradient one rank's term, and sum over TP, at each micro-batch, what has been accumulated."""
    name = draw.parameter("*layernorm.weight")

    def inject(live: Live) -> None:
        def reduce(parameter: Any) -> None:
            dist.all_reduce(parameter.grad, group=live.tp_group)

        live.parameter(name).register_hook(lambda gradient: gradient / live.tp)
        live.parameter(name).register_post_accumulate_grad_hook(reduce)

    return Injection(inject, Place(parameters=(name,)))


def _before_backward(live: Live, action: Callable[[int], None]) -> None:
    """Call `action(micro_batch)` before each backward pass of a step of two."""
    backward, number = live.candidate.backward, 0

    def with_action(loss: Tensor) -> None:
        nonlocal number
        action(number % 2)
        backward(loss)
        number += 1

    live.candidate.backward = with_action


def _cleared_at_each_micro_batch(live: Live) -> None:
    def clear(micro_batch: int) -> None:
        for parameter in live.candidate.module.parameters():
            parameter.grad = None

    _before_backward(live, clear)


def _first_micro_batch_unreduced(live: Live) -> None:
    """Add the first micro-batch's gradient after the second's has been averaged over the replicas."""
    kept: dict[str, Tensor] = {}
    parameters = dict(live.candidate.module.named_parameters())
    backward, number = live.candidate.backward, 0

    def unreduced(loss: Tensor) -> None:
        nonlocal number
        backward(loss)
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            if number % 2 == 0:
                kept[name], parameter.grad = parameter.grad, None
            else:
                parameter.grad += kept[name]
        number += 1

    live.candidate.backward = unreduced


def _loss_not_divided(live: Live) -> None:
    backward = live.candidate.engine.backward
    live.candidate.engine.backward = lambda loss, **options: backward(loss * 2, **options)


def _with_count(count: Callable[[Live, Any, Any], Any]) -> Callable[[Draw], Injection]:
    """Give the model `count(live, given, labels)` as its `num_items_in_batch`."""

    def inject(live: Live) -> None:
        module = live.candidate.module
        forward = module.forward

        def counting(*args: Any, num_items_in_batch: Any = None, **inputs: Any) -> Any:
            number = count(live, num_items_in_batch, inputs["labels"])
            return forward(*args, **inputs, **({} if number is None else {"num_items_in_batch": number}))

        module.forward = counting

    return lambda draw: Injection(inject, Place(modules=("",)))


ignoring_count = _with_count(lambda live, given, labels: None)
"""Let the model divide by its own number of labels."""


def _of_replica(live: Live, given: Any, labels: Tensor) -> Tensor:
    return (labels[:, 1:] != -100).sum()


def _mean_over_replicas(live: Live, given: Any, labels: Tensor) -> Tensor:
    number = _of_replica(live, given, labels).double()
    dist.all_reduce(number, group=live.rank.group("dp"))
    return number / live.rank.topology.dp


def _of_micro_batch(live: Live, given: Any, labels: Tensor) -> float:
    return float(_mean_over_replicas(live, given, labels))


def _state_of(change: Callable[[Live, Tensor], Tensor]) -> Callable[[Draw], Injection]:
    """Change a moment of all sharded parameters after each step."""

    def draw_parameters(draw: Draw) -> Injection:
        names = draw.parameters_matching("*_proj.weight")

        def inject(live: Live) -> None:
            def change_moment(step: int) -> None:
                for name in names:
                    state = live.candidate.engine.optimizer.state[live.parameter(name)]
                    state["exp_avg_sq"] = change(live, state["exp_avg_sq"])

            after_step(live, change_moment)

        return Injection(inject, Place(parameters=names))

    return draw_parameters


def _of_rank_zero(live: Live, moment: Tensor) -> Tensor:
    return all_gathered(moment, live.tp_group)[0].clone()


FAULTS = (
    _of_gradients("accumulated_gradient_reduced", "what is accumulated is summed over TP at each micro-batch",
                  _accumulated_gradient_reduced, "reduced_after_accumulation"),
    _of_gradients("gradient_cleared_at_each_micro_batch", "gradients are cleared before each backward pass",
                  inject_always(_cleared_at_each_micro_batch), "last_micro_batch_only"),
    _of_gradients("first_micro_batch_unreduced", "the gradients of all micro-batches but the last are not averaged",
                  inject_always(_first_micro_batch_unreduced), "micro_batch_unreduced", topology=TP2_DP2),
    _of_gradients("loss_not_divided_by_accumulation", "the losses of micro-batches are added up instead of averaged",
                  inject_always(_loss_not_divided), "gradient_scaled", topology=TP4),
    _of_loss("own_count_of_labels", "each micro-batch divides by its own number of labels",
             ignoring_count, "mean_of_local_means",
             options={"loss": "token_mean", **_TWO}),
    _of_loss("count_of_replica", "each replica divides by its own number of labels", _with_count(_of_replica),
             "mean_of_local_means", options={"loss": "token_mean"}),
    _of_loss("count_of_micro_batch", "each micro-batch divides by its labels on all replicas, not by the step's",
             _with_count(_of_micro_batch), "mean_of_local_means", options={"loss": "token_mean", **_TWO}),
    _of_loss("count_of_all_replicas", "losses are divided by the labels of all replicas, and the reference's are not",
             _with_count(_mean_over_replicas), "token_mean_instead_of_mean", options={"batch": "4x16,padded"}),
    _of_updates("muon_on_shards", "Muon makes each shard orthogonal in place of the matrix", fault_of_the_backend(),
                "optimizer_sees_one_shard", options={"optimizer": "muon"}, steps=1,
                link="https://github.com/deepspeedai/DeepSpeed/issues/8437"),
    _of_updates("muon_of_deepspeed_on_shards", "DeepSpeed's own Muon makes each shard orthogonal",
                fault_of_the_backend(), "optimizer_sees_one_shard", steps=1, topology=TP4,
                config={"optimizer": {"type": "Muon", "params": {"lr": 0.02}}},
                link="https://github.com/deepspeedai/DeepSpeed/issues/8437"),
    _of_updates("adafactor_on_shards", "Adafactor takes the rows and columns of a shard for those of the matrix",
                fault_of_the_backend(), "optimizer_sees_one_shard", options={"optimizer": "adafactor"}, steps=1,
                topology=TP4),
    _of_state("second_moment_of_rank_zero", "every rank has the second moments of the first one's shards",
              _state_of(_of_rank_zero), "optimizer_state_of_another_rank", topology=TP2),
    _of_state("second_moment_halved", "second moments are off by a factor, which one step does not show",
              _state_of(lambda live, moment: moment / 2), "gradient_scaled", topology=TP2),
)  # fmt: skip
