"""Norms, steps and drift."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.numerics.evidence import cause_of, suspect
from tests.numerics.norms import CLIPPING, NORMS, REPLICATED, SHARDED, clipped_alike, facts, step
from tpcheck.core.causes import Cause
from tpcheck.numerics.evidence import ReplicaFacts, StepFacts
from tpcheck.numerics.hypotheses import explain

CHANCE = torch.Generator().manual_seed(0)
EXPECTED, OTHER = torch.randn(2, 4, 8, generator=CHANCE, dtype=torch.float64)
HALVES = EXPECTED.chunk(2, dim=1)


def the_cause(kind: Any, parts: Any, expected: Any = EXPECTED, **fields: Any) -> Cause | None:
    return cause_of(suspect(kind, parts, expected, **fields))


def of_norm(*reported: float, **fields: Any) -> Cause | None:
    return the_cause("norm", reported, NORMS.whole, norms=facts(*reported, **fields))


def of_step(*implied: float, parts: Any = (EXPECTED * 1.1,) * 2, norms: Any = NORMS, **fields: Any) -> Cause | None:
    clipped = clipped_alike(norms.whole)
    return the_cause("update", parts, norms=facts(implied=implied, norms=norms, step=clipped), **fields)


def test_a_wrong_norm_is_recognised() -> None:
    assert of_norm(*NORMS.of_ranks) is Cause.NORM_IS_LOCAL
    assert of_norm(*(NORMS.counting_replicas,) * 2) is Cause.NORM_COUNTS_REPLICAS
    assert of_norm(*(NORMS.whole * 1.1,) * 2) is None
    assert the_cause("norm", NORMS.of_ranks, NORMS.whole) is None  # without facts


def test_a_step_shows_the_norm_that_it_was_clipped_by() -> None:
    assert of_step(*NORMS.of_ranks) is Cause.NORM_IS_LOCAL
    assert of_step(*(NORMS.counting_replicas,) * 2) is Cause.NORM_COUNTS_REPLICAS
    assert of_step(*(NORMS.whole * 1.1,) * 2) is None
    assert of_step() is None


@pytest.mark.parametrize(("error", "cause"), [(0.9e-6, Cause.NORM_IS_LOCAL), (2e-6, None)])
def test_a_norm_that_a_step_implies_agrees_in_six_digits(error: float, cause: Cause | None) -> None:
    first, second = NORMS.of_ranks
    assert of_step(first * (1 + error), second) is cause


def test_only_the_wrong_ranks_show_their_norm() -> None:
    parts = (HALVES[0], HALVES[1] * 1.1)
    assert of_step(NORMS.whole, NORMS.of_ranks[1], parts=parts, expected_parts=HALVES) is Cause.NORM_IS_LOCAL


def test_norms_too_small_to_clip_look_alike() -> None:
    """A rank whose own norm is below the largest one allowed clips nothing: the norm that its step implies is that."""
    small = tuple(
        {name: norm * (0.05 if rank else 1.0) for name, norm in each.items()} for rank, each in enumerate(NORMS.by_rank)
    )
    norms = replace(NORMS, by_rank=small)
    assert norms.of_ranks[1] < CLIPPING.max_norm
    assert of_step(norms.of_ranks[0], CLIPPING.max_norm, norms=norms) is Cause.NORM_IS_LOCAL
    assert of_step(CLIPPING.max_norm, CLIPPING.max_norm, norms=norms) is None  # nothing was clipped at all


def test_what_is_reported_is_wrong_alone_where_the_step_is_right() -> None:
    other, right = NORMS.whole * 1.1, clipped_alike(NORMS.whole)
    assert of_norm(other, other, step=right) is Cause.REPORTED_NORM_WRONG
    assert of_norm(other, other, step=clipped_alike(other)) is None
    assert of_norm(*NORMS.of_ranks, step=right) is Cause.NORM_IS_LOCAL
    ambiguous = (NORMS.whole * 2,) * 2
    assert of_norm(*ambiguous, step=right, scales={"the number of replicas": 2.0}) is None


def test_the_norm_of_one_group_is_that_of_groups_that_were_clipped() -> None:
    by_group = step({name: CLIPPING.factor(NORMS.norm_of(group)) for group in (SHARDED, REPLICATED) for name in group})
    of_group = NORMS.norm_of(REPLICATED)
    assert of_norm(of_group, of_group, step=by_group) is Cause.CLIPPED_PER_GROUP
    assert of_norm(of_group, of_group) is Cause.NORM_LEAVES_OUT_SHARDS
    wrong = facts(implied=(of_group,) * 2, step=by_group)
    assert the_cause("update", [EXPECTED * 1.1] * 2, norms=wrong) is Cause.CLIPPED_PER_GROUP


@pytest.mark.parametrize(
    ("epsilon", "cause"),
    [(1e-3, Cause.CLIP_EPSILON_DIFFERS), (0.1, Cause.CLIP_EPSILON_DIFFERS), (0.0021, None), (-0.1, None)],
)
def test_an_epsilon_that_is_a_power_of_ten_is_named(epsilon: float, cause: Cause | None) -> None:
    """The norm that a step implies is one to which torch's epsilon was added."""
    norm = NORMS.whole + epsilon - CLIPPING.epsilon
    assert of_step(norm, norm) is cause


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
