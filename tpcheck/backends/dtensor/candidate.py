"""A model made of DTensors, and of plain tensors that every TP rank holds whole, as tpcheck sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from tpcheck.backends.layout import Layout
from tpcheck.backends.protocols import RankLike
from tpcheck.backends.sgd import Sgd
from tpcheck.core.topology import Topology


def clip_by_mesh(parameters: Sequence[torch.Tensor], max_norm: float) -> float:
    """Clip as torch does where all gradients share a mesh, else as transformers' Trainer and accelerate do.

    torch.nn.utils.clip_grad_norm_ refuses a mixture of meshes. The two others make one norm for each mesh with torch's
    own `get_total_norm`, and the norm of those; plain gradients count once.

    Returns:
        The norm before clipping.
    """
    by_mesh: dict[DeviceMesh | None, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    limit = max_norm if max_norm > 0 else float("inf")
    if len(by_mesh) == 1:
        return float(_full_norm(clip_grad_norm_(parameters, limit)))
    norms = [
        _full_norm(get_total_norm([one.grad for one in group if one.grad is not None])) for group in by_mesh.values()
    ]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in by_mesh.values():
        clip_grads_with_norm_(group, limit, total)
    return float(total)


def _full_norm(norm: torch.Tensor) -> torch.Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


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


def tp_shard(tensor: torch.Tensor, like: torch.Tensor, topology: Topology) -> torch.Tensor:
    """Return a copy of this rank's part of `tensor`, cut over TP as `like` is and whole over DP.

    Collective over the tensor's mesh. A gradient may lie otherwise than its parameter (terms of a sum, or whole where
    the parameter is cut): the optimizer brings it into the parameter's placements, and so does this.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor.clone()
    placements = _placements_over_tp(like, topology) if isinstance(like, DTensor) else _replicated(tensor)
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


def _replicated(tensor: DTensor) -> list[Placement]:
    return [Replicate() for _ in range(tensor.device_mesh.ndim)]


Around = Callable[[], AbstractContextManager[Any]]
ReduceGradients = Callable[[Sequence[torch.Tensor]], None]


class DTensorCandidate:
    """Implements `adapters.Candidate`: everything is read off the placements of the parameters.

    Args:
        module: The sharded model.
        rank: Where it runs.
        sgd: Steps its parameters.
        reduce_gradients: Called once after each backward pass with the parameters, for what autograd does not reduce.
        around: Makes the context in which forward and backward run.
    """

    def __init__(
        self,
        module: nn.Module,
        rank: RankLike,
        sgd: Sgd,
        *,
        reduce_gradients: ReduceGradients | None = None,
        around: Around = nullcontext,
    ) -> None:
        self._module = module
        self._rank = rank
        self._sgd = sgd
        self._reduce_gradients = reduce_gradients
        self._around = around
        self._norm: float | None = None

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """What steps; a planted fault may change it."""
        return self._sgd.optimizer

    def group_ranks(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        found: dict[str, dict[tuple[int, ...], None]] = {}
        for parameter in self._parameters().values():
            if isinstance(parameter.data, DTensor):
                for axis, ranks in live_groups(parameter.data.device_mesh, self._rank.topology):
                    found.setdefault(axis, {})[ranks] = None
        return {axis: tuple(groups) for axis, groups in found.items()}

    def layouts(self) -> Mapping[str, Layout]:
        tensors = {name: parameter.data for name, parameter in self._parameters().items()}
        return layouts(tensors, self._rank.topology, self._rank.group("tp"))

    def parameter(self, name: str) -> torch.Tensor:
        parameter = self._parameters()[name].data
        return tp_shard(parameter, parameter, self._rank.topology)

    def gradient(self, name: str) -> torch.Tensor | None:
        parameter = self._parameters()[name]
        if parameter.grad is None:
            return None
        return tp_shard(parameter.grad, parameter.data, self._rank.topology)

    def forward(self, batch: Mapping[str, Any]) -> Any:
        with self._around():
            return self._module(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        with self._around():
            loss.backward()  # type: ignore[no-untyped-call]
        if self._reduce_gradients is not None:
            self._reduce_gradients(list(self._module.parameters()))

    def step(self) -> None:
        self._norm = self._sgd.step()

    def gradient_norm(self) -> float | None:
        return self._norm

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._module.named_parameters(remove_duplicate=False))
