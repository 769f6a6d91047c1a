"""Puts together what a live model has cut over ranks, each part with the means of who cut it. Collective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpcheck.errors import CheckpointError


def gathered(entries: Mapping[str, Any], module: nn.Module | None) -> dict[str, Any]:
    """Return the entries of a state dict, with those that are sharded replaced by whole ones on the CPU.

    Args:
        entries: Names with tensors, and whatever else a state dict holds.
        module: What the state dict is of, whose tensor-parallel layers know how they are cut.

    Raises:
        CheckpointError: A tensor is a shard that nothing here can put together.
    """
    layers = () if module is None else _parallel_layers(module)
    of_layers = {id(one): whole for layer in layers for one, whole in _of_layer(*layer)}
    whole = dict(entries)
    for name, value in entries.items():
        if id(value) in of_layers:
            whole[name] = of_layers[id(value)]
        elif _is_shard_of_other_code(value):
            raise CheckpointError(
                f"Parameter {name!r} is this rank's shard of a tensor-parallel parameter, "
                "which only the code that cut it can put together: compare what it saves."
            )
        elif hasattr(value, "full_tensor"):  # a DTensor
            whole[name] = value.full_tensor().detach().cpu()
        elif is_sharded(value):
            with _unpartitioned([value]):
                whole[name] = value.detach().cpu().clone()
    return whole


def is_sharded(value: Any) -> bool:
    """Return whether this rank holds a part of the tensor alone, as the tensor itself tells."""
    return hasattr(value, "full_tensor") or (hasattr(value, "ds_id") and hasattr(value, "ds_shape"))


def _is_shard_of_other_code(value: Any) -> bool:
    """Return whether the parameter is marked as Megatron marks those that it cuts."""
    several_ranks = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several_ranks and bool(getattr(value, "tensor_model_parallel", False))


def _parallel_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) for each layer that DeepSpeed has replaced by a tensor-parallel one."""
    for name, layer in module.named_modules():
        if hasattr(layer, "gather_params") and getattr(layer, "mp_group", None) is not None:
            yield name, layer


def _of_layer(name: str, layer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each parameter of the layer with the whole one, from which tied names elsewhere get theirs."""
    parameters = (getattr(layer, "weight", None), getattr(layer, "bias", None))
    present = [parameter for parameter in parameters if parameter is not None]
    with _unpartitioned(present), _data_set_aside(present):
        for parameter in present:
            parameter.data = parameter.data.clone()  # what gathers may write into it
        try:
            layer.gather_params(list(present))  # before deepspeed 0.19 a None in the place of a bias crashes
        except RuntimeError as error:
            raise CheckpointError(
                f"Layer {name!r} holds a shard of its parameters that DeepSpeed cannot put together."
            ) from error
        return [(parameter, parameter.data.detach().cpu().clone()) for parameter in present]


@contextmanager
def _data_set_aside(parameters: list[torch.Tensor]) -> Iterator[None]:
    saved = [parameter.data for parameter in parameters]
    try:
        yield
    finally:
        for parameter, data in zip(parameters, saved, strict=True):
            parameter.data = data


def _unpartitioned(parameters: list[torch.Tensor]) -> Any:
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        return nullcontext()
    from deepspeed import zero  # has partitioned them, so it is there

    return zero.GatheredParameters(partitioned)
