"""Where DeepSpeed's tensor-parallel layers keep each element, learned from the layers themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpcheck.adapters import Layout


def parallel_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) for each layer that DeepSpeed has replaced by a tensor-parallel one."""
    for name, module in model.named_modules():
        if hasattr(module, "gather_params") and hasattr(module, "mp_group"):
            yield name, module


def layouts(model: nn.Module, group: Any) -> dict[str, Layout]:
    """Return the layout of every parameter over the TP group but those that their layer cannot gather. Collective.

    Each layer is asked to gather a shard whose values say where they come from, through its own `gather_params`: what
    comes back is the layout, whatever the layer does inside.
    """
    tp = dist.get_world_size(group)
    found = {
        name: Layout.replicated(local_shape(parameter), tp)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for prefix, layer in parallel_layers(model):
        for name, layout in _layer_layouts(layer, group).items():
            full_name = f"{prefix}.{name}" if prefix else name
            if layout is None:
                del found[full_name]
            else:
                found[full_name] = layout
    return found


def local_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of this rank's TP shard; ZeRO-3 keeps it aside while the data is partitioned over DP."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _layer_layouts(layer: Any, group: Any) -> dict[str, Layout | None]:
    parameters = {name: getattr(layer, name, None) for name in ("weight", "bias")}
    present = {name: parameter for name, parameter in parameters.items() if parameter is not None}
    shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(shapes, {name: local_shape(p) for name, p in present.items()}, group=group)
    tp_rank = dist.get_rank(group)
    with _data_set_aside(*present.values()):
        for name, parameter in present.items():
            sizes = [prod(by_rank[name]) for by_rank in shapes]
            start = sum(sizes[:tp_rank])
            # float64, since a parameter's data must be floating point: exact below 2**53 elements
            ids = torch.arange(start, start + sizes[tp_rank], dtype=torch.float64, device=parameter.device)
            parameter.data = ids.reshape(shapes[tp_rank][name])
        try:
            layer.gather_params(list(present.values()))  # before 0.19 a None in the place of a bias crashes
        except (
            RuntimeError
        ):  # interleaved fused layouts that DeepSpeed trains but cannot reassemble, on all ranks alike
            return dict.fromkeys(present)
        gathered = {name: parameter.data.clone() for name, parameter in present.items()}
    return {
        name: _layout(ids.to(torch.int64), tuple(by_rank[name] for by_rank in shapes)) for name, ids in gathered.items()
    }


def _layout(ids: torch.Tensor, local_shapes: tuple[tuple[int, ...], ...]) -> Layout:
    whole_on_each_rank = all(shape == tuple(ids.shape) for shape in local_shapes)
    if whole_on_each_rank:
        return Layout(tuple(ids.shape), local_shapes)
    return Layout(tuple(ids.shape), local_shapes, ids.reshape(-1).cpu())


@contextmanager
def _data_set_aside(*parameters: torch.Tensor) -> Iterator[None]:
    saved = [parameter.data for parameter in parameters]
    try:
        yield
    finally:
        for parameter, data in zip(parameters, saved, strict=True):
            parameter.data = data
