"""Which axis of the topology each dim of a device mesh lies along."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tpcheck.topology import Topology

_DP_NAMES = ("dp", "fsdp", "dp_replicate", "dp_shard", "data", "data_parallel", "replicate", "shard")


def axes(mesh: DeviceMesh, topology: Topology) -> tuple[str, ...]:
    """Return `tp` or `dp` for each dim of the mesh.

    A dim's ranks decide. Where they fit neither axis its name does, so that a group of wrong ranks is found as one.
    """
    return tuple(_axis(mesh, dim, topology) for dim in range(mesh.ndim))


def dims_along(mesh: DeviceMesh, topology: Topology, axis: str) -> tuple[int, ...]:
    """Return the dims of the mesh that lie along `axis`."""
    return tuple(dim for dim, found in enumerate(axes(mesh, topology)) if found == axis)


def live_groups(mesh: DeviceMesh, topology: Topology) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each axis that the mesh has, with the global ranks of this rank's group on it."""
    for axis in topology.sizes:
        dims = dims_along(mesh, topology, axis)
        if len(dims) == 1:
            yield axis, _ranks(mesh, dims[0])
        elif dims:  # hybrid sharding: replicas of shards
            place = mesh.get_coordinate() or [0] * mesh.ndim
            index = tuple(slice(None) if dim in dims else place[dim] for dim in range(mesh.ndim))
            yield axis, tuple(sorted(mesh.mesh[index].flatten().tolist()))


def _axis(mesh: DeviceMesh, dim: int, topology: Topology) -> str:
    ranks = set(_ranks(mesh, dim))
    name = (mesh.mesh_dim_names or ("",) * mesh.ndim)[dim]
    named = "dp" if name in _DP_NAMES else "tp"
    fitting = [axis for axis in topology.sizes if ranks <= set(topology.peers(dist.get_rank(), axis))]
    return fitting[0] if len(fitting) == 1 else named


def _ranks(mesh: DeviceMesh, dim: int) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(mesh.get_group(dim)))
