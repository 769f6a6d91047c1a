"""Messages of hand-made ranks in, the outcome of the round out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tpcheck import Finding, RankFailure
from tpcheck.batches.records import LoaderFacts
from tpcheck.batches.rounds import (
    AXES,
    EqualSamples,
    LoaderError,
    Outcome,
    RankBatch,
    RoundMessage,
    Status,
    action_across_dp,
    loader_failure,
    merge_outcomes,
    most_severe,
    outcome_within_tp,
)
from tpcheck.batches.sampling import BatchProvenance

WITHIN = Finding("batches_agree_within_tp", {"field": "labels"}, 1.0, 0.0)
ACROSS = Finding("batches_differ_across_dp", {"field": "labels"}, 1.0, 0.0)
FAILURE = RankFailure("the data loader of rank 1 raised", first=1, outcomes=())


def message(status: Status = Status.BATCH, *, count: int = 3, digest: bytes = b"same") -> RoundMessage:
    return RoundMessage(digest, None, count, status)


def outcome_of(*messages: RoundMessage) -> Outcome | None:
    return outcome_within_tp(messages, step=3, members=[(rank,) for rank in range(len(messages))])


def test_a_message_is_48_bytes_and_survives_the_journey() -> None:
    for rows in (None, b"r" * 16):
        original = RoundMessage(b"d" * 16, rows, 7, Status.LEFT)
        assert len(original.pack()) == 48
        assert RoundMessage.unpack(original.pack()) == original


def test_equal_batches_have_equal_messages() -> None:
    def messages(labels: int) -> bytes:
        batch = {"labels": torch.full((3,), labels)}
        return RankBatch(Status.BATCH, step=0, count=0, batch=batch, with_rows=True).message().pack()

    assert messages(1) == messages(1) != messages(2)


def test_a_rank_without_a_batch_sends_its_status_and_count() -> None:
    assert RankBatch(Status.ENDED, step=9, count=4).message() == RoundMessage(b"", None, 4, Status.ENDED)


def test_a_summary_has_leaves_and_provenance() -> None:
    provenance = BatchProvenance(loader_facts=lambda: LoaderFacts(sampler="RandomSampler"))
    summary = RankBatch(Status.BATCH, step=0, count=0, batch={"x": 1}, provenance=provenance).summary()
    assert [leaf.path for leaf in summary.leaves] == ["", "x"]
    assert summary.loader.sampler == "RandomSampler"


def test_batches_that_agree_have_no_findings() -> None:
    assert outcome_of(message(), message()) == Outcome()


def test_batches_that_differ_need_more_than_their_messages() -> None:
    assert outcome_of(message(), message(digest=b"other")) is None


def test_loaders_that_end_together_have_no_findings() -> None:
    assert outcome_of(message(Status.ENDED), message(Status.ENDED)) == Outcome()


@pytest.mark.parametrize("status", [Status.ENDED, Status.LEFT])
def test_a_rank_that_ends_early_is_named_with_the_numbers_of_batches(status: Status) -> None:
    outcome = outcome_of(message(), message(status), message())
    assert outcome is not None
    assert outcome.uneven == AXES
    (finding,) = outcome.findings
    assert (finding.cause, finding.where["ranks"]) == ("uneven_length", [1])
    assert finding.evidence["batches"] == {"rank 0": 4, "rank 1": 3, "rank 2": 4}
    assert finding.evidence["ended"] == ["rank 1"]


def test_ranks_that_end_after_different_numbers_of_batches_are_uneven() -> None:
    outcome = outcome_of(message(Status.ENDED, count=3), message(Status.ENDED, count=4))
    assert outcome is not None
    assert outcome.findings[0].where["ranks"] == [0, 1]


@pytest.mark.parametrize(
    ("statuses", "outcome", "action"),
    [
        ({Status.BATCH}, Outcome(), "compare samples"),
        ({Status.BATCH, Status.ENDED}, Outcome(), "compare lengths"),
        ({Status.BATCH, Status.LEFT}, Outcome(), "compare lengths"),
        ({Status.BATCH, Status.WRONG}, Outcome(), "merge"),
        ({Status.BATCH, Status.FAILED}, Outcome((WITHIN,)), "merge"),
        ({Status.WRONG, Status.LEFT}, Outcome((WITHIN,)), "keep"),
        ({Status.FAILED, Status.LEFT}, Outcome(failure=FAILURE), "keep"),
        ({Status.WRONG, Status.LEFT}, Outcome(), "compare lengths"),
    ],
)
def test_replicas_act_on_their_statuses(statuses: set[Status], outcome: Outcome, action: str) -> None:
    assert action_across_dp(statuses, outcome) == action


def test_a_failure_is_more_severe_than_a_finding_within_tp_and_that_than_one_across_dp() -> None:
    failed, within, across = Outcome(failure=FAILURE), Outcome((WITHIN,)), Outcome((ACROSS,))
    assert most_severe([across, within, failed]) is failed
    assert most_severe([across, within]) is within
    assert most_severe([across, Outcome()]) is across


def test_merged_outcomes_have_all_findings_and_the_first_failure() -> None:
    merged = merge_outcomes(
        [Outcome((WITHIN,)), Outcome(failure=FAILURE), Outcome((ACROSS,), uneven=frozenset({"dp"}))]
    )
    assert merged == Outcome((WITHIN, ACROSS), FAILURE, AXES)


def test_samples_count_once_they_cannot_be_equal_by_chance() -> None:
    equal = EqualSamples()
    for step in range(3):
        assert equal.may_exist((bytes([step]), bytes([step])))
        assert equal.are_beyond_chance(16.0) is (step == 2)


def test_a_batch_that_stays_the_same_is_no_further_evidence() -> None:
    equal = EqualSamples()
    for _ in range(9):
        assert equal.may_exist((b"same", b"same"))
        assert not equal.are_beyond_chance(30.0)


@pytest.mark.parametrize("different", [True, False])
def test_different_samples_start_the_count_again(different: bool) -> None:
    equal = EqualSamples()
    assert equal.may_exist((b"a", b"a"))
    assert not equal.are_beyond_chance(39.0)
    if different:
        assert not equal.may_exist((b"a", b"b"))
    else:  # the sampled rows are equal, all bytes are not
        assert equal.may_exist((b"b", b"b"))
        assert not equal.are_beyond_chance(None)
    assert equal.bits == 0.0


def test_batches_without_rows_are_not_equal() -> None:
    assert not EqualSamples().may_exist((None, None))


def raised(error: Exception) -> Any:
    try:
        raise error
    except OSError as caught:
        return LoaderError.of(caught)


def test_a_loader_failure_names_the_rank_and_has_its_traceback() -> None:
    failure = loader_failure({0: None, 2: raised(OSError("sample 9 cannot be read"))}, count=2)
    assert str(failure).startswith("the data loader of rank 2 raised OSError at batch 2: sample 9 cannot be read")
    assert "in raised" in str(failure)
    assert (failure.first, [outcome.rank for outcome in failure.outcomes]) == (2, [2])


def test_a_loader_failure_of_an_unknown_rank_gives_the_batch() -> None:
    assert str(loader_failure({}, count=2)) == "the data loader of another rank raised at batch 2"
