"""Ranks as threads of this process, which exchange what real ranks send each other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, cast

import torch

from tpcheck import Topology
from tpcheck.backends.live_groups import LiveGroups
from tpcheck.batches.rounds import Peers
from tpcheck.core.errors import RankFailure
from tpcheck.world.exchange import Exchange

TIMEOUT = 10.0


class Meeting:
    """Where the ranks of one group leave a value for each other."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        self.values: list[Any] = [None] * len(ranks)
        self.barrier = Barrier(len(ranks), timeout=TIMEOUT)


class ThreadExchange:
    """An `Exchange` of one thread."""

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self.ranks = meeting.ranks
        self.aborts: list[RankFailure] = []
        self.calls = 0
        self._meeting, self._rank = meeting, rank

    def all_gather_object(self, value: Any) -> tuple[Any, ...]:
        self.calls += 1
        self._meeting.values[self.ranks.index(self._rank)] = value
        self._meeting.barrier.wait()
        values = tuple(self._meeting.values)
        self._meeting.barrier.wait()
        return values

    all_gather = all_gather_object

    def broadcast(self, data: torch.Tensor, source: int) -> None:
        data.copy_(self.all_gather_object(data.clone())[self.ranks.index(source)])

    def abort(self, failure: RankFailure) -> None:
        self.aborts.append(failure)
        self._meeting.barrier.abort()


def run_on_threads(topology: Topology, function: Callable[[Peers], Any]) -> list[Any]:
    """Return what the function returns on each rank."""
    meetings: dict[tuple[str, tuple[int, ...]], Meeting] = {}

    def exchange(rank: int, axis: str) -> Exchange:
        ranks = topology.peers(rank, axis)
        return cast(Exchange, ThreadExchange(meetings.setdefault((axis, ranks), Meeting(ranks)), rank))

    peers = []
    for rank in range(topology.world_size):
        tp, dp = topology.peers(rank, "tp"), topology.peers(rank, "dp")
        groups = LiveGroups(rank, tp, dp, "threads")
        replicas = tuple(topology.peers(each, "tp") for each in dp)
        peers.append(Peers(groups, exchange(rank, "tp"), exchange(rank, "dp"), replicas))

    def on_rank(each: Peers) -> Any:
        try:
            return function(each)
        except BaseException:  # the others are not to wait for this rank
            for meeting in meetings.values():
                meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(topology.world_size) as pool:
        return list(pool.map(on_rank, peers))
