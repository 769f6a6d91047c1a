"""The rank processes of one world, from fork to exit, and how the controller watches a run."""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from tpcheck.core.errors import RankFailure, RankOutcome, TpcheckError
from tpcheck.world import messages, output
from tpcheck.world.channel import Channel, loads, loads_or_none
from tpcheck.world.failures import FailureKind, Symptom, failure_text, first_failed
from tpcheck.world.forkserver_client import ForkserverClient
from tpcheck.world.messages import RankReport
from tpcheck.world.output import Output

# After a first failure the other ranks have this long to report theirs. They have longer where all that is known so far
# is that connections broke: the failure that broke them is still to come.
_GRACE_S = 0.2
_GRACE_WHILE_UNEXPLAINED_S = 0.25
_STACKS_LIMIT_S = 1.0  # on a busy machine; a suspended rank takes all of it
_STACKS_POLL_S = 0.01
_EXIT_LIMIT_S = 2.0
_END_LIMIT_S = 10.0
_MAX_SELECT_S = 86400.0  # select overflows at 25 days, long before a deadline that a caller may set


class RankOutput(Protocol):
    """What a rank has written, on this machine or on another."""

    @property
    def stdout(self) -> str: ...
    @property
    def stderr(self) -> str: ...
    @property
    def stacks(self) -> str: ...
    @property
    def stacks_size(self) -> int: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class RankProcess:
    """What the controller knows of one rank.

    Attributes:
        status: What waitpid returned, None while the process runs.
        ended_at: When the controller learned of the exit.
        debugging: A debugger prompt is open.
        ready_to_exit: The rank has answered the last `Exit`.
        reports: Its answers to the current run; more than one is an error.
    """

    rank: int
    channel: Channel
    output: RankOutput
    pid: int | None = None
    status: int | None = None
    ended_at: float = 0.0
    debugging: bool = False
    ready_to_exit: bool = False
    reports: list[RankReport] = field(default_factory=list)

    @property
    def has_answered(self) -> bool:
        return bool(self.reports) or self.status is not None

    @property
    def exception(self) -> messages.SerializedException | None:
        """What the function raised, None where it has returned or not ended."""
        return self.reports[0].exception if self.reports else None

    @property
    def has_reported_twice(self) -> bool:
        """Whether another process answered for the rank: a child that the function forked and that returned from it."""
        return len(self.reports) > 1 or any(report.pid != self.pid for report in self.reports if self.pid is not None)

    def symptom(self) -> Symptom | None:
        """Return how this rank failed, None where it has not (yet)."""
        if self.status is not None:
            return Symptom(FailureKind.DIED, self.ended_at, self.rank)
        if self.has_reported_twice:
            return Symptom(FailureKind.REPORTED_TWICE, self.reports[-1].at, self.rank)
        if self.exception is not None:
            kind = FailureKind.LOST_CONNECTION if self.exception.is_communication else FailureKind.RAISED
            return Symptom(kind, self.reports[0].at, self.rank)
        return None

    def hang_symptom(self, now: float) -> Symptom:
        """Return how this rank failed that has not answered in time."""
        frames = output.main_stack(self.output.stacks)
        in_collective = output.collective(frames) is not None
        kind = FailureKind.HUNG_IN_COLLECTIVE if in_collective else FailureKind.HUNG
        return Symptom(kind if frames else FailureKind.SUSPENDED, now, self.rank)

    def outcome(self, *, deadline_passed: bool) -> RankOutcome:
        """Return how this rank ended; one that has not answered hung, or was stopped because another failed."""
        outcome = self._outcome_without_output("hung" if deadline_passed else "stopped")
        return replace(outcome, stdout=self.output.stdout, stderr=self.output.stderr)

    def _outcome_without_output(self, unanswered: Literal["hung", "stopped"]) -> RankOutcome:
        if self.status is not None:
            return _died(self.rank, self.status, stack=self.output.stacks.strip())
        if self.has_reported_twice:
            return _reported_twice(self.rank, self.reports)
        if self.reports:
            return _answered(self.rank, self.exception)
        frames = output.main_stack(self.output.stacks)
        if output.is_serializing(frames):
            return RankOutcome(self.rank, "raised")
        return RankOutcome(
            self.rank,
            unanswered,
            traceback=output.as_traceback(frames) if frames else None,
            collective=output.collective(frames),
            place=output.user_place(frames),
        )


