"""Faults of replicated weights that keep the gradient of their rank's heads, experts or part of the sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import Draw, Live, Place, Planting
from tpcheck.lab.faults.injection import gradient_fault, hook_gradient

_NORMS = ("*.input_layernorm", "*.post_attention_layernorm", "model.norm")

_TP4 = Topology(tp=4)
_TP2_DP2 = Topology(tp=2, dp=2)


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


FAULTS = (
    gradient_fault(
        "qk_norm_partial_in_qwen3",
        "the norms of queries and keys keep the gradient of their rank's heads (DeepSpeed's heuristics, qwen3)",
        _nothing_planted("*.q_norm", "*.k_norm"),
        causes=("partial_gradient_on_replica",),
        family="qwen3",
        ignore_plan=True,
    ),
    gradient_fault(
        "qk_norm_partial_in_gemma3",
        "the norms of queries and keys keep the gradient of their rank's heads (DeepSpeed's heuristics, gemma3)",
        _nothing_planted("*.q_norm", "*.k_norm"),
        causes=("partial_gradient_on_replica",),
        family="gemma3_text",
        ignore_plan=True,
        topology=_TP2_DP2,
        zero_stage=2,
    ),
    gradient_fault(
        "qk_layernorm_partial_in_phi",
        "the layer norms of queries and keys keep the gradient of their rank's heads (DeepSpeed, phi)",
        _nothing_planted("*.q_layernorm", "*.k_layernorm"),
        causes=("partial_gradient_on_replica",),
        family="phi",
        settings={"qk_layernorm": True},
    ),
    gradient_fault(
        "mla_shared_branch_partial",
        "the latent and the rotary key that all heads share get the gradient of their rank's heads (deepseek_v3)",
        _nothing_planted("*.kv_a_proj_with_mqa", "*.self_attn"),
        causes=("missing_reduce",),
        family="deepseek_v3",
        ignore_plan=True,
    ),
    gradient_fault(
        "router_gradient_partial",
        "a router keeps the gradient through its rank's experts",
        _router_of_its_own_experts,
        causes=("partial_gradient_on_replica",),
        family="gpt_oss",
    ),
    gradient_fault(
        "sequence_parallel_norm_not_reduced",
        "under sequence parallelism a norm keeps the gradient of its rank's part of the sequence",
        _norm_over_a_sequence_shard,
        causes=("partial_gradient_on_replica",),
        link="https://github.com/NVIDIA/Megatron-LM/issues/1446",
    ),
    gradient_fault(
        "sequence_parallel_norm_not_reduced_on_four_ranks",
        "under sequence parallelism a norm keeps the gradient of its rank's part of the sequence, on four ranks",
        _norm_over_a_sequence_shard,
        causes=("partial_gradient_on_replica",),
        link="https://github.com/NVIDIA/TransformerEngine/issues/435",
        topology=_TP4,
    ),
)
