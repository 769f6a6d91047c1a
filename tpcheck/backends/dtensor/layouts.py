"""The layouts of DTensor parameters over the TP group, and which dims of a mesh lie along which axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor

from tpcheck.backends.layout import Layout
from tpcheck.backends.live_groups import DP_DIM_NAMES
from tpcheck.backends.local_part import local_part, reduced
from tpcheck.core.topology import Topology


def mesh_groups(mesh: DeviceMesh, topology: Topology) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each axis of the topology that the mesh has, with the global ranks of this rank's group on it."""
    for axis in topology.sizes:
        dims = dims_along(mesh, topology, axis)
        if len(dims) == 1:
            yield axis, _ranks(mesh, dims[0])
        elif dims:  # hybrid sharding: replicas of shards
            coordinate = mesh.get_coordinate() or [0] * mesh.ndim
            index = tuple(slice(None) if dim in dims else coordinate[dim] for dim in range(mesh.ndim))
            yield axis, tuple(sorted(mesh.mesh[index].flatten().tolist()))


def dims_along(mesh: DeviceMesh, topology: Topology, axis: str) -> tuple[int, ...]:
    """Return the dims of the mesh that lie along `axis`."""
    return tuple(dim for dim in range(mesh.ndim) if _axis(mesh, dim, topology) == axis)


def _axis(mesh: DeviceMesh, dim: int, topology: Topology) -> str:
    """Return `tp` or `dp` for a dim of the mesh.

    Its ranks decide. Where they fit both axes or neither, its name does, so that a group of wrong ranks is reported as
    a group of that axis.
    """
    ranks = set(_ranks(mesh, dim))
    fitting = [axis for axis in topology.sizes if ranks <= set(topology.peers(dist.get_rank(), axis))]
    if len(fitting) == 1:
        return fitting[0]
    name = (mesh.mesh_dim_names or ("",) * mesh.ndim)[dim]
    return "dp" if name in DP_DIM_NAMES else "tp"


def _ranks(mesh: DeviceMesh, dim: int) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(mesh.get_group(dim)))


def is_over(tensor: torch.Tensor, axis: str, topology: Topology) -> bool:
    """Return whether the tensor is a DTensor whose mesh has several ranks along `axis`."""
    if not isinstance(tensor, DTensor):
        return False
    return any(tensor.device_mesh.size(dim) > 1 for dim in dims_along(tensor.device_mesh, topology, axis))


def tp_shard(tensor: torch.Tensor, parameter: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Return a copy of this rank's TP shard of a parameter or of its gradient, gathered over DP.

    A gradient may have other placements than its parameter (`Partial`, or `Replicate` where the parameter is sharded);
    the optimizer redistributes it to the parameter's placements, and so does this. Collective over the tensor's mesh.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.clone()
    replicated = [Replicate()] * tensor.device_mesh.ndim
    placements = tp_placements(parameter, topology) if isinstance(parameter, DTensor) else replicated
    return local_part(tensor, placements).clone()


def tp_placements(tensor: DTensor, topology: Topology) -> list[Placement]:
    """Return the placements of the tensor over TP, reduced, with `Replicate` on every other dim of the mesh."""
    tp = dims_along(tensor.device_mesh, topology, "tp")
    return [placement if dim in tp else Replicate() for dim, placement in enumerate(reduced(tensor.placements))]


def parameter_layouts(parameters: Mapping[str, torch.Tensor], topology: Topology, group: Any) -> dict[str, Layout]:
    """Return the layout of each parameter over the TP group. Collective over it.

    DTensor distributes a tensor of the parameter's global shape whose values are their positions. A parameter is left
    out where its local shape contradicts its placements, or where several ranks hold the same shard.
    """
    shards = {name: _shard(parameter, topology) for name, parameter in parameters.items()}
    by_rank: list[dict[str, _Shard | None]] = [shards]
    if dist.get_world_size(group) > 1:
        by_rank = [{} for _ in range(dist.get_world_size(group))]
        dist.all_gather_object(by_rank, shards, group=group)
    layouts = {name: _layout(tuple(parameters[name].shape), [rank[name] for rank in by_rank]) for name in parameters}
    return {name: layout for name, layout in layouts.items() if layout is not None}


_Shard = tuple[tuple[int, ...], torch.Tensor | None]  # local shape; flat positions, None where it is the full tensor


def _shard(parameter: torch.Tensor, topology: Topology) -> _Shard | None:
    """Return this rank's shard, or None where its shape contradicts the placements."""
    tensor = parameter.detach()
    if not isinstance(tensor, DTensor) or not is_over(tensor, "tp", topology):
        return tuple(parameter.shape), None
    placements = tp_placements(tensor, topology)
    shape = tuple(local_part(tensor, placements).shape)
    if all(placement.is_replicate() for placement in placements):
        return (shape, None) if shape == tuple(parameter.shape) else None
    positions = torch.arange(prod(parameter.shape), device=tensor.device).reshape(parameter.shape)
    shard = distribute_tensor(positions, tensor.device_mesh, placements, src_data_rank=None).to_local()
    return (shape, shard.cpu()) if tuple(shard.shape) == shape else None


def _layout(shape: tuple[int, ...], shards: Sequence[_Shard | None]) -> Layout | None:
    known = [shard for shard in shards if shard is not None]
    if len(known) < len(shards):
        return None
    positions = [shard for _, shard in known if shard is not None]
    if sum(len(shard.reshape(-1)) for shard in positions) > prod(shape):
        return None  # a mesh with two TP dims, sharded over one of them: a Layout has no element on several ranks
    return Layout.from_positions(shape, positions) if positions else Layout(shape, tuple(local for local, _ in known))