def _answered(rank: int, exception: messages.SerializedException | None) -> RankOutcome:
    if exception is None:
        return RankOutcome(rank, "returned")
    return RankOutcome(
        rank,
        "raised",
        error_type=exception.error_type,
        error=exception.error,
        traceback=exception.traceback,
        details=loads_or_none(exception.details),
    )


def _died(rank: int, status: int, *, stack: str) -> RankOutcome:
    """`stack` is what faulthandler wrote at a crash."""
    code = os.waitstatus_to_exitcode(status)
    return RankOutcome(
        rank,
        "died",
        exit_code=code if code >= 0 else None,
        signal=_signal_name(-code) if code < 0 else None,
        traceback=stack or None,
    )


def _reported_twice(rank: int, reports: list[RankReport]) -> RankOutcome:
    pids = ", ".join(str(report.pid) for report in reports)
    return RankOutcome(
        rank,
        "raised",
        error_type="tpcheck.core.errors.TpcheckError",
        error=f"a child that the function forked also returned: end it with os._exit. {len(reports)} report(s), from "
        f"process {pids}",
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


class RankHost(Protocol):
    """The ranks of a world that one forkserver forks, on this machine or on another.

    Attributes:
        channel: To select on; its end is that of the forkserver, if the host has not ended before.
        ended: No process or file of this world is left there.
    """

    channel: Channel
    ended: bool

    @property
    def ranks(self) -> tuple[RankProcess, ...]: ...
    def receive(self) -> list[messages.RankForked | messages.RankExited]:
        """Return every message received; do not wait."""

    def signal(self, ranks: tuple[int, ...], number: int) -> None: ...
    def restart_outputs(self) -> None:
        """Empty the output of every rank: the next run begins."""

    def refresh_outputs(self) -> None:
        """Make `RankProcess.output` say what the ranks have written so far."""

    def end(self) -> None:
        """Ask for the end of every rank; `receive` sets `ended` once they have."""

    def abandon(self) -> None:
        """Close without waiting: the ranks are ended nevertheless."""

    def remove_files(self) -> None:
        """Remove what an ended host has left."""

    def error(self) -> TpcheckError:
        """Return why the channel has ended."""


class LocalHost:
    """Ranks on this machine, forked by a forkserver of this process."""

    def __init__(
        self, forkserver: ForkserverClient, *, scratch: str, port: int, extra_preload: tuple[str, ...], capture: bool
    ) -> None:
        self.ended = False
        self.ranks: tuple[RankProcess, ...] = ()
        self.outputs: dict[int, Output] = {}
        self._forkserver = forkserver
        self.scratch = scratch
        self._capture = capture
        self.channel = forkserver.open_world(scratch, port, extra_preload)

    def fork(self, request: messages.ForkRank) -> None:
        """Fork a rank that this process controls."""
        channel, rank_socket = Channel.pair()
        self.fork_with(request, rank_socket)
        self.ranks += (RankProcess(request.rank, channel, self.outputs[request.rank]),)

    def fork_with(self, request: messages.ForkRank, rank_socket: socket.socket) -> None:
        """Fork a rank that is controlled at the other end of this socket."""
        output = self.outputs[request.rank] = Output(capture=self._capture)
        self.channel.send(request, [rank_socket.fileno(), *output.descriptors])
        rank_socket.close()

    def receive(self) -> list[messages.RankForked | messages.RankExited]:
        received = [message for message, _ in self.channel.receive_available()]
        self.ended = self.ended or any(isinstance(message, messages.WorldEnded) for message in received)
        return [message for message in received if not isinstance(message, messages.WorldEnded)]

    def signal(self, ranks: tuple[int, ...], number: int) -> None:
        self.channel.queue(messages.SignalRanks(ranks, number))
        self.channel.flush()

    def restart_outputs(self) -> None:
        for files in self.outputs.values():
            files.restart()

    def refresh_outputs(self) -> None:
        """Do nothing: the files are at hand."""

    def end(self) -> None:
        self.channel.queue(messages.EndWorld())

    def abandon(self) -> None:
        """The forkserver ends the ranks of a world whose channel closes."""
        self.channel.close()
        for files in self.outputs.values():
            files.close()

    def remove_files(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)  # the forkserver has removed it, unless it was killed

    def error(self) -> TpcheckError:
        return self._forkserver.error("has exited, and its ranks with it")


class WorldProcesses:
    """The ranks of a world. They serve any number of runs until one fails."""

    def __init__(self, hosts: Sequence[RankHost], *, port: socket.socket) -> None:
        self._hosts = tuple(hosts)
        self._ranks = tuple(sorted((rank for host in hosts for rank in host.ranks), key=lambda rank: rank.rank))
        self._host_of = {rank.rank: host for host in hosts for rank in host.ranks}
        self._port = port
        self._ended = False
        self._paused_s = 0.0
        self._selector = selectors.DefaultSelector()
        for channel in self._channels():
            self._selector.register(channel, selectors.EVENT_READ)

    def _channels(self) -> Iterator[Channel]:
        yield from (host.channel for host in self._hosts)
        yield from (rank.channel for rank in self._ranks)

    @property
    def reusable(self) -> bool:
        """Whether every rank can serve another run."""
        return not self._ended and all(
            rank.status is None and all(report.reusable for report in rank.reports) for rank in self._ranks
        )

    def run(self, call: bytes, *, seed: int | None, timeout: float | None) -> tuple[RankReport, ...]:
        """Return every rank's report, by rank.

        Raises:
            RankFailure: A rank raised, died, hung, or reported more than once.
        """
        self.raise_if_reported_twice()
        for host in self._hosts:
            host.restart_outputs()
        for rank in self._ranks:
            rank.reports.clear()
            rank.channel.queue(messages.RunFunction(call, seed))
        deadline_passed = self._watch(timeout)
        if not deadline_passed and all(rank.symptom() is None for rank in self._ranks):
            return tuple(rank.reports[0] for rank in self._ranks)
        raise self._failure(timeout, deadline_passed=deadline_passed)

    def raise_if_reported_twice(self) -> None:
        """Raise RankFailure if a second report of the last run has arrived after its end."""
        for rank in self._ranks:
            self._read_from(rank)
        if any(len(rank.reports) > 1 for rank in self._ranks):
            raise self._failure(None, deadline_passed=False)

    def outcomes(self, *, deadline_passed: bool = False) -> tuple[RankOutcome, ...]:
        for host in self._hosts:
            host.refresh_outputs()
        return tuple(rank.outcome(deadline_passed=deadline_passed) for rank in self._ranks)

    def exit(self) -> None:
        """Let every rank exit by itself, then end the world."""
        for _ in range(2):
            for rank in self._ranks:
                rank.ready_to_exit = False
                rank.channel.queue(messages.Exit())
            self._serve_until(
                lambda: all(rank.ready_to_exit or rank.status is not None for rank in self._ranks), _EXIT_LIMIT_S
            )
        self.end()

    def end(self) -> None:
        """Kill what still runs; return when no process or file is left."""
        if not self._ended:
            for host in self._hosts:
                host.end()
            self._serve_until(lambda: all(host.ended for host in self._hosts), _END_LIMIT_S)
        self.abandon()
        for host in self._hosts:
            host.remove_files()

    def abandon(self) -> None:
        """Close the world without waiting; its ranks are ended nevertheless."""
        self._ended = True
        self._selector.close()
        self._port.close()
        for host in self._hosts:
            host.abandon()
        for rank in self._ranks:
            rank.channel.close()

    def _watch(self, timeout: float | None) -> bool:
        """Serve the ranks until all have answered, or have no more time to; return whether the deadline passed."""
        started = time.monotonic()
        self._paused_s = 0.0
        while not all(rank.has_answered for rank in self._ranks):
            symptoms = self._symptoms()
            now = time.monotonic()
            if symptoms:
                is_explained = any(symptom.kind < FailureKind.LOST_CONNECTION for symptom in symptoms)
                grace = _GRACE_S if is_explained else _GRACE_WHILE_UNEXPLAINED_S
                limit: float | None = min(symptom.at for symptom in symptoms) + grace
            else:
                limit = None if timeout is None else started + timeout + self._paused_s
            if limit is not None and now >= limit:
                return not symptoms
            self._serve(None if limit is None else limit - now)
        return False

    def _symptoms(self) -> list[Symptom]:
        return [symptom for rank in self._ranks if (symptom := rank.symptom())]

    def _serve_until(self, done: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while (
            not done()
            and not any(host.channel.ended for host in self._hosts if not host.ended)
            and (remaining := deadline - time.monotonic()) > 0
        ):
            self._serve(remaining)

    def _serve(self, limit_s: float | None) -> None:
        """Send and receive messages until one has arrived, or the time is over."""
        if any(rank.debugging for rank in self._ranks):
            before = time.monotonic()
            self._send_and_receive(None)
            self._paused_s += time.monotonic() - before
        else:
            self._send_and_receive(limit_s)

    def _send_and_receive(self, limit_s: float | None) -> None:
        for channel in self._channels():
            if channel.ended:
                continue
            unsent = channel.flush()
            self._selector.modify(channel, selectors.EVENT_READ | (selectors.EVENT_WRITE if unsent else 0))
        self._selector.select(None if limit_s is None else min(limit_s, _MAX_SELECT_S))
        for rank in self._ranks:
            self._read_from(rank)
        for host in self._hosts:
            self._read_from_host(host)

    def _read_from(self, rank: RankProcess) -> None:
        if rank.channel.ended:
            return
        for message, _ in rank.channel.receive_available():
            if isinstance(message, RankReport):
                rank.reports.append(message)
            elif isinstance(message, messages.Debugging):
                rank.debugging = message.active
            else:
                rank.ready_to_exit = True
        if rank.channel.ended:
            self._selector.unregister(rank.channel)

    def _read_from_host(self, host: RankHost) -> None:
        if host.channel.ended:
            return
        for message in host.receive():
            rank = self._ranks[message.rank]
            if isinstance(message, messages.RankForked):
                rank.pid = message.pid
            else:
                self._read_from(rank)  # what it sent before it exited
                rank.status, rank.ended_at = message.status, time.monotonic()
        if host.channel.ended:
            self._selector.unregister(host.channel)
            if not host.ended:
                raise host.error()

    def _failure(self, timeout: float | None, *, deadline_passed: bool) -> RankFailure:
        self._collect_stacks()
        now = time.monotonic()
        first = first_failed(self._symptoms() or [rank.hang_symptom(now) for rank in self._unanswered()])
        outcomes = self.outcomes(deadline_passed=deadline_passed)
        exception = self._ranks[first].exception
        return RankFailure(
            failure_text(outcomes, first=first, timeout=timeout),
            first=first,
            outcomes=outcomes,
            exception=None if exception is None else loads_or_none(exception.exception),
        )

    def _unanswered(self) -> list[RankProcess]:
        return [rank for rank in self._ranks if not rank.has_answered]

    def _collect_stacks(self) -> None:
        """Ask every rank that has not answered for its stacks, and wait until they are written."""
        unanswered = self._unanswered()
        if not unanswered:
            return
        for host in self._hosts:
            host.signal(
                tuple(rank.rank for rank in unanswered if self._host_of[rank.rank] is host), output.STACK_SIGNAL
            )
        deadline = time.monotonic() + _STACKS_LIMIT_S
        previous_sizes: list[int] | None = None
        while time.monotonic() < deadline:
            for host in self._hosts:
                host.refresh_outputs()
            sizes = [rank.output.stacks_size for rank in unanswered]
            if all(sizes) and sizes == previous_sizes:
                return
            previous_sizes = sizes
            time.sleep(_STACKS_POLL_S)


def load_results(reports: tuple[RankReport, ...], outcomes: tuple[RankOutcome, ...]) -> tuple[Any, ...]:
    """Return the ranks' results, by rank.

    Raises:
        RankFailure: A result does not load in this process, although it pickled on its rank.
    """
    results = []
    for rank, report in enumerate(reports):
        result = report.outcome
        assert isinstance(result, messages.SerializedResult)  # a run in which a rank raises has no results
        try:
            results.append(loads(result.pickled))
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            reason = f"rank {rank} returned a {result.type_name} that does not unpickle here: {why}"
            failed = replace(outcomes[rank], state="raised", error_type="TypeError", error=reason)
            outcomes = (*outcomes[:rank], failed, *outcomes[rank + 1 :])
            text = failure_text(outcomes, first=rank, timeout=None)
            raise RankFailure(text, first=rank, outcomes=outcomes) from error
    return tuple(results)
