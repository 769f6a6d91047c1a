"""How the ranks of a world meet, and their process groups: the default group, and one per axis."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlparse

from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup


# The controller's deadline ends a run that hangs, and shows every stack. A timeout of the group would only interrupt a
# person who debugs a rank.
NO_TIMEOUT = timedelta(days=1)


def reserve_port(host: str = "127.0.0.1") -> socket.socket:
    """Return a socket that reserves a port for as long as it is open.

    It is bound and does not listen, so that code under test can still serve on MASTER_PORT: with SO_REUSEADDR on both
    sockets, as torch's TCPStore sets it, Linux allows the second bind, and gives the port to no process that asks for
    any free port.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, 0))
    return sock


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """A store that several machines reach, and the prefix of one world in it."""

    host: str
    port: int
    prefix: str


@dataclass(frozen=True, slots=True)
class StoreLocation:
    """Where the ranks of a world meet: in a folder, or at an address if there is one."""

    folder: Path
    address: StoreAddress | None

    def open(self, name: str, world_size: int) -> Store:
        """Return the store of this name, the same for every rank of the world."""
        from torch._C._distributed_c10d import (  # torch.distributed does not export them
            FileStore,
            PrefixStore,
            TCPStore,
        )

        if self.address is None:
            store: Store = FileStore(str(self.folder / "store"), world_size)
        else:
            store = TCPStore(self.address.host, self.address.port, is_master=False, wait_for_workers=False)
            name = f"{self.address.prefix}/{name}"
        store.set_timeout(NO_TIMEOUT)
        return PrefixStore(name, store)


def use_store_for_env_rendezvous(location: StoreLocation) -> None:
    """Make `init_process_group()` and other `env://` rendezvous of code under test use this world's store."""
    attempts = count()

    def handler(url: str, timeout: timedelta = NO_TIMEOUT, **_: Any) -> Iterator[tuple[Store, int, int]]:
        query = parse_qs(urlparse(url).query)
        rank, world_size = (int(query.get(name, [os.environ[name.upper()]])[0]) for name in ("rank", "world_size"))
        env_store = location.open(f"env{next(attempts)}", world_size)
        env_store.set_timeout(timeout)
        yield env_store, rank, world_size
        raise RuntimeError("Unable to perform rerendezvous using env:// method")  # as torch does

    rendezvous = import_module("torch.distributed.rendezvous")  # torch.distributed.rendezvous is also a function
    handlers: dict[str, Any] | None = getattr(rendezvous, "_rendezvous_handlers", None)
    if handlers is not None:  # a private name: without it env:// works over MASTER_PORT
        handlers["env"] = handler


BACKENDS = ("gloo", "nccl")


def group_backend(backend: str) -> str:
    """Return the backend as torch names it: `Rank.gather` sends CPU tensors, which NCCL does not take."""
    return "cpu:gloo,cuda:nccl" if backend == "nccl" else backend


def device_of(local_rank: int, *, kind: str, num_gpus: int) -> str:
    """Return the device of a rank; ranks share GPUs where there are fewer GPUs than ranks."""
    return f"cuda:{local_rank % num_gpus}" if kind == "cuda" else "cpu"


def choose_backend(backend: str | None, *, kind: str, num_gpus: int, num_ranks: int) -> str:
    """Return gloo or nccl.

    Raises:
        UsageError: The backend is unknown, or NCCL where ranks share a GPU: NCCL then hangs or refuses.
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
    """Return a group of this rank's peers on the axis. Collective over these peers alone."""
    from torch import distributed as dist

    peers = topology.peers(rank, axis)
    if len(peers) == topology.world_size:
        world = dist.group.WORLD
        assert world is not None
        return world
    group = dist.new_group(list(peers), timeout=NO_TIMEOUT, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)  # this rank is one of its own peers
    return group


def is_checked(group: ProcessGroup) -> bool:
    """Return whether torch checks every collective of the group: it was made under TORCH_DISTRIBUTED_DEBUG=DETAIL."""
    wrapper: Any = getattr(import_module("torch._C._distributed_c10d"), "_ProcessGroupWrapper", ())  # of gloo
    return any(isinstance(group._get_backend(device), wrapper) for device in group._device_types)


def disable_ddp_logger_under_detail() -> None:
    """Make DDP skip its construction log, which fails on the wrapped groups of TORCH_DISTRIBUTED_DEBUG=DETAIL."""
    dist: Any = import_module("torch.distributed")  # these names have no type annotations
    if dist.get_debug_level() == dist.DebugLevel.DETAIL:
        dist.Logger = type("Logger", (dist.Logger,), {"set_construction_data_and_log": lambda *_, **__: None})
