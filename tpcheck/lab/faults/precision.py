"""Faults of precision: something is computed or kept with fewer digits than the rest."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from tpcheck.core.topology import Topology
from tpcheck.lab.faults.fault import Draw, Live, ModelFault, Place, Planting
from tpcheck.lab.faults.injection import after_step, hook_gradient

_KIND = "precision"
_ROUNDED = ("dtype_rounded",)

_TP4 = Topology(tp=4)
_DP2 = Topology(tp=2, dp=2)


def _as_bfloat16(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16).to(tensor.dtype)


def _output_rounded(draw: Draw) -> Planting:
    name = draw.module("*.q_proj", "*.o_proj", "*.up_proj", "*.down_proj", "*layernorm", "model.norm")

    def plant(live: Live) -> None:
        module = live.module(name)
        once = module.forward
        module.forward = lambda hidden: _as_bfloat16(once(hidden))

    return Planting(plant, Place(modules=(name,)))


def _output_rounded_on_one_rank(draw: Draw) -> Planting:
    name, wrong = draw.module("*.gate_proj", "*.k_proj", "*layernorm"), draw.tp_rank()

    def plant(live: Live) -> None:
        if live.tp_rank == wrong:
            module = live.module(name)
            once = module.forward
            module.forward = lambda hidden: once(hidden).half().to(hidden.dtype)

    return Planting(plant, Place(modules=(name,)))


def _main_gradient_dropped(draw: Draw) -> Planting:
    name = draw.parameter("*_proj.weight", "*norm.weight")
    return Planting(lambda live: hook_gradient(live, name, _as_bfloat16), Place(parameters=(name,)))


def _main_weight_dropped(draw: Draw) -> Planting:
    names = draw.parameters_fitting("*_proj.weight")

    def plant(live: Live) -> None:
        def rounded(step: int) -> None:
            for name in names:
                weight = live.parameter(name).data
                weight.copy_(_as_bfloat16(weight))

        after_step(live, rounded)

    return Planting(plant, Place(parameters=names))


def _epsilon_on_one_rank(draw: Draw) -> Planting:
    name, wrong = draw.module("*layernorm", "model.norm"), draw.tp_rank()

    def plant(live: Live) -> None:
        if live.tp_rank == wrong:
            live.module(name).variance_epsilon *= 10

    return Planting(plant, Place(modules=(name,)))


def _rotary_table_rounded(draw: Draw) -> Planting:
    name = draw.module("model.rotary_emb")

    def plant(live: Live) -> None:
        module = live.module(name)
        once = module.forward
        module.forward = lambda *args, **kwargs: tuple(_as_bfloat16(table) for table in once(*args, **kwargs))

    return Planting(plant, Place(modules=(name,)))


def _softmax_in_lower_precision(draw: Draw) -> Planting:
    name = draw.module("*.self_attn")

    def plant(live: Live) -> None:
        module = live.module(name)
        once, softmax = module.forward, functional.softmax

        def low(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return softmax(scores.to(torch.bfloat16), dim=-1).to(scores.dtype)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with patch.object(functional, "softmax", low):
                return once(*args, **kwargs)

        module.forward = forward

    return Planting(plant, Place(modules=(name,)))


def _nowhere_to_plant(draw: Draw) -> Planting:
    """The configuration alone is the fault."""
    return Planting(lambda live: None, Place())


FAULTS = (
    ModelFault(
        "module_rounded_to_bfloat16",
        _KIND,
        "one module's output is rounded to bfloat16",
        _output_rounded,
        checks=("outputs_match_reference",),
        causes=_ROUNDED,
        topology=_TP4,
    ),
    ModelFault(
        "module_rounded_to_float16_on_one_rank",
        _KIND,
        "one module's output is rounded to float16 on one rank",
        _output_rounded_on_one_rank,
        checks=("outputs_match_reference",),
        causes=_ROUNDED,
    ),
    ModelFault(
        "main_gradient_dropped",
        _KIND,
        "a gradient is kept in bfloat16 where it should be accumulated in full precision",
        _main_gradient_dropped,
        checks=("gradients_match_reference",),
        causes=_ROUNDED,
        topology=_TP4,
    ),
    ModelFault(
        "main_weight_dropped",
        _KIND,
        "weights are kept in bfloat16 from step to step where the optimizer should keep full precision",
        _main_weight_dropped,
        checks=("updates_match_reference",),
        causes=_ROUNDED,
    ),
    ModelFault(
        "gradients_averaged_in_bfloat16",
        _KIND,
        "gradients are averaged over data parallelism in bfloat16",
        _nowhere_to_plant,
        checks=("gradients_match_reference",),
        causes=_ROUNDED,
        topology=_DP2,
        config={"communication_data_type": "bf16"},
    ),
    ModelFault(
        "epsilon_changed_on_one_rank",
        _KIND,
        "a norm's epsilon is ten times as large on one rank",
        _epsilon_on_one_rank,
        checks=("outputs_match_reference",),
        causes=(None,),
        topology=_TP4,
    ),
    ModelFault(
        "rotary_table_in_bfloat16",
        _KIND,
        "the tables of the rotary embedding are rounded to bfloat16",
        _rotary_table_rounded,
        checks=("outputs_match_reference",),
        causes=_ROUNDED,
    ),
    ModelFault(
        "softmax_in_bfloat16",
        _KIND,
        "the softmax of attention is computed in bfloat16",
        _softmax_in_lower_precision,
        checks=("outputs_match_reference",),
        causes=(None,),
    ),
)
