"""Links between the processes that a launcher has started, over which rank 0 directs the others.

Rank 0 listens on a port of its own, tells it through the launcher's store, and each other rank connects to it. A
process that ends closes its connection, which the other end notices at once, whatever the process was doing.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from tpcheck.core.errors import TpcheckError, UsageError
from tpcheck.world.attach import launched_rank
from tpcheck.world.channel import Channel

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

# Ranks reach the link at different times: one node may import the tests from a cold disk.
CONNECT_LIMIT_S = 300.0
_POLL_S = 0.1
_TOKEN_BYTES = 16
_GREETING = struct.Struct(f"!{_TOKEN_BYTES}sII")  # token, what the connection is for, rank
_NOTICE_S = 10.0
_LINK = 0  # what a connection is for: this, or the number of a world, for one of its ranks
_STORE_LIMIT = timedelta(seconds=30)


class LinkLost(TpcheckError):
    """The process of a rank has ended, or its machine does not answer."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"the process of rank {rank} has ended")
        self.rank = rank


class Link:
    """The connection to the process of one rank."""

    def __init__(self, rank: int, sock: socket.socket) -> None:
        self.rank = rank
        self.channel = Channel(sock)
        self.received: deque[Any] = deque()

    def send(self, message: object) -> None:
        """Send the message; do nothing if the process has ended, which `receive` says."""
        with contextlib.suppress(OSError):
            self.channel.send(message)

    def poll(self) -> None:
        """Move what has arrived to `received`; do not wait."""
        if not self.channel.ended:
            self.received += [message for message, _ in self.channel.receive_available()]

    def receive(
        self, also: Callable[[], Mapping[Channel, Callable[[], None]]] = dict, *, limit_s: float | None = None
    ) -> Any:
        """Wait for the next message. `also` returns other channels, each with what to call when it can be read.

        Raises:
            LinkLost: The process at the other end has ended.
            TimeoutError: No message has arrived in time.
        """
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while True:
            self.poll()
            if self.received:
                return self.received.popleft()
            if self.channel.ended:
                raise LinkLost(self.rank)
            if deadline is not None and time.monotonic() >= deadline:
                raise TimeoutError
            self._wait(also(), None if deadline is None else deadline - time.monotonic())

    def _wait(self, also: Mapping[Channel, Callable[[], None]], limit_s: float | None) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self.channel, selectors.EVENT_READ, None)
            for channel, on_data in also.items():
                selector.register(channel, selectors.EVENT_READ, on_data)
            for key, _ in selector.select(limit_s):
                if key.data is not None:
                    key.data()


