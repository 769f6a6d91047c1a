"""The `Rank` of a process that torchrun, srun or mpirun started, and what their variables say."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology
from tpcheck.world import deepspeed_shm_comm
from tpcheck.world.channel import dumps, loads
from tpcheck.world.groups import (
    choose_backend,
    device_of,
    disable_ddp_logger_under_detail,
    group_backend,
    is_checked,
)
from tpcheck.world.rank import Rank

# The variables of rank, world size, local rank and number of local ranks. mpirun under Slurm starts its ranks through
# a daemon on each node, which leaves them its own variables of Slurm: those of MPI come first, where they are whole.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # deepspeed sets them, too
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    ("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),  # Cray
)
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "")  # srun; it tells tasks per node as a list
_OTHERS = (("PROCID", "NTASKS", "LOCALID", ""),)
_DEBUG_LEVEL = "TORCH_DISTRIBUTED_DEBUG"
_NODE_LISTS = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")


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

    num_local = num_local_ranks(os.environ, world_size)
    num_gpus = torch.cuda.device_count() if device != "cpu" else 0
    kind = device or ("cuda" if num_gpus >= num_local else "cpu")
    rank_device = device_of(local_rank, kind=kind, num_gpus=max(1, num_gpus))
    if kind == "cuda":
        torch.cuda.set_device(torch.device(rank_device))
    if not dist.is_initialized():
        host, port = master_address(os.environ)
        for name, value in (("MASTER_ADDR", host), ("MASTER_PORT", str(port))):
            os.environ.setdefault(name, value)  # as `env://` and libraries read it
        group = choose_backend(backend, kind=kind, num_gpus=num_gpus, num_ranks=num_local)
        dist.init_process_group(group_backend(group), rank=rank, world_size=world_size)
        if group == "gloo":
            atexit.register(_destroy_process_group)
    return Rank(rank, topology, device=rank_device)


def is_launched() -> bool:
    """Return whether torchrun, srun or mpirun started this process as one of several ranks.

    A batch script under sbatch has srun's variables too, but its step has one task.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return True
    sizes = [_number(os.environ, size) for rank, size, _, _ in _MPI if rank in os.environ and size in os.environ]
    return max([*sizes, _number(os.environ, "SLURM_STEP_NUM_TASKS", default=1)]) > 1


@contextlib.contextmanager
def collectives_checked() -> Iterator[None]:
    """Let torch check every collective of the groups that are made inside (TORCH_DISTRIBUTED_DEBUG=DETAIL).

    Does nothing where the environment has a level already, or the caller has made a default group that torch does not
    check. One that is left of an earlier call is checked, and so are the groups that are made beside it.
    """
    from torch._C._distributed_c10d import set_debug_level_from_env

    dist: Any = import_module("torch.distributed")  # `Logger` has no type annotation
    if _DEBUG_LEVEL in os.environ or (dist.is_initialized() and not is_checked(dist.group.WORLD)):
        yield
        return
    logger = dist.Logger
    os.environ[_DEBUG_LEVEL] = "DETAIL"
    set_debug_level_from_env()
    disable_ddp_logger_under_detail()
    try:
        yield
    finally:
        dist.Logger = logger
        del os.environ[_DEBUG_LEVEL]
        set_debug_level_from_env()


def exchange_through_store(rank: Rank, value: Any, *, name: str, limit_s: float) -> dict[int, Any]:
    """Return the values of the ranks that call this too, by rank, without a collective: others may have parted.

    Those of ranks that do not come in time, or not before the process that serves the store ends, are left out.

    Args:
        name: Of this exchange, the same on all ranks; no other has it.
    """
    from torch.distributed import distributed_c10d

    store: Any = distributed_c10d._get_default_store()
    deadline, values = time.monotonic() + limit_s, {rank.rank: value}
    with contextlib.suppress(RuntimeError):  # the connection is lost
        store.set(f"tpcheck/{name}/{rank.rank}", dumps(value))
        for other in range(rank.world_size):
            while other not in values and time.monotonic() < deadline:
                if store.check([f"tpcheck/{name}/{other}"]):
                    values[other] = loads(store.get(f"tpcheck/{name}/{other}"))
                else:
                    time.sleep(0.05)
    return dict(sorted(values.items()))


