"""Weights and buffers after a step are compared, and each rank's gradient norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import hypot, inf, nan

import pytest
import torch

from tests.numerics.evidence import BIAS, BUFFER, DOWN, NORM, UP, right_evidence, with_digest, with_step, with_tensor
from tpcheck.core.causes import Cause
from tpcheck.numerics.checks.updates import gradient_norm_matches_reference, norm_facts, updates_match_reference
from tpcheck.numerics.evidence import Evidence, Suspect
from tpcheck.numerics.hypotheses import explain

RIGHT = right_evidence()
EXPECTED = RIGHT.reference[0].gradient_norm or 0.0


def test_equal_norms_agree() -> None:
    outcome = gradient_norm_matches_reference(RIGHT, 0)
    assert outcome.margins == {"gradient norm": 0.0}
    assert not outcome.suspects


def test_a_norm_that_the_backend_does_not_report_is_not_compared() -> None:
    outcome = gradient_norm_matches_reference(with_step(RIGHT, ranks=[1], gradient_norm=None), 0)
    assert list(outcome.not_compared) == ["gradient norm"]


def test_the_ranks_with_a_wrong_norm_are_named() -> None:
    (suspect,) = gradient_norm_matches_reference(with_step(RIGHT, ranks=[1], gradient_norm=2 * EXPECTED), 0).suspects
    assert suspect.where == {"phase": "update", "step": 0, "ranks": [1]}
    assert suspect.observed == pytest.approx(1.0)
    assert suspect.evidence["norm_actual"] == [EXPECTED, 2 * EXPECTED]
    assert set(suspect.facts_as_evidence()) == {
        "norm_of_each_rank_alone", "norm_of_each_ranks_shards", "norm_with_replicas_counted"
    }  # fmt: skip


def test_a_norm_that_is_not_a_number_is_infinitely_wrong() -> None:
    outcome = gradient_norm_matches_reference(with_step(RIGHT, gradient_norm=nan), 0)
    assert outcome.margins == {"gradient norm": inf}


def test_the_usual_wrong_norms_are_those_of_shards_and_replicas() -> None:
    facts = norm_facts(RIGHT, 0)
    sizes = [{name: float(tensor.norm()) for name, tensor in rank.gradients.items()} for rank in RIGHT.candidate[0]]
    assert facts.of_ranks_shards == pytest.approx([hypot(size[UP], size[DOWN]) for size in sizes])
    assert facts.of_ranks == pytest.approx([hypot(*size.values()) for size in sizes])
    assert facts.counting_replicas == pytest.approx(hypot(EXPECTED, sizes[0][NORM], sizes[0][BIAS]))


@pytest.mark.parametrize(
    ("norm", "cause"), [("of_ranks", Cause.NORM_IS_LOCAL), ("counting_replicas", Cause.NORM_COUNTS_REPLICAS)]
)
def test_a_usual_wrong_norm_is_explained(norm: str, cause: Cause) -> None:
    facts, evidence = norm_facts(RIGHT, 0), RIGHT
    for rank in (0, 1):
        value = getattr(facts, norm)
        evidence = with_step(evidence, ranks=[rank], gradient_norm=value if isinstance(value, float) else value[rank])
    (suspect,) = gradient_norm_matches_reference(evidence, 0).suspects
    found = explain(suspect)
    assert found is not None
    assert found.cause is cause
    assert explain(replace(suspect, norms=None)) is None


RIGHT, TWO_STEPS = right_evidence(), right_evidence(steps=2)


def the_cause(suspect: Suspect) -> Cause | None:
    found = explain(suspect)
    return found.cause if found else None


def with_move(
    evidence: Evidence, name: str, change: Callable[[torch.Tensor], torch.Tensor], *ranks: int, step: int = 0
) -> Evidence:
    """Return the evidence with another step of the optimizer on one parameter."""
    for rank in ranks or (0, 1):
        before = evidence.parts_before(step)[rank][name]
        evidence = with_tensor(
            evidence, "weights", name, lambda after, before=before: before + change(after - before), ranks=[rank],
            step=step,
        )  # fmt: skip
    return evidence


def test_weights_and_buffers_of_a_right_run_agree() -> None:
    outcome = updates_match_reference(TWO_STEPS, 1)
    assert not outcome.suspects
    assert set(outcome.margins) == {NORM, UP, DOWN, BIAS, f"buffer {BUFFER}"}


def test_a_call_without_an_optimizer_step_has_no_weights_to_compare() -> None:
    evidence = replace(RIGHT, reference=(replace(RIGHT.reference[0], weights={}),))
    assert updates_match_reference(with_step(evidence, weights={}), 0).not_compared == {
        "weights": "no optimizer step followed this call"
    }


def test_a_weight_without_a_gradient_may_be_decayed() -> None:
    step = RIGHT.reference[0]
    evidence = replace(RIGHT, reference=(replace(step, gradients={**step.gradients, NORM: None}),))
    evidence = with_tensor(evidence, "gradients", NORM, lambda gradient: None)
    outcome = updates_match_reference(with_move(evidence, NORM, lambda move: move * 2), 0)
    assert not outcome.suspects
    assert outcome.not_compared == {NORM: "it has no gradient, and optimizers differ in whether they decay it"}


def test_the_worst_weight_comes_first_and_tells_the_share_of_each_term() -> None:
    evidence = with_move(with_move(RIGHT, DOWN, lambda move: move * 1.5), UP, lambda move: move * 3)
    first, second = updates_match_reference(evidence, 0).suspects
    assert (first.parameter, second.parameter) == (UP, DOWN)
    assert first.step.ratios["gradient"] == pytest.approx((3.0, 3.0))
    assert first.facts_as_evidence()["gradient_ratio"] == [3.0, 3.0]


def test_a_step_that_is_not_taken_leaves_a_stale_weight() -> None:
    (suspect,) = updates_match_reference(with_move(RIGHT, UP, torch.zeros_like, 1), 0).suspects
    assert suspect.where["ranks"] == [1]
    assert the_cause(suspect) is Cause.STALE_WEIGHT


@pytest.mark.parametrize("cause", [Cause.NORM_IS_LOCAL, Cause.NORM_COUNTS_REPLICAS])
def test_a_step_that_another_norm_clips_is_explained(cause: Cause) -> None:
    norm, facts, evidence = RIGHT.reference[0].gradient_norm or 0.0, norm_facts(RIGHT, 0), RIGHT
    for rank in (0, 1):
        used = facts.of_ranks[rank] if cause is Cause.NORM_IS_LOCAL else facts.counting_replicas
        evidence = with_move(evidence, UP, lambda move, by=(norm + 1e-6) / (used + 1e-6): move * by, rank)
    (suspect,) = updates_match_reference(evidence, 0).suspects
    assert suspect.norms is not None
    assert len(suspect.norms.implied) == 2
    assert the_cause(suspect) is cause


@pytest.mark.parametrize(("sources", "cause"), [((0, 0), Cause.SHARD_REPEATED), ((1, 0), Cause.SHARD_ORDER_SWAPPED)])
def test_the_momentum_of_another_ranks_shard_is_explained(sources: tuple[int, int], cause: Cause) -> None:
    first = TWO_STEPS.reference[0].weights[UP] - TWO_STEPS.initial[UP]
    parts = [TWO_STEPS.layouts[UP].local(first, rank) for rank in (0, 1)]
    evidence = TWO_STEPS
    for rank, source in enumerate(sources):
        wrong = 0.5 * (parts[source] - parts[rank])
        evidence = with_move(evidence, UP, lambda move, wrong=wrong: move + wrong, rank, step=1)
    (suspect,) = updates_match_reference(evidence, 1).suspects
    assert suspect.step.momentum_share == pytest.approx(0.5)
    assert the_cause(suspect) is cause


def test_replicas_that_the_step_drives_apart_have_drifted() -> None:
    evidence = with_tensor(RIGHT, "weights", NORM, lambda weight: weight + 1e-7, ranks=[1])
    (suspect,) = updates_match_reference(evidence, 0).suspects
    assert the_cause(suspect) is Cause.REPLICA_DRIFT
    for item, moment in ((("parameter", NORM), 0), (("gradient", NORM), 1)):
        (suspect,) = updates_match_reference(with_digest(evidence, item, [1], moment=moment), 0).suspects
        assert the_cause(suspect) is None  # something else told them apart before


def test_replicas_over_dp_that_differ_are_marked() -> None:
    evidence = with_tensor(right_evidence(dp=2), "weights", UP, lambda weight: weight + 1e-7)
    (suspect,) = updates_match_reference(with_digest(evidence, ("parameter", UP), [2], moment=1), 0).suspects
    assert suspect.replicas.differ_over_dp
    assert suspect.facts_as_evidence()["replicas_over_dp_differ"] is True


def test_buffers_are_compared_and_drift() -> None:
    evidence = with_tensor(RIGHT, "buffers", BUFFER, lambda buffer: buffer + 1, ranks=[1])
    (suspect,) = updates_match_reference(evidence, 0).suspects
    assert suspect.where == {
        "phase": "update", "step": 0, "module": "block", "field": f"buffer {BUFFER}", "ranks": [1]
    }  # fmt: skip
    assert the_cause(suspect) is Cause.REPLICA_DRIFT


@pytest.mark.parametrize(
    ("buffers", "reason"),
    [
        ({}, "the sharded model has no buffer of this name"),
        ({BUFFER: torch.ones(2)}, "the sharded model's buffer has another shape"),
    ],
)
def test_buffers_that_cannot_be_compared_say_why(buffers: dict[str, torch.Tensor], reason: str) -> None:
    assert updates_match_reference(with_step(RIGHT, buffers=buffers), 0).not_compared == {f"buffer {BUFFER}": reason}
