"""What the controller knows of a rank decides how it failed and how it ended."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from tpcheck.world.channel import Channel, dumps
from tpcheck.world.failures import FailureKind, serialized_exception
from tpcheck.world.messages import RankReport, SerializedException, SerializedResult
from tpcheck.world.output import Output
from tpcheck.world.processes import RankProcess

PID = 41
RETURNED = SerializedResult(dumps(3), "int")
RAISED = serialized_exception(ValueError("boom"))
LOST = serialized_exception(RuntimeError("Connection closed by peer"))


@pytest.fixture
def rank() -> Iterator[RankProcess]:
    channel, other_end = Channel.pair()
    rank = RankProcess(0, channel, Output(capture=True), pid=PID)
    yield rank
    channel.close()
    other_end.close()
    rank.output.close()


def report(outcome: SerializedResult | SerializedException, *, pid: int = PID) -> RankReport:
    return RankReport(pid, at=2.0, outcome=outcome, reusable=True)


def write_stack(rank: RankProcess, *lines: str) -> None:
    dump = "".join(["Current thread 0x1 (most recent call first):\n", *(f"  {line}\n" for line in lines)])
    os.write(rank.output.descriptors[2], dump.encode())


def test_a_rank_that_returned_has_no_symptom(rank: RankProcess) -> None:
    assert not rank.has_answered
    rank.reports.append(report(RETURNED))
    assert rank.has_answered
    assert rank.symptom() is None
    assert rank.outcome(deadline_passed=False).state == "returned"


@pytest.mark.parametrize(("exception", "kind"), [(RAISED, FailureKind.RAISED), (LOST, FailureKind.LOST_CONNECTION)])
def test_a_rank_that_raised_is_distinguished_from_one_that_lost_a_connection(
    rank: RankProcess, exception: SerializedException, kind: FailureKind
) -> None:
    rank.reports.append(report(exception))
    symptom = rank.symptom()
    assert symptom is not None
    assert (symptom.kind, symptom.at) == (kind, 2.0)
    outcome = rank.outcome(deadline_passed=False)
    assert (outcome.state, outcome.error_type, outcome.error) == ("raised", exception.error_type, exception.error)


@pytest.mark.parametrize(
    ("status", "exit_code", "signal_name"), [(3 << 8, 3, None), (0, 0, None), (signal.SIGKILL, None, "SIGKILL")]
)
def test_a_rank_that_exited_has_died_whatever_it_reported(
    rank: RankProcess, status: int, exit_code: int | None, signal_name: str | None
) -> None:
    rank.reports.append(report(RETURNED))
    rank.status, rank.ended_at = status, 5.0
    symptom = rank.symptom()
    assert symptom is not None
    assert (symptom.kind, symptom.at) == (FailureKind.DIED, 5.0)
    outcome = rank.outcome(deadline_passed=False)
    assert (outcome.state, outcome.exit_code, outcome.signal) == ("died", exit_code, signal_name)


@pytest.mark.parametrize("pids", [(PID, PID), (PID, 42), (42,)])
def test_a_second_report_or_one_of_another_process_is_an_error(rank: RankProcess, pids: tuple[int, ...]) -> None:
    rank.reports += [report(RETURNED, pid=pid) for pid in pids]
    symptom = rank.symptom()
    assert symptom is not None
    assert symptom.kind is FailureKind.REPORTED_TWICE
    outcome = rank.outcome(deadline_passed=False)
    assert outcome.state == "raised"
    assert f"{len(pids)} report(s), from process {', '.join(map(str, pids))}" in (outcome.error or "")


def test_a_rank_that_waits_in_a_collective_is_distinguished_from_one_that_does_not(rank: RankProcess) -> None:
    assert rank.hang_symptom(9.0).kind is FailureKind.SUSPENDED
    write_stack(rank, 'File "/home/me/test_x.py", line 12 in body')
    assert rank.hang_symptom(9.0).kind is FailureKind.HUNG
    rank.output.restart()
    all_reduce = 'File "/v/site-packages/torch/distributed/distributed_c10d.py", line 1 in all_reduce'
    write_stack(rank, all_reduce, 'File "/home/me/test_x.py", line 12 in body')
    assert rank.hang_symptom(9.0).kind is FailureKind.HUNG_IN_COLLECTIVE
    hung, stopped = rank.outcome(deadline_passed=True), rank.outcome(deadline_passed=False)
    assert (hung.state, hung.collective, hung.place) == ("hung", "all_reduce", "/home/me/test_x.py:12 in body")
    assert stopped.state == "stopped"


def test_a_rank_that_was_stopped_while_it_serialized_its_exception_has_raised(rank: RankProcess) -> None:
    write_stack(rank, f'File "{serialized_exception.__code__.co_filename}", line 1 in serialized_exception')
    outcome = rank.outcome(deadline_passed=False)
    assert (outcome.state, outcome.error_type) == ("raised", None)
