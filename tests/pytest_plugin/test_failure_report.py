"""The outcomes of ranks decide which exception pytest sees, and what it shows beside it."""

from __future__ import annotations

from typing import Literal

import pytest

from tpcheck import RankFailure, RankOutcome
from tpcheck.pytest_plugin.failure_report import captured_sections, exception_of, origin_of
from tpcheck.pytest_plugin.messages import BodyFailed, pickle_exception


def raised(
    rank: int,
    error: BaseException,
    verdict: Literal["failed", "skipped", "xfailed"] = "failed",
    *,
    is_communication: bool = False,
) -> RankOutcome:
    details = BodyFailed(verdict, str(error), is_communication, None, pickle_exception(error), (), ())
    return RankOutcome(rank, "raised", error_type=type(error).__name__, error=str(error), details=details)


def failure(*outcomes: RankOutcome, first: int = 0) -> RankFailure:
    return RankFailure("rank 0 of 2 failed", first=first, outcomes=outcomes)


def test_the_exception_is_the_one_that_the_first_rank_raised() -> None:
    run = failure(RankOutcome(0, "stopped"), raised(1, ValueError("boom")), first=1)
    error = exception_of(run)
    assert isinstance(error, ValueError)
    origin = origin_of(error)
    assert origin is not None
    assert (origin.failure, origin.outcome) == (run, run.outcomes[1])


def test_a_rank_that_died_or_hung_is_the_failure_of_the_run() -> None:
    run = failure(RankOutcome(0, "died", exit_code=3), RankOutcome(1, "stopped"))
    assert exception_of(run) is run


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ([RankOutcome(1, "stopped"), RankOutcome(2, "returned")], "no GPU (rank 0)"),
        ([raised(1, pytest.skip.Exception("no GPU"), "skipped"), RankOutcome(2, "returned")], "no GPU (ranks 0, 1)"),
        ([raised(rank, pytest.skip.Exception("no GPU"), "skipped") for rank in (1, 2)], "no GPU (every rank)"),
    ],
)
def test_a_skip_names_its_ranks(others: list[RankOutcome], reason: str) -> None:
    error = exception_of(failure(raised(0, pytest.skip.Exception("no GPU"), "skipped"), *others))
    assert isinstance(error, pytest.skip.Exception)
    assert error.msg == reason


def test_a_rank_that_fails_by_itself_overrides_a_skip() -> None:
    skip = raised(0, pytest.skip.Exception("no GPU"), "skipped")
    assert isinstance(exception_of(failure(skip, raised(1, ValueError("boom")))), ValueError)
    lost = raised(1, RuntimeError("Connection closed by peer"), is_communication=True)
    assert isinstance(exception_of(failure(skip, lost)), pytest.skip.Exception)


def test_an_exception_of_pytests_process_has_no_origin() -> None:
    assert origin_of(ValueError()) is None


def test_output_of_ranks_has_a_section_each() -> None:
    outcomes = (RankOutcome(0, "returned", stdout=" \n", stderr="a warning"), RankOutcome(1, "returned", stdout="loss"))
    assert captured_sections(outcomes, None) == [
        ("Captured stderr rank 0", "a warning"),
        ("Captured stdout rank 1", "loss"),
    ]
    with pytest.raises(RankFailure) as caught:
        raise failure(*outcomes)
    assert captured_sections(outcomes, caught) == []  # the message contains them
