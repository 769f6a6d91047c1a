"""Norms, steps and drift."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.numerics.evidence import suspect
from tpcheck.core.causes import Cause
from tpcheck.numerics.evidence import NormFacts, ReplicaFacts, StepFacts
from tpcheck.numerics.hypotheses import explain

CHANCE = torch.Generator().manual_seed(0)
EXPECTED, OTHER = torch.randn(2, 4, 8, generator=CHANCE, dtype=torch.float64)
HALVES = EXPECTED.chunk(2, dim=1)
NORMS = NormFacts(of_ranks=(3.0, 4.0), of_ranks_shards=(2.0, 2.5), counting_replicas=6.0)


def the_cause(kind: Any, parts: Any, expected: Any = EXPECTED, **fields: Any) -> Cause | None:
    found = explain(suspect(kind, parts, expected, **fields))
    return found.cause if found else None


@pytest.mark.parametrize(
    ("norms", "cause"),
    [
        ((3.0, 3.0), Cause.NORM_IS_LOCAL),
        ((3.0, 4.0), Cause.NORM_IS_LOCAL),
        ((2.0, 2.5), Cause.NORM_IS_LOCAL),
        ((6.0, 6.0), Cause.NORM_COUNTS_REPLICAS),
        ((5.5, 5.5), None),
    ],
)
def test_the_usual_wrong_norms_are_recognised(norms: tuple[float, ...], cause: Cause | None) -> None:
    assert the_cause("norm", norms, 5.0, observed=0.2, norms=NORMS) is cause


@pytest.mark.parametrize(
    ("implied", "cause"),
    [((3.0, 4.0), Cause.NORM_IS_LOCAL), ((6.0, 6.0), Cause.NORM_COUNTS_REPLICAS), ((5.5, 5.5), None), ((), None)],
)
def test_a_step_shows_the_norm_that_it_was_clipped_by(implied: tuple[float, ...], cause: Cause | None) -> None:
    assert the_cause("update", [EXPECTED * 1.1] * 2, norms=replace(NORMS, implied=implied)) is cause


def test_without_the_usual_wrong_norms_there_is_no_cause() -> None:
    assert the_cause("norm", (3.0, 3.0), 5.0, observed=0.2) is None
    assert the_cause("update", [EXPECTED * 1.1] * 2) is None


def test_norms_where_none_is_expected_are_compared_as_they_are() -> None:
    assert the_cause("norm", (3.0, 4.0), 0.0, observed=3.0, norms=NORMS) is Cause.NORM_IS_LOCAL
    assert the_cause("norm", (3.1, 4.0), 0.0, observed=3.0, norms=NORMS) is None


def test_norms_agree_with_a_wrong_one_far_closer_than_with_the_right_one() -> None:
    assert the_cause("norm", (6.0009, 6.0), 5.0, observed=0.2, norms=NORMS) is Cause.NORM_COUNTS_REPLICAS
    assert the_cause("norm", (6.002, 6.0), 5.0, observed=0.2, norms=NORMS) is None


@pytest.mark.parametrize(("error", "cause"), [(0.9e-6, Cause.NORM_IS_LOCAL), (2e-6, None)])
def test_a_norm_that_a_step_implies_agrees_in_six_digits(error: float, cause: Cause | None) -> None:
    norms = replace(NORMS, implied=(3.0 * (1 + error), 4.0))
    assert the_cause("update", [EXPECTED * 1.1] * 2, norms=norms) is cause


def test_only_the_wrong_ranks_show_their_norm() -> None:
    norms = replace(NORMS, implied=(5.5, 4.0))
    parts = (HALVES[0], HALVES[1] * 1.1)
    assert the_cause("update", parts, expected_parts=HALVES, norms=norms) is Cause.NORM_IS_LOCAL


@pytest.mark.parametrize("parts", [(OTHER, OTHER), (OTHER, EXPECTED)])
def test_the_wrong_ranks_hold_the_weight_from_before(parts: tuple[torch.Tensor, ...]) -> None:
    assert the_cause("update", parts, step=StepFacts(before=(OTHER, OTHER))) is Cause.STALE_WEIGHT
    assert the_cause("update", [part + 0.1 for part in parts], step=StepFacts(before=(OTHER, OTHER))) is None


@pytest.mark.parametrize(("sources", "cause"), [((1, 1), Cause.SHARD_REPEATED), ((1, 0), Cause.SHARD_ORDER_SWAPPED)])
def test_the_momentum_of_another_rank_is_recognised(sources: tuple[int, int], cause: Cause) -> None:
    moves = OTHER.chunk(2, dim=1)
    facts = StepFacts(before=tuple(half - 1 for half in HALVES), momentum_parts=moves, momentum_share=0.9)
    parts = [HALVES[rank] + 0.9 * (moves[source] - moves[rank]) for rank, source in enumerate(sources)]
    found = explain(suspect("update", parts, EXPECTED, expected_parts=HALVES, step=facts))
    assert found is not None
    assert (found.cause, found.evidence["momentum_of_tp_rank"]) == (cause, list(sources))


def test_updates_of_some_replicas_have_drifted_and_of_all_have_not() -> None:
    assert the_cause("update", (EXPECTED, EXPECTED + 1e-7), observed=1e-7) is Cause.REPLICA_DRIFT
    assert the_cause("update", (EXPECTED + 1e-7, EXPECTED + 1e-7), observed=1e-7) is None


@pytest.mark.parametrize("replicas", [ReplicaFacts(differed_at_start=True), ReplicaFacts(gradients_differ=True)])
def test_replicas_that_differ_for_another_reason_have_not_drifted(replicas: ReplicaFacts) -> None:
    assert the_cause("update", (EXPECTED, EXPECTED + 1e-7), observed=1e-7, replicas=replicas) is None


def test_replicas_over_dp_drift_too() -> None:
    parts = (HALVES[0], HALVES[1] + 1e-7)
    assert the_cause("update", parts, expected_parts=HALVES) is None
    over_dp = ReplicaFacts(differ_over_dp=True)
    assert the_cause("update", parts, expected_parts=HALVES, replicas=over_dp) is Cause.REPLICA_DRIFT


@pytest.mark.parametrize(
    ("phase", "replicas", "cause"),
    [
        ("update", ReplicaFacts({"parameter": 2}), Cause.REPLICA_DRIFT),
        ("start", ReplicaFacts({"parameter": 2}), None),
        ("update", ReplicaFacts({"parameter": 2}, differed_at_start=True), None),
        ("update", ReplicaFacts({"parameter": 2, "gradient": 1}), None),
    ],
)
def test_replicas_that_were_equal_at_the_start_have_drifted(
    phase: str, replicas: ReplicaFacts, cause: Cause | None
) -> None:
    assert the_cause("replica", (), None, where={"phase": phase}, replicas=replicas) is cause