def leave_after(rank: Rank, *, first: int, name: str, limit_s: float) -> None:
    """Let this process end after that of rank `first`, which is to write: a launcher ends the others when one fails.

    Args:
        name: As of `exchange_through_store`.
    """
    from torch.distributed import distributed_c10d

    store: Any = distributed_c10d._get_default_store()
    key = f"tpcheck/{name}/left"

    def leave() -> None:
        deadline = time.monotonic() + limit_s
        with contextlib.suppress(RuntimeError):  # that rank serves the store, and has ended
            if rank.rank == first:
                store.set(key, "")
            while not store.check([key]) and time.monotonic() < deadline:
                time.sleep(0.05)

    atexit.register(leave)


def _destroy_process_group() -> None:
    """End gloo's threads: a process that exits while they run sometimes aborts (3 of 30 worlds)."""
    from torch import distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def launched_rank(environ: Mapping[str, str]) -> tuple[int, int, int]:
    """Return the rank, world size and local rank that the variables of a launcher give this process.

    Raises:
        UsageError: No launcher has set them, or one is not a number.
    """
    variables = _launchers_variables(environ)
    if variables is None:
        raise UsageError(
            "environment",
            "no RANK, SLURM_PROCID or OMPI_COMM_WORLD_RANK",
            "the variables that torchrun, srun or mpirun sets; start the script with one of them",
        )
    rank, world_size, local_rank, _ = variables
    return _number(environ, rank), _number(environ, world_size), _number(environ, local_rank, default=0)


def num_local_ranks(environ: Mapping[str, str], world_size: int) -> int:
    """Return how many ranks the launcher has started on this machine; where it does not say, all of the world."""
    variables = _launchers_variables(environ)
    if variables == _SLURM:
        return _tasks_on_this_node(environ) or world_size
    return _number(environ, variables[3] if variables else "", default=world_size)


def master_address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Return host and port of rank 0: as they are set, or as a step of Slurm gives them.

    Task 0 is on the first node of the step. The port, equal on all nodes, is a number made of the job and its step.

    Raises:
        UsageError: A variable is missing.
    """
    nodes = next((environ[name] for name in _NODE_LISTS if environ.get(name)), "")
    is_step = _launchers_variables(environ) == _SLURM
    host = environ.get("MASTER_ADDR") or (first_node(nodes) if is_step else "")
    if not host:
        raise UsageError("MASTER_ADDR", None, "the address of rank 0; set it beside the launcher's variables")
    if environ.get("MASTER_PORT") or not (is_step and environ.get("SLURM_JOB_ID", "").isdigit()):
        return host, _number(
            environ, "MASTER_PORT", accepted="the port of rank 0; set it beside the launcher's variables"
        )
    step = environ.get("SLURM_STEP_ID", "")
    return host, 15000 + (int(environ["SLURM_JOB_ID"]) + 101 * int(step if step.isdigit() else 0)) % 10000


def first_node(nodes: str) -> str:
    """Return the first name in a node list of Slurm.

    Example:
        >>> first_node("gpu[007-012,020],login1"), first_node("a1,b[2-3]"), first_node("rack[1-2]n[03,05]")
        ('gpu007', 'a1', 'rack1n03')
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[(\w*)[^\]]*\]", r"\1", first[0] if first else "")


def _launchers_variables(environ: Mapping[str, str]) -> tuple[str, str, str, str] | None:
    """Return the names of those that are set."""
    whole = [names for names in _MPI if all(name in environ for name in names[:3])]
    for names in (_TORCHRUN, *whole, _SLURM, *_OTHERS, *_MPI):
        if names[0] in environ and names[1] in environ:
            return names
    return None


def _tasks_on_this_node(environ: Mapping[str, str]) -> int | None:
    """Return Slurm's number of tasks on the node of this one, from `2(x3),1`: three nodes of 2 and one of 1."""
    counts: list[int] = []
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        counts += [int(match[1])] * int(match[2] or 1) if match else []
    node = _number(environ, "SLURM_NODEID", default=0)
    return counts[node] if node < len(counts) else None


def _number(
    environ: Mapping[str, str],
    name: str,
    *,
    default: int | None = None,
    accepted: str = "a number, as launchers set it",
) -> int:
    value = environ.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdigit():
        raise UsageError(name, value, accepted)
    return int(value)
