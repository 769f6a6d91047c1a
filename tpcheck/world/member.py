"""One rank as the controller sees it during a run, and what that amounts to in the end."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field, replace
from typing import Literal

from tpcheck.errors import RankOutcome
from tpcheck.world import stacks
from tpcheck.world.channel import Channel
from tpcheck.world.culprit import Kind, Symptom
from tpcheck.world.messages import Failure, Report
from tpcheck.world.output import Output
from tpcheck.world.pickling import loads_or_none


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
        in_collective = stacks.collective(stacks.main_stack(self.output.stacks)) is not None
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
        frames = stacks.main_stack(self.output.stacks)
        stack = stacks.as_traceback(frames) if frames else None
        return RankOutcome(self.rank, unanswered, traceback=stack, collective=stacks.collective(frames))


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
        error_type="tpcheck.errors.TpcheckError",
        error=f"a child forked by the function came back out of it: {len(reports)} report(s), from process {pids}",
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
