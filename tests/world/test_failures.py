"""The rank that failed first is found, whatever arrives first, and the message of a failed run is exact."""

from __future__ import annotations

import pytest

from tpcheck import RankOutcome
from tpcheck.core.errors import RankFailure
from tpcheck.world.failures import (
    FailureKind,
    Symptom,
    failure_text,
    first_failed,
    is_communication,
)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (FailureKind.DIED, FailureKind.LOST_CONNECTION),
        (FailureKind.DIED, FailureKind.RAISED),
        (FailureKind.RAISED, FailureKind.LOST_CONNECTION),
        (FailureKind.REPORTED_TWICE, FailureKind.LOST_CONNECTION),
        (FailureKind.HUNG, FailureKind.HUNG_IN_COLLECTIVE),
        (FailureKind.SUSPENDED, FailureKind.HUNG),
    ],
)
def test_the_failure_that_explains_the_other_is_first_even_if_it_is_seen_later(
    first: FailureKind, second: FailureKind
) -> None:
    assert first_failed([Symptom(second, at=1.0, rank=0), Symptom(first, at=2.0, rank=1)]) == 1


def test_of_equal_failures_the_earlier_is_first_then_the_lower_rank() -> None:
    raised = [
        Symptom(FailureKind.RAISED, 2.0, 0),
        Symptom(FailureKind.RAISED, 1.0, 2),
        Symptom(FailureKind.RAISED, 1.0, 1),
    ]
    assert first_failed(raised) == 1


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234",
        "[gloo/transport/tcp/unbound_buffer.cc:129] Timed out waiting 3000ms for send operation to complete",
        "[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 3000 ms",
        "NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited or there was a network error",
        "Socket Timeout",
    ],
)
def test_errors_of_torch_about_a_lost_peer_are_about_communication(text: str) -> None:
    assert is_communication(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Connection closed by peer is the expected text"),
        RuntimeError("Detected mismatch between collectives on ranks. Rank 0 is running collective: ALLREDUCE"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        AssertionError("timed out"),
    ],
)
def test_other_errors_are_not_about_communication(error: Exception) -> None:
    assert not is_communication(error)


def test_an_error_that_follows_from_a_lost_peer_is_about_communication() -> None:
    error = AssertionError("all_reduce failed")
    error.__context__ = RuntimeError("Connection reset by peer")
    assert is_communication(error)
    error.__suppress_context__ = True
    assert not is_communication(error)


def test_an_error_about_another_rank_is_about_communication() -> None:
    of_another = RankFailure("the data loader of rank 1 raised ArithmeticError", first=1, outcomes=())
    assert is_communication(of_another)


_STACK = """\
Stack (most recent call last):
  File "/home/me/test_x.py", line 12, in body
  File "/v/site-packages/torch/distributed/distributed_c10d.py", line 3245, in all_reduce"""
_PLACE = "/home/me/test_x.py:12 in body"
_LOOP = """\
Stack (most recent call last):
  File "/home/me/test_x.py", line 7, in step"""


def test_an_exception() -> None:
    outcomes = (
        RankOutcome(0, "stopped", traceback=_STACK, collective="all_reduce", place=_PLACE, stdout="loss 3.2\n"),
        RankOutcome(
            1,
            "raised",
            error_type="ValueError",
            error="3 heads\nfor 2 ranks",
            traceback="Traceback (most recent call last):\n  ...\nValueError: 3 heads\nfor 2 ranks\n",
            stderr="a warning\n",
        ),
        RankOutcome(2, "raised", error_type="ValueError", error="3 heads\nfor 2 ranks", traceback="..."),
        RankOutcome(3, "returned"),
    )
    assert failure_text(outcomes, first=1, timeout=60) == (
        "rank 1 of 4 raised ValueError: 3 heads\n"
        "\n"
        "Traceback (most recent call last):\n"
        "  ...\n"
        "ValueError: 3 heads\n"
        "for 2 ranks\n"
        "\n"
        "rank 0: stopped while waiting in all_reduce, at /home/me/test_x.py:12 in body\n"
        "rank 2: raised the same ValueError\n"
        "rank 3: had returned\n"
        "\n"
        "captured stderr of rank 1:\n"
        "a warning\n"
        "\n"
        "captured stdout of rank 0:\n"
        "loss 3.2"
    )


def test_a_death() -> None:
    outcomes = (
        RankOutcome(0, "died", signal="SIGKILL"),
        RankOutcome(1, "raised", error_type="RuntimeError", error="Connection closed by peer"),
        RankOutcome(2, "died", exit_code=3),
        RankOutcome(3, "stopped"),
    )
    assert failure_text(outcomes, first=0, timeout=60) == (
        "rank 0 of 4 died: killed by SIGKILL\n"
        "\n"
        "rank 1: raised RuntimeError: Connection closed by peer\n"
        "rank 2: died: exited with code 3 before it answered\n"
        "rank 3: stopped while at an unknown place (no stack)"
    )


def test_a_hang() -> None:
    outcomes = (
        RankOutcome(0, "hung", traceback=_STACK, collective="all_reduce", place=_PLACE),
        RankOutcome(1, "hung", traceback=_LOOP, place="/home/me/test_x.py:7 in step"),
    )
    assert failure_text(outcomes, first=1, timeout=2.5) == (
        "rank 1 of 2 hung: no answer within 2.5 s, not in a collective, at /home/me/test_x.py:7 in step\n"
        "\n" + _LOOP + "\n"
        "\n"
        "rank 0: hung waiting in all_reduce, at /home/me/test_x.py:12 in body\n"
        "\n"
        "rank 0:\n" + _STACK
    )


def test_a_rank_that_was_stopped_while_it_reported_its_exception() -> None:
    outcomes = (
        RankOutcome(0, "raised", error_type="ValueError", error="3 heads", traceback="..."),
        RankOutcome(1, "raised"),
    )
    text = failure_text(outcomes, first=0, timeout=60)
    assert text.endswith("rank 1: raised, too (stopped before it could report the exception)")


def test_the_end_of_long_output_is_shown() -> None:
    printed = "[... 9.1 MB before this]\n" + "".join(f"{number}\n" for number in range(102))
    outcomes = (RankOutcome(0, "died", exit_code=3, stdout=printed),)
    text = failure_text(outcomes, first=0, timeout=60)
    assert "\ncaptured stdout of rank 0:\n[... 9.1 MB before this]\n... (2 earlier lines)\n2\n3\n" in text
