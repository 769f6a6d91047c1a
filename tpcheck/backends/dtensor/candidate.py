"""A sharded model whose parameters are DTensors, or plain tensors that every TP rank holds in full, and its layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tpcheck.backends.interface import RankLike, WayToResume
from tpcheck.backends.layout import Layout
from tpcheck.backends.live_groups import DP_DIM_NAMES
from tpcheck.backends.local_part import full_tensor, local_part, reduced
from tpcheck.backends.sgd import clip_gradients
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


def clip_by_mesh(parameters: Sequence[torch.Tensor], max_norm: float) -> float:
    """Clip as torch does where all gradients share a mesh, else as transformers' Trainer and accelerate do.

    `torch.nn.utils.clip_grad_norm_` refuses gradients on several meshes. The other two make one norm for each mesh with
    torch's `get_total_norm`, and the norm of those norms; plain gradients count once.

    Returns:
        The norm before clipping.
    """
    by_mesh: dict[DeviceMesh | None, list[torch.Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            mesh = parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None
            by_mesh.setdefault(mesh, []).append(parameter)
    if len(by_mesh) <= 1:
        return clip_gradients(parameters, max_norm)
    norms = [
        full_tensor(get_total_norm([parameter.grad for parameter in group if parameter.grad is not None]))
        for group in by_mesh.values()
    ]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if max_norm > 0:
        for group in by_mesh.values():
            clip_grads_with_norm_(group, max_norm, total)
    return float(total)


MakeContext = Callable[[], AbstractContextManager[Any]]
ReduceGradients = Callable[[Sequence[torch.Tensor]], None]


class OptimizerSteps(Protocol):
    """What steps the parameters of a candidate, as `Sgd` does."""

    optimizer: torch.optim.Optimizer

    @property
    def has_masters(self) -> bool:
        """Whether what it steps are masters of its own, which no library saves."""

    def step(self) -> float | None:
        """Clip, step, clear the gradients, and return the norm before clipping."""

    def state(self, parameter: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """Return what the optimizer has for each element of a parameter."""


class DTensorCandidate:
    """Implements `adapters.Candidate` by the placements of the parameters.

    Args:
        module: The sharded model.
        rank: The rank that it runs on.
        sgd: Steps its parameters.
        reduce_gradients: Called after the last backward pass of a step with the parameters, to reduce what autograd
            does not.
        context: Makes the context in which forward and backward run.
        accumulate: Micro-batches of a step.
    """

    def __init__(
        self,
        module: nn.Module,
        rank: RankLike,
        sgd: OptimizerSteps,
        *,
        reduce_gradients: ReduceGradients | None = None,
        context: MakeContext = nullcontext,
        accumulate: int = 1,
    ) -> None:
        self.module = module
        self.optimizer = sgd.optimizer  # an injected fault may change it
        self._rank = rank
        self._sgd = sgd
        self._reduce_gradients = reduce_gradients
        self._context = context
        self._norm: float | None = None
        self._accumulate = accumulate
        self._num_backward = 0

    def group_ranks(self) -> Mapping[str, tuple[tuple[int, ...], ...]]:
        by_axis: dict[str, dict[tuple[int, ...], None]] = {}
        for parameter in self._parameters().values():
            if isinstance(parameter.data, DTensor):
                for axis, ranks in mesh_groups(parameter.data.device_mesh, self._rank.topology):
                    by_axis.setdefault(axis, {})[ranks] = None
        return {axis: tuple(groups) for axis, groups in by_axis.items()}

    def layouts(self) -> Mapping[str, Layout]:
        tensors = {name: parameter.data for name, parameter in self._parameters().items()}
        return parameter_layouts(tensors, self._rank.topology, self._rank.group("tp"))

    def parameter(self, name: str) -> torch.Tensor:
        parameter = self._parameter(name).data
        return tp_shard(parameter, parameter, self._rank.topology)

    def gradient(self, name: str) -> torch.Tensor | None:
        parameter = self._parameter(name)
        if parameter.grad is None:
            return None
        return tp_shard(parameter.grad, parameter.data, self._rank.topology)

    def forward(self, batch: Mapping[str, Any]) -> Any:
        with self._context():
            return self.module(**batch)

    def backward(self, loss: torch.Tensor) -> None:
        self._num_backward += 1
        with self._context():
            (loss / self._accumulate if self._accumulate > 1 else loss).backward()  # type: ignore[no-untyped-call]
        if self._reduce_gradients is not None and self._num_backward % self._accumulate == 0:
            self._reduce_gradients(list(self.module.parameters()))

    def step(self) -> None:
        self._norm = self._sgd.step()

    def gradient_norm(self) -> float | None:
        return self._norm

    def ways_to_resume(self) -> Mapping[str, WayToResume]:
        if self._sgd.has_masters:
            return {}
        return {
            "torch.distributed.checkpoint": WayToResume(
                partial(_save_training, self.module, self.optimizer),
                partial(_load_training, self.module, self.optimizer),
                other_sizes=("tp", "dp"),
            )
        }

    def trained(self) -> tuple[Any, Any]:
        return self.module, self.optimizer

    def counters(self) -> Mapping[str, Any]:
        return {}

    def optimizer_state(self, name: str) -> Mapping[str, torch.Tensor]:
        parameter = self._parameter(name)
        states = self._sgd.state(parameter)
        return {state: tp_shard(value, parameter.data, self._rank.topology) for state, value in states.items()}

    def _parameter(self, name: str) -> nn.Parameter:
        return self.module.get_parameter(name)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters(remove_duplicate=False))


def _save_training(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    model_state, optimizer_state = get_state_dict(module, optimizer)
    dcp_save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def _load_training(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    model_state, optimizer_state = get_state_dict(module, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    dcp_load(state, checkpoint_id=folder)
    set_state_dict(module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
