"""Faults of LoRA adapters: gradients of A and B, what ranks start from, the scale of the delta, what is saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.functional import linear

from tpcheck.lab.faults.fault import TP2, Draw, Injection, Live, Place, fault_constructor
from tpcheck.lab.faults.injection import inject_always

_KIND = "adapters"
COLUMN_PARALLEL = "4,q_proj,k_proj,v_proj,gate_proj,up_proj"
"""The layers on which peft and transformers can add adapters under TP."""

_SHARED: dict[str, Any] = {"settings": {"num_hidden_layers": 1}, "topologies": (TP2,), "steps": 1}
_transformers = fault_constructor(
    _KIND, "gradients_match_reference", options={"lora": COLUMN_PARALLEL}, backend="transformers", **_SHARED
)
_dtensor = fault_constructor(_KIND, "outputs_match_reference", options={"lora": 4}, backend="dtensor", **_SHARED)


def _draw_half(draw: Draw, patterns: tuple[str, ...], forward: Callable[[Any, Any], Any]) -> Injection:
    """Return an injection into half of an adapter, whose forward becomes `forward(half, hidden)`."""
    name = draw.module(*patterns)

    def inject(live: Live) -> None:
        half = live.module(name)
        half.forward = lambda hidden: forward(half, hidden)

    layer, _, adapter = name.rpartition(".lora_")
    halves = tuple(f"{layer}.lora_{half}.{adapter.partition('.')[2]}" for half in "AB")
    return Injection(inject, Place(halves, tuple(f"{half}.weight" for half in halves)))


def _input_gradient_unreduced(draw: Draw) -> Injection:
    def forward(half: Any, hidden: Any) -> Any:
        return linear(hidden, half.weight.to_local())

    return _draw_half(draw, ("*.q_proj.lora_B.default", "*.up_proj.lora_B.default"), forward)


def _output_unreduced(draw: Draw) -> Injection:
    def forward(half: Any, hidden: Any) -> Any:
        terms = linear(hidden.to_local(), half.weight.to_local())
        return DTensor.from_local(terms, half.weight.device_mesh, [Replicate()], run_check=False)

    return _draw_half(draw, ("*.o_proj.lora_A.default", "*.down_proj.lora_A.default"), forward)


def _drawn_by_each_rank(draw: Draw) -> Injection:
    name = draw.parameter("*.lora_A.default.weight")

    def inject(live: Live) -> None:
        if live.tp_rank == 0:
            return  # what all should hold
        generator = torch.Generator().manual_seed(live.rank.rank)
        with torch.no_grad():
            weight = live.parameter(name)
            weight.copy_(torch.randn(weight.shape, generator=generator).to(weight))

    return Injection(inject, Place(parameters=(name,)))


def _other_scale_on_one_rank(draw: Draw) -> Injection:
    name, tp_rank = draw.module("*.self_attn.?_proj", "*.mlp.gate_proj", "*.mlp.up_proj"), draw.tp_rank()

    def inject(live: Live) -> None:
        if live.tp_rank == tp_rank:
            live.module(name).scaling["default"] *= 2

    return Injection(inject, Place(modules=(name,)))


def _scaled_after_the_backward_pass(draw: Draw) -> Injection:
    name = draw.parameter("*.lora_?.default.weight")

    def inject(live: Live) -> None:
        backward = live.candidate.backward

        def backward_and_scale(loss: Tensor) -> None:
            backward(loss)
            _local(live.parameter(name).grad).mul_(1.5)

        live.candidate.backward = backward_and_scale

    return Injection(inject, Place(parameters=(name,)))


def _base_is_trained(draw: Draw) -> Injection:
    name = draw.parameter("*.q_proj.base_layer.weight", "*.o_proj.weight")

    def inject(live: Live) -> None:
        step = live.candidate.step

        def step_and_decay() -> None:
            step()
            with torch.no_grad():
                live.parameter(name).mul_(0.9995)

        live.candidate.step = step_and_decay

    return Injection(inject, Place(parameters=(name,)))


def _save_shards_of_one_rank(live: Live) -> None:
    def save(folder: Path) -> None:
        model = live.candidate.module
        shards = {name: _local(tensor) for name, tensor in model.state_dict().items() if "lora_" in name}
        model.save_pretrained(str(folder), state_dict=shards, is_main_process=live.rank.rank == 0)

    live.candidate.ways_to_save = lambda: {"save_pretrained": save}


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).contiguous()


FAULTS = (
    _transformers("lora_a_gradient_unreduced", "Each rank keeps its term of the gradient of A, behind a B of shards",
                  _input_gradient_unreduced, "missing_reduce", "partial_gradient_on_replica"),
    _dtensor("lora_a_output_unreduced", "The terms of A before a row-parallel layer are not summed",
             _output_unreduced, "missing_reduce"),
    _dtensor("lora_gradient_scaled_in_bfloat16",
             "the gradient of a half of an adapter is multiplied by 1.5 between the backward pass and the step",
             _scaled_after_the_backward_pass, "gradient_scaled", checks=("gradients_match_reference",),
             dtype="bfloat16"),
    _transformers("lora_a_drawn_by_each_rank", "Each rank draws the A that all should hold from its own generator",
                  _drawn_by_each_rank, None, "replica_drift", checks=("weights_match_reference", "replicas_agree")),
    _transformers("lora_scale_of_one_rank", "One rank scales its part of the delta by another alpha",
                  _other_scale_on_one_rank, None, checks=("outputs_match_reference",)),
    _transformers("lora_base_not_frozen", "Weight decay reaches a frozen weight of the base",
                  _base_is_trained, None, checks=("updates_match_reference",)),
    _transformers("lora_saved_from_one_rank", "The adapter that is saved holds the first rank's shards of B",
                  inject_always(_save_shards_of_one_rank), "shard_missing", checks=("checkpoint_matches_reference",),
                  options={"lora": COLUMN_PARALLEL, "checks": ("checkpoint_matches_reference",)}),
)  # fmt: skip
