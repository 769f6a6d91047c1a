"""Messages arrive whole and in order, descriptors with the message they belong to, and nobody waits who must not."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcheck.world.channel import Channel


def connected() -> tuple[Channel, Channel]:
    here, there = Channel.pair()
    return here, Channel(there)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 400_000), max_size=8))
def test_messages_of_any_size_arrive_in_order(sizes: list[int]) -> None:
    sender, receiver = connected()
    for size in sizes:
        sender.queue(b"x" * size)
    received: list[object] = []
    while sender.flush() or len(received) < len(sizes):
        received += [message for message, _ in receiver.pump()]
    assert [len(message) for message in received if isinstance(message, bytes)] == sizes
    sender.close()
    receiver.close()


def test_descriptors_stay_with_their_message(tmp_path: Path) -> None:
    sender, receiver = connected()
    for name in ("first", "second"):
        path = tmp_path / name
        path.write_text(name)
        with path.open() as file:
            sender.send(name, [file.fileno()])
        sender.send("between")
    for message, descriptors in receiver.pump():
        assert len(descriptors) == (message != "between")
        for descriptor in descriptors:
            assert os.read(descriptor, 100).decode() == message
            os.close(descriptor)


def test_a_reader_that_sleeps_does_not_hold_up_the_sender() -> None:
    sender, _receiver = connected()
    sender.queue(b"x" * 50_000_000)
    assert sender.flush()


def test_the_end_of_the_other_side_is_seen() -> None:
    sender, receiver = connected()
    sender.send("last")
    sender.close()
    assert [message for message, _ in receiver.pump()] == ["last"]
    assert receiver.ended
    with pytest.raises(EOFError):
        receiver.receive()


def test_writing_to_nobody_is_no_error_of_its_own() -> None:
    sender, receiver = connected()
    receiver.close()
    sender.queue("hello")
    assert not sender.flush()
    assert isinstance(sender.socket, socket.socket)
