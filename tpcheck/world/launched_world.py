"""Worlds whose ranks run where a launcher has started processes: each is forked beside one of these.

torchrun starts the ranks of a node alike, so one forkserver forks them all. srun may bind each to its own CPUs and
GPUs: there each process has a forkserver of its own.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from tpcheck.core.errors import TpcheckError, UsageError
from tpcheck.core.topology import Topology
from tpcheck.world import messages
from tpcheck.world.channel import Channel
from tpcheck.world.environment import LauncherPlace, visible_gpus
from tpcheck.world.exchange import this_machine
from tpcheck.world.groups import StoreAddress, reserve_port
from tpcheck.world.launch import Launch, Link, LinkLost
from tpcheck.world.messages import RankReport
from tpcheck.world.processes import LocalHost, RankProcess, WorldProcesses
from tpcheck.world.requests import RankOrigin, WorldPlan, fork_request
from tpcheck.world.world import ready_forkserver

_FORK_LIMIT_S = 600.0  # the other forkserver imports from a cold disk
_ANSWER_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where the process of a rank is.

    Attributes:
        machine: Equal for processes of one machine, None where this cannot be said.
        gpus: What CUDA_VISIBLE_DEVICES says, and how many GPUs that makes.
        forks_alike: Equal for processes of which each can fork the ranks of all; None for those of which none can.
        num_local: Ranks that the launcher has started on this machine, None where it does not say.
    """

    origin: RankOrigin
    machine: object
    gpus: tuple[str | None, int]
    forks_alike: object
    num_local: int | None


def this_place(launch: Launch) -> Place:
    """Return the place of this process."""
    machine = this_machine()
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    cpus = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    is_alike = run_id is not None and machine is not None
    num_local = os.environ.get("LOCAL_WORLD_SIZE", "")
    return Place(
        origin=RankOrigin.here(launch.rank, local_rank=launch.local_rank, num_gpus=0),
        machine=machine,
        gpus=(gpus, visible_gpus(os.environ)),
        forks_alike=(machine, run_id, os.environ.get("GROUP_RANK"), gpus, cpus) if is_alike else None,
        num_local=int(num_local) if num_local.isdigit() else None,
    )


@dataclass(frozen=True, slots=True)
class OpenHost:
    """Fork these ranks for a world of rank 0's, connected to it. Answered by `HostFailed` where that fails."""

    number: int
    plan: WorldPlan
    origins: tuple[RankOrigin, ...]
    port: int
    store: StoreAddress


@dataclass(frozen=True, slots=True)
class HostFailed:
    """The ranks cannot be forked, or the forkserver has ended."""

    reason: str


@dataclass(frozen=True, slots=True)
class FromForkserver:
    message: messages.RankForked | messages.RankExited


@dataclass(frozen=True, slots=True)
class HostEnded:
    """No process or file of the world is left there."""


@dataclass(frozen=True, slots=True)
class OutputRequest:
    """Say what the ranks have written; answered by `Outputs`. If `restart`, empty the files instead."""

    restart: bool


@dataclass(frozen=True, slots=True)
class Outputs:
    """What each rank has written: stdout, stderr, stacks."""

    by_rank: dict[int, tuple[str, str, str]]


