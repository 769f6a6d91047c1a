"""A mesh puts messages together from what arrives, and hears alarms and ends between them."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from tpcheck.world.exchange import PeerAborted, PeerLost, PeerSockets

MESSAGE, ALARM = b"\0", b"\1"


def nothing() -> None:
    pass


@pytest.fixture
def ends() -> Iterator[tuple[PeerSockets, socket.socket]]:
    """The mesh of rank 0, and the other end of its connection to rank 7."""
    own, other = socket.socketpair()
    mesh = PeerSockets({7: own})
    with other:
        yield mesh, other
    mesh.close()


def later(act: Callable[[], object], seconds: float = 0.05) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_a_message_may_come_in_two_parts(ends: tuple[PeerSockets, socket.socket], cut: int) -> None:
    mesh, other = ends
    framed = MESSAGE + b"abcd"
    other.sendall(framed[:cut])
    timer = later(lambda: other.sendall(framed[cut:]))
    assert mesh.receive(4, nothing) == {7: b"abcd"}
    timer.join()


def test_messages_that_wait_are_read_one_by_one(ends: tuple[PeerSockets, socket.socket]) -> None:
    mesh, other = ends
    other.sendall(MESSAGE + b"one" + MESSAGE + b"\1wo")
    assert mesh.receive(3, nothing) == {7: b"one"}
    assert mesh.receive(3, nothing) == {7: b"\1wo"}


def test_who_waits_is_called_now_and_then_and_may_give_up(ends: tuple[PeerSockets, socket.socket]) -> None:
    mesh, _ = ends
    called: list[float] = []

    def waiting() -> None:
        called.append(time.monotonic())
        if len(called) == 3:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        mesh.receive(3, waiting)
    assert all(0.2 < after - before < 2 for before, after in pairwise(called))


@pytest.mark.parametrize("cut", [1, 4, 9, 11, 13])
def test_an_alarm_may_come_in_two_parts(ends: tuple[PeerSockets, socket.socket], cut: int) -> None:
    mesh, other = ends
    framed = ALARM + (4).to_bytes(8, "little") + b"fire"
    other.sendall(framed[:cut])
    timer = later(lambda: other.sendall(framed[cut:]))
    with pytest.raises(PeerAborted) as caught:
        mesh.receive(48, nothing)
    assert caught.value.told == b"fire"
    timer.join()


def test_an_alarm_is_heard_after_the_message_before_it(ends: tuple[PeerSockets, socket.socket]) -> None:
    mesh, other = ends
    sender = PeerSockets({0: other.dup()})
    sender.send(b"abc")
    sender.abort(b"fire")
    mesh.raise_if_aborted()  # a message comes first: it is not touched
    assert mesh.receive(3, nothing) == {7: b"abc"}
    with pytest.raises(PeerAborted) as caught:
        mesh.raise_if_aborted()
    assert caught.value.told == b"fire"
    sender.close()


def test_to_heed_waits_for_nobody(ends: tuple[PeerSockets, socket.socket]) -> None:
    mesh, other = ends
    start = time.monotonic()
    mesh.raise_if_aborted()
    other.close()
    mesh.raise_if_aborted()  # who is gone is told of by `receive`
    assert time.monotonic() - start < 0.2


@pytest.mark.parametrize("sent", [b"", MESSAGE + b"ab", ALARM + b"\4"])
def test_an_end_is_told_with_its_rank_even_within_a_message(
    ends: tuple[PeerSockets, socket.socket], sent: bytes
) -> None:
    mesh, other = ends
    other.sendall(sent)
    other.close()
    with pytest.raises(PeerLost) as caught:
        mesh.receive(3, nothing)
    assert caught.value.rank == 7
    mesh.send(b"abc")  # tells nobody, and does not raise


def test_a_message_is_whole_that_does_not_fit_into_the_buffer_at_once(ends: tuple[PeerSockets, socket.socket]) -> None:
    mesh, other = ends
    receiver = PeerSockets({0: other.dup()})
    long = bytes(range(256)) * 8192
    sender = threading.Thread(target=mesh.send, args=(long,))
    sender.start()
    assert receiver.receive(len(long), nothing) == {0: long}
    sender.join()
    receiver.close()


def test_a_rank_that_reads_nothing_does_not_keep_the_sender(ends: tuple[PeerSockets, socket.socket]) -> None:
    mesh, _ = ends
    start = time.monotonic()
    mesh.send(bytes(1 << 22))
    assert time.monotonic() - start < 2
