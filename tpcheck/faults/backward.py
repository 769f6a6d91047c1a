"""Faults of the backward pass: gradients that are partial, scaled, missing, or those of something else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from tpcheck.faults.fault import Draw, Live, ModelFault, Place, Planting
from tpcheck.faults.live_collectives import all_gathered, all_reduced
from tpcheck.faults.training import after_backward, hook_gradient
from tpcheck.topology import Topology

_KIND = "backward"
_CHECKS = ("gradients_match_reference",)
_COLUMN = ("*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj")
_ROW = ("*.o_proj", "*.down_proj")
_NORMS = ("*.input_layernorm", "*.post_attention_layernorm", "model.norm")
_MATRICES = ("*_proj.weight",)

_TP4 = Topology(tp=4)
_TP2_DP2 = Topology(tp=2, dp=2)


class _Backward(torch.autograd.Function):
    """Passes a tensor on as it is, and its gradient through `change`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.change(gradients[0]), None


def _with_backward(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    changed: Tensor = _Backward.apply(tensor, change)  # type: ignore[no-untyped-call]
    return changed


def _input_gradient_not_reduced(draw: Draw) -> Planting:
    name = draw.module(*_COLUMN)

    def plant(live: Live) -> None:
        layer = live.module(name)
        layer.forward = lambda hidden: functional.linear(hidden, layer.weight, layer.bias)

    return Planting(plant, Place(modules=(name,)))


def _input_gradient_reduced_twice(draw: Draw) -> Planting:
    name = draw.module(*_COLUMN)

    def plant(live: Live) -> None:
        def reduced(gradient: Tensor) -> Tensor:
            again = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(again, group=live.rank.group("tp"))
            return again

        layer = live.module(name)
        once = layer.forward
        layer.forward = lambda hidden: once(_with_backward(hidden, reduced))

    return Planting(plant, Place(modules=(name,)))


def _reduce_lost_on_a_strided_gradient(draw: Draw) -> Planting:
    name = draw.module(*_COLUMN)

    def plant(live: Live) -> None:
        def reduced(gradient: Tensor) -> Tensor:
            strided = gradient.transpose(0, 1).contiguous().transpose(0, 1)
            dist.all_reduce(strided.contiguous(), group=live.rank.group("tp"))  # the sum lies in a copy
            return strided

        layer = live.module(name)
        layer.forward = lambda hidden: functional.linear(_with_backward(hidden, reduced), layer.weight, layer.bias)

    return Planting(plant, Place(modules=(name,)))


def _reduced_twice_on_one_rank(draw: Draw) -> Planting:
    name, wrong = draw.module(*_COLUMN), draw.tp_rank()

    def plant(live: Live) -> None:
        def again(gradient: Tensor) -> Tensor:
            total = all_reduced(gradient, live.rank.group("tp"))
            return total if live.tp_rank == wrong else gradient

        layer = live.module(name)
        once = layer.forward
        layer.forward = lambda hidden: once(_with_backward(hidden, again))

    return Planting(plant, Place(modules=(name,)))


def _row_parallel_backward_reduces(draw: Draw) -> Planting:
    """The backward of a differentiable all-reduce sums gradients that are replicas already."""
    name = draw.module(*_ROW)

    def plant(live: Live) -> None:
        def reduced(gradient: Tensor) -> Tensor:
            again = gradient.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(again, group=live.rank.group("tp"))
            return again

        layer = live.module(name)
        once = layer.forward
        layer.forward = lambda hidden: _with_backward(once(hidden), reduced)

    return Planting(plant, Place(modules=(name,), parameters=(f"{name}.weight",)))


def _nothing_planted(*patterns: str) -> Callable[[Draw], Planting]:
    """The backend has this fault by itself, in parameters whose names fit."""

    def draw(chance: Draw) -> Planting:
        return Planting(lambda live: None, Place(modules=chance.modules_fitting(*patterns)))

    return draw


def _norm_over_a_sequence_shard(draw: Draw) -> Planting:
    """Each rank's weight gradient is that of its own part of the sequence, as sequence parallelism leaves it."""
    name = draw.module(*_NORMS)

    def plant(live: Live) -> None:
        norm = live.module(name)
        whole = norm.forward

        def without_gradient(part: Tensor) -> Tensor:
            kept = dict(norm._parameters)
            norm._parameters.update({key: one.detach() for key, one in kept.items()})
            try:
                made: Tensor = whole(part)
            finally:
                norm._parameters.update(kept)
            return made

        def forward(hidden: Tensor) -> Tensor:
            parts = enumerate(hidden.chunk(live.tp, dim=1))
            return torch.cat(
                [whole(part) if tp_rank == live.tp_rank else without_gradient(part) for tp_rank, part in parts], dim=1
            )

        norm.forward = forward

    return Planting(plant, Place(modules=(name,)))


def _router_of_its_own_experts(draw: Draw) -> Planting:
    """Each rank's gradient of the router is that through its own experts."""
    name = draw.parameter("*.router.weight", "*.mlp.gate.weight")

    def plant(live: Live) -> None:
        def own(gradient: Tensor) -> Tensor:
            kept = torch.zeros_like(gradient)
            rows = range(gradient.shape[0])[live.tp_rank :: live.tp]
            kept[list(rows)] = gradient[list(rows)]
            return kept

        hook_gradient(live, name, own)

    return Planting(plant, Place(parameters=(name,)))


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


_fault = partial(ModelFault, steps=1)  # a gradient is wrong at once

FAULTS = (
    _fault(
        "column_input_gradient_not_reduced",
        _KIND,
        "a column-parallel layer sends back its rank's term of the input gradient instead of the sum",
        _input_gradient_not_reduced,
        checks=_CHECKS,
        causes=("missing_reduce",),
    ),
    _fault(
        "column_input_gradient_not_reduced_on_four_ranks",
        _KIND,
        "a column-parallel layer sends back its rank's term of the input gradient, on four ranks",
        _input_gradient_not_reduced,
        checks=_CHECKS,
        causes=("missing_reduce",),
        topology=_TP4,
    ),
    _fault(
        "column_input_gradient_reduced_twice",
        _KIND,
        "a column-parallel layer sums its input gradient twice",
        _input_gradient_reduced_twice,
        checks=_CHECKS,
        causes=("duplicate_reduce",),
        topology=_TP2_DP2,
        zero_stage=1,
    ),
    _fault(
        "column_input_gradient_reduced_twice_on_one_rank",
        _KIND,
        "one rank alone sums the input gradient of a column-parallel layer twice",
        _reduced_twice_on_one_rank,
        checks=_CHECKS,
        causes=("duplicate_reduce",),
        family="gemma2",
    ),
    _fault(
        "column_reduce_lost_on_a_strided_gradient",
        _KIND,
        "the all-reduce of a non-contiguous input gradient sums a copy and returns the original",
        _reduce_lost_on_a_strided_gradient,
        checks=_CHECKS,
        causes=("missing_reduce",),
        link="https://github.com/NovaSky-AI/SkyRL/pull/1886",
    ),
    _fault(
        "row_parallel_backward_reduces",
        _KIND,
        "the backward of a row-parallel layer's all-reduce sums gradients that are replicas already",
        _row_parallel_backward_reduces,
        checks=_CHECKS,
        causes=("duplicate_reduce", "gradient_scaled"),
        topology=_TP4,
    ),
    _fault(
        "qk_norm_partial_in_qwen3",
        _KIND,
        "the norms of queries and keys keep the gradient of their rank's heads (DeepSpeed's heuristics, qwen3)",
        _nothing_planted("*.q_norm", "*.k_norm"),
        checks=_CHECKS,
        causes=("partial_gradient_on_replica",),
        family="qwen3",
        ignore_plan=True,
    ),
    _fault(
        "qk_norm_partial_in_gemma3",
        _KIND,
        "the norms of queries and keys keep the gradient of their rank's heads (DeepSpeed's heuristics, gemma3)",
        _nothing_planted("*.q_norm", "*.k_norm"),
        checks=_CHECKS,
        causes=("partial_gradient_on_replica",),
        family="gemma3_text",
        ignore_plan=True,
        topology=_TP2_DP2,
        zero_stage=2,
    ),
    _fault(
        "qk_layernorm_partial_in_phi",
        _KIND,
        "the layer norms of queries and keys keep the gradient of their rank's heads (DeepSpeed, phi)",
        _nothing_planted("*.q_layernorm", "*.k_layernorm"),
        checks=_CHECKS,
        causes=("partial_gradient_on_replica",),
        family="phi",
        settings={"qk_layernorm": True},
    ),
    _fault(
        "mla_shared_branch_partial",
        _KIND,
        "the latent and the rotary key that all heads share get the gradient of their rank's heads (deepseek_v3)",
        _nothing_planted("*.kv_a_proj_with_mqa", "*.self_attn"),
        checks=_CHECKS,
        causes=("missing_reduce",),
        family="deepseek_v3",
        ignore_plan=True,
    ),
    _fault(
        "router_gradient_partial",
        _KIND,
        "a router keeps the gradient through its rank's experts",
        _router_of_its_own_experts,
        checks=_CHECKS,
        causes=("partial_gradient_on_replica",),
        family="gpt_oss",
    ),
    _fault(
        "sequence_parallel_norm_not_reduced",
        _KIND,
        "under sequence parallelism a norm keeps the gradient of its rank's part of the sequence",
        _norm_over_a_sequence_shard,
        checks=_CHECKS,
        causes=("partial_gradient_on_replica",),
        link="https://github.com/NVIDIA/Megatron-LM/issues/1446",
    ),
    _fault(
        "sequence_parallel_norm_not_reduced_on_four_ranks",
        _KIND,
        "under sequence parallelism a norm keeps the gradient of its rank's part of the sequence, on four ranks",
        _norm_over_a_sequence_shard,
        checks=_CHECKS,
        causes=("partial_gradient_on_replica",),
        link="https://github.com/NVIDIA/TransformerEngine/issues/435",
        topology=_TP4,
    ),
    _fault(
        "gradient_times_tp",
        _KIND,
        "a gradient is summed over ranks that all have the whole of it",
        _scaled(lambda live: live.tp, "*.weight"),
        checks=_CHECKS,
        causes=("gradient_scaled",),
        topology=_TP2_DP2,
        zero_stage=2,
    ),
    _fault(
        "gradient_divided_by_tp",
        _KIND,
        "a gradient is averaged over the TP group although it is whole on each rank",
        _scaled(lambda live: 1 / live.tp, "*.weight"),
        checks=_CHECKS,
        causes=("gradient_scaled",),
        topology=_TP4,
    ),
    _fault(
        "gradient_scaled_on_one_rank",
        _KIND,
        "one rank's gradient has another scale",
        _one_rank_scaled,
        checks=_CHECKS,
        causes=("gradient_scaled",),
        topology=_TP4,
    ),
    _fault(
        "row_bias_gradient_summed",
        _KIND,
        "the gradient of a row-parallel layer's bias, whole on each rank, is summed over them",
        _bias_summed_over_ranks,
        checks=_CHECKS,
        causes=("gradient_scaled",),
        family="opt",
    ),
    _fault(
        "input_overwritten_by_a_reduce",
        _KIND,
        "an in-place all-reduce overwrites an input that the weight's gradient still needs",
        _overwritten_in_place,
        checks=_CHECKS,
        causes=(None,),
    ),
    _fault(
        "parameter_frozen",
        _KIND,
        "a parameter was frozen and never gets a gradient",
        _frozen,
        checks=_CHECKS,
        causes=("gradient_missing",),
    ),
    _fault(
        "branch_detached",
        _KIND,
        "a branch is cut out of the backward pass",
        _detached,
        checks=_CHECKS,
        causes=("gradient_missing",),
    ),
    _fault(
        "gradient_lost_on_one_rank",
        _KIND,
        "one rank's gradient of a replicated parameter is zero",
        _lost_on_one_rank,
        checks=_CHECKS,
        causes=("gradient_missing", "all_zero"),
    ),
    _fault(
        "gradients_of_two_layers_swapped",
        _KIND,
        "two layers get each other's gradients",
        _swapped,
        checks=_CHECKS,
        causes=("tensor_of_another_layer",),
    ),
    _fault(
        "gradient_of_the_next_rank",
        _KIND,
        "each rank has the gradient of the next rank's shard",
        _of_the_next_rank,
        checks=_CHECKS,
        causes=("shard_order_swapped",),
        family="qwen2",
        topology=_TP4,
    ),
    _fault(
        "tied_weight_trained_apart",
        _KIND,
        "a tied weight became two parameters, equal at first, each with a gradient of its own",
        _untied,
        checks=_CHECKS,
        causes=("tied_weight_untied",),
        family="qwen2",
        settings={"tie_word_embeddings": True},
    ),
)
