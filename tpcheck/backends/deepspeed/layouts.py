"""The layouts of parameters under DeepSpeed AutoTP, as its tensor-parallel layers gather them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpcheck.backends.layout import Layout
from tpcheck.backends.local_part import restored_data


def parallel_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) for each layer that DeepSpeed has replaced by a tensor-parallel one."""
    for name, module in model.named_modules():
        if hasattr(module, "gather_params") and hasattr(module, "mp_group"):
            yield name, module


def parameter_layouts(model: nn.Module, group: Any) -> dict[str, Layout]:
    """Return the layout of every parameter except those that their layer cannot gather. Collective over the TP group.

    Each layer gathers, through its own `gather_params`, a shard whose values are their positions: the result is the
    layout, whatever the layer does inside.
    """
    tp = dist.get_world_size(group)
    layouts = {
        name: Layout.replicated(local_shape(parameter), tp)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    for prefix, layer in parallel_layers(model):
        for name, layout in _layer_layouts(layer, group).items():
            full_name = f"{prefix}.{name}" if prefix else name
            if layout is None:
                del layouts[full_name]
            else:
                layouts[full_name] = layout
    return layouts


def local_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of this rank's TP shard, which ZeRO-3 keeps in `ds_shape` while it partitions the data."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _layer_layouts(layer: Any, group: Any) -> dict[str, Layout | None]:
    """Return the layouts of a layer's weight and bias, None where the layer cannot gather them."""
    parameters = {name: getattr(layer, name, None) for name in ("weight", "bias")}
    present = {name: parameter for name, parameter in parameters.items() if parameter is not None}
    shapes_by_rank: list[dict[str, tuple[int, ...]]] = [{} for _ in range(dist.get_world_size(group))]
    own_shapes = {name: local_shape(parameter) for name, parameter in present.items()}
    dist.all_gather_object(shapes_by_rank, own_shapes, group=group)
    tp_rank = dist.get_rank(group)
    with restored_data(present.values()):
        for name, parameter in present.items():
            sizes = [prod(shapes[name]) for shapes in shapes_by_rank]
            start = sum(sizes[:tp_rank])
            # float64, since the data of a parameter must be floating point: exact below 2**53 elements
            positions = torch.arange(start, start + sizes[tp_rank], dtype=torch.float64, device=parameter.device)
            parameter.data = positions.reshape(own_shapes[name])
        try:
            layer.gather_params(list(present.values()))  # before 0.19 a None in the place of a bias crashes
        except RuntimeError:  # fused blocks that interleave: DeepSpeed trains them but no rank can reassemble them
            return dict.fromkeys(present)
        gathered = {name: parameter.data.clone() for name, parameter in present.items()}
    return {
        name: _layout(source.to(torch.int64), tuple(shapes[name] for shapes in shapes_by_rank))
        for name, source in gathered.items()
    }


def _layout(source: torch.Tensor, local_shapes: tuple[tuple[int, ...], ...]) -> Layout:
    is_replicated = all(shape == tuple(source.shape) for shape in local_shapes)
    return Layout(tuple(source.shape), local_shapes, None if is_replicated else source.reshape(-1).cpu())
