"""Where the elements of this rank lie in whole tensors: by DTensor's placements, by the layouts that backends read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import nn

from tpcheck.backends.live_groups import LiveGroups
from tpcheck.backends.local_part import local_shape
from tpcheck.backends.registry import layout_readers
from tpcheck.numerics.global_index import GlobalIndex


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Return whether it is a DTensor; importing DTensor takes time, and no plain tensor needs it."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def index_of_dtensor(tensor: Any) -> GlobalIndex | None:
    """Return which elements of the whole tensor this rank's part of a DTensor holds; None where that is unknown.

    Dims of the mesh over which the tensor is `Partial` or `Replicate` cut nothing.
    """
    shape, mesh = tuple(tensor.shape), tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    indices: list[torch.Tensor | None] = [None] * len(shape)
    for mesh_dim, split_factor in _cuts(tensor):
        dim = tensor.placements[mesh_dim].dim % len(shape)
        known = indices[dim]
        every = torch.arange(shape[dim]) if known is None else known
        indices[dim] = _chunk(every, split_factor, mesh.size(mesh_dim), coordinate[mesh_dim])
    sizes = tuple(size if index is None else len(index) for size, index in zip(shape, indices, strict=True))
    return GlobalIndex(shape, tuple(indices)) if sizes == tuple(tensor.to_local().shape) else None


def _cuts(tensor: Any) -> Iterator[tuple[int, int]]:
    """Yield the dims of the mesh that cut, in the order of the cuts, each with the split factor of its cut.

    FSDP2 cuts what TP has cut before, and writes that as `_StridedShard` with the number of TP's cuts on its right as
    split factor (torch/distributed/fsdp/_fully_shard/_fsdp_param.py:_init_sharding_spec_tp at 2.13). The cut that
    `_StridedShard` itself describes has other sizes where they are uneven, so this one is made last instead.
    """
    placements, mesh = tensor.placements, tensor.device_mesh
    last = []
    for mesh_dim, placement in enumerate(placements):
        if not hasattr(placement, "dim"):
            continue
        split_factor = getattr(placement, "split_factor", 1)
        right = range(mesh_dim + 1, len(placements))
        cut_before = prod(mesh.size(dim) for dim in right if getattr(placements[dim], "dim", None) == placement.dim)
        if split_factor > 1 and split_factor == cut_before:
            last.append(mesh_dim)
        else:
            yield mesh_dim, split_factor
    for mesh_dim in reversed(last):
        yield mesh_dim, 1


def _chunk(indices: torch.Tensor, split_factor: int, num_ranks: int, rank: int) -> torch.Tensor:
    chunks = [torch.chunk(block, num_ranks) for block in torch.chunk(indices, split_factor)]
    return torch.cat([chunk[rank] for chunk in chunks if rank < len(chunk)] or [indices[:0]])


def fragment_of(index: GlobalIndex, first: int, end: int) -> GlobalIndex:
    """Return the index of the elements from `first` to `end` (exclusive) of the flattened local tensor."""
    positions = None if index.positions is None else index.positions[first:end]
    return replace(index, fragment=(first, end), positions=positions)


def read_indices(model: nn.Module, groups: LiveGroups | None) -> dict[str, GlobalIndex | None]:
    """Return the indices of the parameters that are no DTensors, by their names in this model.

    None where the layout over TP is unknown: of a layer that its backend cannot gather, or of one that belongs to no
    backend in a model that TP ranks share. Collective over the TP group where a backend has layers in the model.
    """
    if groups is not None and len(groups.tp) == 1:
        return {name: GlobalIndex.whole(local_shape(parameter)) for name, parameter in _named_plain_parameters(model)}
    readers = layout_readers(model)
    indices: dict[str, GlobalIndex | None] = {}
    for prefix, module in model.named_modules():
        # One module at a time: layouts of all parameters take eight bytes an element.
        reader = readers.get(type(module).__module__.partition(".")[0])
        own = dict(module.named_parameters(recurse=False))
        layouts = {} if reader is None or not own else reader.layouts_of(module)
        for name, parameter in own.items():
            full_name = f"{prefix}.{name}" if prefix else name
            if is_dtensor(parameter):
                continue
            if groups is not None and name in layouts:
                indices[full_name] = GlobalIndex.from_layout(layouts[name], groups.tp.index(groups.rank))
            elif readers and reader is None:  # the backend replaces the layers that it shards; the others are whole
                indices[full_name] = GlobalIndex.whole(local_shape(parameter))
            else:
                indices[full_name] = None
    return indices


def _named_plain_parameters(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not is_dtensor(parameter):
            yield name, parameter