class Launch:
    """The processes of a launcher, linked. Rank 0 has a link to each other rank, and these have one to rank 0.

    Attributes:
        links: By rank.
        master_addr: Where rank 0 is.
    """

    def __init__(self) -> None:
        self.rank, self.world_size, self.local_rank = launched_rank(os.environ)
        self.master_addr = _master_addr(os.environ)
        self.links: dict[int, Link] = {}
        self._store: Store | None = None
        self._world_store: Store | None = None
        self._listener: socket.socket | None = None
        self._accepted: dict[tuple[int, int], socket.socket] = {}
        self._token = b""
        self._port = 0

    def connect(self, notify: Callable[[str], None], *, limit_s: float = CONNECT_LIMIT_S) -> None:
        """Link the ranks; call `notify` with a sentence where that takes long. Collective over them.

        Raises:
            TpcheckError: A rank has not come in time, or has said that it takes no part; names it.
        """
        store = self._store = _launchers_store(self.rank, self.master_addr)
        started = time.monotonic()
        notices = iter([notify])

        def on_poll(missing: set[int]) -> None:
            self._raise_if_absent(missing)
            if time.monotonic() > started + _NOTICE_S and (first := next(notices, None)) is not None:
                first(f"waiting for {_named(missing)}: the launcher has started {self.world_size} processes")

        deadline = started + limit_s
        if self.rank == 0:
            self._listen()
            store.set("address", json.dumps([self._port, self._token.hex()]))
            others = set(range(1, self.world_size))
            sockets = self._accept(_LINK, others, deadline, on_poll=on_poll)
            self.links = {rank: Link(rank, sock) for rank, sock in sockets.items()}
        else:
            while not store.check(["address"]):
                on_poll({0})
                if time.monotonic() > deadline:
                    raise _not_here({0}, limit_s)
                time.sleep(_POLL_S)
            self._port, token = json.loads(store.get("address"))
            self._token = bytes.fromhex(token)
            self.links = {0: Link(0, self._open(_LINK, self.rank))}

    def accept_ranks(
        self, world: int, ranks: Iterable[int], *, limit_s: float, on_poll: Callable[[], None]
    ) -> dict[int, socket.socket]:
        """Return the connections of ranks that were forked elsewhere; rank 0 alone calls this. Worlds count from 1."""
        return self._accept(world, set(ranks), time.monotonic() + limit_s, on_poll=lambda _: on_poll())

    def open_rank(self, world: int, rank: int) -> socket.socket:
        """Return the connection to rank 0 of a rank that is to be forked here."""
        return self._open(world, rank)

    def store_address(self) -> tuple[str, int]:
        """Return the address of a store for the ranks of worlds, which rank 0 serves from the first call on."""
        from torch._C._distributed_c10d import TCPStore  # torch.distributed does not export it

        if self._world_store is None:
            self._world_store = TCPStore(self.master_addr, 0, is_master=True, wait_for_workers=False)
        port: int = self._world_store.port  # type: ignore[attr-defined]  # of a TCPStore
        return self.master_addr, port

    def close(self) -> None:
        for link in self.links.values():
            link.channel.close()
        if self._listener is not None:
            self._listener.close()

    def _listen(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=self.world_size)
        self._listener.settimeout(_POLL_S)
        self._port = self._listener.getsockname()[1]
        self._token = secrets.token_bytes(_TOKEN_BYTES)  # only who reads the store may send messages

    def _accept(
        self, purpose: int, ranks: set[int], deadline: float, *, on_poll: Callable[[set[int]], None]
    ) -> dict[int, socket.socket]:
        assert self._listener is not None  # rank 0 has one
        started = time.monotonic()
        while missing := {rank for rank in ranks if (purpose, rank) not in self._accepted}:
            on_poll(missing)
            if time.monotonic() > deadline:
                raise _not_here(missing, deadline - started)
            with contextlib.suppress(TimeoutError):
                sock, _ = self._listener.accept()
                self._admit(sock)
        return {rank: self._accepted.pop((purpose, rank)) for rank in sorted(ranks)}

    def _admit(self, sock: socket.socket) -> None:
        """Read who connects; close the connection of a stranger."""
        sock.settimeout(_POLL_S * 50)
        with contextlib.suppress(OSError):
            greeting = b""
            while len(greeting) < _GREETING.size and (data := sock.recv(_GREETING.size - len(greeting))):
                greeting += data
            if len(greeting) == _GREETING.size:
                token, purpose, rank = _GREETING.unpack(greeting)
                if secrets.compare_digest(token, self._token):
                    self._accepted[purpose, rank] = _ready(sock)
                    return
        sock.close()

    def _open(self, purpose: int, rank: int) -> socket.socket:
        sock = socket.create_connection((self.master_addr, self._port), timeout=_STORE_LIMIT.total_seconds())
        sock.sendall(_GREETING.pack(self._token, purpose, rank))
        return _ready(sock)

    def _raise_if_absent(self, missing: set[int]) -> None:
        assert self._store is not None
        absent = [rank for rank in sorted(missing) if self._store.check([f"absent/{rank}"])]
        if absent:
            raise TpcheckError(self._store.get(f"absent/{absent[0]}").decode())


def say_absent(reason: str) -> None:
    """Tell ranks that wait in `Launch.connect` that this one does not come, and why. Not collective."""
    rank, _, _ = launched_rank(os.environ)
    _launchers_store(rank, _master_addr(os.environ)).set(f"absent/{rank}", reason)


def has_launchers_store() -> bool:
    """Return whether the launcher itself serves a store, so that no rank has to."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _launchers_store(rank: int, master_addr: str) -> Store:
    """Return the store that torchrun serves, else one that rank 0 serves on the port that torch's own would use."""
    from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed does not export them

    port = os.environ.get("MASTER_PORT", "")
    if not port.isdigit():
        raise UsageError("MASTER_PORT", port or None, "the port of rank 0; set it beside the launcher's variables")
    store = TCPStore(
        master_addr,
        int(port),
        is_master=rank == 0 and not has_launchers_store(),
        wait_for_workers=False,
        multi_tenant=True,  # `init_process_group` serves on the same port
        timeout=_STORE_LIMIT,
    )
    return PrefixStore(f"tpcheck/launch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _master_addr(environ: Mapping[str, str]) -> str:
    address = environ.get("MASTER_ADDR")
    if not address:
        raise UsageError("MASTER_ADDR", address, "the address of rank 0; set it beside the launcher's variables")
    return address


def _ready(sock: socket.socket) -> socket.socket:
    """Return the socket without a limit, and such that the death of the other machine ends it."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sock


def _not_here(missing: set[int], limit_s: float) -> TpcheckError:
    return TpcheckError(f"{_named(missing)} did not connect within {limit_s:.0f} s")


def _named(ranks: set[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"
