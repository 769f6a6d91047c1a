"""Faults of parameters' gradients: scaled, missing, or those of something else."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import Draw, Live, Place, Planting
from tpcheck.lab.faults.injection import after_backward, all_gathered, gradient_fault, hook_gradient

_ROW = ("*.o_proj", "*.down_proj")
_MATRICES = ("*_proj.weight",)

_TP4 = Topology(tp=4)
_TP2_DP2 = Topology(tp=2, dp=2)


def _scaled(factor: Callable[[Live], float], *patterns: str) -> Callable[[Draw], Planting]:
    def draw(chance: Draw) -> Planting:
        name = chance.parameter(*patterns)
        return Planting(
            lambda live: hook_gradient(live, name, lambda gradient: gradient * factor(live)), Place(parameters=(name,))
        )

    return draw


def _one_rank_scaled(draw: Draw) -> Planting:
    name, wrong, factor = draw.parameter("*.weight"), draw.tp_rank(), draw.random.choice((0.5, 1.01, 3.0))

    def plant(live: Live) -> None:
        if live.tp_rank == wrong:
            hook_gradient(live, name, lambda gradient: gradient * factor)

    return Planting(plant, Place(parameters=(name,)))


def _bias_summed_over_ranks(draw: Draw) -> Planting:
    name = draw.parameter("*.out_proj.bias", "*.fc2.bias")

    def plant(live: Live) -> None:
        def summed(gradient: Tensor) -> Tensor:
            total = gradient.clone()
            dist.all_reduce(total, group=live.rank.group("tp"))
            return total

        hook_gradient(live, name, summed)

    return Planting(plant, Place(parameters=(name,)))


def _overwritten_in_place(draw: Draw) -> Planting:
    """An in-place reduce overwrites the input that the weight's gradient still needs."""
    name = draw.module(*_ROW)

    def plant(live: Live) -> None:
        layer = live.module(name)
        once = layer.forward

        def forward(hidden: Tensor) -> Tensor:
            output: Tensor = once(hidden)
            dist.all_reduce(hidden.data, group=live.rank.group("tp"))  # .data: autograd does not see it
            return output

        layer.forward = forward

    return Planting(plant, Place(parameters=(f"{name}.weight",), modules=(name,)))


def _frozen(draw: Draw) -> Planting:
    name = draw.parameter("*norm.weight", *_MATRICES)
    return Planting(lambda live: live.parameter(name).requires_grad_(False), Place(parameters=(name,)))


def _detached(draw: Draw) -> Planting:
    name = draw.module("*.v_proj", "*.up_proj", "*.mlp")

    def plant(live: Live) -> None:
        module = live.module(name)
        once = module.forward
        module.forward = lambda hidden: once(hidden).detach()

    return Planting(plant, Place(modules=(name,)))


def _lost_on_one_rank(draw: Draw) -> Planting:
    name, wrong = draw.parameter("*norm.weight"), draw.tp_rank()

    def plant(live: Live) -> None:
        if live.tp_rank == wrong:
            hook_gradient(live, name, torch.zeros_like)

    return Planting(plant, Place(parameters=(name,)))


def _of_the_next_rank(draw: Draw) -> Planting:
    name = draw.parameter(*_MATRICES)

    def plant(live: Live) -> None:
        def of_the_next(gradient: Tensor) -> Tensor:
            return all_gathered(gradient, live.rank.group("tp"))[(live.tp_rank + 1) % live.tp]

        hook_gradient(live, name, of_the_next)

    return Planting(plant, Place(parameters=(name,)))


def _untied(draw: Draw) -> Planting:
    """Sharding made a parameter of its own for each name of a tied weight."""

    def plant(live: Live) -> None:
        head = live.module("lm_head")
        head.weight = nn.Parameter(head.weight.detach().clone())

    return Planting(plant, Place(parameters=("model.embed_tokens.weight",)))


def _swapped(draw: Draw) -> Planting:
    first = draw.parameter("model.layers.0.*_proj.weight")
    second = first.replace("layers.0", "layers.1")

    def plant(live: Live) -> None:
        def swap(step: int) -> None:
            one, other = live.parameter(first), live.parameter(second)
            one.grad, other.grad = other.grad, one.grad

        after_backward(live, swap)

    return Planting(plant, Place(parameters=(first, second)))


FAULTS = (
    gradient_fault(
        "gradient_times_tp",
        "a gradient is summed over ranks that all have the whole of it",
        _scaled(lambda live: live.tp, "*.weight"),
        causes=("gradient_scaled",),
        topology=_TP2_DP2,
        zero_stage=2,
    ),
    gradient_fault(
        "gradient_divided_by_tp",
        "a gradient is averaged over the TP group although it is whole on each rank",
        _scaled(lambda live: 1 / live.tp, "*.weight"),
        causes=("gradient_scaled",),
        topology=_TP4,
    ),
    gradient_fault(
        "gradient_scaled_on_one_rank",
        "one rank's gradient has another scale",
        _one_rank_scaled,
        causes=("gradient_scaled",),
        topology=_TP4,
    ),
    gradient_fault(
        "row_bias_gradient_summed",
        "the gradient of a row-parallel layer's bias, whole on each rank, is summed over them",
        _bias_summed_over_ranks,
        causes=("gradient_scaled",),
        family="opt",
    ),
    gradient_fault(
        "input_overwritten_by_a_reduce",
        "an in-place all-reduce overwrites an input that the weight's gradient still needs",
        _overwritten_in_place,
        causes=(None,),
    ),
    gradient_fault(
        "parameter_frozen",
        "a parameter was frozen and never gets a gradient",
        _frozen,
        causes=("gradient_missing",),
    ),
    gradient_fault(
        "branch_detached",
        "a branch is cut out of the backward pass",
        _detached,
        causes=("gradient_missing",),
    ),
    gradient_fault(
        "gradient_lost_on_one_rank",
        "one rank's gradient of a replicated parameter is zero",
        _lost_on_one_rank,
        causes=("gradient_missing", "all_zero"),
    ),
    gradient_fault(
        "gradients_of_two_layers_swapped",
        "two layers get each other's gradients",
        _swapped,
        causes=("tensor_of_another_layer",),
    ),
    gradient_fault(
        "gradient_of_the_next_rank",
        "each rank has the gradient of the next rank's shard",
        _of_the_next_rank,
        causes=("shard_order_swapped",),
        family="qwen2",
        topology=_TP4,
    ),
    gradient_fault(
        "tied_weight_trained_apart",
        "a tied weight became two parameters, equal at first, each with a gradient of its own",
        _untied,
        causes=("tied_weight_untied",),
        family="qwen2",
        settings={"tie_word_embeddings": True},
    ),
)
