"""The processes of one world, from their fork to their end, and the watch over each run."""

from __future__ import annotations

import os
import selectors
import shutil
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from tpcheck.core.errors import RankFailure, RankOutcome
from tpcheck.world import messages, output
from tpcheck.world.channel import Channel, loads, loads_or_none
from tpcheck.world.failures import Kind, Symptom, failure_text, first_failed
from tpcheck.world.launcher import Template
from tpcheck.world.messages import Failure, Report
from tpcheck.world.output import Output


@dataclass(slots=True)
class Member:
    """Attributes:
    status: What waitpid said, once the process is gone.
    ended_at: When that was seen.
    reports: What it answered to the current run; more than one is an error.
    """

    rank: int
    channel: Channel
    output: Output
    pid: int | None = None
    status: int | None = None
    ended_at: float = 0.0
    debugging: bool = False
    left: bool = False
    reports: list[Report] = field(default_factory=list)

    @property
    def answered(self) -> bool:
        return bool(self.reports) or self.status is not None

    @property
    def report(self) -> Report | None:
        return self.reports[0] if self.reports else None

    @property
    def is_double(self) -> bool:
        """Tell whether another process answered for the rank: a child that the function forked came back out of it."""
        return len(self.reports) > 1 or any(report.pid != self.pid for report in self.reports if self.pid is not None)

    def symptom(self) -> Symptom | None:
        """Return how this rank failed, None where it has not (yet)."""
        if self.status is not None:
            return Symptom(Kind.DIED, self.ended_at, self.rank)
        if self.is_double:
            return Symptom(Kind.CAME_BACK_TWICE, self.reports[-1].at, self.rank)
        if self.report is not None and self.report.failure is not None:
            kind = Kind.LOST_CONNECTION if self.report.failure.is_communication else Kind.RAISED
            return Symptom(kind, self.report.at, self.rank)
        return None

    def hang(self, now: float) -> Symptom | None:
        """Return what it means that this rank has not answered in time."""
        if self.answered:
            return None
        in_collective = output.collective(output.main_stack(self.output.stacks)) is not None
        return Symptom(Kind.HUNG_IN_COLLECTIVE if in_collective else Kind.HUNG, now, self.rank)

    def outcome(self, *, deadline_passed: bool) -> RankOutcome:
        """Return how this rank ended; one that has not answered hung, or was stopped for another's sake."""
        outcome = self._ending("hung" if deadline_passed else "stopped")
        return replace(outcome, stdout=self.output.stdout, stderr=self.output.stderr)

    def _ending(self, unanswered: Literal["hung", "stopped"]) -> RankOutcome:
        if self.status is not None:
            return _death(self.rank, self.status, stack=self.output.stacks.strip())
        if self.is_double:
            return _double(self.rank, self.reports)
        if self.report is not None:
            return _answer(self.rank, self.report.failure)
        frames = output.main_stack(self.output.stacks)
        stack = output.as_traceback(frames) if frames else None
        return RankOutcome(self.rank, unanswered, traceback=stack, collective=output.collective(frames))


def _answer(rank: int, failure: Failure | None) -> RankOutcome:
    if failure is None:
        return RankOutcome(rank, "returned")
    return RankOutcome(
        rank,
        "raised",
        error_type=failure.error_type,
        error=failure.error,
        traceback=failure.traceback,
        details=loads_or_none(failure.details),
    )


def _death(rank: int, status: int, *, stack: str) -> RankOutcome:
    """`stack` is what faulthandler wrote, after a crash."""
    code = os.waitstatus_to_exitcode(status)
    return RankOutcome(
        rank,
        "died",
        exit_code=code if code >= 0 else None,
        signal=_signal_name(-code) if code < 0 else None,
        traceback=stack or None,
    )


