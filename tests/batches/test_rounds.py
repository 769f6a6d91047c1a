"""Messages of hand-made ranks in, the outcome of the round out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

from tests.batches.threads import run_on_threads
from tpcheck import Finding, RankFailure, Topology
from tpcheck.batches.records import LoaderFacts
from tpcheck.batches.rounds import (
    AXES,
    EqualSamples,
    LoaderError,
    Outcome,
    Peers,
    RankBatch,
    RoundMessage,
    Status,
    action_across_dp,
    compare,
    loader_failure,
    merge_outcomes,
    most_severe,
    outcome_after_leaving,
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


# ---- whole rounds, on ranks that are threads


def ids(*values: int) -> RankBatch:
    return RankBatch(Status.BATCH, step=2, count=2, batch={"ids": torch.tensor(values)}, with_rows=True)


def without_batch(status: Status, *, count: int = 2, error: BaseException | None = None) -> RankBatch:
    return RankBatch(status, step=2, count=count, error=error)


FAILED = OSError("sample 9 cannot be read")
ENOUGH = range(40)


def compared(
    topology: Topology,
    batches: Sequence[RankBatch],
    *,
    axes: frozenset[str] = AXES,
    samples: bool = True,
) -> list[Outcome]:
    def on_rank(peers: Peers) -> Outcome:
        equal_samples = EqualSamples() if samples else None
        return compare(peers, batches[peers.groups.rank], axes=axes, equal_samples=equal_samples)

    return run_on_threads(topology, on_rank)


def the_outcome(topology: Topology, *batches: RankBatch, **options: Any) -> Outcome:
    """Return the outcome that all ranks have."""
    first, *others = compared(topology, batches, **options)
    assert all((each.findings, str(each.failure), each.uneven) == (first.findings, str(first.failure), first.uneven)
               for each in others)  # fmt: skip
    return first


def test_ranks_of_a_tp_group_with_equal_batches_exchange_one_message() -> None:
    batches = [ids(1, 2), ids(1, 2)]

    def on_rank(peers: Peers) -> tuple[Outcome, int]:
        outcome = compare(peers, batches[peers.groups.rank], axes=AXES, equal_samples=EqualSamples())
        return outcome, cast(Any, peers.tp).calls

    assert run_on_threads(Topology(tp=2), on_rank) == [(Outcome(), 1)] * 2


def test_ranks_of_a_tp_group_find_what_differs_and_where() -> None:
    outcome = the_outcome(Topology(tp=2), ids(1, 2), ids(1, 3))
    (finding,) = outcome.findings
    assert finding.where == {"step": 2, "field": "ids", "ranks": [0, 1], "index": [1]}
    assert finding.evidence["values"] == {"rank 0": 2, "rank 1": 3}
    assert not outcome.uneven


@pytest.mark.parametrize("mask", [True, False])
def test_tokens_that_differ_in_padding_alone_are_explained(mask: bool) -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    padded = torch.cat([tokens, torch.zeros(2, 2, dtype=torch.int64)], dim=1)
    if mask:  # the padding is of several values
        padded[0, 3:] = torch.tensor([7, 8])
    batches = [{"ids": tokens, "name": "a"}, {"ids": padded, "name": "a"}]
    if mask:
        for batch in batches:
            batch["attention_mask"] = (torch.arange(cast(torch.Tensor, batch["ids"]).shape[1]) < 3).long().expand(2, -1)
    ranks = [RankBatch(Status.BATCH, step=2, count=2, batch=batch) for batch in batches]
    (finding,) = the_outcome(Topology(tp=2), *ranks).findings
    assert (finding.cause, finding.where["field"]) == ("padding_differs", "ids")


def test_tensors_of_different_dims_are_not_explained_by_padding() -> None:
    batches = [{"ids": torch.zeros(2, 3)}, {"ids": torch.zeros(2, 3, 1)}, {}]
    ranks = [RankBatch(Status.BATCH, step=2, count=2, batch=batch) for batch in batches]
    (finding,) = the_outcome(Topology(tp=3), *ranks).findings
    assert finding.cause is None
    assert finding.evidence["also"] == [{"field": "ids", "differs": "shape"}]


def test_ranks_whose_loaders_have_ended_together_find_nothing() -> None:
    assert the_outcome(Topology(tp=2), without_batch(Status.ENDED), without_batch(Status.ENDED)) == Outcome()


def test_a_loader_that_raises_is_named_on_all_ranks_of_its_tp_group() -> None:
    outcome = the_outcome(Topology(tp=2), ids(1), without_batch(Status.FAILED, error=FAILED))
    assert outcome.failure is not None
    assert str(outcome.failure).startswith("the data loader of rank 1 raised OSError at batch 2: sample 9")


def test_a_loader_that_raises_after_a_rank_has_left_is_not_named() -> None:
    batches = [without_batch(Status.LEFT), without_batch(Status.FAILED, error=FAILED)]
    outcome = the_outcome(Topology(tp=2), *batches)
    assert str(outcome.failure) == "the data loader of another rank raised at batch 2"


def test_a_loader_that_raises_ends_the_other_replicas_too() -> None:
    batches = [ids(1), without_batch(Status.FAILED, error=FAILED)]
    outcome = the_outcome(Topology(dp=2), *batches)
    assert outcome.failure is not None
    assert outcome.failure.first == 1


def test_a_difference_in_one_replica_is_found_on_all_ranks_with_its_replica() -> None:
    (finding,) = the_outcome(Topology(tp=2, dp=2), ids(1), ids(1), ids(2), ids(3)).findings
    assert finding.where == {"step": 2, "field": "ids", "ranks": [2, 3], "dp_rank": 1, "index": [0]}


def test_a_rank_that_ends_early_is_uneven_on_all_replicas() -> None:
    outcome = the_outcome(Topology(tp=2, dp=2), ids(1), ids(1), ids(2), without_batch(Status.ENDED))
    assert outcome.uneven == AXES
    assert [finding.where["ranks"] for finding in outcome.findings] == [[3]]


def test_replicas_that_end_early_are_uneven_over_dp_alone() -> None:
    outcome = the_outcome(Topology(dp=2), ids(1), without_batch(Status.ENDED))
    assert outcome.uneven == {"dp"}
    (finding,) = outcome.findings
    assert (finding.check, finding.where["ranks"]) == ("batches_differ_across_dp", [1])
    assert finding.evidence["batches"] == {"replica 0": 3, "replica 1": 2}


def test_replicas_with_the_same_samples_are_found_with_their_field() -> None:
    outcome = the_outcome(Topology(tp=2, dp=2), *(ids(*ENOUGH) for _ in range(4)))
    (finding,) = outcome.findings
    assert (finding.check, finding.cause) == ("batches_differ_across_dp", "duplicate_dp_batch")
    assert finding.where == {"step": 2, "field": "ids", "ranks": [0, 1, 2, 3]}


def test_replicas_with_different_samples_find_nothing() -> None:
    assert the_outcome(Topology(dp=2), ids(*ENOUGH), ids(*range(40, 80))) == Outcome()


def test_replicas_with_samples_that_may_be_equal_by_chance_find_nothing() -> None:
    assert the_outcome(Topology(dp=2), ids(1, 1), ids(1, 1)) == Outcome()


@pytest.mark.parametrize("options", [{"samples": False}, {"axes": frozenset({"tp"})}])
def test_samples_of_replicas_need_not_be_compared(options: dict[str, Any]) -> None:
    assert the_outcome(Topology(dp=2), ids(*ENOUGH), ids(*ENOUGH), **options) == Outcome()


def test_ranks_of_a_tp_group_need_not_be_compared() -> None:
    assert the_outcome(Topology(tp=2), ids(1), ids(2), axes=frozenset({"dp"})) == Outcome()


def test_replicas_after_one_has_left_keep_what_they_have_found_themselves() -> None:
    batches = [ids(1), ids(2), without_batch(Status.LEFT), without_batch(Status.LEFT)]
    first, second, *left = compared(Topology(tp=2, dp=2), batches)
    assert first == second
    assert [finding.where["field"] for finding in first.findings] == ["ids"]
    assert [each.uneven for each in left] == [{"dp"}] * 2


class Gone:
    """An exchange with a rank that is gone, or with messages of a round that this rank did not wait for."""

    def __init__(self, messages: tuple[bytes, ...] | None = None) -> None:
        self.ranks, self.messages, self.aborts = (0, 1), messages, list[RankFailure]()

    def all_gather(self, message: bytes) -> tuple[bytes, ...]:
        raise FAILURE

    def wait(self) -> tuple[bytes, ...] | None:
        return self.messages

    def abort(self, failure: RankFailure) -> None:
        self.aborts.append(failure)


def test_a_rank_that_is_gone_ends_the_waiting_of_both_groups() -> None:
    tp, dp = Gone(), Gone()
    peers = Peers(cast(Any, None), cast(Any, tp), cast(Any, dp), ())
    with pytest.raises(RankFailure):
        compare(peers, ids(1), axes=AXES, equal_samples=None)
    assert tp.aborts == dp.aborts == [FAILURE]


@pytest.mark.parametrize(
    ("others", "ranks"), [(None, None), (message(Status.LEFT, count=3), None), (message(count=3), [0])]
)
def test_a_rank_that_left_compares_the_numbers_of_batches_afterwards(
    others: RoundMessage | None, ranks: list[int] | None
) -> None:
    messages = None if others is None else (message(Status.LEFT, count=3).pack(), others.pack())
    peers = Peers(cast(Any, None), cast(Any, Gone(messages)), cast(Any, Gone()), ())
    outcome = outcome_after_leaving(peers, "tp", step=3)
    assert [finding.where["ranks"] for finding in outcome.findings] == ([] if ranks is None else [ranks])
