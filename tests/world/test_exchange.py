"""Small messages reach every rank of a group, over sockets or gloo, and a rank that fails is heard of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tpcheck import Rank, RankFailure, Topology, World, spawn


@pytest.fixture(scope="module")
def four() -> Iterator[World]:
    with spawn(Topology(tp=4), timeout=60) as world:
        yield world


def exchange_of(rank: Rank, *, sockets: bool, timeout: float = 10.0):  # type: ignore[no-untyped-def]
    from tpcheck.world import exchange
    from tpcheck.world.exchange import Exchange

    kept, exchange._machine = exchange._machine, exchange._machine if sockets else lambda: None
    try:
        return Exchange(rank.topology.peers(rank.rank, "tp"), axis="tp", timeout=timeout)
    finally:
        exchange._machine = kept


@pytest.mark.parametrize("sockets", [True, False])
def test_messages_come_in_the_order_of_ranks(four: World, sockets: bool) -> None:
    def talk(rank: Rank) -> bool:
        import torch

        exchange = exchange_of(rank, sockets=sockets)
        assert (exchange._mesh is not None) == sockets
        for number in range(20):
            own = bytes([rank.rank, number])
            assert exchange.all_gather(own) == tuple(bytes([other, number]) for other in range(4))
        assert exchange.all_gather_object("x" * rank.rank) == ("", "x", "xx", "xxx")
        data = torch.full((3,), rank.rank, dtype=torch.uint8)
        exchange.broadcast(data, 2)
        return bool(data.tolist() == [2, 2, 2])

    assert four.run(talk) == (True,) * 4


def test_messages_go_over_gloo_where_one_rank_may_not_bind_an_abstract_socket(four: World) -> None:
    def talk(rank: Rank) -> tuple[bool, tuple[bytes, ...]]:
        import socket
        from unittest.mock import patch

        from tpcheck.world.exchange import Exchange

        class Refusing(socket.socket):
            def bind(self, address: object) -> None:
                raise PermissionError(1, "Operation not permitted")

        with patch.object(socket, "socket", Refusing if rank.rank == 2 else socket.socket):
            exchange = Exchange(rank.topology.peers(rank.rank, "tp"), axis="tp", timeout=10)
        return exchange._mesh is None, exchange.all_gather(bytes([rank.rank]))

    assert four.run(talk) == ((True, (b"\0", b"\1", b"\2", b"\3")),) * 4


@pytest.mark.parametrize("sockets", [True, False])
def test_a_posted_message_meets_the_next_ones_of_the_others(four: World, sockets: bool) -> None:
    def talk(rank: Rank) -> tuple[object, object]:
        exchange = exchange_of(rank, sockets=sockets)
        if rank.rank == 0:
            exchange.isend(b"0")
            return exchange.wait(), exchange.wait()
        return exchange.all_gather(b"x"), None

    assert four.run(talk) == (((b"0", b"x", b"x", b"x"), None),) * 4


@pytest.mark.parametrize("sockets", [True, False])
def test_a_rank_that_does_not_come_is_named_to_all(four: World, sockets: bool, tmp_path: Path) -> None:
    def talk(rank: Rank) -> tuple[str, int, float]:
        exchange = exchange_of(rank, sockets=sockets, timeout=1.0)
        start = time.monotonic()
        try:
            if rank.rank != 2:
                exchange.all_gather(b"x")
        except RankFailure as failure:
            (tmp_path / str(rank.rank)).touch()
            return str(failure), failure.first, time.monotonic() - start
        while len(list(tmp_path.iterdir())) < 3:  # stays until all others have given up
            time.sleep(0.05)
        return "", 2, 0.0

    said = four.run(talk)
    for rank in (0, 1, 3):
        message, first, seconds = said[rank]
        assert message.startswith("rank 2 of TP group (0, 1, 2, 3) did not come within 1 s")
        assert first == 2
        assert seconds < 10


@pytest.mark.parametrize("sockets", [True, False])
def test_an_alarm_ends_the_waiting_of_others(four: World, sockets: bool) -> None:
    def talk(rank: Rank) -> str:
        exchange = exchange_of(rank, sockets=sockets)
        if rank.rank == 1:
            exchange.abort(RankFailure("out of memory", first=1, outcomes=()))
            return ""
        with pytest.raises(RankFailure) as caught:
            exchange.all_gather(b"x")
        assert exchange.broken
        return str(caught.value)

    assert four.run(talk) == ("out of memory", "", "out of memory", "out of memory")


def test_a_forked_worker_does_not_keep_the_connections_open(four: World) -> None:
    def talk(rank: Rank) -> bool:
        import os

        exchange = exchange_of(rank, sockets=True)
        reader, writer = os.pipe()
        worker = os.fork()
        if not worker:
            closed = all(each.fileno() == -1 for each in exchange._mesh._sockets.values())
            os.write(writer, b"closed" if closed else b"open  ")
            os._exit(0)
        os.waitpid(worker, 0)
        exchange.all_gather(b"x")
        return os.read(reader, 6) == b"closed"

    assert four.run(talk) == (True,) * 4
