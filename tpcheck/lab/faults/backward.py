"""Faults of the backward pass: gradients that are not reduced, reduced too often, partial, scaled, or missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from tpcheck.lab.faults.fault import TP2_DP2, TP4, Draw, Injection, Live, Place, fault_constructor
from tpcheck.lab.faults.injection import (
    after_backward,
    all_gathered,
    all_reduced,
    change_gradient,
    fault_of_the_backend,
    inject_always,
    replace_forward,
    with_backward,
    wrap_forward,
)

_COLUMN = ("*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj")
_ROW = ("*.o_proj", "*.down_proj")
_MATRICES = ("*_proj.weight",)
_NORMS = ("*.input_layernorm", "*.post_attention_layernorm", "model.norm")

_fault = fault_constructor("backward", "gradients_match_reference", steps=1)


def _not_reduced(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, layer.weight, layer.bias)


def _reduced_twice(live: Live, tp_rank: int, forward: Callable[..., Any], hidden: Tensor) -> Any:
    return forward(with_backward(hidden, lambda gradient: all_reduced(gradient, live.tp_group)))


def _reduced_twice_on_one_rank(live: Live, tp_rank: int, forward: Callable[..., Any], hidden: Tensor) -> Any:
    def reduced(gradient: Tensor) -> Tensor:
        total = all_reduced(gradient, live.tp_group)
        return total if live.tp_rank == tp_rank else gradient

    return forward(with_backward(hidden, reduced))


def _reduce_lost_on_a_strided_gradient(live: Live, layer: Any, tp_rank: int, hidden: Tensor) -> Tensor:
    def reduced(gradient: Tensor) -> Tensor:
        strided = gradient.transpose(0, 1).contiguous().transpose(0, 1)
        dist.all_reduce(strided.contiguous(), group=live.tp_group)  # the sum lies in a copy
        return strided

    return functional.linear(with_backward(hidden, reduced), layer.weight, layer.bias)


def _row_parallel_backward_reduces(live: Live, tp_rank: int, forward: Callable[..., Any], hidden: Tensor) -> Tensor:
    """Sum gradients in the backward of an all-reduce, although they are replicas already."""
    return with_backward(forward(hidden), lambda gradient: all_reduced(gradient, live.tp_group))


def _norm_over_a_sequence_shard(draw: Draw) -> Injection:
    """Keep on each rank the weight gradient of its own part of the sequence, as sequence parallelism leaves it."""
    name = draw.module(*_NORMS)

    def inject(live: Live) -> None:
        norm = live.module(name)
        right = norm.forward

        def without_gradient(part: Tensor) -> Tensor:
            kept = dict(norm._parameters)
            norm._parameters.update({key: parameter.detach() for key, parameter in kept.items()})
            try:
                output: Tensor = right(part)
            finally:
                norm._parameters.update(kept)
            return output

        def forward(hidden: Tensor) -> Tensor:
            parts = enumerate(hidden.chunk(live.tp, dim=1))
            return torch.cat(
                [right(part) if tp_rank == live.tp_rank else without_gradient(part) for tp_rank, part in parts], dim=1
            )

        norm.forward = forward

    return Injection(inject, Place(modules=(name,)))


def _through_local_experts(live: Live, tp_rank: int, gradient: Tensor) -> Tensor:
    kept = torch.zeros_like(gradient)
    kept[live.tp_rank :: live.tp] = gradient[live.tp_rank :: live.tp]
    return kept


def _scaled(factor: Callable[[Live], float], *patterns: str) -> Callable[[Draw], Injection]:
    return change_gradient(lambda live, tp_rank, gradient: gradient * factor(live), *patterns)


def _one_rank_scaled(draw: Draw) -> Injection:
    name, wrong, factor = draw.parameter("*.weight"), draw.tp_rank(), draw.random.choice((0.5, 1.01, 3.0))

    def inject(live: Live) -> None:
        if live.tp_rank == wrong:
            live.parameter(name).register_hook(lambda gradient: gradient * factor)

    return Injection(inject, Place(parameters=(name,)))


def _summed(live: Live, tp_rank: int, gradient: Tensor) -> Tensor:
    return all_reduced(gradient, live.tp_group)


def _zero_on_one_rank(live: Live, tp_rank: int, gradient: Tensor) -> Tensor:
    return torch.zeros_like(gradient) if live.tp_rank == tp_rank else gradient


def _of_the_next_rank(live: Live, tp_rank: int, gradient: Tensor) -> Tensor:
    return all_gathered(gradient, live.tp_group)[(live.tp_rank + 1) % live.tp]


def _overwritten_in_place(live: Live, tp_rank: int, forward: Callable[..., Any], hidden: Tensor) -> Any:
    output = forward(hidden)
    dist.all_reduce(hidden.data, group=live.tp_group)  # .data: autograd does not see it
    return output


def _detached(live: Live, tp_rank: int, forward: Callable[..., Any], hidden: Tensor) -> Any:
    return forward(hidden).detach()


def _frozen(draw: Draw) -> Injection:
    name = draw.parameter("*norm.weight", *_MATRICES)
    return Injection(lambda live: live.parameter(name).requires_grad_(False), Place(parameters=(name,)))


def _untie(live: Live) -> None:
    """Make a parameter for each name of a tied weight."""
    head = live.module("lm_head")
    head.weight = nn.Parameter(head.weight.detach().clone())


def _swapped(draw: Draw) -> Injection:
    first = draw.parameter("model.layers.0.*_proj.weight")
    second = first.replace("layers.0", "layers.1")

    def inject(live: Live) -> None:
        def swap(step: int) -> None:
            first_parameter, second_parameter = live.parameter(first), live.parameter(second)
            first_parameter.grad, second_parameter.grad = second_parameter.grad, first_parameter.grad

        after_backward(live, swap)

    return Injection(inject, Place(parameters=(first, second)))


FAULTS = (
    _fault("column_input_gradient_not_reduced",
           "a column-parallel layer sends back its rank's term of the input gradient instead of the sum",
           replace_forward(_not_reduced, *_COLUMN), "missing_reduce"),
    _fault("column_input_gradient_not_reduced_on_four_ranks",
           "a column-parallel layer sends back its rank's term of the input gradient, on four ranks",
           replace_forward(_not_reduced, *_COLUMN), "missing_reduce", topology=TP4),
    _fault("column_input_gradient_reduced_twice", "a column-parallel layer sums its input gradient twice",
           wrap_forward(_reduced_twice, *_COLUMN), "duplicate_reduce", topology=TP2_DP2, zero_stage=1),
    _fault("column_input_gradient_reduced_twice_on_one_rank",
           "one rank alone sums the input gradient of a column-parallel layer twice",
           wrap_forward(_reduced_twice_on_one_rank, *_COLUMN), "duplicate_reduce", family="gemma2"),
    _fault("column_reduce_lost_on_a_strided_gradient",
           "the all-reduce of a non-contiguous input gradient sums a copy and returns the original",
           replace_forward(_reduce_lost_on_a_strided_gradient, *_COLUMN), "missing_reduce",
           link="https://github.com/NovaSky-AI/SkyRL/pull/1886"),
    _fault("row_parallel_backward_reduces",
           "the backward of a row-parallel layer's all-reduce sums gradients that are replicas already",
           wrap_forward(_row_parallel_backward_reduces, *_ROW, or_weight=True), "duplicate_reduce", "gradient_scaled",
           topology=TP4),
    _fault("qk_norm_partial_in_qwen3",
           "the norms of queries and keys keep the gradient of their rank's heads (DeepSpeed's heuristics, qwen3)",
           fault_of_the_backend("*.q_norm", "*.k_norm"), "partial_gradient_on_replica", family="qwen3",
           ignore_plan=True),
    _fault("qk_norm_partial_in_gemma3",
           "the norms of queries and keys keep the gradient of their rank's heads (DeepSpeed's heuristics, gemma3)",
           fault_of_the_backend("*.q_norm", "*.k_norm"), "partial_gradient_on_replica", family="gemma3_text",
           ignore_plan=True, topology=TP2_DP2, zero_stage=2),
    _fault("qk_layernorm_partial_in_phi",
           "the layer norms of queries and keys keep the gradient of their rank's heads (DeepSpeed, phi)",
           fault_of_the_backend("*.q_layernorm", "*.k_layernorm"), "partial_gradient_on_replica", family="phi",
           settings={"qk_layernorm": True}),
    _fault("mla_shared_branch_partial",
           "the latent and the rotary key that all heads share get the gradient of their rank's heads (deepseek_v3)",
           fault_of_the_backend("*.kv_a_proj_with_mqa", "*.self_attn"), "missing_reduce", family="deepseek_v3",
           ignore_plan=True),
    _fault("router_gradient_partial", "a router keeps the gradient through its rank's experts",
           change_gradient(_through_local_experts, "*.router.weight", "*.mlp.gate.weight"),
           "partial_gradient_on_replica", family="gpt_oss"),
    _fault("sequence_parallel_norm_not_reduced",
           "under sequence parallelism a norm keeps the gradient of its rank's part of the sequence",
           _norm_over_a_sequence_shard, "partial_gradient_on_replica",
           link="https://github.com/NVIDIA/Megatron-LM/issues/1446"),
    _fault("sequence_parallel_norm_not_reduced_on_four_ranks",
           "under sequence parallelism a norm keeps the gradient of its rank's part of the sequence, on four ranks",
           _norm_over_a_sequence_shard, "partial_gradient_on_replica",
           link="https://github.com/NVIDIA/TransformerEngine/issues/435", topology=TP4),
    _fault("gradient_times_tp", "a gradient is summed over ranks, each of which already holds the full gradient",
           _scaled(lambda live: live.tp, "*.weight"), "gradient_scaled", topology=TP2_DP2, zero_stage=2),
    _fault("gradient_divided_by_tp", "a gradient is averaged over the TP group although it is whole on each rank",
           _scaled(lambda live: 1 / live.tp, "*.weight"), "gradient_scaled", topology=TP4),
    _fault("gradient_scaled_on_one_rank", "one rank's gradient has another scale", _one_rank_scaled, "gradient_scaled",
           topology=TP4),
    _fault("row_bias_gradient_summed",
           "the gradient of a row-parallel layer's bias, whole on each rank, is summed over them",
           change_gradient(_summed, "*.out_proj.bias", "*.fc2.bias"), "gradient_scaled", family="opt"),
    _fault("input_overwritten_by_a_reduce",
           "an in-place all-reduce overwrites an input that the weight's gradient still needs",
           wrap_forward(_overwritten_in_place, *_ROW, or_weight=True), None),
    _fault("parameter_frozen", "a parameter was frozen and never gets a gradient", _frozen, "gradient_missing"),
    _fault("branch_detached", "a branch is cut out of the backward pass",
           wrap_forward(_detached, "*.v_proj", "*.up_proj", "*.mlp"), "gradient_missing"),
    _fault("gradient_lost_on_one_rank", "one rank's gradient of a replicated parameter is zero",
           change_gradient(_zero_on_one_rank, "*norm.weight"), "gradient_missing", "all_zero"),
    _fault("gradients_of_two_layers_swapped", "two layers get each other's gradients", _swapped,
           "tensor_of_another_layer"),
    _fault("gradient_of_the_next_rank", "each rank has the gradient of the next rank's shard",
           change_gradient(_of_the_next_rank, *_MATRICES), "shard_order_swapped", family="qwen2", topology=TP4),
    _fault("tied_weight_trained_apart",
           "a tied weight became two parameters, equal at first, each with a gradient of its own",
           inject_always(_untie, parameters=("model.embed_tokens.weight",)), "tied_weight_untied", family="qwen2",
           settings={"tie_word_embeddings": True}),
)  # fmt: skip
