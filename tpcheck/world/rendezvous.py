"""How the ranks of one world find each other: through a file of their own, so that nothing can race or stall.

torch's TCPStore looks up the name of each peer, which takes 5 s whenever the resolver does not answer (2 of 60
connections here); a port that is chosen, closed and opened again may by then be another world's.
"""

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

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

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
