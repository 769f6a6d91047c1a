"""What one rank of 16,384 sends, on torch's fake process group: the other ranks say what it says, of other samples."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FakeProcessGroup
from torch.testing._internal.distributed import fake_pg  # registers the backend

import tpcheck
from tpcheck import Topology
from tpcheck.batches.rounds import RoundMessage
from tpcheck.world.exchange import PeerSockets

LARGE = Topology(tp=8, dp=2048)
DOCS = Path(__file__).parents[2] / "docs" / "runs.md"


@dataclass
class Traffic:
    """What this rank has sent, by the number of ranks of the group.

    Attributes:
        frames: Bytes of each message to one peer over a socket, by the number of ranks of the group.
        gathered: Bytes that it has given to each all_gather of a group without sockets, by the number of its ranks.
    """

    frames: dict[int, list[list[int]]] = field(default_factory=dict)
    gathered: dict[int, list[int]] = field(default_factory=dict)

    def clear(self) -> None:
        for frames in self.frames.values():
            for to_peer in frames:
                to_peer.clear()
        self.gathered.clear()


class Gloo:
    """A group of torch's fake process group, whose other ranks have other samples in a round of `watch`."""

    def __init__(self, traffic: Traffic, place: int, size: int) -> None:
        self._group = FakeProcessGroup._create_internal(place, size)
        self._traffic, self._place, self._size = traffic, place, size

    def allgather(self, parts: list[list[torch.Tensor]], data: list[torch.Tensor]) -> Any:
        self._traffic.gathered.setdefault(self._size, []).append(data[0].numel())
        work = self._group.allgather(parts, data)
        for place, part in enumerate(parts[0]):
            part.copy_(data[0])
            if part.numel() == 48 and place != self._place:
                message = replace(RoundMessage.unpack(part.numpy().tobytes()), rows=place.to_bytes(16, "little"))
                part.copy_(torch.frombuffer(bytearray(message.pack()), dtype=torch.uint8))
        return work


def echo(sock: socket.socket, frames: list[int]) -> None:
    """Answer every message with itself, as a peer that has the same does."""
    with sock, suppress(OSError):  # closed with answers that nobody has read
        while data := sock.recv(2**16):
            frames.append(len(data))
            sock.sendall(data)


@contextmanager
def one_rank_of(topology: Topology) -> Iterator[Traffic]:
    """This process is a rank in the middle, 8 of them on a node."""
    traffic = Traffic()
    connect = PeerSockets.connect

    def connect_to_echoes(rank: int, machines: dict[int, Any], all_gather_object: Any) -> PeerSockets | None:
        if len(machines) > 8:
            nodes = {peer: (f"boot of node {peer // 8}", "net") for peer in machines}
            return connect(rank, nodes, all_gather_object)
        pairs = {peer: socket.socketpair() for peer in machines if peer != rank}
        frames: list[list[int]] = [[] for _ in pairs]
        for (_, other), to_peer in zip(pairs.values(), frames, strict=True):
            threading.Thread(target=echo, args=(other, to_peer), daemon=True).start()
        traffic.frames.setdefault(len(machines), []).extend(frames)
        return PeerSockets({peer: own for peer, (own, _) in pairs.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PeerSockets, "connect", connect_to_echoes)
        patch.setattr(dist, "ProcessGroupGloo", lambda store, place, size, timeout: Gloo(traffic, place, size))
        middle = topology.world_size // 2 + 3
        dist.init_process_group("fake", rank=middle, world_size=topology.world_size, store=fake_pg.FakeStore())
        try:
            yield traffic
        finally:
            dist.destroy_process_group()


def test_the_topology_of_16384_ranks_takes_less_than_a_second() -> None:
    start = time.process_time()
    assert len(LARGE.groups("tp")) == 2048
    assert len(LARGE.groups("dp")) == 8
    assert all(LARGE.peers(rank, "tp")[0] == rank - rank % 8 for rank in range(LARGE.world_size))
    assert time.process_time() - start < 1


@pytest.mark.parametrize("dp", [128, 2048])
def test_what_watch_sends_does_not_grow_over_tp_and_by_48_bytes_a_replica_over_dp(dp: int) -> None:
    topology = Topology(tp=8, dp=dp)
    batch = {"input_ids": torch.arange(64).view(4, 16)}
    with one_rank_of(topology) as traffic:
        batches = iter(tpcheck.watch([batch] * 4, topology=topology))
        next(batches)
        traffic.clear()
        next(batches)
        assert traffic.frames == {8: [[49]] * 7}
        assert traffic.gathered == {dp: [48]}
        batches.close()
    if topology == LARGE:
        assert row("`watch`, each batch", "7 messages of 49 bytes", 48) in DOCS.read_text()


def test_guard_sends_what_the_docs_say_at_16384_ranks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    with one_rank_of(LARGE) as traffic, tpcheck.guard(model, optimizer=optimizer, topology=LARGE, every=1):
        for step in range(4):
            traffic.clear()
            model(torch.ones(2, 8) * step).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert traffic.frames == {8: [[57, 2]] * 7}
    assert traffic.gathered == {2048: [56]}
    assert row("`guard`, each check", "7 messages of 57 bytes and 7 of 2 bytes", 56) in DOCS.read_text()


def row(what: str, over_tp: str, size: int) -> str:
    """Return the row of the table in the docs; gloo's ring hands on a message of each other rank."""
    return f"| {what} | {over_tp} | {size * (LARGE.dp - 1):,} bytes: {size} for each other rank |"
