"""Small messages between the ranks of one group, on connections of their own, that fail soon and say who is missing."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from select import POLLIN, poll
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakSet, finalize

from tpcheck.core.errors import RankFailure, RankOutcome
from tpcheck.world.channel import dumps, loads

if TYPE_CHECKING:
    import torch


_POLL_SECONDS = 0.3  # seconds: how soon a rank that waits looks whether another one has failed elsewhere
_CONNECT = 10.0  # seconds
_LOOKS = 40  # 0.1 ms: ranks that come nearly together need not be woken up, which takes up to 0.4 ms
_MESSAGE, _ALARM = b"\0", b"\1"  # the first byte of what is sent
_open_peer_sockets: WeakSet[PeerSockets] = WeakSet()


class PeerLost(Exception):
    """A rank has closed its end, as its death does."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"rank {rank} has closed the connection")
        self.rank = rank


class PeerAborted(Exception):
    """A rank will not come, and has said why."""

    def __init__(self, told: bytes) -> None:
        super().__init__("another rank has rung the alarm")
        self.told = told


class PeerSockets:
    """A socket to each other rank of the group."""

    def __init__(self, sockets: dict[int, socket.socket]) -> None:
        self._sockets = sockets
        for each in sockets.values():
            each.setblocking(False)  # one with a timeout is polled before each call
        _open_peer_sockets.add(self)
        finalize(self, _close, tuple(sockets.values()))  # a loader that is dropped takes its connections along

    @classmethod
    def connect(cls, rank: int, ranks: Sequence[int], gather: Callable[[Any], tuple[Any, ...]]) -> PeerSockets | None:
        """Return the connections, or None on every rank where one of them is on another machine. Collective."""
        place = _machine()
        with socket.socket(socket.AF_UNIX) as listener:
            name = f"\0tpcheck-{secrets.token_hex(16)}"  # abstract: no file is left; nobody else knows the name
            try:
                listener.bind(name)
                listener.listen(len(ranks))
                listener.settimeout(_CONNECT)
            except OSError:  # no abstract sockets on this system, or in this sandbox
                place = None
            told = dict(zip(ranks, gather((place, name)), strict=True))
            if place is None or any(other != place for other, _ in told.values()):
                return None
            sockets = _connected(rank, {other: name for other, (_, name) in told.items()}, listener)
        return cls(sockets) if all(gather(len(sockets) == len(ranks) - 1)) else None

    def send(self, message: bytes) -> None:
        """Send to all; those who are gone are told of by `receive`."""
        self._send(_MESSAGE + message)

    def abort(self, told: bytes) -> None:
        """Send what the others' next `receive`, or `raise_if_aborted`, raises as an `PeerAborted`."""
        self._send(_ALARM + len(told).to_bytes(8, "little") + told)

    def receive(self, size: int, waiting: Callable[[], None]) -> dict[int, bytes]:
        """Return `size` bytes from each other rank; `waiting` is called now and then meanwhile.

        Raises:
            PeerLost: A rank has closed its end.
            PeerAborted: A rank will not come.
        """
        received: dict[int, bytes] = {}
        for rank, each in self._sockets.items():
            data = _part(each, 1 + size)
            if data is None:
                waiting()
            if not data or len(data) <= size or data[:1] != _MESSAGE:  # late, gone, in parts, or an alarm
                data = _received(rank, each, data or b"", size, waiting)
            received[rank] = data[1:]
        return received

    def raise_if_aborted(self) -> None:
        """Raise the `PeerAborted` of a rank that has rung it; wait for nobody."""
        for rank, each in self._sockets.items():
            with suppress(OSError, PeerLost):
                if each.recv(1, socket.MSG_PEEK) == _ALARM:
                    _received(rank, each, b"", 0, lambda: None)

    def close(self) -> None:
        _close(tuple(self._sockets.values()))

    def _send(self, framed: bytes) -> None:
        for each in self._sockets.values():
            try:
                sent = each.send(framed)
            except BlockingIOError:
                sent = 0
            except OSError:  # gone
                continue
            if sent < len(framed):
                with suppress(OSError):  # stopped, with a full buffer
                    _send_rest(each, framed[sent:])


