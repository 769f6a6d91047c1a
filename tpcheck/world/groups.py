"""How the ranks of a world find each other, and their process groups: the default one, and one per axis."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
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


# The controller's deadline ends what hangs, and shows every stack. A second clock in the group would only break in on a
# person who sits at a rank's debugger.
NO_TIMEOUT = timedelta(days=1)


def reserve_port() -> socket.socket:
    """Return a socket that keeps a port out of everybody else's hands for as long as it is open.

    It is bound and does not listen, so that code under test can still serve on MASTER_PORT: with SO_REUSEADDR on both,
    as torch's TCPStore sets it, Linux allows the second bind, while it hands the port to nobody who asks for any.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", 0))
    return sock


def store(scratch: Path, name: str, world_size: int) -> Store:
    """Return the store of this name, the same for every rank of the world."""
    from torch._C._distributed_c10d import (  # torch.distributed has them, but does not export them
        FileStore,
        PrefixStore,
    )

    file_store = FileStore(str(scratch / "store"), world_size)
    file_store.set_timeout(NO_TIMEOUT)
    return PrefixStore(name, file_store)


def serve_env(scratch: Path) -> None:
    """Make `init_process_group()` and other `env://` rendezvous of code under test meet in this world's file, too."""
    rendezvous = import_module("torch.distributed.rendezvous")  # torch.distributed.rendezvous is also a function
    handlers: dict[str, Any] | None = getattr(rendezvous, "_rendezvous_handlers", None)
    if handlers is not None:  # private: without it env:// still works, over MASTER_PORT
        handlers["env"] = _env_handler(scratch)


def _env_handler(scratch: Path) -> Callable[..., Iterator[tuple[Store, int, int]]]:
    attempts = count()

    def handler(url: str, timeout: timedelta = NO_TIMEOUT, **_: Any) -> Iterator[tuple[Store, int, int]]:
        query = parse_qs(urlparse(url).query)
        rank, world_size = (int(query.get(name, [os.environ[name.upper()]])[0]) for name in ("rank", "world_size"))
        env_store = store(scratch, f"env{next(attempts)}", world_size)
        env_store.set_timeout(timeout)
        yield env_store, rank, world_size
        raise RuntimeError("Unable to perform rerendezvous using env:// method")  # torch's own words

    return handler


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
