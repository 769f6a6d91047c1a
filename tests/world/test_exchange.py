"""Messages reach every rank of a group, over sockets or gloo, and a rank that fails ends the waiting of the others."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tpcheck import Rank, RankFailure, Topology, World, spawn
from tpcheck.world.exchange import BoundedStore, Exchange, PeerAborted, PeerLost, PeerSockets


@pytest.fixture(scope="module")
def four() -> Iterator[World]:
    with spawn(Topology(tp=4), timeout=60) as world:
        yield world


def create_exchange(rank: Rank, *, over: str = "unix", timeout: float = 10.0):  # type: ignore[no-untyped-def]
    """Return an exchange as on one machine, as over several, or as over more than can connect."""
    from unittest.mock import patch

    from tpcheck.world import exchange
    from tpcheck.world.exchange import Exchange

    machine = exchange.this_machine() if over == "unix" else (f"machine {rank.rank}", "")
    with (
        patch.object(exchange, "this_machine", lambda: machine),
        patch.object(exchange, "_MOST_PEERS_OVER_TCP", 2 if over == "gloo" else 64),
        patch.object(socket, "gethostname", lambda: "one" if over == "unix" else f"node-{rank.rank // 2}"),
    ):
        made = Exchange(rank.topology.peers(rank.rank, "tp"), axis="tp", timeout=timeout)
    families = {sock.family.name for sock in made._peer_sockets._sockets.values()} if made._peer_sockets else set()
    assert families == {"unix": {"AF_UNIX"}, "tcp": {"AF_INET"}, "gloo": set()}[over]
    return made


@pytest.mark.parametrize("over", ["unix", "tcp", "gloo"])
def test_messages_are_in_the_order_of_ranks(four: World, over: str) -> None:
    def communicate(rank: Rank) -> bool:
        import torch

        exchange = create_exchange(rank, over=over)
        for number in range(20):
            message = bytes([rank.rank, number])
            assert exchange.all_gather(message) == tuple(bytes([peer, number]) for peer in range(4))
        assert exchange.all_gather_object("x" * rank.rank) == ("", "x", "xx", "xxx")
        data = torch.full((3,), rank.rank, dtype=torch.uint8)
        exchange.broadcast(data, 2)
        return bool(data.tolist() == [2, 2, 2])

    assert four.run(communicate) == (True,) * 4


def test_messages_go_over_gloo_where_one_rank_may_not_bind_an_abstract_socket(four: World) -> None:
    def communicate(rank: Rank) -> tuple[bool, tuple[bytes, ...]]:
        from unittest.mock import patch

        from tpcheck.world.exchange import Exchange

        class RefusesToBind(socket.socket):
            def bind(self, address: object) -> None:
                raise PermissionError(1, "Operation not permitted")

        with patch.object(socket, "socket", RefusesToBind if rank.rank == 2 else socket.socket):
            exchange = Exchange(rank.topology.peers(rank.rank, "tp"), axis="tp", timeout=10)
        return exchange._peer_sockets is None, exchange.all_gather(bytes([rank.rank]))

    assert four.run(communicate) == ((True, (b"\0", b"\1", b"\2", b"\3")),) * 4


@pytest.mark.parametrize("over", ["unix", "tcp", "gloo"])
def test_isend_meets_the_next_all_gather_of_the_other_ranks(four: World, over: str) -> None:
    def communicate(rank: Rank) -> tuple[object, object]:
        exchange = create_exchange(rank, over=over)
        if rank.rank == 0:
            exchange.isend(b"0")
            return exchange.wait(), exchange.wait()
        return exchange.all_gather(b"x"), None

    assert four.run(communicate) == (((b"0", b"x", b"x", b"x"), None),) * 4


@pytest.mark.parametrize("over", ["unix", "tcp", "gloo"])
def test_a_rank_that_does_not_respond_is_named_on_all_others(four: World, over: str, tmp_path: Path) -> None:
    def communicate(rank: Rank) -> tuple[str, int, float]:
        exchange = create_exchange(rank, over=over, timeout=1.0)
        start = time.monotonic()
        try:
            if rank.rank != 2:
                exchange.all_gather(b"x")
        except RankFailure as failure:
            (tmp_path / str(rank.rank)).touch()
            return str(failure), failure.first, time.monotonic() - start
        while len(list(tmp_path.iterdir())) < 3:  # runs until all others have given up
            time.sleep(0.05)
        return "", 2, 0.0

    results = four.run(communicate)
    for rank in (0, 1, 3):
        message, first, seconds = results[rank]
        named = "rank 2" if over == "unix" else "rank 2 (node-1)"
        assert message.startswith(f"{named} of TP group (0, 1, 2, 3) did not respond within 1 s")
        assert first == 2
        assert seconds < 10


@pytest.mark.parametrize("over", ["unix", "gloo", ""])
def test_a_rank_that_comes_late_is_not_taken_for_one_that_never_comes(over: str, tmp_path: Path) -> None:
    """Over sockets, over gloo, and while it is connected: it waits longer than the first that gives up."""

    def communicate(rank: Rank) -> str:
        from unittest.mock import patch

        from tpcheck.world import exchange

        made = create_exchange(rank, over=over, timeout=2.0) if over else None
        if rank.rank == 2:
            while len(list(tmp_path.iterdir())) < 2:  # with its connections open
                time.sleep(0.05)
            return ""
        time.sleep(0.8 if rank.rank == 1 else 0)
        with patch.object(exchange, "_ROLL_CALL_S", 0.3), pytest.raises(RankFailure) as caught:
            (made or create_exchange(rank, timeout=2.0)).all_gather(b"x")
        (tmp_path / str(rank.rank)).touch()
        return str(caught.value)

    with spawn(Topology(tp=3), timeout=60) as world:
        first, late, _ = world.run(communicate)
    named = "rank 2 (node-1)" if over == "gloo" else "rank 2"
    assert first.startswith(f"{named} of TP group (0, 1, 2) did not respond within 2 s"), first
    assert late.startswith(f"{named} of TP group (0, 1, 2) "), late


def test_a_roll_call_ends_with_the_failure_that_another_rank_names(four: World) -> None:
    def communicate(rank: Rank) -> str:
        exchange = create_exchange(rank, over="gloo")
        if rank.rank == 0:
            time.sleep(0.3)
            exchange.abort(RankFailure("rank 3 died", first=3, outcomes=()))
        if rank.rank != 1:
            return ""
        with pytest.raises(RankFailure) as caught:
            exchange._fail(RuntimeError("Connection closed by peer"))
        return str(caught.value)

    assert four.run(communicate)[1] == "rank 3 died"


def test_a_rank_that_never_comes_is_named_once_the_others_have_waited() -> None:
    def connect_without_rank_2(rank: Rank) -> str:
        if rank.rank == 2:
            return ""
        with pytest.raises(RankFailure) as caught:
            create_exchange(rank, timeout=1)
        return str(caught.value)

    with spawn(Topology(tp=4), timeout=60) as world:  # of its own: its ranks have not made as many exchanges
        messages = world.run(connect_without_rank_2)
    expected = "rank 2 of TP group (0, 1, 2, 3) did not respond within 1 s while the ranks compared their batches"
    assert {*messages} == {"", expected}


@pytest.mark.parametrize(("host", "named"), [("rank", "rank 0"), ("agent", "a rank")])
def test_the_host_of_the_store_is_named_if_it_ends_before_the_ranks_are_connected(
    host: str, named: str, tmp_path: Path
) -> None:
    def connect_without_rank_0(rank: Rank) -> str:
        from unittest.mock import patch

        from torch._C._distributed_c10d import TCPStore

        if host == "agent":
            os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 3, rank.rank == 0)
        if rank.rank == 0:
            del store
            while len(list(tmp_path.iterdir())) < 2:  # this process is in the others' way if it ends
                time.sleep(0.05)
            return ""
        with (
            patch("torch.distributed.distributed_c10d._get_default_store", lambda: store),
            pytest.raises(RankFailure) as caught,
        ):
            create_exchange(rank, timeout=5)
        (tmp_path / str(rank.rank)).touch()
        return str(caught.value)

    with spawn(Topology(tp=3), timeout=60) as world:
        _, *messages = world.run(connect_without_rank_0)
    assert {message.partition(" of TP group")[0] for message in messages} == {named}, messages


@pytest.mark.parametrize("over", ["unix", "tcp", "gloo"])
def test_abort_ends_the_waiting_of_the_other_ranks(four: World, over: str) -> None:
    def communicate(rank: Rank) -> str:
        exchange = create_exchange(rank, over=over)
        if rank.rank == 1:
            exchange.abort(RankFailure("out of memory", first=1, outcomes=()))
            return ""
        with pytest.raises(RankFailure) as caught:
            exchange.all_gather(b"x")
        assert exchange.broken
        return str(caught.value)

    assert four.run(communicate) == ("out of memory", "", "out of memory", "out of memory")


def test_a_stranger_who_connects_to_the_port_is_not_taken_for_a_rank(four: World) -> None:
    def communicate(rank: Rank) -> bool:
        from unittest.mock import patch

        from tpcheck.world import exchange

        connect = exchange._connect

        def connect_late(own: int, endpoints, listener):  # type: ignore[no-untyped-def]
            with socket.create_connection(listener.getsockname()) as stranger:
                stranger.sendall(bytes(16) + (3).to_bytes(8, "little"))
                return connect(own, endpoints, listener)

        with patch.object(exchange, "_connect", connect_late):
            made = create_exchange(rank, over="tcp")
        return len(made.all_gather(b"x")) == 4

    assert four.run(communicate) == (True,) * 4


def test_a_forked_worker_does_not_keep_the_connections_open(four: World) -> None:
    def communicate(rank: Rank) -> bool:
        import os

        exchange = create_exchange(rank)
        reader, writer = os.pipe()
        worker = os.fork()
        if not worker:
            closed = all(sock.fileno() == -1 for sock in exchange._peer_sockets._sockets.values())
            os.write(writer, b"closed" if closed else b"open  ")
            os._exit(0)
        os.waitpid(worker, 0)
        exchange.all_gather(b"x")
        return os.read(reader, 6) == b"closed"

    assert four.run(communicate) == (True,) * 4


MESSAGE, ABORT = b"\0", b"\1"


def do_nothing() -> None:
    pass


def test_a_rank_whose_process_is_stopped_is_suspended() -> None:
    address = f"\0tpcheck test {os.getpid()}"  # of Linux alone, as the exchange's own
    script = f"import socket, time; rank = socket.socket(socket.AF_UNIX); rank.connect({address!r}); time.sleep(60)"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        with subprocess.Popen([sys.executable, "-c", script]) as rank:
            try:
                peers = PeerSockets({7: listener.accept()[0]})
                assert peers.suspended_ranks() == ()
                rank.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, rank.pid, os.WSTOPPED)
                assert peers.suspended_ranks() == (7,)
            finally:
                rank.kill()
    assert peers.suspended_ranks() == ()
    peers.close()


@pytest.fixture
def socket_pair() -> Iterator[tuple[PeerSockets, socket.socket]]:
    """The sockets of rank 0, and the other end of its connection to rank 7."""
    rank_0, other = socket.socketpair()
    peers = PeerSockets({7: rank_0})
    with other:
        yield peers, other
    peers.close()


def call_later(act: Callable[[], object], seconds: float = 0.05) -> threading.Timer:
    timer = threading.Timer(seconds, act)
    timer.start()
    return timer


@pytest.mark.parametrize("cut", [0, 1, 3, 5])
def test_a_message_may_arrive_in_two_parts(socket_pair: tuple[PeerSockets, socket.socket], cut: int) -> None:
    peers, other = socket_pair
    framed = MESSAGE + b"abcd"
    other.sendall(framed[:cut])
    timer = call_later(lambda: other.sendall(framed[cut:]))
    assert peers.receive(4, do_nothing) == {7: b"abcd"}
    timer.join()


def test_messages_that_have_arrived_are_read_one_by_one(socket_pair: tuple[PeerSockets, socket.socket]) -> None:
    peers, other = socket_pair
    other.sendall(MESSAGE + b"one" + MESSAGE + b"\1wo")
    assert peers.receive(3, do_nothing) == {7: b"one"}
    assert peers.receive(3, do_nothing) == {7: b"\1wo"}


def test_the_callback_is_called_while_waiting_and_may_raise(socket_pair: tuple[PeerSockets, socket.socket]) -> None:
    peers, _ = socket_pair
    calls: list[float] = []

    def on_poll() -> None:
        calls.append(time.monotonic())
        if len(calls) == 3:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        peers.receive(3, on_poll)
    assert all(0.2 < after - before < 2 for before, after in pairwise(calls))


@pytest.mark.parametrize("cut", [1, 4, 9, 11, 13])
def test_an_abort_may_arrive_in_two_parts(socket_pair: tuple[PeerSockets, socket.socket], cut: int) -> None:
    peers, other = socket_pair
    framed = ABORT + (4).to_bytes(8, "little") + b"fire"
    other.sendall(framed[:cut])
    timer = call_later(lambda: other.sendall(framed[cut:]))
    with pytest.raises(PeerAborted) as caught:
        peers.receive(48, do_nothing)
    assert caught.value.reason == b"fire"
    timer.join()


def test_an_abort_is_raised_after_the_message_before_it(socket_pair: tuple[PeerSockets, socket.socket]) -> None:
    peers, other = socket_pair
    sender = PeerSockets({0: other.dup()})
    sender.send(b"abc")
    sender.abort(b"fire")
    peers.raise_if_aborted()  # the next message is not an abort, and is not read
    assert peers.receive(3, do_nothing) == {7: b"abc"}
    with pytest.raises(PeerAborted) as caught:
        peers.raise_if_aborted()
    assert caught.value.reason == b"fire"
    sender.close()


def test_raise_if_aborted_does_not_wait(socket_pair: tuple[PeerSockets, socket.socket]) -> None:
    peers, other = socket_pair
    start = time.monotonic()
    peers.raise_if_aborted()
    other.close()
    peers.raise_if_aborted()  # a closed connection is left to `receive`
    assert time.monotonic() - start < 0.2


@pytest.mark.parametrize("sent", [b"", MESSAGE + b"ab", ABORT + b"\4"])
def test_a_closed_connection_names_its_rank_even_within_a_message(
    socket_pair: tuple[PeerSockets, socket.socket], sent: bytes
) -> None:
    peers, other = socket_pair
    other.sendall(sent)
    other.close()
    with pytest.raises(PeerLost) as caught:
        peers.receive(3, do_nothing)
    assert caught.value.rank == 7
    peers.send(b"abc")  # does not raise


def test_a_message_larger_than_the_buffer_arrives_complete(socket_pair: tuple[PeerSockets, socket.socket]) -> None:
    peers, other = socket_pair
    receiver = PeerSockets({0: other.dup()})
    message = bytes(range(256)) * 8192
    sender = threading.Thread(target=peers.send, args=(message,))
    sender.start()
    assert receiver.receive(len(message), do_nothing) == {0: message}
    sender.join()
    receiver.close()


def test_send_does_not_wait_for_a_rank_that_reads_nothing(socket_pair: tuple[PeerSockets, socket.socket]) -> None:
    peers, _ = socket_pair
    start = time.monotonic()
    peers.send(bytes(1 << 22))
    assert time.monotonic() - start < 2


class LateWork:
    """Is done just after the first look."""

    def __init__(self) -> None:
        self.looks = 0

    def wait(self, timeout: object) -> None:
        self.looks += 1
        if self.looks == 1:
            raise RuntimeError("Timed out waiting 300ms for recv operation to complete")

    def is_completed(self) -> bool:
        return True


def test_work_that_is_done_just_after_the_last_look_is_no_failure() -> None:
    work = LateWork()
    Exchange((0,), axis="tp", timeout=1)._wait_for_gloo(work)
    assert work.looks == 2


class StoreOfASuspendedHost:
    def __init__(self) -> None:
        self.calls = 0
        self.resumed = threading.Event()

    def check(self, keys: list[str]) -> bool:
        self.calls += 1
        return self.resumed.wait()

    def set(self, key: str, value: str) -> None:
        raise RuntimeError("connection reset")

    def get(self, key: str) -> bytes:
        return key.encode()


def test_a_store_that_does_not_answer_is_given_up_and_not_asked_again() -> None:
    suspended = StoreOfASuspendedHost()
    store = BoundedStore(suspended, limit_s=0.05)  # type: ignore[arg-type]
    assert store.get("here/1") == b"here/1"
    with pytest.raises(RuntimeError, match="connection reset"):
        store.set("here/0", "closed")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the store does not answer"):
            store.check(["here/1"])
    assert suspended.calls == 1
    suspended.resumed.set()
