"""The TP and DP groups of a live program, as global ranks: from arguments, or from the library that made them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpcheck.core.digests import digest
from tpcheck.core.errors import UsageError
from tpcheck.core.guides import Guide
from tpcheck.core.topology import Topology

TP_DIM_NAMES = ("tp", "tensor_parallel")  # Lightning spells it out
DP_DIM_NAMES = (
    "dp", "dp_replicate", "dp_shard", "replicate", "shard", "fsdp", "ddp", "data", "data_parallel", "dp_cp",
)  # fmt: skip
CP_DIM_NAMES = ("cp", "sp", "context_parallel", "sequence_parallel")
PP_DIM_NAMES = ("pp", "pipe", "pipeline_parallel")


@dataclass(frozen=True, slots=True)
class LiveGroups:
    """The groups of this rank.

    Attributes:
        rank: This rank.
        tp: Global ranks of its TP group, itself included.
        dp: Global ranks of its DP group; itself alone where no DP group is known.
        source: The argument or library that they come from.
        dp_rank: The expression that gives `dp_rank` under this source.
        cp: Global ranks that share its sequences; none where no such group is known.
        pp: Global ranks of the stages that it hands its activations to; none where no such group is known.
    """

    rank: int
    tp: tuple[int, ...]
    dp: tuple[int, ...]
    source: str
    dp_rank: str = ""
    cp: tuple[int, ...] = ()
    pp: tuple[int, ...] = ()

    @property
    def library(self) -> str:
        """The source as a user calls it."""
        return _LIBRARIES.get(self.source, self.source)

    @property
    def notice(self) -> str | None:
        """What a run without TP is told once: what still has a meaning."""
        if len(self.tp) > 1:
            return None
        if len(self.dp) == 1:
            return "this process has no other rank to compare with (no TP, no DP)"
        text = f"there is no TP here: ranks {_listed(self.dp)} are data-parallel replicas ({self.library})"
        assumed = "; where TP is your own, pass group= or topology=tpcheck.Topology(tp=..., dp=...)"
        return text + (assumed if self.source == NO_LIBRARY else "")

    @property
    def topology(self) -> Topology:
        return Topology(tp=len(self.tp), dp=len(self.dp), cp=max(1, len(self.cp)), pp=max(1, len(self.pp)))

    @property
    def not_compared(self) -> str:
        """What ranks are not compared over, for a last line: `not compared across cp (ranks 0, 2)`, or nothing.

        Slices of a sequence may be cut before or after the batch is seen, and stages get the same batch or none.
        """
        axes = [(axis, ranks) for axis, ranks in (("cp", self.cp), ("pp", self.pp)) if len(ranks) > 1]
        listed = " and ".join(f"{axis} (ranks {_listed(ranks)})" for axis, ranks in axes)
        return f"not compared across {listed}" if axes else ""


ALONE = "a process alone"
NO_LIBRARY = "no library has created a TP group"
_LIBRARIES = {
    "the device mesh on the model": "the model's device mesh",
    "deepspeed.utils.groups": "DeepSpeed",
    "megatron.core.parallel_state": "Megatron",
}


def _listed(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}"


def groups_of_batches(*, group: Any = None, topology: Topology | None = None, model: Any = None) -> LiveGroups:
    """Return the groups whose batches are compared. A run without TP has them, too.

    In a process alone they are this rank; in a world whose libraries know no TP group, all ranks are replicas.

    Args:
        group, topology, model: As in `live_groups`.

    Raises:
        UsageError: An argument does not fit, or the launcher has started several ranks and torch.distributed is not
            initialised.
    """
    if _is_alone(group, topology):
        return LiveGroups(0, (0,), (0,), ALONE, "0")
    try:
        return live_groups(group=group, topology=topology, model=model)
    except UsageError:
        if group is not None or topology is not None or not dist.is_initialized():
            raise
        ddp = _distributed_data_parallel(model)
        if ddp is not None:
            return _replicas(dist.get_process_group_ranks(ddp.process_group), "DistributedDataParallel")
        return _replicas(range(dist.get_world_size()), NO_LIBRARY)


def has_tp_library(model: Any) -> bool:
    """Return whether a library knows the groups of the model; torch.distributed is initialised."""
    try:
        live_groups(model=model)
    except UsageError:
        return False
    return True


def _replicas(ranks: Iterable[int], source: str) -> LiveGroups:
    rank = dist.get_rank()
    return LiveGroups(rank, (rank,), tuple(sorted(ranks)), source, "torch.distributed.get_rank()")


def _is_alone(group: Any, topology: Topology | None) -> bool:
    """Return whether there is one rank; a launcher that has started more says so in WORLD_SIZE."""
    if group is not None or (topology is not None and topology.world_size > 1):
        return False
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() == 1
    return os.environ.get("WORLD_SIZE", "1") == "1"


def live_groups(*, group: Any = None, topology: Topology | None = None, model: Any = None) -> LiveGroups:
    """Return this rank's groups from the first source that has them.

    The order: the arguments; the device mesh that transformers or Lightning put on the model; DeepSpeed's groups;
    accelerate's device mesh; Megatron's parallel state.

    Args:
        group: A TP group: a ProcessGroup, or a DeviceMesh of one dim.
        topology: Sizes of the axes, `tp` innermost.
        model: The model that the batches are for, if there is one.

    Raises:
        UsageError: torch.distributed is not initialised, an argument does not fit, or no source has a TP group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise _not_initialised("group", group)
    rank = dist.get_rank()
    if group is not None or topology is not None:
        return _from_arguments(rank, group, topology)
    for source, find in _SOURCES:
        groups = None
        with suppress(Exception):  # libraries raise errors of many types where there is no group
            groups = find(model)
        if groups is not None:
            tp = groups.tp or (rank,)
            return LiveGroups(
                rank,
                tp,
                groups.dp or _dp_group_for(rank, tp),
                source,
                _dp_rank(source, model, len(tp)),
                groups.cp or (),
                groups.pp or (),
            )
    raise UsageError(
        "group",
        None,
        "a TP group: no framework has created one. Pass group= or topology=tpcheck.Topology(tp=..., dp=...), or call "
        "this after transformers, DeepSpeed, accelerate or Megatron is initialised",
        Guide.WHICH_RANKS,
    )