class LaunchedMachines:
    """Where the launcher's processes are: rank 0 opens worlds there."""

    def __init__(self, launch: Launch, places: Sequence[Place]) -> None:
        self._launch = launch
        self._places = places
        self._numbers = count(1)
        self._forkers = [_forker(place, places) for place in places]

    def forks(self, rank: int) -> bool:
        """Return whether the process of this rank forks ranks."""
        return rank in self._forkers

    def choose_device(self, topology: Topology, device: str | None, _preload: Sequence[str] | None) -> tuple[str, int]:
        num_gpus = [place.gpus[1] for place in self._places]
        have_own_gpu = all(place.gpus[1] >= self._sharing(place) for place in self._places)
        if device == "cpu" or (device is None and not have_own_gpu):
            return "cpu", 0
        if min(num_gpus) == 0:
            without = [rank for rank, number in enumerate(num_gpus) if number == 0]
            raise UsageError("device", device, f"cpu: there is no GPU for ranks {without}")
        return "cuda", topology.world_size if have_own_gpu else 1

    def start(self, plan: WorldPlan) -> WorldProcesses:
        """Fork every rank beside its process.

        Raises:
            UsageError: The launcher has started more or fewer processes than the topology has ranks.
        """
        if plan.topology.world_size != len(self._places):
            expected = f"a topology of {len(self._places)} ranks, as many as the launcher has started"
            raise UsageError("topology", plan.topology, expected)
        hosts = {forker: self._origins(forker) for forker in sorted(set(self._forkers))}
        port = reserve_port("" if len(hosts) > 1 else "127.0.0.1")
        port_number, number = port.getsockname()[1], next(self._numbers)
        store = None
        remote: list[RemoteHost] = []
        try:
            if len(hosts) > 1:
                host, store_port = self._launch.store_address()
                store = StoreAddress(host, store_port, f"world{number}")
            for forker, origins in hosts.items():
                if forker != 0:
                    assert store is not None  # there is another host
                    request = OpenHost(number, plan, origins, port_number, store)
                    remote.append(RemoteHost(self._launch.links[forker], request))
            here = _open_host(plan, port=port_number)
            for origin in hosts[0]:
                here.fork(fork_request(plan, origin, scratch=here.scratch, port=port_number, store=store))
            for far in remote:
                far.connect(self._launch)
            return WorldProcesses([here, *remote], port=port)
        except BaseException:  # Ctrl-C included
            port.close()
            for far in remote:
                far.abandon()
            raise

    def _origins(self, forker: int) -> tuple[RankOrigin, ...]:
        """Return the origins of the ranks that this process forks."""
        ranks = [rank for rank, other in enumerate(self._forkers) if other == forker]
        return tuple(replace(self._places[rank].origin, **self._on_machine(rank)) for rank in ranks)

    def _on_machine(self, rank: int) -> dict[str, Any]:
        place = self._places[rank]
        machines = {other.machine for other in self._places}
        mates = [other for other in self._places if place.machine is not None and other.machine == place.machine]
        launched = LauncherPlace(
            local_rank=place.origin.local_rank,
            num_local=place.num_local or len(mates) or 1,
            master_addr=self._launch.master_addr if len(set(self._forkers)) > 1 else "127.0.0.1",
            is_one_machine=len(machines) == 1 and None not in machines,
        )
        return {"num_gpus": place.gpus[1], "launched": launched}

    def _sharing(self, place: Place) -> int:
        """Return the number of ranks that choose from the GPUs of this place."""
        return sum((other.machine, other.gpus) == (place.machine, place.gpus) for other in self._places)


def _forker(place: Place, places: Sequence[Place]) -> int:
    """Return the rank whose process forks the rank of this place."""
    if place.forks_alike is None:
        return place.origin.rank
    return next(other.origin.rank for other in places if other.forks_alike == place.forks_alike)


def _open_host(plan: WorldPlan, *, port: int) -> LocalHost:
    """Return a host on this machine, which has forked nothing yet."""
    forkserver = ready_forkserver(plan)
    return LocalHost(
        forkserver,
        scratch=forkserver.new_scratch(),
        port=port,
        extra_preload=plan.extra_preload,
        capture=plan.capture,
    )


class _RemoteOutput:
    """What a rank of another process has written, as of the last refresh."""

    def __init__(self) -> None:
        self.stdout = self.stderr = self.stacks = ""

    @property
    def stacks_size(self) -> int:
        return len(self.stacks)

    def close(self) -> None:
        """Do nothing: the files are elsewhere."""


class _RemoteRankChannel(Channel):
    """The connection to a rank on another machine, whose clock is another one."""

    def receive_available(self) -> list[tuple[Any, list[int]]]:
        now = time.monotonic()
        return [
            (replace(message, at=now) if isinstance(message, RankReport) else message, descriptors)
            for message, descriptors in super().receive_available()
        ]


