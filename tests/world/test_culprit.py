"""The rank whose failure explains the others is named, whatever arrives first."""

from __future__ import annotations

import pytest

from tpcheck.world.failures import Kind, Symptom, first_failed, is_communication


@pytest.mark.parametrize(
    ("culprit", "victim"),
    [
        (Kind.DIED, Kind.LOST_CONNECTION),
        (Kind.DIED, Kind.RAISED),
        (Kind.RAISED, Kind.LOST_CONNECTION),
        (Kind.CAME_BACK_TWICE, Kind.LOST_CONNECTION),
        (Kind.HUNG, Kind.HUNG_IN_COLLECTIVE),
    ],
)
def test_the_more_telling_failure_counts_even_when_it_is_seen_later(culprit: Kind, victim: Kind) -> None:
    assert first_failed([Symptom(victim, at=1.0, rank=0), Symptom(culprit, at=2.0, rank=1)]) == 1


def test_of_equal_failures_the_earlier_counts_then_the_lower_rank() -> None:
    raised = [Symptom(Kind.RAISED, 2.0, 0), Symptom(Kind.RAISED, 1.0, 2), Symptom(Kind.RAISED, 1.0, 1)]
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
def test_what_torch_says_of_a_lost_peer_is_about_communication(text: str) -> None:
    assert is_communication(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("Connection closed by peer is what I expected"),
        RuntimeError("Detected mismatch between collectives on ranks. Rank 0 is running collective: ALLREDUCE"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        AssertionError("timed out"),
    ],
)
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_communication(error)


def test_an_error_that_follows_from_a_lost_peer_is_about_communication() -> None:
    error = AssertionError("all_reduce failed")
    error.__context__ = RuntimeError("Connection reset by peer")
    assert is_communication(error)
    error.__suppress_context__ = True
    assert not is_communication(error)
