"""Faults of precision: a value is computed or stored in a lower dtype than the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from tpcheck.lab.faults.fault import TP2_DP2, TP4, Draw, Injection, Live, Place, fault_constructor
from tpcheck.lab.faults.injection import after_step, change_gradient, fault_of_the_backend, wrap_forward

_ROUNDED = ("*.q_proj", "*.o_proj", "*.up_proj", "*.down_proj", "*layernorm", "model.norm")

_fault = fault_constructor("precision", "outputs_match_reference")


def _as_bfloat16(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def _output_rounded(live: Live, tp_rank: int, forward: Callable[..., Any], hidden: Tensor) -> Tensor:
    return _as_bfloat16(forward(hidden))


def _output_rounded_on_one_rank(live: Live, tp_rank: int, forward: Callable[..., Any], hidden: Tensor) -> Any:
    output = forward(hidden)
    return output.half().to(hidden.dtype) if live.tp_rank == tp_rank else output


def _main_weight_dropped(draw: Draw) -> Injection:
    names = draw.parameters_matching("*_proj.weight")

    def inject(live: Live) -> None:
        def round_weights(step: int) -> None:
            for name in names:
                weight = live.parameter(name).data
                weight.copy_(_as_bfloat16(weight))

        after_step(live, round_weights)

    return Injection(inject, Place(parameters=names))


def _weight_changed_beside_its_master(draw: Draw) -> Injection:
    name, tp_rank = draw.parameter("*_proj.weight"), draw.tp_rank()

    def inject(live: Live) -> None:
        def change(step: int) -> None:
            if live.tp_rank == tp_rank:
                live.parameter(name).data.mul_(1.05)

        after_step(live, change)

    return Injection(inject, Place(parameters=(name,)))


def _epsilon_on_one_rank(draw: Draw) -> Injection:
    name, wrong = draw.module("*layernorm", "model.norm"), draw.tp_rank()

    def inject(live: Live) -> None:
        if live.tp_rank == wrong:
            live.module(name).variance_epsilon *= 10

    return Injection(inject, Place(modules=(name,)))


def _tables_rounded(live: Live, tp_rank: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return tuple(_as_bfloat16(table) for table in forward(*args, **kwargs))


def _softmax_in_bfloat16(live: Live, tp_rank: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    softmax = functional.softmax

    def low_precision(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return softmax(scores.to(torch.bfloat16), dim=-1).to(scores.dtype)

    with patch.object(functional, "softmax", low_precision):
        return forward(*args, **kwargs)


FAULTS = (
    _fault("module_rounded_to_bfloat16", "one module's output is rounded to bfloat16",
           wrap_forward(_output_rounded, *_ROUNDED),
           "dtype_rounded", topology=TP4),
    _fault("module_rounded_to_float16_on_one_rank", "one module's output is rounded to float16 on one rank",
           wrap_forward(_output_rounded_on_one_rank, "*.gate_proj", "*.k_proj", "*layernorm"), "dtype_rounded"),
    _fault("main_gradient_dropped", "a gradient is kept in bfloat16 where it should be accumulated in full precision",
           change_gradient(lambda live, tp_rank, gradient: _as_bfloat16(gradient), "*_proj.weight", "*norm.weight"),
           "dtype_rounded", checks=("gradients_match_reference",), topology=TP4),
    _fault("main_weight_dropped",
           "weights are kept in bfloat16 from step to step where the optimizer should keep full precision",
           _main_weight_dropped, "dtype_rounded", checks=("updates_match_reference",)),
    _fault("weight_changed_beside_its_master",
           "a bfloat16 weight is changed on one rank after the step, and its float32 master is not",
           _weight_changed_beside_its_master, "masters_stale", checks=("updates_match_reference",), dtype="bfloat16",
           zero_stage=1, options={"optimizer": "adamw"}, steps=1),
    _fault("gradients_averaged_in_bfloat16", "gradients are averaged over data parallelism in bfloat16",
           fault_of_the_backend(), "dtype_rounded", checks=("gradients_match_reference",), topology=TP2_DP2,
           config={"communication_data_type": "bf16"}),
    _fault("epsilon_changed_on_one_rank", "a norm's epsilon is ten times as large on one rank", _epsilon_on_one_rank,
           None, topology=TP4),
    _fault("rotary_table_in_bfloat16", "the tables of the rotary embedding are rounded to bfloat16",
           wrap_forward(_tables_rounded, "model.rotary_emb"), "dtype_rounded"),
    _fault("softmax_in_bfloat16", "the softmax of attention is computed in bfloat16",
           wrap_forward(_softmax_in_bfloat16, "*.self_attn"), None),
)  # fmt: skip
