"""Replicas are compared by their digests, over TP and over DP."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests.numerics.evidence import BIAS, BUFFER, NORM, UP, cause_of, right_evidence, with_digest, with_tensor
from tpcheck.core.causes import Cause
from tpcheck.numerics.checks.replicas import replicas_agree_after, replicas_agree_at_start

RIGHT, RIGHT_DP = right_evidence(), right_evidence(dp=2)


def test_replicas_of_a_right_run_agree() -> None:
    assert not replicas_agree_at_start(RIGHT).suspects
    assert not replicas_agree_after(RIGHT_DP, 0).suspects


def test_over_tp_replicated_parameters_are_replicas_and_over_dp_all() -> None:
    assert set(replicas_agree_at_start(RIGHT).margins) == {
        f"parameter {NORM} over tp", f"parameter {BIAS} over tp", f"buffer {BUFFER} over tp"
    }  # fmt: skip
    assert f"parameter {UP} over dp" in replicas_agree_at_start(RIGHT_DP).margins


def test_buffers_may_differ_over_dp_once_trained() -> None:
    assert f"buffer {BUFFER} over dp" in replicas_agree_at_start(RIGHT_DP).margins
    assert f"buffer {BUFFER} over dp" not in replicas_agree_after(RIGHT_DP, 0).margins


def test_the_whole_world_is_compared_once() -> None:
    assert not replicas_agree_at_start(replace(RIGHT_DP, dp_rank=1)).margins


def test_ranks_that_differ_from_the_majority_are_named_with_all_tensors() -> None:
    evidence = right_evidence(tp=4)
    for name in (NORM, BIAS):
        evidence = with_digest(evidence, ("parameter", name), [2], moment=0)
    (suspect,) = replicas_agree_at_start(evidence).suspects
    assert suspect.where["ranks"] == [2]
    assert suspect.evidence == {"count_differing": 2, "also": [{"kind": "parameter", "name": BIAS}]}
    assert suspect.facts_as_evidence() == {"parameters": 2}
    assert cause_of(suspect) is None  # nothing has drifted before the first step


def test_all_ranks_are_named_where_there_is_no_majority() -> None:
    (suspect,) = replicas_agree_at_start(with_digest(RIGHT, ("parameter", NORM), [1], moment=0)).suspects
    assert suspect.where["ranks"] == [0, 1]


def test_replicas_that_were_equal_at_the_start_have_drifted() -> None:
    evidence = with_digest(RIGHT, ("buffer", BUFFER), [1], moment=1)
    (suspect,) = replicas_agree_after(evidence, 0).suspects
    assert suspect.where["module"] == "block"
    assert cause_of(suspect) is Cause.REPLICA_DRIFT
    (suspect,) = replicas_agree_after(with_digest(evidence, ("buffer", BUFFER), [1], moment=0), 0).suspects
    assert suspect.replicas.differed_at_start
    assert cause_of(suspect) is None


def test_gradients_that_differ_are_explained_by_their_tensors() -> None:
    evidence = with_tensor(RIGHT, "gradients", NORM, lambda tensor: tensor * 0.25, ranks=[0])
    evidence = with_tensor(evidence, "gradients", NORM, lambda tensor: tensor * 0.75, ranks=[1])
    evidence = with_digest(evidence, ("gradient", NORM), [1], moment=1)
    (suspect,) = replicas_agree_after(evidence, 0).suspects
    assert suspect.where["field"] == f"gradient {NORM} over tp"
    assert cause_of(suspect) is Cause.PARTIAL_GRADIENT_ON_REPLICA


def test_a_gradient_that_a_rank_does_not_have_differs_without_a_tensor() -> None:
    evidence = with_tensor(RIGHT, "gradients", NORM, lambda tensor: None, ranks=[1])
    (suspect,) = replicas_agree_after(with_digest(evidence, ("gradient", NORM), [1], moment=1), 0).suspects
    assert suspect.actual_parts == ()
    assert cause_of(suspect) is None


def test_a_gradient_that_differs_over_dp_or_in_another_replica_is_not_compared_with_the_expected_one() -> None:
    for ranks in ([2], [2, 3]):
        evidence = with_digest(RIGHT_DP, ("gradient", NORM), ranks, moment=1)
        for suspect in replicas_agree_after(evidence, 0).suspects:
            assert suspect.expected is None
            assert not suspect.actual_parts
    (suspect,) = replicas_agree_after(with_digest(RIGHT, ("gradient", NORM), [1], moment=1), 0).suspects
    assert torch.equal(suspect.expected, RIGHT.reference[0].gradients[NORM])
    assert len(suspect.actual_parts) == 2


def test_a_parameter_that_differs_with_its_gradient_has_no_expected_one() -> None:
    (suspect,) = replicas_agree_after(with_digest(RIGHT, ("parameter", NORM), [1], moment=1), 0).suspects
    assert suspect.expected is None


def test_a_parameter_of_unknown_layout_is_no_replica_over_tp() -> None:
    facts = tuple(
        replace(each, digests=({**each.digests[0], ("parameter", "other"): str(rank)}, *each.digests[1:]))
        for rank, each in enumerate(RIGHT.facts)
    )
    assert not replicas_agree_at_start(replace(RIGHT, facts=facts)).suspects
