"""Process groups as global ranks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology

_TP_DIMS = ("tp", "tensor_parallel")  # Lightning spells it out
_DP_DIMS = ("dp", "dp_replicate", "dp_shard", "fsdp", "ddp", "data", "data_parallel", "dp_cp")


@dataclass(frozen=True, slots=True)
class LiveGroups:
    """Where this rank stands.

    Attributes:
        rank: This rank.
        tp: Global ranks of its TP group, itself included.
        dp: Global ranks of its DP group, itself alone where none is known.
        source: Who told.
    """

    rank: int
    tp: tuple[int, ...]
    dp: tuple[int, ...]
    source: str

    @property
    def topology(self) -> Topology:
        return Topology(tp=len(self.tp), dp=len(self.dp))


def live_groups(*, group: Any = None, topology: Topology | None = None, model: Any = None) -> LiveGroups:
    """Return this rank's groups from the first that knows them.

    In this order: the arguments; the device mesh that transformers or Lightning put on the model; DeepSpeed's groups;
    accelerate's device mesh; Megatron's parallel state.

    Args:
        group: A TP group: a ProcessGroup, or a DeviceMesh of one dim.
        topology: Sizes of the axes, `tp` innermost.
        model: The model that the batches are for, where it is at hand.

    Raises:
        UsageError: torch.distributed is not initialised, an argument does not fit, or nobody knows a TP group.
    """
    from torch import distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError(
            "group",
            group,
            "ranks that can talk: initialise torch.distributed first (deepspeed.init_distributed, accelerate, "
            "torch.distributed.init_process_group) and start under torchrun or deepspeed",
        )
    rank = dist.get_rank()
    if group is not None or topology is not None:
        return _from_arguments(rank, group, topology)
    for source, find in _SOURCES:
        found = None
        with suppress(Exception):  # libraries tell "there is none" by assertions and errors of many types
            found = find(model)
        if found is not None:
            tp, dp = found
            own = tp or (rank,)
            return LiveGroups(rank, own, dp or _dp_beside(rank, own), source)
    raise UsageError(
        "group", None, "a TP group (group=..., or topology=tpcheck.Topology(tp=..., dp=...)): neither transformers, "
        "DeepSpeed, accelerate nor Megatron has made one in this process"
    )  # fmt: skip


_Ranks = tuple[int, ...]
_Found = tuple["_Ranks | None", "_Ranks | None"]


def _from_arguments(rank: int, group: Any, topology: Topology | None) -> LiveGroups:
    from torch import distributed as dist

    if topology is not None:
        if not isinstance(topology, Topology) or topology.world_size != dist.get_world_size():
            raise UsageError("topology", topology, f"a tpcheck.Topology of {dist.get_world_size()} ranks")
        tp, dp = topology.peers(rank, "tp"), topology.peers(rank, "dp")
        if group is not None and _ranks(group) != tp:
            raise UsageError("group", _ranks(group), f"the ranks that the topology has for rank {rank}: {tp}")
        return LiveGroups(rank, tp, dp, "the arguments group and topology" if group is not None else "topology")
    if not hasattr(group, "get_group") and not isinstance(group, dist.ProcessGroup):
        raise UsageError("group", group, "a torch ProcessGroup that this rank is in, or a DeviceMesh of one dim")
    tp = _ranks(group)
    return LiveGroups(rank, tp, _dp_beside(rank, tp), "the argument group")


def _dp_beside(rank: int, tp: _Ranks) -> _Ranks:
    """Return the live DP group, where it meets this TP group in this rank alone; else nobody."""
    for _, find in _SOURCES:
        with suppress(Exception):
            found = find(None)
            if found is not None and found[1] and set(found[1]) & set(tp) == {rank}:
                return found[1]
    return (rank,)


def _of_model(model: Any) -> _Found | None:
    inner = model
    for _ in range(8):  # engines and compiled models around it
        mesh = getattr(inner, "_device_mesh", None) or getattr(inner, "device_mesh", None)
        if mesh is not None and "torch.distributed" in type(mesh).__module__:
            return _of_mesh(mesh)
        inner = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if inner is None:
            return None
    return None


def _of_deepspeed(_: Any) -> _Found | None:
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is None:
        return None
    mpu = groups.mpu
    if mpu is not None:
        return _ranks(mpu.get_tensor_model_parallel_group()), _ranks(mpu.get_data_parallel_group())
    tp = groups._TENSOR_MODEL_PARALLEL_GROUP
    if tp is None:
        return None
    return _ranks(tp), _ranks(groups.get_data_parallel_group())


def _of_accelerate(_: Any) -> _Found | None:
    state = sys.modules.get("accelerate.state")
    if state is None or not state.AcceleratorState._shared_state:
        return None
    shared = state.AcceleratorState._shared_state
    mesh = shared.get("device_mesh") or shared.get("ds_device_mesh")
    return None if mesh is None else _of_mesh(mesh)


def _of_megatron(_: Any) -> _Found | None:
    parallel = sys.modules.get("megatron.core.parallel_state")
    if parallel is None or not parallel.model_parallel_is_initialized():
        return None
    return _ranks(parallel.get_tensor_model_parallel_group()), _ranks(parallel.get_data_parallel_group())


_SOURCES: tuple[tuple[str, Callable[[Any], _Found | None]], ...] = (
    ("the device mesh on the model", _of_model),
    ("deepspeed.utils.groups", _of_deepspeed),
    ("accelerate's device mesh", _of_accelerate),
    ("megatron.core.parallel_state", _of_megatron),
)


def _of_mesh(mesh: Any) -> _Found | None:
    names = tuple(mesh.mesh_dim_names or ())
    if not names:
        return (_ranks(mesh), None) if mesh.ndim == 1 else None
    tp = [name for name in names if name in _TP_DIMS]
    if not tp:
        return None
    return _along(mesh, tp), _along(mesh, [name for name in names if name in _DP_DIMS])


def _along(mesh: Any, dims: list[str]) -> _Ranks | None:
    """Return the ranks that differ from this one on these dims alone."""
    if not dims:
        return None
    own = list(mesh.get_coordinate())
    picks = tuple(slice(None) if name in dims else own[place] for place, name in enumerate(mesh.mesh_dim_names))
    return tuple(sorted(int(rank) for rank in mesh.mesh[picks].flatten()))


def _ranks(group: Any) -> _Ranks:
    from torch import distributed as dist

    held = group.get_group() if hasattr(group, "get_group") else group
    return tuple(sorted(dist.get_process_group_ranks(held)))


def distinct_ranks(process_groups: Iterable[Any]) -> tuple[tuple[int, ...], ...]:
    """Return the ranks of each group, those of equal groups once."""
    return tuple(dict.fromkeys(tuple(dist.get_process_group_ranks(group)) for group in process_groups))
