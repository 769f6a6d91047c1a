"""Small messages between the ranks of one group, on separate connections, which fail soon and name the missing rank."""

from __future__ import annotations

import os
import queue
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from ipaddress import ip_address
from itertools import count
from math import inf
from pathlib import Path
from select import POLLIN, poll
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast
from weakref import WeakSet, finalize

import psutil  # type: ignore[import-untyped]

from tpcheck.core.errors import RankFailure, RankOutcome
from tpcheck.world.channel import dumps, end_with_machine, loads

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

_POLL_S = 0.3  # how soon a rank that waits learns that another rank has failed
_CONNECT_TIMEOUT_S = 10.0
_SPINS = 40  # 0.1 ms: a rank that is scheduled out takes up to 0.4 ms to wake up
_STORE_LIMIT_S = 10.0  # a busy host answers within a second; one that is suspended, never
_ROLL_CALL_S = 1.5  # five polls, so that every rank that waits has answered
_MOST_PEERS_OVER_TCP = 64  # each rank has a connection to each other: 8 ranks of a node 504, of 1024 that may be open
_TOKEN_BYTES = 16
_TIMED_OUT, _CLOSED = "timed out", "closed"
_MESSAGE, _ABORT = b"\0", b"\1"  # the first byte on the wire


class PeerLost(Exception):
    """A rank has closed its connection, as its death does."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} has closed the connection")
        self.rank = rank


class PeersSilent(Exception):
    """The messages of these ranks have not arrived in time."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__("timed out")
        self.ranks = ranks


class PeerAborted(Exception):
    """A rank has called `abort`, with the reason as bytes."""

    def __init__(self, reason: bytes) -> None:
        super().__init__("another rank has aborted")
        self.reason = reason


# What the sockets win over the gloo group alone, measured with `watch` in a training step of 100 ms of matrix products
# and one all_reduce, 0.75 MiB a batch, all variants alternating in one run on 2 cores with other load (CPU time of a
# rank per step; time that `next(loader)` takes; "overlap" compares while the step runs):
#                      2 ranks, CPU and next()        4 ranks, CPU and next()
#   not watched         98.5 ms                        99.9 ms
#   sockets             98.0 ms    4.0 ms             100.8 ms    9.8 ms
#   gloo                98.9 ms   12.3 ms             103.5 ms   13.1 ms
#   sockets, overlap    99.6 ms    2.3 ms             102.0 ms    5.2 ms
#   gloo, overlap       98.9 ms    1.0 ms             103.8 ms    5.5 ms
# With overlap the gain is within the noise at 2 ranks and 2 % of the step at 4. The reason to keep the sockets is that
# they name a rank that dies. Over gloo alone the connection that closes has no rank, the roll call needs the store, and
# the store ends with rank 0: each case of `test_a_rank_that_is_killed_or_hangs_ends_all_others` then names no rank.
class PeerSockets:
    """A socket to every other rank of the group."""

    def __init__(self, sockets: dict[int, socket.socket]) -> None:
        self._sockets = sockets
        for sock in sockets.values():
            sock.setblocking(False)  # Python polls a socket that has a timeout before each call
        _open_peer_sockets.add(self)
        finalize(self, _close, tuple(sockets.values()))  # closes them with a loader that is garbage collected

    @classmethod
    def connect(
        cls,
        rank: int,
        machines: Mapping[int, tuple[str, str] | None],
        all_gather_object: Callable[[Any], tuple[Any, ...]],
    ) -> PeerSockets | None:
        """Return the connections, or None on every rank if one of them has no way to another. Collective.

        Args:
            rank: This one.
            machines: What `this_machine` returns on each rank.
            all_gather_object: Over the ranks.
        """
        is_one_machine = len({*machines.values()}) == 1
        if None in machines.values() or (not is_one_machine and len(machines) > _MOST_PEERS_OVER_TCP):
            return None
        with ExitStack() as stack:
            endpoint = None
            with suppress(OSError):  # no abstract sockets in this sandbox, no address
                listener, endpoint = _listen(len(machines), is_one_machine=is_one_machine)
                stack.enter_context(listener)
            endpoints = dict(zip(machines, all_gather_object(endpoint), strict=True))
            if None in endpoints.values():
                return None
            sockets = _connect(rank, endpoints, listener)
        if all(all_gather_object(len(sockets) == len(machines) - 1)):
            return cls(sockets)
        _close(tuple(sockets.values()))
        return None

    def send(self, message: bytes) -> None:
        """Send to every peer. `receive` raises for those that have closed their connection."""
        self._send(_MESSAGE + message)

    def abort(self, reason: bytes) -> None:
        """Make the next `receive` or `raise_if_aborted` of every peer raise PeerAborted."""
        self._send(_ABORT + len(reason).to_bytes(8, "little") + reason)

    def receive(self, size: int, on_poll: Callable[[], None], *, timeout: float = inf) -> dict[int, bytes]:
        """Return a message of `size` bytes from each peer; call `on_poll` every 0.3 s meanwhile.

        Raises:
            PeerLost: A peer has closed its connection.
            PeerAborted: A peer has aborted.
            PeersSilent: Messages have not arrived within `timeout` seconds.
        """
        received: dict[int, bytes] = {}
        deadline = time.monotonic() + timeout

        def look() -> None:
            on_poll()
            if time.monotonic() > deadline:
                awaited = {rank: sock for rank, sock in self._sockets.items() if rank not in received}
                silent = tuple(rank for rank, sock in awaited.items() if not _has_data(sock))
                raise PeersSilent(silent or tuple(awaited))

        for rank, sock in self._sockets.items():
            received[rank] = _receive_message(rank, sock, size, look)
        return received

    def raise_if_aborted(self) -> None:
        """Raise PeerAborted if the next message of a peer is an abort; do not wait."""
        for rank, sock in self._sockets.items():
            with suppress(OSError, PeerLost):
                if sock.recv(1, socket.MSG_PEEK) == _ABORT:
                    _receive_message(rank, sock, 0, lambda: None)

    def lost_ranks(self) -> tuple[int, ...]:
        """Return the peers that have closed their connections and left no message; do not wait."""
        return tuple(rank for rank, sock in self._sockets.items() if _is_closed(sock))

    def suspended_ranks(self) -> tuple[int, ...]:
        """Return the peers on this machine whose processes are stopped (SIGSTOP, Ctrl-Z)."""
        return tuple(rank for rank, sock in self._sockets.items() if _is_suspended(sock))

    def close(self) -> None:
        _close(tuple(self._sockets.values()))

    def _send(self, frame: bytes) -> None:
        for sock in self._sockets.values():
            try:
                sent = sock.send(frame)
            except BlockingIOError:
                sent = 0
            except OSError:  # the peer has closed it
                continue
            if sent < len(frame):
                with suppress(OSError):  # the peer is stopped, and its buffer full
                    _send_rest(sock, frame[sent:])