def _not_initialised(argument: str, value: Any) -> UsageError:
    expected = (
        "initialised process groups: call deepspeed.init_distributed, accelerate or "
        "torch.distributed.init_process_group first, and start under torchrun or deepspeed"
    )
    return UsageError(argument, value, expected, Guide.WHICH_RANKS)


def groups_of_run(model: Any, root: nn.Module, topology: Topology | None) -> LiveGroups:
    """Return the groups of this rank. Without any known TP group, ranks are replicas where their weights are equal.

    Raises:
        UsageError: The topology does not fit; or no library knows a TP group, and weights differ between the ranks; or
            the launcher has started several ranks and torch.distributed is not initialised.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if topology is not None and topology.world_size > 1:
            raise UsageError("topology", topology, "Topology(), as torch.distributed is not initialised")
        if topology is None and not _is_alone(None, None):
            raise _not_initialised("topology", None)
        return LiveGroups(0, (0,), (0,), ALONE)
    if topology is None and dist.get_world_size() == 1:
        return LiveGroups(dist.get_rank(), (0,), (0,), ALONE)
    try:
        return live_groups(topology=topology, model=root)
    except UsageError:
        if topology is not None:
            raise
        ddp = _distributed_data_parallel(model)
        if ddp is not None:
            return _replicas(dist.get_process_group_ranks(ddp.process_group), "DistributedDataParallel")
        if _weights_agree(root):
            return _replicas(range(dist.get_world_size()), NO_LIBRARY)
        raise UsageError(
            "topology",
            None,
            "tpcheck.Topology(tp=..., dp=...): no framework has created a TP group, or not yet, the model is no "
            "DistributedDataParallel, and its weights differ between the ranks",
            Guide.WHICH_RANKS,
        ) from None


def _weights_agree(root: nn.Module) -> bool:
    """Return whether all ranks hold the same weights, as replicas do before they train. Collective over all ranks."""
    weights = {name: parameter.detach() for name, parameter in root.named_parameters()}
    is_plain = all(type(values) is torch.Tensor and not values.is_meta for values in weights.values())
    own = {name: digest(values) for name, values in weights.items()} if is_plain else None
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, own)
    return is_plain and all(of_rank == own for of_rank in by_rank)


def _distributed_data_parallel(model: Any) -> Any:
    while model is not None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            return model
        model = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
    return None


_Ranks = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Groups:
    """Groups as a library has them; None where it has none on the axis."""

    tp: _Ranks | None
    dp: _Ranks | None
    cp: _Ranks | None = None
    pp: _Ranks | None = None


def _from_arguments(rank: int, group: Any, topology: Topology | None) -> LiveGroups:
    if topology is not None:
        if not isinstance(topology, Topology) or topology.world_size != dist.get_world_size():
            accepted = f"a tpcheck.Topology of {dist.get_world_size()} ranks"
            raise UsageError("topology", topology, accepted, Guide.WHICH_RANKS)
        tp, dp = topology.peers(rank, "tp"), topology.peers(rank, "dp")
        if group is not None and _ranks(group) != tp:
            accepted = f"the TP group of rank {rank} in the topology: {tp}"
            raise UsageError("group", _ranks(group), accepted, Guide.WHICH_RANKS)
        source = "the arguments group and topology" if group is not None else "topology"
        cp, pp = (topology.peers(rank, axis) if axis in topology.axes else () for axis in ("cp", "pp"))
        return LiveGroups(rank, tp, dp, source, 'topology.coordinate(torch.distributed.get_rank())["dp"]', cp, pp)
    if not hasattr(group, "get_group") and not isinstance(group, dist.ProcessGroup):
        raise UsageError("group", group, "a torch ProcessGroup that this rank is in, or a DeviceMesh of one dim")
    tp = _ranks(group)
    is_innermost = tp == tuple(range(tp[0], tp[0] + len(tp))) and tp[0] % len(tp) == 0
    dp_rank = f"torch.distributed.get_rank() // {len(tp)}" if is_innermost else ""
    return LiveGroups(rank, tp, _dp_group_for(rank, tp), "the argument group", dp_rank)


def _dp_group_for(rank: int, tp: _Ranks) -> _Ranks:
    """Return the live DP group if this rank is all that it shares with the TP group; else this rank alone."""
    for _, find in _SOURCES:
        with suppress(Exception):
            groups = find(None)
            if groups is not None and groups.dp and set(groups.dp) & set(tp) == {rank}:
                return groups.dp
    return (rank,)


def _from_model(model: Any) -> _Groups | None:
    inner = model
    for _ in range(8):  # engines and compiled models wrap the model
        mesh = getattr(inner, "_device_mesh", None) or getattr(inner, "device_mesh", None)
        if mesh is not None and "torch.distributed" in type(mesh).__module__:
            return _from_mesh(mesh)
        inner = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if inner is None:
            return None
    return None


def _from_deepspeed(_: Any) -> _Groups | None:
    groups = sys.modules.get("deepspeed.utils.groups")
    if groups is None:
        return None
    mpu = groups.mpu
    if mpu is not None:
        return _Groups(_ranks(mpu.get_tensor_model_parallel_group()), _ranks(mpu.get_data_parallel_group()))
    tp = groups._TENSOR_MODEL_PARALLEL_GROUP
    if tp is None:
        return None
    return _Groups(_ranks(tp), _ranks(groups.get_data_parallel_group()))


def _from_accelerate(_: Any) -> _Groups | None:
    state = sys.modules.get("accelerate.state")
    if state is None or not state.AcceleratorState._shared_state:
        return None
    shared = state.AcceleratorState._shared_state
    mesh = shared.get("device_mesh") or shared.get("ds_device_mesh")
    return None if mesh is None else _from_mesh(mesh)


def _from_megatron(_: Any) -> _Groups | None:
    parallel = sys.modules.get("megatron.core.parallel_state")
    if parallel is None or not parallel.model_parallel_is_initialized():
        return None
    tp, dp = parallel.get_tensor_model_parallel_group(), parallel.get_data_parallel_group()
    cp, pp = parallel.get_context_parallel_group(), parallel.get_pipeline_model_parallel_group()
    return _Groups(_ranks(tp), _ranks(dp), _ranks(cp), _ranks(pp))


_SOURCES: tuple[tuple[str, Callable[[Any], _Groups | None]], ...] = (
    ("the device mesh on the model", _from_model),
    ("deepspeed.utils.groups", _from_deepspeed),
    ("accelerate's device mesh", _from_accelerate),
    ("megatron.core.parallel_state", _from_megatron),
)


def _dp_rank(source: str, model: Any, tp: int) -> str:
    """Return the expression for `dp_rank` where a library has the groups."""
    if source == "deepspeed.utils.groups":
        return "deepspeed.utils.groups.get_data_parallel_rank()"
    if source == "megatron.core.parallel_state":
        return "megatron.core.parallel_state.get_data_parallel_rank()"
    if source == "accelerate's device mesh":
        shared = sys.modules["accelerate.state"].AcceleratorState._shared_state
        name = "device_mesh" if shared.get("device_mesh") is not None else "ds_device_mesh"
        mesh, code = shared.get(name), f"AcceleratorState().{name}"
    else:
        inner, mesh, code = model, None, "model"
        while inner is not None and mesh is None:
            attribute = next((name for name in ("_device_mesh", "device_mesh") if getattr(inner, name, None)), None)
            mesh = None if attribute is None else getattr(inner, attribute)
            code = f"model.{attribute}"
            inner = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
    names = [name for name in getattr(mesh, "mesh_dim_names", None) or () if name in DP_DIM_NAMES]
    if len(names) == 1:
        return f'{code}["{names[0]}"].get_local_rank()'
    return "0, as there is one replica" if not names and dist.get_world_size() == tp else ""


def _from_mesh(mesh: Any) -> _Groups | None:
    names = tuple(mesh.mesh_dim_names or ())
    if not names:
        return _Groups(_ranks(mesh), None) if mesh.ndim == 1 else None
    groups = _Groups(
        *(
            _along(mesh, [name for name in names if name in of_axis])
            for of_axis in (TP_DIM_NAMES, DP_DIM_NAMES, CP_DIM_NAMES, PP_DIM_NAMES)
        )
    )
    return groups if groups.tp or groups.cp or groups.pp else None


def _along(mesh: Any, dims: list[str]) -> _Ranks | None:
    """Return the ranks whose coordinates differ from this rank's on these dims alone."""
    if not dims:
        return None
    coordinate = mesh.get_coordinate()
    names = zip(mesh.mesh_dim_names, coordinate, strict=True)
    index = tuple(slice(None) if name in dims else place for name, place in names)
    return tuple(sorted(int(rank) for rank in mesh.mesh[index].flatten()))


def _ranks(group: Any) -> _Ranks:
    process_group = group.get_group() if hasattr(group, "get_group") else group
    return tuple(sorted(dist.get_process_group_ranks(process_group)))


def distinct_ranks(process_groups: Iterable[Any]) -> tuple[tuple[int, ...], ...]:
    """Return the ranks of each group, of equal groups once."""
    return tuple(dict.fromkeys(tuple(dist.get_process_group_ranks(group)) for group in process_groups))
