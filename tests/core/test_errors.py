"""Errors have a message that says what is wrong, and can be pickled and copied."""

from __future__ import annotations

import copy
import pickle

import pytest

from tpcheck import (
    BackendError,
    BatchMismatch,
    Mismatch,
    RankFailure,
    RankOutcome,
    TpcheckError,
    UnevenBatches,
    UsageError,
)


@pytest.mark.parametrize(
    ("accepted", "text"),
    [
        ("a positive integer", "tp=0: expected a positive integer"),
        (["float64", "bfloat16"], "tp=0: expected one of float64, bfloat16"),
        ((1, 2), "tp=0: expected one of 1, 2"),
        (["losses", "norms, losses"], "tp=0: expected one of losses; norms, losses"),
    ],
)
def test_a_usage_error_has_the_name_the_value_and_what_is_accepted(accepted: object, text: str) -> None:
    error = UsageError("tp", 0, accepted)  # type: ignore[arg-type]
    assert str(error) == text
    assert (error.name, error.value) == ("tp", 0)


def test_all_errors_have_one_base() -> None:
    kinds = (UsageError, Mismatch, BatchMismatch, UnevenBatches, RankFailure, BackendError)
    assert all(issubclass(kind, TpcheckError) for kind in kinds)
    assert issubclass(BatchMismatch, Mismatch)
    assert issubclass(UnevenBatches, Mismatch)


def test_usage_errors_are_value_errors_and_mismatches_assertions() -> None:
    assert issubclass(UsageError, ValueError)
    assert issubclass(Mismatch, AssertionError)  # so that pytest reports a failure, not an error
    assert not issubclass(BackendError, Mismatch)


@pytest.mark.parametrize("copied", [lambda error: pickle.loads(pickle.dumps(error)), copy.copy, copy.deepcopy])
def test_errors_can_be_pickled_and_copied(copied: object) -> None:
    assert callable(copied)
    usage = copied(UsageError("tp", 0, ["1", "2"]))
    assert (str(usage), usage.name, usage.value, usage.accepted) == (
        "tp=0: expected one of 1, 2",
        "tp",
        0,
        "one of 1, 2",
    )
    mismatch = copied(BatchMismatch("differs", {"a": 1}))
    assert (type(mismatch), str(mismatch), mismatch.report) == (BatchMismatch, "differs", {"a": 1})
    outcomes = (RankOutcome(0, "returned"), RankOutcome(1, "died", signal="SIGKILL"))
    failure = copied(RankFailure("rank 1 died", first=1, outcomes=outcomes, exception=None))
    assert (str(failure), failure.first, failure.outcomes, failure.exception) == ("rank 1 died", 1, outcomes, None)