_open_peer_sockets: WeakSet[PeerSockets] = WeakSet()


def _close(sockets: tuple[socket.socket, ...]) -> None:
    for sock in sockets:
        sock.close()


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """Where a rank listens. Who connects says the token: anybody can reach an address, though not an abstract name.

    Attributes:
        address: The name of an abstract socket, or host and port.
        token: 16 bytes.
    """

    address: str | tuple[str, int]
    token: bytes

    @property
    def family(self) -> socket.AddressFamily:
        if isinstance(self.address, str):
            return socket.AF_UNIX
        return socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET


def _listen(num_ranks: int, *, is_one_machine: bool) -> tuple[socket.socket, _Endpoint]:
    """Return a socket that listens: an abstract one, or where the ranks are on several machines, a TCP port."""
    token = secrets.token_bytes(_TOKEN_BYTES)
    address = f"\0tpcheck-{token.hex()}" if is_one_machine else (_own_address(), 0)  # abstract: leaves no file
    endpoint = _Endpoint(address, token)
    listener = socket.socket(endpoint.family)
    try:
        listener.bind(address)
        listener.listen(num_ranks)
    except OSError:
        listener.close()
        raise
    listener.settimeout(_CONNECT_TIMEOUT_S)
    return listener, endpoint if is_one_machine else _Endpoint(listener.getsockname()[:2], token)


def _own_address() -> str:
    """Return the address by which other machines reach this one: that from which it reaches rank 0's.

    Rank 0's may be its name, which it finds to be a loopback address: then the one from which it reaches others.
    """
    name = os.environ.get("MASTER_ADDR") or socket.gethostname()
    family, *_, target = socket.getaddrinfo(name, 9, type=socket.SOCK_DGRAM)[0]
    if ip_address(target[0]).is_loopback and not _is_loopback(name):
        family, target = socket.AF_INET, ("192.0.2.1", 9)  # of nobody: RFC 5737
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect(target)
        address: str = probe.getsockname()[0]
        return address


