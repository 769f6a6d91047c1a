"""Process groups: the default one, and one per axis of the topology."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpcheck.errors import UsageError
from tpcheck.topology import Topology
from tpcheck.world.rendezvous import NO_TIMEOUT

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

BACKENDS = ("gloo", "nccl")


def start_default_group(store: Store, *, rank: int, world_size: int, device: str, backend: str) -> None:
    """Initialise torch's default process group; on GPUs it carries CPU tensors as well."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))
        torch.cuda.init()  # type: ignore[no-untyped-call]
    torch.distributed.init_process_group(
        group_backend(backend), store=store, rank=rank, world_size=world_size, timeout=NO_TIMEOUT
    )


def group_backend(backend: str) -> str:
    """Return torch's name for it: objects (and `Rank.gather`) travel as CPU tensors, which NCCL does not carry."""
    return "cpu:gloo,cuda:nccl" if backend == "nccl" else backend


def device_of(local_rank: int, *, kind: str, num_gpus: int) -> str:
    """Return the device of a rank; ranks share GPUs where there are fewer of them."""
    return f"cuda:{local_rank % num_gpus}" if kind == "cuda" else "cpu"


def choose_backend(backend: str | None, *, kind: str, num_gpus: int, num_ranks: int) -> str:
    """Return gloo or nccl.

    Raises:
        UsageError: NCCL was asked for where ranks do not have a GPU each: it would hang or refuse.
    """
    has_own_gpu = kind == "cuda" and num_gpus >= num_ranks
    if backend is None:
        return "nccl" if has_own_gpu else "gloo"
    if backend not in BACKENDS:
        raise UsageError("backend", backend, BACKENDS)
    if backend == "nccl" and not has_own_gpu:
        raise UsageError("backend", backend, f"gloo: {num_ranks} ranks on {num_gpus} GPUs, and NCCL needs one each")
    return backend


def axis_group(topology: Topology, rank: int, axis: str) -> ProcessGroup:
    """Return a group of this rank's peers on the axis; only they need to call."""
    from torch import distributed as dist

    peers = topology.peers(rank, axis)
    if len(peers) == topology.world_size:
        world = dist.group.WORLD
        assert world is not None
        return world
    group = dist.new_group(list(peers), timeout=NO_TIMEOUT, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)  # this rank is one of its own peers
    return group
