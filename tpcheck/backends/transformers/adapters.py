"""PEFT models under transformers' TP: the base model is sharded while it is loaded, then gets its adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tpcheck.backends.local_part import local_part


def add_adapters(load_sharded: Callable[[nn.Module], nn.Module], model: Any) -> Any:
    """Shard the base model, add the adapters as a user would, and give them the values that `model` has. Collective.

    peft (0.21) shards `lora_B` behind a column-parallel layer and `lora_A` before a row-parallel one, and leaves the
    other whole on every rank (tuners/lora/model.py:add_lora_tp_hooks_dtensor).

    Args:
        load_sharded: Returns the sharded copy of a model of transformers.

    Raises:
        AdapterError: peft cannot add such adapters to the sharded base, or makes them of other sizes.
    """
    import peft

    base = copy.deepcopy(model).unload()
    for parameter in base.parameters():
        parameter.requires_grad_(True)  # what is frozen is decided by the adapters
    sharded: Any = load_sharded(base)
    first, *others = model.peft_config
    try:
        # adapters of the run's dtype: peft's default is float32 beside 16-bit weights
        adapted = peft.get_peft_model(
            sharded, copy.deepcopy(model.peft_config[first]), adapter_name=first, autocast_adapter_dtype=False
        )
        for name in others:
            adapted.add_adapter(name, copy.deepcopy(model.peft_config[name]), autocast_adapter_dtype=False)
    except Exception as error:
        reason = f"peft adds no such adapters to the sharded model: {type(error).__name__}: {error}"
        raise AdapterError(reason) from error
    expected = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name in expected:
                parameter.requires_grad_(expected[name].requires_grad)
                _copy(name, expected[name].detach(), parameter)
    return adapted


def _copy(name: str, value: torch.Tensor, parameter: nn.Parameter) -> None:
    """Copy this rank's part of a value to a parameter.

    Raises:
        AdapterError: peft has made the parameter of another size.
    """
    placed, part = parameter.data, value.to(parameter.dtype)
    if isinstance(placed, DTensor) and placed.shape == part.shape:
        part = distribute_tensor(part, placed.device_mesh, placed.placements, src_data_rank=None)
    made, needed = tuple(local_part(placed).shape), tuple(local_part(part).shape)
    if made != needed:
        raise AdapterError(f"peft makes {name} of shape {made} on this rank, which needs {needed}")
    parameter.copy_(part)


class AdapterError(Exception):
    """peft, which is under test, cannot do what the model asks for."""