def _is_loopback(name: str) -> bool:
    with suppress(ValueError):
        return ip_address(name).is_loopback
    return name == "localhost"


def _connect(rank: int, endpoints: Mapping[int, _Endpoint], listener: socket.socket) -> dict[int, socket.socket]:
    """Connect to the ranks below, accept those above; return fewer sockets if a rank does not connect in time."""
    sockets: dict[int, socket.socket] = {}
    above = {peer for peer in endpoints if peer > rank}
    with suppress(OSError):
        for peer in sorted(endpoints):
            if peer < rank:
                sockets[peer] = sock = socket.socket(endpoints[peer].family)
                sock.settimeout(_CONNECT_TIMEOUT_S)
                sock.connect(endpoints[peer].address)
                sock.sendall(endpoints[peer].token + rank.to_bytes(8, "little"))
        while above - sockets.keys():
            accepted, _address = listener.accept()
            accepted.settimeout(_CONNECT_TIMEOUT_S)
            greeting = accepted.recv(_TOKEN_BYTES + 8, socket.MSG_WAITALL)
            peer = int.from_bytes(greeting[_TOKEN_BYTES:], "little")
            if secrets.compare_digest(greeting[:_TOKEN_BYTES], endpoints[rank].token) and peer in above:
                sockets[peer] = accepted
            else:
                accepted.close()
        for sock in sockets.values():
            if sock.family != socket.AF_UNIX:
                end_with_machine(sock)
    return sockets


def _send_rest(sock: socket.socket, data: bytes) -> None:
    sock.settimeout(_POLL_S)
    try:
        sock.sendall(data)
    finally:
        sock.setblocking(False)


def _receive_message(rank: int, sock: socket.socket, size: int, on_poll: Callable[[], None]) -> bytes:
    data = _receive(rank, sock, b"", 1, size + 1, on_poll)
    if data[:1] == _ABORT:  # nothing that follows it is read
        data = _receive(rank, sock, data, 9, 9, on_poll)
        end = 9 + int.from_bytes(data[1:9], "little")
        raise PeerAborted(_receive(rank, sock, data, end, end, on_poll)[9:end])
    return _receive(rank, sock, data, size + 1, size + 1, on_poll)[1:]


def _receive(
    rank: int, sock: socket.socket, data: bytes, at_least: int, at_most: int, on_poll: Callable[[], None]
) -> bytes:
    """Return `data` and what follows it: `at_least` to `at_most` bytes."""
    while len(data) < at_least:
        received = _wait_for_data(sock, at_most - len(data))
        if received == b"":
            raise PeerLost(rank)
        if received is None:
            on_poll()
        else:
            data += received
    return data


def _wait_for_data(sock: socket.socket, size: int) -> bytes | None:
    """Return up to `size` bytes, `b""` at the end of the stream, None if nothing arrives in time."""
    for _ in range(_SPINS):
        if (data := _available_data(sock, size)) is not None:
            return data
        os.sched_yield()
    poller = poll()
    poller.register(sock, POLLIN)
    poller.poll(1000 * _POLL_S)
    return _available_data(sock, size)


def _available_data(sock: socket.socket, size: int) -> bytes | None:
    try:
        return sock.recv(size)
    except BlockingIOError:
        return None
    except OSError:  # reset, or its machine does not answer any more
        return b""


def _is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _has_data(sock: socket.socket) -> bool:
    try:
        return sock.recv(1, socket.MSG_PEEK) != b""
    except OSError:
        return False