def _close(sockets: tuple[socket.socket, ...]) -> None:
    for each in sockets:
        each.close()


def _connected(rank: int, names: dict[int, str], listener: socket.socket) -> dict[int, socket.socket]:
    """Connect to the ranks below, accept those above; fewer where one does not come."""
    sockets: dict[int, socket.socket] = {}
    with suppress(OSError):
        for other in sorted(names):
            if other < rank:
                sockets[other] = socket.socket(socket.AF_UNIX)
                sockets[other].settimeout(_CONNECT)
                sockets[other].connect(names[other])
                sockets[other].sendall(rank.to_bytes(8, "little"))
        for _ in range(sum(other > rank for other in names)):
            accepted, _address = listener.accept()
            accepted.settimeout(_CONNECT)
            sockets[int.from_bytes(accepted.recv(8), "little")] = accepted
    return sockets


def _send_rest(connection: socket.socket, data: bytes) -> None:
    connection.settimeout(_POLL_SECONDS)
    try:
        connection.sendall(data)
    finally:
        connection.setblocking(False)


def _received(rank: int, connection: socket.socket, data: bytes, size: int, waiting: Callable[[], None]) -> bytes:
    """Return a message whole, with its first byte, from what has been read of it."""
    data = _filled(rank, connection, data, 1, size + 1, waiting)
    if data[:1] == _ALARM:  # whatever follows it is of no use
        data = _filled(rank, connection, data, 9, 9, waiting)
        end = 9 + int.from_bytes(data[1:9], "little")
        raise PeerAborted(_filled(rank, connection, data, end, end, waiting)[9:end])
    return _filled(rank, connection, data, size + 1, size + 1, waiting)


def _filled(
    rank: int, connection: socket.socket, data: bytes, least: int, most: int, waiting: Callable[[], None]
) -> bytes:
    """Return `data` and what follows it, until there are `least` bytes; read no more than `most`."""
    while len(data) < least:
        part = _part(connection, most - len(data))
        if part == b"":
            raise PeerLost(rank)
        if part is None:
            waiting()
        else:
            data += part
    return data


def _part(connection: socket.socket, size: int) -> bytes | None:
    """Return what has arrived, nothing at the end, None where nothing came in time."""
    for _ in range(_LOOKS):
        if (part := _arrived(connection, size)) is not None:
            return part
        os.sched_yield()
    poller = poll()
    poller.register(connection, POLLIN)
    poller.poll(1000 * _POLL_SECONDS)
    return _arrived(connection, size)


def _arrived(connection: socket.socket, size: int) -> bytes | None:
    try:
        return connection.recv(size)
    except BlockingIOError:
        return None
    except ConnectionError:
        return b""


def _machine() -> tuple[str, str] | None:
    """Return what ranks share that can reach each other by abstract sockets: a boot, and a network namespace."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/net").readlink())
    return None


def _forget_in_child() -> None:
    """Close a forked worker's copies: while one is open, nobody hears that the rank has died."""
    for mesh in list(_open_peer_sockets):
        mesh.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


_POLL = timedelta(seconds=0.3)  # how soon a rank that waits hears that another one has failed elsewhere
_LATE = "late"
_ROLL_CALL = 1.5  # seconds: five polls, so that every rank that waits has answered
# Ranks of one group make their exchanges in the same order; the number keeps their keys in the store apart.
_numbers: dict[tuple[int, ...], Iterator[int]] = {}