def _double(rank: int, reports: list[Report]) -> RankOutcome:
    pids = ", ".join(str(report.pid) for report in reports)
    return RankOutcome(
        rank,
        "raised",
        error_type="tpcheck.core.errors.TpcheckError",
        error=f"a child forked by the function came back out of it: {len(reports)} report(s), from process {pids}",
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# After a first failure the others get this long to report theirs. More where all that is known so far is that
# connections broke: what broke them is still to come.
_GRACE_S = 0.2
_GRACE_FOR_CULPRIT_S = 0.25
_STACKS_LIMIT_S = 0.15
_STACKS_QUIET_S = 0.01
_LEAVE_LIMIT_S = 2.0
_END_LIMIT_S = 10.0
_LONGEST_WAIT_S = 86400.0  # select overflows at 25 days, long before the deadline that a caller may set


@dataclass(frozen=True, slots=True)
class Fork:
    """How to fork one rank, with what its world decided."""

    order: messages.Fork
    capture: bool


class Processes:
    """One generation of ranks; over after the first failed run."""

    def __init__(
        self, template: Template, forks: tuple[Fork, ...], *, scratch: str, port: socket.socket, also: tuple[str, ...]
    ) -> None:
        self._template = template
        self._scratch = scratch
        self._port = port
        self._ended = False
        self._paused_s = 0.0
        self._run_number = 0
        self._channel = template.open_world(scratch, port.getsockname()[1], also)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._channel, selectors.EVENT_READ)
        self._members = tuple(self._fork(fork) for fork in forks)

    def _fork(self, fork: Fork) -> Member:
        channel, theirs = Channel.pair()
        output = Output(capture=fork.capture)
        self._channel.send(fork.order, [theirs.fileno(), *output.descriptors])
        theirs.close()
        self._selector.register(channel, selectors.EVENT_READ)
        return Member(fork.order.rank, channel, output)

    @property
    def reusable(self) -> bool:
        """Tell whether every rank is as ready for a run as it was at first."""
        return not self._ended and all(
            member.status is None and (member.report is None or member.report.reusable) for member in self._members
        )

    def run(self, call: bytes, *, seed: int | None, timeout: float | None) -> tuple[messages.Report, ...]:
        """Return every rank's report, by rank.

        Raises:
            RankFailure: At least one rank raised, died, hung, or reported more than once.
        """
        self.refuse_second_reports()
        self._run_number += 1
        for member in self._members:
            member.reports.clear()
            member.output.restart()
            member.channel.queue(messages.Run(self._run_number, call, seed))
        deadline_passed = self._watch(timeout)
        if not deadline_passed and all(member.symptom() is None for member in self._members):
            return tuple(member.reports[0] for member in self._members)
        raise self._failure(timeout, deadline_passed=deadline_passed)

    def refuse_second_reports(self) -> None:
        """Fail where a rank answered the last run again, after it was over.

        Raises:
            RankFailure: One did.
        """
        for member in self._members:
            self._read_from(member)
        if any(len(member.reports) > 1 for member in self._members):
            raise self._failure(None, deadline_passed=False)

    def outcomes(self, *, deadline_passed: bool = False) -> tuple[RankOutcome, ...]:
        return tuple(member.outcome(deadline_passed=deadline_passed) for member in self._members)

    def leave(self) -> None:
        """Let every rank exit by itself, then make sure."""
        for _ in range(2):
            for member in self._members:
                member.left = False
                member.channel.queue(messages.Leave())
            self._serve_until(
                lambda: all(member.left or member.status is not None for member in self._members), _LEAVE_LIMIT_S
            )
        self.end()

    def end(self) -> None:
        """Kill what still runs; return when nothing is left."""
        if not self._ended:
            self._channel.queue(messages.End())
            self._serve_until(lambda: self._ended, _END_LIMIT_S)
        self.abandon()
        shutil.rmtree(self._scratch, ignore_errors=True)  # the template did, unless it is gone itself

    def abandon(self) -> None:
        """Let go without waiting: the template ends the ranks of a world that nobody holds."""
        self._ended = True
        self._channel.close()
        self._selector.close()
        self._port.close()
        for member in self._members:
            member.channel.close()
            member.output.close()

    def _watch(self, timeout: float | None) -> bool:
        """Serve the ranks until all have answered, or may not any longer; tell whether the deadline passed."""
        started = time.monotonic()
        self._paused_s = 0.0
        while not all(member.answered for member in self._members):
            symptoms = [symptom for member in self._members if (symptom := member.symptom())]
            now = time.monotonic()
            if symptoms:
                is_explained = any(symptom.kind < Kind.LOST_CONNECTION for symptom in symptoms)
                grace = _GRACE_S if is_explained else _GRACE_FOR_CULPRIT_S
                limit: float | None = min(symptom.at for symptom in symptoms) + grace
            else:
                limit = None if timeout is None else started + timeout + self._paused_s
            if limit is not None and now >= limit:
                return not symptoms
            self._serve(None if limit is None else limit - now)
        return False

    def _serve_until(self, done: Callable[[], bool], limit_s: float) -> None:
        deadline = time.monotonic() + limit_s
        while not done() and not self._channel.ended and (left := deadline - time.monotonic()) > 0:
            self._serve(left)

    def _serve(self, limit_s: float | None) -> None:
        """Move messages both ways until something happened, or the time is over."""
        if any(member.debugging for member in self._members):
            before = time.monotonic()
            self._exchange(None)
            self._paused_s += time.monotonic() - before
        else:
            self._exchange(limit_s)

    def _exchange(self, limit_s: float | None) -> None:
        for channel in (self._channel, *(member.channel for member in self._members)):
            if channel.ended:
                continue
            unsent = channel.flush()
            self._selector.modify(channel, selectors.EVENT_READ | (selectors.EVENT_WRITE if unsent else 0))
        self._selector.select(None if limit_s is None else min(limit_s, _LONGEST_WAIT_S))
        for member in self._members:
            self._read_from(member)
        self._read_from_template()

    def _read_from(self, member: Member) -> None:
        if member.channel.ended:
            return
        for message, _ in member.channel.pump():
            if isinstance(message, messages.Report):
                member.reports.append(message)
            elif isinstance(message, messages.Debugging):
                member.debugging = message.active
            else:
                member.left = True
        if member.channel.ended:
            self._selector.unregister(member.channel)

    def _read_from_template(self) -> None:
        for message, _ in self._channel.pump():
            if isinstance(message, messages.Forked):
                self._members[message.rank].pid = message.pid
            elif isinstance(message, messages.Exited):
                member = self._members[message.rank]
                self._read_from(member)  # what it said before it went
                member.status, member.ended_at = message.status, time.monotonic()
            else:
                self._ended = True
        if self._channel.ended and not self._ended:
            raise self._template.failure("is gone, and its ranks with it")

    def _failure(self, timeout: float | None, *, deadline_passed: bool) -> RankFailure:
        self._collect_stacks()
        now = time.monotonic()
        symptoms = [symptom for member in self._members if (symptom := member.symptom())]
        symptoms = symptoms or [hang for member in self._members if (hang := member.hang(now))]
        first = first_failed(symptoms)
        outcomes = self.outcomes(deadline_passed=deadline_passed)
        report = self._members[first].report
        failure = report.failure if report is not None else None
        return RankFailure(
            failure_text(outcomes, first=first, timeout=timeout),
            first=first,
            outcomes=outcomes,
            exception=loads_or_none(failure.exception) if failure is not None else None,
        )

    def _collect_stacks(self) -> None:
        silent = [member for member in self._members if not member.answered]
        if not silent:
            return
        self._channel.queue(messages.Signal(tuple(member.rank for member in silent), output.STACK_SIGNAL))
        self._channel.flush()
        deadline = time.monotonic() + _STACKS_LIMIT_S
        before: list[int] | None = None
        while time.monotonic() < deadline:
            sizes = [member.output.stacks_size for member in silent]
            if all(sizes) and sizes == before:
                return
            before = sizes
            time.sleep(_STACKS_QUIET_S)


def results(reports: tuple[messages.Report, ...], outcomes: tuple[RankOutcome, ...]) -> tuple[Any, ...]:
    """Return the ranks' results, by rank.

    Raises:
        RankFailure: One does not load in this process, although it pickled on its rank.
    """
    return tuple(
        _loaded(report.result, rank, outcomes) for rank, report in enumerate(reports) if report.result is not None
    )


def _loaded(result: messages.Result, rank: int, outcomes: tuple[RankOutcome, ...]) -> Any:
    try:
        return loads(result.pickled)
    except Exception as error:
        reason = f"rank {rank} returned a {result.kind} that does not unpickle here: {type(error).__name__}: {error}"
        failed = replace(outcomes[rank], state="raised", error_type="TypeError", error=reason)
        outcomes = (*outcomes[:rank], failed, *outcomes[rank + 1 :])
        raise RankFailure(failure_text(outcomes, first=rank, timeout=None), first=rank, outcomes=outcomes) from error