def _is_suspended(sock: socket.socket) -> bool:
    if sock.family != socket.AF_UNIX:
        return False  # the peer may be on another machine
    pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    with suppress(psutil.Error, ValueError):  # it has died; it is in another namespace of processes
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def this_machine() -> tuple[str, str] | None:
    """Return what processes share that can connect by abstract sockets: a boot and a network namespace."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/net").readlink())
    return None


def _close_in_child() -> None:
    """Close the copies of a forked data loader worker: while they are open, peers do not see that the rank has died."""
    for peer_sockets in list(_open_peer_sockets):
        peer_sockets.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


# Ranks of one group create their exchanges in the same order; the number separates their keys in the store.
_numbers: dict[tuple[int, ...], Iterator[int]] = {}


class Exchange:
    """Messages between the ranks of one group. Every method but `isend` and `abort` is collective over it.

    It is a gloo group that torch does not list, so TORCH_DISTRIBUTED_DEBUG=DETAIL does not double its cost, with
    `PeerSockets` for the messages of every step where the ranks can connect, and are not too many on other machines.

    Attributes:
        ranks: Global ranks of the group.
        node_of: The name of each rank's machine; empty for a group of one rank.
        name: The group in messages: `TP group (0, 1)`.
        broken: A rank has failed; no method can be called any more.
        also_aborted_by: Exchanges whose aborts end the waiting of this one, too.
        purpose: What the ranks do, for messages.
    """

    def __init__(
        self, ranks: Sequence[int], *, axis: str, timeout: float, purpose: str = "compared their batches"
    ) -> None:
        from torch import distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        self.ranks = tuple(ranks)
        self.name = f"{axis.upper()} group ({', '.join(map(str, self.ranks))})"
        self.node_of: dict[int, str] = {}
        self.broken = False
        self.also_aborted_by: tuple[Exchange, ...] = ()
        self.purpose = purpose
        self._timeout = timeout
        self._num_over_gloo = 0
        self._pending: Callable[[], tuple[bytes, ...]] | None = None
        self._peer_sockets: PeerSockets | None = None
        self._group: Any = None
        if len(self.ranks) == 1:
            return
        self._rank = dist.get_rank()
        number = next(_numbers.setdefault(self.ranks, count()))
        default_store = _get_default_store()
        store = PrefixStore(f"tpcheck/exchange/{axis}/{self.ranks}/{number}", default_store)
        self._store, self._store_host = BoundedStore(store), _host_of(default_store)
        self._arrive()
        try:
            self._group = dist.ProcessGroupGloo(
                PrefixStore("gloo", store), self.ranks.index(self._rank), len(self.ranks),
                timedelta(seconds=timeout),
            )  # fmt: skip
        except RuntimeError as error:
            self._fail(error)
        places = dict(zip(self.ranks, self.all_gather_object((socket.gethostname(), this_machine())), strict=True))
        self.node_of = {rank: node for rank, (node, _) in places.items()}
        machines = {rank: machine for rank, (_, machine) in places.items()}
        self._peer_sockets = PeerSockets.connect(self._rank, machines, self.all_gather_object)

    def all_gather(self, message: bytes) -> tuple[bytes, ...]:
        """Return every rank's message, all of one length, in the order of `ranks`.

        Raises:
            RankFailure: A rank has failed, or does not call in time.
        """
        if len(self.ranks) == 1:
            return (message,)
        self.wait()
        return self._send(message)()

    def isend(self, message: bytes) -> None:
        """Send a message to the next `all_gather` or `isend` of the other ranks; `wait` returns theirs."""
        if len(self.ranks) > 1:
            self.wait()
            self._pending = self._send(message)

    def wait(self) -> tuple[bytes, ...] | None:
        """Return the messages that belong to the last `isend`, None if there is none to wait for."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending()

    def all_gather_object(self, value: Any) -> tuple[Any, ...]:
        """Return every rank's value, in the order of `ranks`."""
        if len(self.ranks) == 1:
            return (value,)
        import torch

        data = torch.frombuffer(bytearray(dumps(value)), dtype=torch.uint8)
        sizes = [int.from_bytes(size, "little") for size in self.all_gather(data.numel().to_bytes(8, "little"))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: data.numel()] = data
        work, parts = self._start_gloo_all_gather(padded)
        self._wait_for_gloo(work)
        return tuple(loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True))

    def broadcast(self, data: torch.Tensor, source: int) -> None:
        """Fill `data` (bytes, on the CPU) with that of the rank `source`."""
        if len(self.ranks) > 1:
            from torch.distributed import BroadcastOptions

            options = BroadcastOptions()
            options.rootRank = self.ranks.index(source)
            self._num_over_gloo += 1
            self._wait_for_gloo(self._group.broadcast([data], options))

    def abort(self, failure: RankFailure) -> None:
        """Make the other ranks raise this failure when they next wait."""
        if len(self.ranks) == 1:
            return
        reason = dumps((str(failure), failure.first, failure.outcomes))
        if self._peer_sockets is not None:
            self._peer_sockets.abort(reason)
        with suppress(RuntimeError):  # the rank that hosts the store may have died
            self._store.set("abort", reason.hex())

    def raise_if_aborted(self) -> None:
        """Raise the failure with which another rank has called `abort`; do not wait.

        Raises:
            RankFailure: Another rank has aborted.
        """
        if len(self.ranks) == 1:
            return
        try:
            if self._peer_sockets is not None:
                self._peer_sockets.raise_if_aborted()
            elif self._store.check(["abort"]):
                raise PeerAborted(bytes.fromhex(self._store.get("abort").decode()))
        except PeerAborted as abort:
            self._raise_abort(abort)
        except RuntimeError:  # the store is not reachable
            return

    def lost_ranks(self) -> tuple[int, ...]:
        """Return the ranks that have closed their connections, as their death does; do not wait.

        Nothing is known where the ranks have no `PeerSockets`.
        """
        return () if self._peer_sockets is None else self._peer_sockets.lost_ranks()

    def suspended_ranks(self) -> tuple[int, ...]:
        """Return the ranks whose processes are stopped; of those on other machines nothing is known."""
        return () if self._peer_sockets is None else self._peer_sockets.suspended_ranks()

    def named(self, ranks: Sequence[int]) -> str:
        """Return `ranks 2, 3 (node-b)`; without nodes where all ranks of the group are on one."""
        text = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
        nodes = dict.fromkeys(self.node_of[rank] for rank in ranks if rank in self.node_of)
        return f"{text} ({', '.join(nodes)})" if len({*self.node_of.values()}) > 1 else text

    def _send(self, message: bytes) -> Callable[[], tuple[bytes, ...]]:
        """Send a message, and return a function that waits for those of the other ranks."""
        if self._peer_sockets is not None:
            self._peer_sockets.send(message)
            return partial(self._receive, self._peer_sockets, message)
        import torch

        work, parts = self._start_gloo_all_gather(torch.frombuffer(bytearray(message), dtype=torch.uint8))

        def wait() -> tuple[bytes, ...]:
            self._wait_for_gloo(work)
            return tuple(part.numpy().tobytes() for part in parts)

        return wait

    def _receive(self, peer_sockets: PeerSockets, message: bytes) -> tuple[bytes, ...]:
        try:
            by_peer = peer_sockets.receive(len(message), self._raise_if_any_aborted, timeout=self._timeout)
        except PeerLost as error:
            self._fail(error, missing=(error.rank,))
        except PeersSilent as error:
            suspended = sorted({*error.ranks} & {*self.suspended_ranks()})  # which others may be waiting for elsewhere
            self._fail(error, missing=suspended or error.ranks)
        except PeerAborted as abort:
            self._raise_abort(abort)
        return tuple([by_peer.get(rank, message) for rank in self.ranks])

    def _start_gloo_all_gather(self, data: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        import torch

        parts = [torch.empty_like(data) for _ in self.ranks]
        self._num_over_gloo += 1
        try:
            return self._group.allgather([parts], [data]), parts
        except RuntimeError as error:
            self._fail(error)

    def _wait_for_gloo(self, work: Any) -> None:
        """Wait for the work, and look every 0.3 s whether another rank has aborted."""
        deadline = time.monotonic() + self._timeout
        has_arrived = False
        while (error := _gloo_error(work)) is not None:
            if work.is_completed() and (error := _gloo_error(work)) is None:
                return  # it was done just after the last look
            if work.is_completed() or time.monotonic() > deadline:
                self._fail(error)
            if not has_arrived:
                self._arrive()
                has_arrived = True
            self._raise_if_any_aborted()

    def _raise_if_any_aborted(self) -> None:
        for exchange in (self, *self.also_aborted_by):
            exchange.raise_if_aborted()

    def _raise_abort(self, abort: PeerAborted) -> NoReturn:
        self.broken = True
        message, first, outcomes = loads(abort.reason)
        raise RankFailure(message, first=first, outcomes=outcomes) from None

    def _fail(self, error: Exception, *, missing: Sequence[int] = ()) -> NoReturn:
        """Raise the failure of another rank that has aborted, else one that names the ranks which do not answer.

        Args:
            missing: These ranks, where they are known; else the store is asked.
        """
        self.broken = True
        timed_out = any(words in str(error).lower() for words in ("timed out", "timeout"))  # gloo's, the store's
        with suppress(RuntimeError):
            self._store.set(f"here/{self._rank}", _TIMED_OUT if timed_out else _CLOSED)
        self._raise_if_any_aborted()
        if not missing:
            missing, other_timed_out = self._roll_call()
            if not missing and len(self.ranks) == 2:
                missing = [rank for rank in self.ranks if rank != self._rank]
            timed_out = timed_out or other_timed_out  # to the other ranks, the first that times out closes a connection
        who = self.named(missing) if missing else "a rank"
        what = f"did not respond within {self._timeout:g} s" if timed_out else "closed its connection"
        failure = RankFailure(
            f"{who} of {self.name} {what} while the ranks {self.purpose}",
            first=missing[0] if missing else -1,
            outcomes=tuple(RankOutcome(rank, "hung" if timed_out else "died") for rank in missing),
        )
        self.abort(failure)
        raise failure from error

    def _arrive(self) -> None:
        """Say in the store that this rank waits for the others, in which of the messages over gloo."""
        with suppress(RuntimeError):
            self._store.set(f"waits/{self._rank}", str(self._num_over_gloo))

    def _roll_call(self) -> tuple[list[int], bool]:
        """Return the ranks that do not answer in the store, and whether one that answers has timed out.

        Of these, where one has timed out, those that do not wait: who has come later waits longer, and answers later.
        If the store does not answer either, return the rank that hosts it, or no rank where that is not known.
        """
        missing, timed_out = list(self.ranks), False
        with suppress(RuntimeError):
            deadline = time.monotonic() + _ROLL_CALL_S
            while missing and time.monotonic() < deadline:
                present = [rank for rank in missing if self._store.check([f"here/{rank}"])]
                timed_out = timed_out or any(self._store.get(f"here/{rank}").decode() == _TIMED_OUT for rank in present)
                missing = [rank for rank in missing if rank not in present]
                self._raise_if_any_aborted()
                time.sleep(0.02)
            absent = [rank for rank in missing if not self._waits(rank)]
            return (absent if timed_out and absent else missing), timed_out
        return [rank for rank in missing if rank == self._store_host != self._rank], timed_out

    def _waits(self, rank: int) -> bool:
        key = f"waits/{rank}"
        return self._store.check([key]) and int(self._store.get(key)) >= self._num_over_gloo  # who sends may go on


class BoundedStore:
    """A store whose answers are waited for a limited time: torch waits for ever where its host is suspended.

    Every call raises RuntimeError where the store does not answer, as torch does where its host has died.
    """

    def __init__(self, store: Store, limit_s: float = _STORE_LIMIT_S) -> None:
        self._store = store
        self._limit_s = limit_s
        self._is_silent = False

    def set(self, key: str, value: str) -> None:
        self._answer(lambda: self._store.set(key, value))

    def check(self, keys: list[str]) -> bool:
        return self._answer(lambda: self._store.check(keys))

    def get(self, key: str) -> bytes:
        return self._answer(lambda: self._store.get(key))

    def _answer(self, ask: Callable[[], T]) -> T:
        if self._is_silent:
            raise RuntimeError("the store does not answer")
        answers: queue.SimpleQueue[tuple[T | None, RuntimeError | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                answers.put((ask(), None))
            except RuntimeError as error:
                answers.put((None, error))

        threading.Thread(target=run, daemon=True, name="tpcheck-store").start()
        try:
            answer, error = answers.get(timeout=self._limit_s)
        except queue.Empty:
            self._is_silent = True
            raise RuntimeError("the store does not answer") from None
        if error is not None:
            raise error
        return cast("T", answer)


def _host_of(store: Store) -> int | None:
    """Return the rank that hosts the default store: 0 where it is at MASTER_ADDR, unless torchrun itself hosts it."""
    from torch._C._distributed_c10d import PrefixStore, TCPStore  # torch.distributed does not export the latter

    while isinstance(store, PrefixStore):
        store = store.underlying_store
    address = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    is_of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    return 0 if isinstance(store, TCPStore) and not is_of_agent and (store.host, str(store.port)) == address else None


def _gloo_error(work: Any) -> RuntimeError | None:
    """Wait for the work; return why it is not done after 0.3 s, None if it is."""
    try:
        work.wait(timedelta(seconds=_POLL_S))
    except RuntimeError as error:
        return error
    return None