class Exchange:
    """Messages between the ranks of one group; every method but `isend` and `abort` is collective over it.

    It is a bare gloo group beside torch's list of groups, so `TORCH_DISTRIBUTED_DEBUG=DETAIL` does not double its cost,
    with a `PeerSockets` for the messages of every step where the ranks are on one machine.

    Attributes:
        ranks: Global ranks of the group.
        name: What the group is, for messages: `TP group (0, 1)`.
        broken: A rank has gone; nothing can be exchanged any more.
        also_aborted_by: Exchanges whose alarms are heard, too, while this one waits.
    """

    def __init__(self, ranks: Sequence[int], *, axis: str, timeout: float) -> None:
        from torch import distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

        self.ranks = tuple(ranks)
        self.name = f"{axis.upper()} group ({', '.join(map(str, self.ranks))})"
        self.broken = False
        self.also_aborted_by: tuple[Exchange, ...] = ()
        self._timeout = timeout
        self._deadline = 0.0  # of what is being received
        self._pending: Callable[[], tuple[bytes, ...]] | None = None
        self._mesh: PeerSockets | None = None
        self._group: Any = None
        if len(self.ranks) == 1:
            return
        self._rank = dist.get_rank()
        number = next(_numbers.setdefault(self.ranks, count()))
        self._store = PrefixStore(f"tpcheck/exchange/{axis}/{self.ranks}/{number}", _get_default_store())
        try:
            self._group = dist.ProcessGroupGloo(
                PrefixStore("gloo", self._store), self.ranks.index(self._rank), len(self.ranks),
                timedelta(seconds=timeout),
            )  # fmt: skip
        except RuntimeError as error:
            self._fail(error)
        self._mesh = PeerSockets.connect(self._rank, self.ranks, self.all_gather_object)

    def all_gather(self, message: bytes) -> tuple[bytes, ...]:
        """Return every rank's message, all of one length, in the order of `ranks`.

        Raises:
            RankFailure: A rank has gone, or does not come in time.
        """
        if len(self.ranks) == 1:
            return (message,)
        if self._pending is not None:
            self.wait()
        if self._mesh is not None:
            self._mesh.send(message)
            return self._received(self._mesh, message)
        return self._sent(message)()

    def isend(self, message: bytes) -> None:
        """Send a message as `all_gather` does, and do not wait for those of the others."""
        if len(self.ranks) > 1:
            self.wait()
            self._pending = self._sent(message)

    def wait(self) -> tuple[bytes, ...] | None:
        """Return the messages that met the one last posted, or None where none was."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending()

    def all_gather_object(self, value: Any) -> tuple[Any, ...]:
        """Return every rank's value, in the order of `ranks`."""
        if len(self.ranks) == 1:
            return (value,)
        import torch

        own = torch.frombuffer(bytearray(dumps(value)), dtype=torch.uint8)
        sizes = [int.from_bytes(size, "little") for size in self.all_gather(own.numel().to_bytes(8, "little"))]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: own.numel()] = own
        work, parts = self._start(padded)
        self._wait(work)
        return tuple(loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True))

    def broadcast(self, data: torch.Tensor, source: int) -> None:
        """Fill `data` (bytes, on the CPU) with that of the rank `source`."""
        if len(self.ranks) > 1:
            from torch.distributed import BroadcastOptions

            options = BroadcastOptions()
            options.rootRank = self.ranks.index(source)
            self._wait(self._group.broadcast([data], options))

    def abort(self, failure: RankFailure) -> None:
        """Tell the ranks of the group that wait, now or later, that this one will not come."""
        if len(self.ranks) == 1:
            return
        told = dumps((str(failure), failure.first, failure.outcomes))
        if self._mesh is not None:
            self._mesh.abort(told)
        with suppress(RuntimeError):  # the store's host may be the rank that died
            self._store.set("alarm", told.hex())

    def raise_if_aborted(self) -> None:
        """Raise the alarm that another rank of the group has rung, if any.

        Raises:
            RankFailure: What that rank said.
        """
        if len(self.ranks) == 1:
            return
        told = None
        try:
            if self._mesh is not None:
                self._mesh.raise_if_aborted()
            elif self._store.check(["alarm"]):
                told = bytes.fromhex(self._store.get("alarm").decode())
        except PeerAborted as alarm:
            told = alarm.told
        except RuntimeError:  # the store is gone
            return
        if told is not None:
            self._raise(told)

    def _sent(self, message: bytes) -> Callable[[], tuple[bytes, ...]]:
        """Send a message, and return what waits for those of the others."""
        if self._mesh is not None:
            self._mesh.send(message)
            return partial(self._received, self._mesh, message)
        import torch

        work, parts = self._start(torch.frombuffer(bytearray(message), dtype=torch.uint8))

        def wait() -> tuple[bytes, ...]:
            self._wait(work)
            return tuple(part.numpy().tobytes() for part in parts)

        return wait

    def _received(self, mesh: PeerSockets, own: bytes) -> tuple[bytes, ...]:
        self._deadline = time.monotonic() + self._timeout
        try:
            others = mesh.receive(len(own), self._waiting)
        except PeerLost as error:
            self._fail(error, gone=error.rank)
        except PeerAborted as alarm:
            self._raise(alarm.told)
        return tuple([others.get(rank, own) for rank in self.ranks])

    def _waiting(self) -> None:
        self._raise_if_any_aborted()
        if time.monotonic() > self._deadline:
            self._fail(RuntimeError("timed out"))

    def _start(self, own: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        import torch

        parts = [torch.empty_like(own) for _ in self.ranks]
        try:
            return self._group.allgather([parts], [own]), parts
        except RuntimeError as error:
            self._fail(error)

    def _wait(self, work: Any) -> None:
        """Wait, and look now and then whether another rank has rung the alarm."""
        deadline = time.monotonic() + self._timeout
        while (error := _waited(work)) is not None:
            if work.is_completed() or time.monotonic() > deadline:
                self._fail(error)
            self._raise_if_any_aborted()

    def _raise_if_any_aborted(self) -> None:
        for exchange in (self, *self.also_aborted_by):
            exchange.raise_if_aborted()

    def _raise(self, told: bytes) -> NoReturn:
        self.broken = True
        message, first, outcomes = loads(told)
        raise RankFailure(message, first=first, outcomes=outcomes)

    def _fail(self, error: Exception, *, gone: int | None = None) -> NoReturn:
        """Raise what happened: another rank's alarm, or who of the group does not answer a roll call."""
        self.broken = True
        late = "timed out" in str(error).lower()
        with suppress(RuntimeError):
            self._store.set(f"here/{self._rank}", _LATE if late else "closed")
        self._raise_if_any_aborted()
        if gone is None:
            missing, others_late = self._roll_call()
            late = late or others_late  # a rank that times out first closes its connections: the others see only that
        else:
            missing = [gone]
        who = ("rank " if len(missing) == 1 else "ranks ") + ", ".join(map(str, missing)) if missing else "a rank"
        how = f"did not come within {self._timeout:g} s" if late else "went away (the connection is closed)"
        failure = RankFailure(
            f"{who} of {self.name} {how} while the ranks compared their batches",
            first=missing[0] if missing else -1,
            outcomes=tuple(RankOutcome(rank, "hung" if late else "died") for rank in missing),
        )
        self.abort(failure)
        raise failure from error

    def _roll_call(self) -> tuple[list[int], bool]:
        """Return the ranks that do not answer, and whether one that does has timed out; none where no store answers."""
        missing, late = list(self.ranks), False
        with suppress(RuntimeError):
            deadline = time.monotonic() + _ROLL_CALL
            while missing and time.monotonic() < deadline:
                here = [rank for rank in missing if self._store.check([f"here/{rank}"])]
                late = late or any(self._store.get(f"here/{rank}").decode() == _LATE for rank in here)
                missing = [rank for rank in missing if rank not in here]
                time.sleep(0.02)
            return missing, late
        return [], late


def _waited(work: Any) -> RuntimeError | None:
    try:
        work.wait(_POLL)
    except RuntimeError as error:
        return error
    return None
