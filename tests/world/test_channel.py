"""Messages arrive complete and in order, descriptors arrive with their message, and `queue` and `flush` never block."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcheck.world.channel import Channel


def connected_pair() -> tuple[Channel, Channel]:
    channel, other_end = Channel.pair()
    return channel, Channel(other_end)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 400_000), max_size=8))
def test_messages_of_any_size_arrive_in_order(sizes: list[int]) -> None:
    sender, receiver = connected_pair()
    for size in sizes:
        sender.queue(b"x" * size)
    received: list[object] = []
    while sender.flush() or len(received) < len(sizes):
        received += [message for message, _ in receiver.receive_available()]
    assert [len(message) for message in received if isinstance(message, bytes)] == sizes
    sender.close()
    receiver.close()


def test_descriptors_arrive_with_their_message(tmp_path: Path) -> None:
    sender, receiver = connected_pair()
    for name in ("first", "second"):
        path = tmp_path / name
        path.write_text(name)
        with path.open() as file:
            sender.send(name, [file.fileno()])
        sender.send("between")
    for message, descriptors in receiver.receive_available():
        assert len(descriptors) == (message != "between")
        for descriptor in descriptors:
            assert os.read(descriptor, 100).decode() == message
            os.close(descriptor)


def test_flush_does_not_wait_for_a_reader_that_sleeps() -> None:
    sender, _receiver = connected_pair()
    sender.queue(b"x" * 50_000_000)
    assert sender.flush()


def test_a_closed_connection_is_seen_after_the_last_message() -> None:
    sender, receiver = connected_pair()
    sender.send("last")
    sender.close()
    assert [message for message, _ in receiver.receive_available()] == ["last"]
    assert receiver.ended
    with pytest.raises(EOFError):
        receiver.receive()


def test_flush_to_a_closed_connection_does_not_raise() -> None:
    sender, receiver = connected_pair()
    receiver.close()
    sender.queue("hello")
    assert not sender.flush()
    assert isinstance(sender.socket, socket.socket)
