"""Messages over a Unix stream socket, with open descriptors beside them, and how values become bytes."""

from __future__ import annotations

import pickle
import socket
import struct
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any


def dumps(value: Any) -> bytes:
    import cloudpickle  # type: ignore[import-untyped]

    pickled: bytes = cloudpickle.dumps(value)
    return pickled


def loads(pickled: bytes) -> Any:
    return pickle.loads(pickled)


def dumps_or_none(value: Any) -> bytes | None:
    """Return the value as bytes that load again, None where it has no such bytes."""
    try:
        pickled = dumps(value)
        loads(pickled)
    except Exception:
        return None
    return pickled


def loads_or_none(pickled: bytes | None) -> Any:
    """Return the unpickled value, None where this process cannot load it."""
    if pickled is None:
        return None
    try:
        return loads(pickled)
    except Exception:
        return None


_HEADER = struct.Struct("!QB")  # number of bytes in the message, number of descriptors beside it
_CHUNK = 1 << 20
_INT = array("i").itemsize
_ANCILLARY = socket.CMSG_SPACE(16 * _INT)  # room for more descriptors than any message carries


class Channel:
    """One end of a connection. Both ends run the same tpcheck, so plain pickle is safe and sufficient.

    `send` and `receive` block. `queue`, `flush` and `receive_available` never do: the controller uses them, so that a
    stuck rank cannot keep the controller beyond its deadline.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.ended = False
        self._unread = bytearray()
        self._unsent = bytearray()
        self._descriptors: deque[int] = deque()

    @classmethod
    def pair(cls) -> tuple[Channel, socket.socket]:
        """Return this process's end, and the other end to hand to another process."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        return cls(here), there

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def send(self, message: object, descriptors: Sequence[int] = ()) -> None:
        frame = _frame(message, len(descriptors))
        sent = socket.send_fds(self.socket, [frame], list(descriptors)) if descriptors else 0
        self.socket.sendall(frame[sent:])

    def receive(self) -> Any:
        """Wait for one message.

        Raises:
            EOFError: The other end has closed.
        """
        while (message := self._next()) is None:
            if not (data := self.socket.recv(_CHUNK)):
                raise EOFError
            self._unread += data
        return message[0]

    def queue(self, message: object) -> None:
        self._unsent += _frame(message, 0)

    def flush(self) -> bool:
        """Send what fits now; return whether something is left to send."""
        while self._unsent:
            try:
                sent = self.socket.send(memoryview(self._unsent)[:_CHUNK], socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:  # the other end has closed: its exit status says more than this error
                self._unsent.clear()
                break
            del self._unsent[:sent]
        return bool(self._unsent)

    def receive_available(self) -> list[tuple[Any, list[int]]]:
        """Return every complete message received, with its descriptors. At the end of the stream, set `ended`."""
        while not self.ended:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(_CHUNK, _ANCILLARY, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except OSError:
                data, ancillary = b"", []
            for _, kind, content in ancillary:  # socket.recv_fds drops its flags, so it would block
                if kind == socket.SCM_RIGHTS:
                    self._descriptors.extend(array("i", content[: len(content) // _INT * _INT]))
            self._unread += data
            self.ended = not data
        messages = []
        while (message := self._next()) is not None:
            messages.append(message)
        return messages

    def _next(self) -> tuple[Any, list[int]] | None:
        if len(self._unread) < _HEADER.size:
            return None
        size, num_descriptors = _HEADER.unpack_from(self._unread)
        end = _HEADER.size + size
        if len(self._unread) < end:
            return None
        message = pickle.loads(memoryview(self._unread)[_HEADER.size : end].tobytes())
        del self._unread[:end]
        return message, [self._descriptors.popleft() for _ in range(num_descriptors)]


def _frame(message: object, num_descriptors: int) -> bytes:
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(len(body), num_descriptors) + body


def end_with_machine(sock: socket.socket) -> None:
    """Set options of a TCP socket: send at once, and end within half a minute of the death of the other machine."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 25_000)):
        if hasattr(socket, name):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