class RemoteHost:
    """Ranks that the process of another rank forks."""

    def __init__(self, link: Link, request: OpenHost) -> None:
        self.channel = link.channel
        self.ended = False
        self.ranks: tuple[RankProcess, ...] = ()
        self._link = link
        self._number = request.number
        self._pending: deque[messages.RankForked | messages.RankExited] = deque()
        self._failure: str | None = None
        self._ranks = tuple(origin.rank for origin in request.origins)
        self._outputs = {rank: _RemoteOutput() for rank in self._ranks}
        link.send(request)

    def connect(self, launch: Launch) -> None:
        """Wait until the ranks have connected.

        Raises:
            TpcheckError: They cannot be forked; says why.
        """
        sockets = launch.accept_ranks(self._number, self._ranks, limit_s=_FORK_LIMIT_S, on_poll=self._raise_if_failed)
        self.ranks = tuple(
            RankProcess(rank, _RemoteRankChannel(sock), self._outputs[rank]) for rank, sock in sockets.items()
        )

    def receive(self) -> list[messages.RankForked | messages.RankExited]:
        self._sort_received()
        if self._failure is not None and not self.ended:
            self.ended = True  # there is nothing to wait for
            raise self.error()
        received = list(self._pending)
        self._pending.clear()
        return received

    def signal(self, ranks: tuple[int, ...], number: int) -> None:
        self._link.send(messages.SignalRanks(ranks, number))

    def restart_outputs(self) -> None:
        self._request_outputs(OutputRequest(restart=True))

    def refresh_outputs(self) -> None:
        self._request_outputs(OutputRequest(restart=False))

    def end(self) -> None:
        self._link.send(messages.EndWorld())

    def abandon(self) -> None:
        if not self.ended:
            self._link.send(messages.EndWorld())

    def remove_files(self) -> None:
        """Do nothing: the process that has them removes them."""

    def error(self) -> TpcheckError:
        return TpcheckError(self._failure or str(LinkLost(self._link.rank)))

    def _request_outputs(self, request: OutputRequest) -> None:
        self._link.send(request)
        deadline = time.monotonic() + _ANSWER_LIMIT_S
        while not self._link.channel.ended and self._failure is None and (left := deadline - time.monotonic()) > 0:
            try:
                answer = self._link.receive(limit_s=left)
            except (LinkLost, TimeoutError):
                return
            if isinstance(answer, Outputs):
                for rank, (stdout, stderr, stacks) in answer.by_rank.items():
                    output = self._outputs[rank]
                    output.stdout, output.stderr, output.stacks = stdout, stderr, stacks
                return
            self._sort(answer)

    def _sort_received(self) -> None:
        self._link.poll()
        received = list(self._link.received)
        self._link.received.clear()
        for message in received:
            self._sort(message)

    def _sort(self, message: Any) -> None:
        if isinstance(message, FromForkserver):
            self._pending.append(message.message)
        elif isinstance(message, HostEnded):
            self.ended = True
        elif isinstance(message, HostFailed):
            self._failure = f"rank {self._link.rank}: {message.reason}"
        elif not isinstance(message, Outputs):
            self._failure = f"rank {self._link.rank} has left while its ranks ran"
            self._link.received.append(message)  # for who ends the session

    def _raise_if_failed(self) -> None:
        self._sort_received()
        if self._failure is not None or self._link.channel.ended:
            raise self.error()


class HostedRanks:
    """The ranks that this process forks for a world of rank 0's, and their end."""

    def __init__(self, launch: Launch, request: OpenHost) -> None:
        self._link = launch.links[0]
        self._host = _open_host(request.plan, port=request.port)
        for origin in request.origins:
            forked = fork_request(
                request.plan, origin, scratch=self._host.scratch, port=request.port, store=request.store
            )
            self._host.fork_with(forked, launch.open_rank(request.number, origin.rank))

    def channels(self) -> Mapping[Channel, Callable[[], None]]:
        """Return what to select on, with what to call then."""
        return {} if self._host.channel.ended else {self._host.channel: self._forward}

    def handle(self, message: object) -> None:
        """Do what rank 0 asks."""
        if isinstance(message, messages.SignalRanks):
            self._host.signal(message.ranks, message.number)
        elif isinstance(message, OutputRequest):
            if message.restart:
                self._host.restart_outputs()
            outputs = {rank: (out.stdout, out.stderr, out.stacks) for rank, out in self._host.outputs.items()}
            self._link.send(Outputs(outputs))
        elif isinstance(message, messages.EndWorld):
            self._host.end()
            self._host.channel.flush()

    @property
    def ended(self) -> bool:
        return self._host.ended or self._host.channel.ended

    def close(self) -> None:
        """End the ranks, where they have not ended."""
        self._host.abandon()
        self._host.remove_files()

    def _forward(self) -> None:
        for message in self._host.receive():
            self._link.send(FromForkserver(message))
        if self._host.ended:
            self._link.send(HostEnded())
        elif self._host.channel.ended:
            self._link.send(HostFailed(str(self._host.error())))


def serve_worlds(launch: Launch) -> Any:
    """Fork ranks as rank 0 asks; return the first message of rank 0 that asks for something else.

    Raises:
        LinkLost: Rank 0 has ended.
    """
    link = launch.links[0]
    hosted: HostedRanks | None = None
    try:
        while True:
            message = link.receive(hosted.channels if hosted is not None else dict)
            if isinstance(message, OpenHost):
                hosted = _opened(launch, message)
            elif isinstance(message, (messages.SignalRanks, messages.EndWorld, OutputRequest)):
                if hosted is not None:
                    hosted.handle(message)
            else:
                return message
            if hosted is not None and hosted.ended:
                hosted.close()
                hosted = None
    finally:
        if hosted is not None:
            hosted.close()


def _opened(launch: Launch, request: OpenHost) -> HostedRanks | None:
    try:
        return HostedRanks(launch, request)
    except Exception as error:
        launch.links[0].send(HostFailed(f"{type(error).__name__}: {error}"))
        return None
