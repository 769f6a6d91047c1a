"""The `Rank` of a process that torchrun or srun started."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping

from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology
from tpcheck.world import deepspeed_shm_comm
from tpcheck.world.groups import choose_backend, device_of, group_backend
from tpcheck.world.rank import Rank

_LAUNCHERS = (  # the variables of rank, world size and local rank
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, deepspeed
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
    ("PROCID", "NTASKS", "LOCALID"),
)


def attach(topology: Topology, *, device: str | None = None, backend: str | None = None) -> Rank:
    """Return the `Rank` of this process; initialise the default process group unless the caller has.

    Args:
        topology: Sizes of the parallel axes; their product equals the launcher's world size.
        device: `cpu`, `cuda`, or None for CUDA where there is a GPU for each local rank.
        backend: `gloo`, `nccl`, or None for NCCL where every local rank has a GPU, else gloo.

    Raises:
        UsageError: No launcher has set its variables, or its world size differs.
    """
    rank, world_size, local_rank = launched_rank(os.environ)
    if world_size != topology.world_size:
        raise UsageError("topology", topology, f"a topology of {world_size} ranks, as many as the launcher has started")
    deepspeed_shm_comm.disable()
    import torch
    from torch import distributed as dist

    num_local = _number(os.environ, "LOCAL_WORLD_SIZE", default=world_size)
    num_gpus = torch.cuda.device_count() if device != "cpu" else 0
    kind = device or ("cuda" if num_gpus >= num_local else "cpu")
    rank_device = device_of(local_rank, kind=kind, num_gpus=max(1, num_gpus))
    if kind == "cuda":
        torch.cuda.set_device(torch.device(rank_device))
    if not dist.is_initialized():
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UsageError(name, None, "the address of rank 0; set it beside the launcher's variables")
        group = choose_backend(backend, kind=kind, num_gpus=num_gpus, num_ranks=num_local)
        dist.init_process_group(group_backend(group), rank=rank, world_size=world_size)
        if group == "gloo":
            atexit.register(_destroy_process_group)
    return Rank(rank, topology, device=rank_device)


def is_launched() -> bool:
    """Return whether torchrun or srun started this process as one of several ranks.

    A batch script under sbatch has srun's variables too, but its step has one task.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    return _number(os.environ, "SLURM_STEP_NUM_TASKS", default=1) > 1


def _destroy_process_group() -> None:
    """End gloo's threads: a process that exits while they run sometimes aborts (3 of 30 worlds)."""
    from torch import distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def launched_rank(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """Return the rank, world size and local rank that the variables of a launcher give this process."""
    for rank, world_size, local_rank in _LAUNCHERS:
        if rank in environ and world_size in environ:
            return _number(environ, rank), _number(environ, world_size), _number(environ, local_rank, default=0)
    raise UsageError(
        "environment",
        "no RANK or SLURM_PROCID",
        "the variables that torchrun or srun sets; start the script with one of them",
    )


def _number(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    value = environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdigit():
        raise UsageError(name, value, "a number, as torchrun and srun set it")
    return int(value)
