"""What a tensor that may be a DTensor says of where its elements lie: its TP shard, whole over DP, and its layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

from tpcheck.adapters import Layout
from tpcheck.backends.dtensor.mesh import dims_along
from tpcheck.topology import Topology


def tp_shard(tensor: torch.Tensor, like: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Return a copy of this rank's part of `tensor`, cut over TP as `like` is and whole over DP.

    Collective over the tensor's mesh. A gradient may lie otherwise than its parameter (terms of a sum, or whole where
    the parameter is cut): the optimizer brings it into the parameter's placements, and so does this.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.clone()
    placements = _placements_over_tp(like, topology) if isinstance(like, DTensor) else _whole(tensor)
    return tensor.redistribute(placements=placements).to_local().clone()


def is_over(tensor: torch.Tensor, axis: str, topology: Topology) -> bool:
    """Return whether the mesh of a DTensor has ranks along `axis`."""
    if not isinstance(tensor, DTensor):
        return False
    return any(tensor.device_mesh.size(dim) > 1 for dim in dims_along(tensor.device_mesh, topology, axis))


def layouts(parameters: Mapping[str, torch.Tensor], topology: Topology, group: Any) -> dict[str, Layout]:
    """Return how each parameter lies over the TP group. Collective over it.

    DTensor itself is asked: a tensor of the parameter's global shape whose values say where they come from is cut as
    the parameter is. A parameter whose local shape is not what its placements say is left out.
    """
    own = {name: _own_part(parameter, topology) for name, parameter in parameters.items()}
    ranks: list[dict[str, _Part]] = [own]
    if dist.get_world_size(group) > 1:
        ranks = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(ranks, own, group=group)
    found = {
        name: _layout(tuple(parameter.shape), [parts[name] for parts in ranks])
        for name, parameter in parameters.items()
    }
    return {name: layout for name, layout in found.items() if layout is not None}


_Part = tuple[tuple[int, ...], torch.Tensor | None] | None  # local shape, and where each element comes from


def _own_part(parameter: torch.Tensor, topology: Topology) -> _Part:
    """Return what this rank holds; all of it without sources, and None where the placements do not say."""
    local = parameter.detach()
    if not isinstance(local, DTensor) or not is_over(local, "tp", topology):
        return tuple(parameter.shape), None
    placements = _placements_over_tp(local, topology)
    shape = tuple(local.redistribute(placements=placements).to_local().shape)
    if all(placement.is_replicate() for placement in placements):
        return (shape, None) if shape == tuple(parameter.shape) else None
    ids = torch.arange(prod(parameter.shape), device=local.device).reshape(parameter.shape)
    sources = distribute_tensor(ids, local.device_mesh, placements, src_data_rank=None).to_local()
    return (shape, sources.reshape(-1).cpu()) if tuple(sources.shape) == shape else None


def _layout(shape: tuple[int, ...], parts: Sequence[_Part]) -> Layout | None:
    told = [part for part in parts if part is not None]
    if len(told) < len(parts):
        return None
    local_shapes = tuple(local for local, _ in told)
    sources = [ids for _, ids in told if ids is not None]
    if not sources:
        return Layout(shape, local_shapes)
    pool = torch.cat(sources)
    places = torch.zeros(prod(shape), dtype=torch.int64)
    places[pool] = torch.arange(len(pool))
    return Layout(shape, local_shapes, places)


def _placements_over_tp(tensor: DTensor, topology: Topology) -> list[Placement]:
    tp = dims_along(tensor.device_mesh, topology, "tp")
    return [placement if dim in tp else Replicate() for dim, placement in enumerate(tensor.placements)]


def _whole(tensor: DTensor) -> list[Placement]:
    return [Replicate() for _ in range(tensor.device_mesh.ndim)]
