"""Weights and buffers after a step are compared, and each rank's gradient norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import hypot, inf, isnan, nan

import pytest
import torch

from tests.numerics.evidence import (
    BIAS,
    BUFFER,
    CLIPPING,
    DOWN,
    NORM,
    UP,
    cause_of,
    right_evidence,
    with_digest,
    with_step,
    with_tensor,
)
from tpcheck.core.causes import Cause
from tpcheck.core.clipping import Clipping
from tpcheck.numerics.checks.clipping import gradient_norms, norm_facts, observed_clipping, shares_of
from tpcheck.numerics.checks.updates import gradient_norm_matches_reference, updates_match_reference
from tpcheck.numerics.evidence import SKIPPED, Evidence, MicroBatchGradients
from tpcheck.numerics.hypotheses import explain
from tpcheck.numerics.tolerance import RESIDUAL_EXACT

Change = Callable[[torch.Tensor], torch.Tensor | None]
RIGHT, TWO_STEPS = right_evidence(), right_evidence(steps=2)
EXPECTED = RIGHT.reference[0].gradient_norm or 0.0


def test_equal_norms_agree() -> None:
    outcome = gradient_norm_matches_reference(RIGHT, 0)
    assert outcome.margins == {"gradient norm": 0.0}
    assert not outcome.suspects


def test_a_norm_that_the_backend_does_not_report_is_not_compared() -> None:
    outcome = gradient_norm_matches_reference(with_step(RIGHT, ranks=[1], gradient_norm=None), 0)
    assert list(outcome.not_compared) == ["gradient norm"]


def test_nothing_is_compared_with_a_reference_that_does_not_clip() -> None:
    reference = (replace(RIGHT.reference[0], gradient_norm=None),)
    outcome = gradient_norm_matches_reference(replace(RIGHT, reference=reference), 0)
    assert list(outcome.not_compared) == ["gradient norm"]


def test_a_norm_of_zero_agrees_with_zero_alone() -> None:
    evidence = replace(RIGHT, reference=(replace(RIGHT.reference[0], gradient_norm=0.0),))
    outcome = gradient_norm_matches_reference(with_step(evidence, gradient_norm=0.0), 0)
    assert (outcome.margins, outcome.suspects) == ({"gradient norm": 0.0}, ())
    wrong = with_step(with_step(evidence, gradient_norm=0.0), ranks=[1], gradient_norm=0.5)
    outcome = gradient_norm_matches_reference(wrong, 0)
    assert outcome.margins == {"gradient norm": inf}
    (suspect,) = outcome.suspects
    assert (suspect.where["ranks"], suspect.observed, suspect.allowed) == ([1], 0.5, 0.0)


def test_the_ranks_with_a_wrong_norm_are_named() -> None:
    outcome = gradient_norm_matches_reference(with_step(RIGHT, ranks=[1], gradient_norm=2 * EXPECTED), 0)
    (suspect,) = outcome.suspects
    assert suspect.allowed == pytest.approx(20 * 2.0**-52)
    assert outcome.margins["gradient norm"] == pytest.approx(suspect.observed / suspect.allowed)
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
    facts = gradient_norms(RIGHT, 0)
    sizes = [{name: float(tensor.norm()) for name, tensor in rank.gradients.items()} for rank in RIGHT.candidate[0]]
    assert facts.of_ranks_shards == pytest.approx([hypot(size[UP], size[DOWN]) for size in sizes])
    assert facts.of_ranks == pytest.approx([hypot(*size.values()) for size in sizes])
    assert facts.counting_replicas == pytest.approx(hypot(EXPECTED, sizes[0][NORM], sizes[0][BIAS]))


def test_missing_and_unknown_gradients_have_no_norm() -> None:
    gradients = {**RIGHT.candidate[0][0].gradients, NORM: None, "head.weight": RIGHT.initial[UP]}
    facts = gradient_norms(with_step(RIGHT, ranks=[0], gradients=gradients), 0)
    sizes = {name: float(tensor.norm()) for name, tensor in RIGHT.candidate[0][0].gradients.items()}
    assert facts.of_ranks[0] == pytest.approx(hypot(sizes[UP], sizes[DOWN], sizes[BIAS]))


@pytest.mark.parametrize(
    ("norm", "cause"), [("of_ranks", Cause.NORM_IS_LOCAL), ("counting_replicas", Cause.NORM_COUNTS_REPLICAS)]
)
def test_a_usual_wrong_norm_is_explained(norm: str, cause: Cause) -> None:
    facts, evidence = gradient_norms(RIGHT, 0), RIGHT
    for rank in (0, 1):
        value = getattr(facts, norm)
        evidence = with_step(evidence, ranks=[rank], gradient_norm=value if isinstance(value, float) else value[rank])
    (suspect,) = gradient_norm_matches_reference(evidence, 0).suspects
    found = explain(suspect)
    assert found is not None
    assert found.cause is cause
    assert explain(replace(suspect, norms=None)) is None


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
    assert not outcome.compared_only


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
    assert NORM in updates_match_reference(evidence, 0).margins  # where it is equal


def test_a_frozen_weight_may_not() -> None:
    step = RIGHT.reference[0]
    evidence = replace(RIGHT, reference=(replace(step, gradients={**step.gradients, NORM: None}),))
    evidence = replace(with_tensor(evidence, "gradients", NORM, lambda gradient: None), frozen=frozenset({NORM}))
    (suspect,) = updates_match_reference(with_move(evidence, NORM, lambda move: move * 2), 0).suspects
    assert suspect.where["parameter"] == NORM
    assert suspect.evidence["note"] == "it is frozen: no step may change it"


@pytest.mark.parametrize("nothing", [lambda gradient: None, torch.zeros_like])
def test_a_weight_that_only_the_reference_has_a_gradient_for_is_compared(nothing: Change) -> None:
    evidence = with_tensor(with_move(RIGHT, UP, torch.zeros_like), "gradients", UP, nothing)
    (suspect,) = updates_match_reference(evidence, 0).suspects
    assert suspect.parameter == UP


@pytest.mark.parametrize(("zeros", "is_compared"), [(True, False), (False, True)])
def test_a_weight_that_one_rank_has_a_gradient_for_is_compared(zeros: bool, is_compared: bool) -> None:
    step = RIGHT.reference[0]
    evidence = replace(RIGHT, reference=(replace(step, gradients={**step.gradients, UP: None}),))
    evidence = with_tensor(evidence, "gradients", UP, lambda gradient: None, ranks=[0])
    if zeros:
        evidence = with_tensor(evidence, "gradients", UP, torch.zeros_like, ranks=[1])
    outcome = updates_match_reference(with_move(evidence, UP, lambda move: move * 2), 0)
    assert [suspect.parameter for suspect in outcome.suspects] == [UP] * is_compared
    assert (UP in outcome.margins) is is_compared


# Rounding may do more than the steps: of NORM with its 4 elements a step that is left out does not show.
ROUGH = replace(
    RIGHT, tolerance=replace(RIGHT.tolerance, deviations={(0, "weight", NORM): 1e3, (0, "weight", UP): 1e3})
)


def test_a_step_that_is_no_larger_than_what_rounding_may_do_is_not_compared() -> None:
    outcome = updates_match_reference(ROUGH, 0)
    assert NORM not in outcome.margins
    assert outcome.not_compared[NORM].startswith("its step is smaller than the error that rounding allows")
    assert {UP, DOWN} <= set(outcome.margins)
    wrong = with_tensor(ROUGH, "weights", NORM, lambda weight: weight + 1e6)
    assert [suspect.parameter for suspect in updates_match_reference(wrong, 0).suspects] == [NORM]


def test_a_weight_that_does_not_move_at_all_shows_whatever_rounding_may_do() -> None:
    """As in bfloat16 without masters: the distance to the expected weight is allowed, and no element moves."""
    outcome = updates_match_reference(with_move(ROUGH, UP, torch.zeros_like, 1), 0)
    (suspect,) = outcome.suspects
    assert (suspect.parameter, suspect.where["ranks"], suspect.observed, suspect.allowed) == (UP, [1], 16.0, 0.0)
    assert cause_of(suspect) is Cause.STALE_WEIGHT
    assert outcome.margins[UP] == inf
    assert not updates_match_reference(with_move(ROUGH, UP, lambda move: move * 0.5, 1), 0).suspects
    noise = with_tensor(ROUGH, "weights", UP, lambda weight: weight + 1e-13)
    assert not updates_match_reference(noise, 0).suspects


@pytest.mark.parametrize("nothing", [lambda gradient: None, torch.zeros_like], ids=["none", "zeros"])
def test_a_weight_may_stay_where_its_own_gradient_is_nothing(nothing: Change) -> None:
    """As that of an expert whose one token rounding sends elsewhere: whether a gradient is missing shows in itself."""
    still = with_move(ROUGH, UP, torch.zeros_like, 1)
    outcome = updates_match_reference(with_tensor(still, "gradients", UP, nothing, ranks=[1]), 0)
    assert not outcome.suspects
    assert outcome.not_compared[UP].startswith("its step is smaller than the error that rounding allows")
    assert UP not in outcome.margins


def test_where_the_gradient_is_wrong_the_step_says_nothing_of_clipping() -> None:
    halved = clipped_by(RIGHT, 2 * EXPECTED, names=[NORM])
    (suspect,) = updates_match_reference(halved, 0).suspects
    assert suspect.norms is not None
    (suspect,) = updates_match_reference(
        with_tensor(halved, "gradients", NORM, lambda gradient: gradient / 2), 0
    ).suspects
    assert suspect.norms is None


def test_the_worst_weight_comes_first_whatever_its_place_in_the_model() -> None:
    evidence = with_move(with_move(RIGHT, DOWN, lambda move: move * 3), UP, lambda move: move * 1.01)
    suspects = updates_match_reference(evidence, 0).suspects
    assert [suspect.parameter for suspect in suspects] == [DOWN, UP]
    assert all(suspect.evidence["first_of"] == 2 for suspect in suspects)


def test_a_weight_that_the_reference_does_not_move_is_noted() -> None:
    step = RIGHT.reference[0]
    evidence = replace(RIGHT, reference=(replace(step, weights={**step.weights, UP: RIGHT.initial[UP]}),))
    suspect, *_ = updates_match_reference(evidence, 0).suspects
    assert suspect.evidence["note"] == "the reference's weight is the same as before this step"
    assert not suspect.step.before
    moved, *_ = updates_match_reference(with_move(RIGHT, UP, lambda move: move * 2), 0).suspects
    assert "note" not in moved.evidence
    assert [tuple(part.shape) for part in moved.step.before] == [(4, 4), (4, 4)]


def test_a_step_that_moves_no_weight_shows_nothing_unless_the_other_side_moves() -> None:
    still = with_step(
        replace(RIGHT, reference=(replace(RIGHT.reference[0], weights=dict(RIGHT.initial)),)),
        weights=dict(RIGHT.parts_before(0)[0]),
    )
    for rank, parts in enumerate(RIGHT.parts_before(0)):
        for name in RIGHT.initial:
            still = with_tensor(still, "weights", name, lambda _, part=parts[name]: part, ranks=[rank])  # fmt: skip
    outcome = updates_match_reference(still, 0)
    assert not outcome.suspects
    assert set(outcome.margins) == {f"buffer {BUFFER}"}
    assert outcome.compared_only == "buffers"
    why = "no weight moves in this step: its rate is 0, or rounding takes the step away"
    assert outcome.not_compared == dict.fromkeys(RIGHT.initial, why)
    moved = with_tensor(still, "weights", UP, lambda weight: weight + 1)
    assert [suspect.parameter for suspect in updates_match_reference(moved, 0).suspects] == [UP]


def test_a_step_after_calls_without_one_has_their_gradients_too() -> None:
    first, second = TWO_STEPS.reference
    total = first.gradients[UP] + second.gradients[UP]
    weights = {**TWO_STEPS.initial, UP: TWO_STEPS.initial[UP] - total / 8}
    evidence = replace(TWO_STEPS, reference=(replace(first, weights={}), replace(second, weights=weights)))
    for rank, parts in enumerate(evidence.initial_parts):
        after = {**parts, UP: parts[UP] - evidence.layouts[UP].local(total, rank) / 4}
        evidence = with_step(evidence, step=1, ranks=[rank], weights=after)
        evidence = with_step(evidence, step=0, ranks=[rank], weights={})
    suspects = updates_match_reference(evidence, 1).suspects
    (suspect,) = (each for each in suspects if each.parameter == UP)
    assert suspect.step.ratios["gradient"] == pytest.approx((2.0, 2.0))
    assert "momentum" not in suspect.step.ratios


def test_without_clipping_a_step_has_no_ratios() -> None:
    evidence = replace(RIGHT, reference=(replace(RIGHT.reference[0], gradient_norm=None),))
    (suspect,) = updates_match_reference(with_move(evidence, UP, lambda move: move * 2), 0).suspects
    assert (suspect.step.ratios, suspect.norms) == ({}, None)


def test_the_norm_that_a_step_implies_is_exact() -> None:
    norm = RIGHT.reference[0].gradient_norm or 0.0
    (suspect,) = updates_match_reference(
        with_move(RIGHT, UP, lambda move: move * (norm + 1e-6) / (2 * norm + 1e-6)), 0
    ).suspects
    assert suspect.norms is not None
    assert suspect.norms.implied == pytest.approx((2 * norm, 2 * norm), rel=1e-9)


def test_a_step_that_is_not_taken_implies_no_norm() -> None:
    (suspect,) = updates_match_reference(with_move(RIGHT, UP, torch.zeros_like), 0).suspects
    assert suspect.norms is None


MOVE_TERMS = [torch.arange(1.0, 9.0), torch.arange(8.0) ** 2]


def test_the_shares_of_the_terms_in_a_move_are_found() -> None:
    move = 3 * MOVE_TERMS[0] - 0.5 * MOVE_TERMS[1]
    assert shares_of(MOVE_TERMS, move) == pytest.approx([3.0, -0.5], rel=1e-4)
    assert shares_of([MOVE_TERMS[0][:5]], MOVE_TERMS[0][:5] * 2) == pytest.approx([2.0])


def test_a_share_that_rounding_hides_is_unknown() -> None:
    gradient, weight = 1e-17 * MOVE_TERMS[0].double(), MOVE_TERMS[1].double()
    rounded = (1e-4 * weight + 1e-18 * gradient.flip(0)) - 1e-18 * gradient
    of_gradient, of_weight = shares_of([gradient, weight], rounded) or ()
    assert isnan(of_gradient)
    assert of_weight == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("terms", "move"),
    [
        (MOVE_TERMS, MOVE_TERMS[0] + torch.tensor([0, 0, 0, 0.1, 0, 0, 0, 0])),  # no sum of the terms
        ([MOVE_TERMS[0], torch.zeros(8)], MOVE_TERMS[0]),
        (MOVE_TERMS, torch.full((8,), torch.inf)),
        ([term[:4] for term in MOVE_TERMS], MOVE_TERMS[0][:4]),  # few numbers are a sum of any others
    ],
)
def test_a_move_that_is_no_sum_of_the_terms_has_noshares_of(terms: list[torch.Tensor], move: torch.Tensor) -> None:
    assert shares_of([term.double() for term in terms], move.double()) is None


def test_the_worst_weight_comes_first_and_tells_the_share_of_each_term() -> None:
    evidence = with_move(with_move(RIGHT, DOWN, lambda move: move * 1.5), UP, lambda move: move * 3)
    first, second = updates_match_reference(evidence, 0).suspects
    assert (first.parameter, second.parameter) == (UP, DOWN)
    assert first.step.ratios["gradient"] == pytest.approx((3.0, 3.0))
    assert first.facts_as_evidence()["gradient_ratio"] == [3.0, 3.0]


def test_a_step_that_is_not_taken_leaves_a_stale_weight() -> None:
    (suspect,) = updates_match_reference(with_move(RIGHT, UP, torch.zeros_like, 1), 0).suspects
    assert suspect.where["ranks"] == [1]
    assert cause_of(suspect) is Cause.STALE_WEIGHT


@pytest.mark.parametrize("ranks", [(), (1,)])
def test_a_step_whose_gradient_is_not_clipped_says_so(ranks: tuple[int, ...]) -> None:
    """As where a loop clips shards alone, or one rank alone clips."""
    factor = RIGHT.clipping.factor(RIGHT.reference[0].gradient_norm or 0.0)
    assert factor < 1
    (suspect,) = updates_match_reference(with_move(RIGHT, UP, lambda move: move / factor, *ranks), 0).suspects
    assert suspect.evidence["note"] == "its gradient was not clipped"
    (suspect,) = updates_match_reference(with_move(RIGHT, UP, lambda move: move * 1.5, *ranks), 0).suspects
    assert "note" not in suspect.evidence


@pytest.mark.parametrize("cause", [Cause.NORM_IS_LOCAL, Cause.NORM_COUNTS_REPLICAS])
def test_a_step_that_another_norm_clips_is_explained(cause: Cause) -> None:
    norm, facts, evidence = RIGHT.reference[0].gradient_norm or 0.0, gradient_norms(RIGHT, 0), RIGHT
    for rank in (0, 1):
        used = facts.of_ranks[rank] if cause is Cause.NORM_IS_LOCAL else facts.counting_replicas
        evidence = with_move(evidence, UP, lambda move, by=(norm + 1e-6) / (used + 1e-6): move * by, rank)
    (suspect,) = updates_match_reference(evidence, 0).suspects
    assert suspect.norms is not None
    assert len(suspect.norms.implied) == 2
    assert cause_of(suspect) is cause


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
    assert cause_of(suspect) is cause


def test_replicas_that_the_step_drives_apart_have_drifted() -> None:
    evidence = with_tensor(RIGHT, "weights", NORM, lambda weight: weight + 1e-7, ranks=[1])
    (suspect,) = updates_match_reference(evidence, 0).suspects
    assert cause_of(suspect) is Cause.REPLICA_DRIFT
    for item, moment in ((("parameter", NORM), 0), (("gradient", NORM), 1)):
        (suspect,) = updates_match_reference(with_digest(evidence, item, [1], moment=moment), 0).suspects
        assert cause_of(suspect) is None  # something else told them apart before


@pytest.mark.parametrize("name", [NORM, UP])
def test_the_momentum_is_handed_over_where_it_may_be_that_of_another_shard(name: str) -> None:
    evidence = with_move(TWO_STEPS, name, lambda move: move * 2, step=1)
    (suspect,) = updates_match_reference(evidence, 1).suspects
    assert len(suspect.step.momentum_parts) == (2 if name == UP else 0)
    (suspect,) = updates_match_reference(with_move(RIGHT, name, lambda move: move * 2), 0).suspects
    assert not suspect.step.momentum_parts  # a first step has none


def test_shards_of_different_values_are_no_replicas_that_differ() -> None:
    (suspect,) = updates_match_reference(with_move(RIGHT, UP, lambda move: move * 2), 0).suspects
    assert not suspect.replicas.differed_at_start
    assert not suspect.replicas.gradients_differ


def test_replicas_are_compared_at_the_moment_of_the_step() -> None:
    evidence = with_move(right_evidence(dp=2, steps=2), UP, lambda move: move * 2)
    for item in (("parameter", UP), ("gradient", UP)):
        (suspect,) = updates_match_reference(with_digest(evidence, item, [2], moment=2), 0).suspects
        assert not suspect.replicas.differ_over_dp
        assert not suspect.replicas.gradients_differ
    (suspect,) = updates_match_reference(with_digest(evidence, ("gradient", UP), [2], moment=1), 0).suspects
    assert suspect.replicas.gradients_differ


def test_buffers_of_replicas_over_dp_may_differ() -> None:
    evidence = with_tensor(right_evidence(dp=2), "buffers", BUFFER, lambda buffer: buffer + 1)
    (suspect,) = updates_match_reference(with_digest(evidence, ("buffer", BUFFER), [2, 3], moment=1), 0).suspects
    assert not suspect.replicas.differ_over_dp


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
    assert cause_of(suspect) is Cause.REPLICA_DRIFT


@pytest.mark.parametrize(
    ("buffers", "reason"),
    [
        ({}, "the sharded model has no buffer of this name"),
        ({BUFFER: torch.ones(2)}, "the sharded model's buffer has another shape"),
    ],
)
def test_buffers_that_cannot_be_compared_say_why(buffers: dict[str, torch.Tensor], reason: str) -> None:
    assert updates_match_reference(with_step(RIGHT, buffers=buffers), 0).not_compared == {f"buffer {BUFFER}": reason}


def test_a_buffer_of_another_shape_on_one_rank_is_not_compared() -> None:
    evidence = with_tensor(RIGHT, "buffers", BUFFER, lambda buffer: torch.ones(2), ranks=[1])
    assert updates_match_reference(evidence, 0).not_compared == {
        f"buffer {BUFFER}": "the sharded model's buffer has another shape"
    }


# ---- clipping


def clipped_by(evidence: Evidence, norm: float, *, factor: float | None = None, names: Sequence[str] = ()) -> Evidence:
    """Return the evidence with the gradients of a step clipped by another norm, or multiplied by another factor."""
    change = (factor or CLIPPING.factor(norm)) / CLIPPING.factor(EXPECTED)
    for name in names or (NORM, UP, DOWN, BIAS):
        evidence = with_move(evidence, name, lambda move: move * change)
    return evidence


def test_a_wrong_norm_by_which_nothing_was_clipped_says_so() -> None:
    evidence = with_step(RIGHT, gradient_norm=1.2345 * EXPECTED)
    (suspect,) = gradient_norm_matches_reference(evidence, 0).suspects
    assert suspect.evidence["clipped_by"] == "the right norm: only what is reported is wrong"
    assert cause_of(suspect) is Cause.REPORTED_NORM_WRONG
    doubled = with_step(RIGHT, gradient_norm=gradient_norms(RIGHT, 0).counting_replicas)
    (suspect,) = gradient_norm_matches_reference(doubled, 0).suspects
    assert suspect.evidence["clipped_by"] == "the right norm: only what is reported is wrong"
    assert cause_of(suspect) is Cause.NORM_COUNTS_REPLICAS


@pytest.mark.parametrize(
    ("factor", "by"),
    [(1.2345, "the norm that is reported"), (1.5, "another norm than the right one and the one that is reported")],
)
def test_a_wrong_norm_says_by_what_gradients_were_clipped(factor: float, by: str) -> None:
    evidence = with_step(clipped_by(RIGHT, factor * EXPECTED), gradient_norm=1.2345 * EXPECTED)
    (suspect,) = gradient_norm_matches_reference(evidence, 0).suspects
    assert suspect.evidence["clipped_by"] == by
    assert cause_of(suspect) is None


def test_a_wrong_norm_that_clips_no_otherwise_says_nothing_of_the_step() -> None:
    evidence = replace(with_step(RIGHT, gradient_norm=1.2345 * EXPECTED), clipping=Clipping(100.0))
    (suspect,) = gradient_norm_matches_reference(evidence, 0).suspects
    assert "clipped_by" not in suspect.evidence
    assert cause_of(suspect) is None


def test_a_wrong_step_beside_the_right_norm_says_so() -> None:
    suspect, *_ = updates_match_reference(clipped_by(RIGHT, gradient_norms(RIGHT, 0).of_ranks[0]), 0).suspects
    assert suspect.evidence["reported"] == "the right norm: only the step is clipped by another one"
    assert cause_of(suspect) is Cause.NORM_LEAVES_OUT_SHARDS


@pytest.mark.parametrize(
    "change",
    [lambda move: move.flip(0), lambda move: move + 1e-3],
    ids=["another place", "another term"],
)
def test_a_step_that_is_wrong_otherwise_is_not_said_to_be_clipped(
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    evidence = RIGHT
    for name in (NORM, UP, DOWN, BIAS):
        evidence = with_move(evidence, name, change)
    suspects = updates_match_reference(evidence, 0).suspects
    assert suspects
    assert all("reported" not in suspect.evidence for suspect in suspects)


def test_a_step_at_another_learning_rate_is_not_said_to_be_clipped() -> None:
    evidence = with_move(TWO_STEPS, UP, lambda move: move * 2, step=1)
    (suspect,) = updates_match_reference(evidence, 1).suspects
    assert suspect.step.ratios["gradient"] == pytest.approx((2.0, 2.0))
    assert "reported" not in suspect.evidence


def test_a_parameter_that_the_norm_of_a_step_counts_on_one_rank_alone_is_found() -> None:
    squares = gradient_norms(RIGHT, 0).squares
    suspect, *_ = updates_match_reference(clipped_by(RIGHT, (EXPECTED**2 - squares[UP][1]) ** 0.5), 0).suspects
    found = explain(suspect)
    assert found is not None
    assert (found.cause, found.evidence["parameters"], found.evidence["of_tp_ranks"]) == (
        Cause.NORM_LEAVES_OUT_SHARDS,
        [UP],
        [1],
    )


def test_groups_that_are_clipped_each_by_its_own_norm_are_found() -> None:
    norms, evidence = gradient_norms(RIGHT, 0), RIGHT
    groups = ([UP, NORM], [DOWN, BIAS])
    for names in groups:
        evidence = clipped_by(evidence, norms.norm_of(names), names=names)
    suspects = updates_match_reference(evidence, 0).suspects
    assert {cause_of(suspect) for suspect in suspects} == {Cause.CLIPPED_PER_GROUP}
    reported = with_step(evidence, gradient_norm=norms.norm_of(groups[1]))
    (suspect,) = gradient_norm_matches_reference(reported, 0).suspects
    found = explain(suspect)
    assert found is not None
    assert (found.cause, found.evidence["parameters"]) == (Cause.CLIPPED_PER_GROUP, sorted(groups[1]))


@pytest.mark.parametrize(
    ("epsilon", "cause"), [(1e-2, Cause.CLIP_EPSILON_DIFFERS), (1e-4, Cause.CLIP_EPSILON_DIFFERS), (0.0123, None)]
)
def test_an_epsilon_that_changes_the_step_is_named(epsilon: float, cause: Cause | None) -> None:
    evidence = clipped_by(RIGHT, 0.0, factor=CLIPPING.max_norm / (EXPECTED + epsilon))
    assert observed_clipping(evidence) == CLIPPING
    suspect, *_ = updates_match_reference(evidence, 0).suspects
    assert cause_of(suspect) is cause


@pytest.mark.parametrize("epsilon", [0.0, 1e-7, 1e-5])
def test_the_epsilon_of_a_convention_is_read_off_the_step(epsilon: float) -> None:
    evidence = clipped_by(RIGHT, 0.0, factor=CLIPPING.max_norm / (EXPECTED + epsilon))
    assert observed_clipping(evidence) == replace(CLIPPING, epsilon=epsilon)
    assert "clipping" not in updates_match_reference(evidence, 0).suspects[0].facts_as_evidence()
    read = updates_match_reference(replace(evidence, clipping=replace(CLIPPING, epsilon=epsilon)), 0).suspects[0]
    assert str(read.facts_as_evidence()["clipping"]).startswith("min(1, 0.01 / ")


def test_gradients_that_are_scaled_up_are_read_off_the_step() -> None:
    large = Clipping(2 * EXPECTED)
    evidence = replace(RIGHT, clipping=large)
    assert observed_clipping(evidence) == large
    scaled = clipped_by(
        evidence, 0.0, factor=CLIPPING.factor(EXPECTED) * replace(large, scales_up=True).factor(EXPECTED)
    )
    assert observed_clipping(scaled) == replace(large, scales_up=True)


@pytest.mark.parametrize("step", [0, 1])
def test_a_step_that_no_convention_gives_changes_none(step: int) -> None:
    assert observed_clipping(TWO_STEPS) == CLIPPING
    wrong = with_move(TWO_STEPS, UP, lambda move: move * 1.00001, step=step)
    assert observed_clipping(wrong) == CLIPPING
    assert observed_clipping(replace(clipped_by(RIGHT, 2 * EXPECTED), clipping=CLIPPING)) == CLIPPING


def test_without_clipping_there_is_no_convention() -> None:
    assert observed_clipping(replace(RIGHT, clipping=Clipping())) == Clipping()


def test_what_gradients_are_multiplied_by_is_known() -> None:
    facts = norm_facts(right_evidence(dp=2), 0)
    assert facts is not None
    assert facts.scales == {"the number of replicas": 2.0}
    micro = MicroBatchGradients({}, {})
    accumulated = replace(RIGHT, reference=(replace(RIGHT.reference[0], micro_gradients=(micro,) * 3),))
    (suspect,) = gradient_norm_matches_reference(with_step(accumulated, gradient_norm=3 * EXPECTED), 0).suspects
    found = explain(suspect)
    assert found is not None
    assert (found.cause, found.evidence["note"]) == (Cause.NORM_BEFORE_UNSCALING, "times the number of micro-batches")


def test_facts_of_a_norm_need_one() -> None:
    assert norm_facts(replace(RIGHT, reference=(replace(RIGHT.reference[0], gradient_norm=None),)), 0) is None


State = Callable[[float, torch.Tensor, torch.Tensor], dict[tuple[str, str], torch.Tensor]]


def momentum(factor: float, gradient: torch.Tensor, weight: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
    """Return the momentum of a first step of SGD: a factor times the gradient, and the weight's decay."""
    return {("momentum", UP): (factor * gradient + 0.01 * weight).float()}


def master(factor: float, gradient: torch.Tensor, weight: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
    """Return the master weight after a step of SGD without momentum and decay."""
    return {("master", UP): weight.float() - 0.1 * (factor * gradient).float()}


def decayed_master(factor: float, gradient: torch.Tensor, weight: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
    return {("master", UP): weight.float() - 0.1 * (factor * gradient + 0.01 * weight).float()}


def adam(factor: float, gradient: torch.Tensor, weight: torch.Tensor) -> dict[tuple[str, str], torch.Tensor]:
    """Return what Adam's first step has made: a master to which a factor of the gradient makes no difference."""
    moments = {("exp_avg", UP): 0.1 * factor * gradient, ("exp_avg_sq", UP): 0.001 * (factor * gradient).square()}
    return {("master", UP): weight.float() - 0.1 * gradient.sign().float(), **moments}


def in_float16(factors: tuple[float, float], state: State = momentum, *, scale: float = 64.0) -> Evidence:
    """Return a first step with the gradient times a factor on each rank; the loss scale doubles after it."""
    step, name, before = RIGHT.reference[0], UP, RIGHT.initial_parts
    whole = state(1.0, step.gradients[name], RIGHT.initial[name])
    reference = replace(step, optimizer_state=whole, loss_scale=scale, next_loss_scale=2 * scale)
    ranks = tuple(
        replace(
            rank,
            optimizer_state=state(factor, rank.gradients[name], before[number][name]),
            weights={**rank.weights, name: rank.weights[name] + 0.1},
            loss_scale=scale,
        )
        for number, (rank, factor) in enumerate(zip(RIGHT.candidate[0], factors, strict=True))
    )
    return replace(RIGHT, dtype="float16", reference=(reference,), candidate=(ranks,))


@pytest.mark.parametrize("state", [momentum, master, decayed_master])
@pytest.mark.parametrize(
    ("factors", "cause", "note"),
    [
        ((64.0, 64.0), Cause.GRADIENT_SCALED, "not divided by the loss scale"),
        ((1 / 64, 1 / 64), Cause.GRADIENT_SCALED, "twice"),
        ((1 / 2, 1 / 2), Cause.GRADIENT_SCALED, "of the next step"),
        ((1.0, 64.0), None, ""),
    ],
)
def test_a_moment_or_the_change_of_a_master_shows_that_gradients_keep_the_loss_scale(
    factors: tuple[float, float], cause: Cause | None, note: str, state: State
) -> None:
    suspect, *_ = updates_match_reference(in_float16(factors, state), 0).suspects
    assert suspect.step.ratios["gradient"] == pytest.approx(factors, rel=RESIDUAL_EXACT)
    found = explain(suspect)
    assert (None if found is None else found.cause) == cause
    assert note in ("" if found is None else found.evidence["note"])


def test_a_factor_that_the_rounding_of_masters_hides_is_unknown() -> None:
    tiny = in_float16((2.0**-22,) * 2, master, scale=2.0**22)  # changes of the size of a float32's spacing
    suspect, *_ = updates_match_reference(tiny, 0).suspects
    assert "gradient" not in suspect.step.ratios
    assert cause_of(suspect) is None


def test_a_master_that_is_not_stepped_by_the_gradient_shows_no_factor() -> None:
    evidence = in_float16((64.0, 64.0), adam)
    suspect, *_ = updates_match_reference(evidence, 0).suspects
    assert suspect.step.ratios["gradient"] == pytest.approx((64.0, 64.0))  # of the first moment
    for step in (*evidence.reference, *evidence.candidate[0]):
        del step.optimizer_state["exp_avg", UP], step.optimizer_state["exp_avg_sq", UP]  # type: ignore[attr-defined]
    suspect, *_ = updates_match_reference(evidence, 0).suspects
    assert suspect.step.ratios == {}
    assert cause_of(suspect) is None


def test_ratios_of_float32_states_are_shown_with_the_digits_that_are_known() -> None:
    suspect, *_ = updates_match_reference(in_float16((1 / 64,) * 2, master), 0).suspects
    assert suspect.facts_as_evidence()["gradient_ratio"] == [0.0156, 0.0156]
    found = explain(suspect)
    assert found is not None
    assert found.evidence["factors"] == [0.0156, 0.0156]


def test_ranks_that_skip_a_step_are_named() -> None:
    evidence = with_step(with_move(RIGHT, UP, torch.zeros_like), ranks=[1], is_skipped=True, gradient_norm=inf)
    (norm,) = gradient_norm_matches_reference(evidence, 0).suspects
    for suspect in (norm, updates_match_reference(evidence, 0).suspects[0]):
        assert suspect.step.skipped_on == (1,)
        assert cause_of(suspect) is Cause.STEP_SKIPPED


def test_of_a_step_that_the_reference_skips_weights_alone_are_compared() -> None:
    step = replace(RIGHT.reference[0].without_gradients(), weights=RIGHT.initial, is_skipped=True)
    evidence = replace(RIGHT, reference=(step,))
    assert list(gradient_norm_matches_reference(evidence, 0).not_compared.values()) == [SKIPPED]
    assert updates_match_reference(evidence, 0).suspects  # the candidate takes it
    for rank in (0, 1):
        evidence = with_step(evidence, ranks=[rank], weights=RIGHT.initial_parts[rank], is_skipped=True)
    outcome = updates_match_reference(evidence, 0)
    assert not outcome.suspects
    assert outcome.not_compared["weights"] == SKIPPED


def with_masters(*, changed: float = 1.0, rows: slice = slice(None)) -> Evidence:
    """Return a run whose weights are bfloat16 and have float32 masters; rows of UP on rank 1 are changed after it."""
    evidence = RIGHT
    for tp_rank, step in enumerate(RIGHT.candidate[0]):
        masters = {("master", name): weight.float() for name, weight in step.weights.items() if name != BIAS}
        weights = {name: weight.float().bfloat16() for name, weight in step.weights.items()}
        if tp_rank == 1:
            weights[UP][rows] *= changed
        evidence = with_step(evidence, ranks=[tp_rank], weights=weights, optimizer_state=masters)
    rounded = {name: weight.bfloat16() for name, weight in RIGHT.reference[0].weights.items()}
    noise = {(0, "weight", name): 0.2 * float(weight.norm()) for name, weight in rounded.items()}
    reference = replace(RIGHT.reference[0], weights=rounded)
    return replace(evidence, reference=(reference,), tolerance=replace(RIGHT.tolerance, deviations=noise))


def test_a_weight_is_its_master_rounded_to_the_bit() -> None:
    outcome = updates_match_reference(with_masters(), 0)
    assert not outcome.suspects
    assert {name for name in outcome.margins if "master" in name} == {
        f"{name}, of its master" for name in (NORM, UP, DOWN)
    }
    for rows in (slice(None), slice(1)):
        (suspect,) = updates_match_reference(with_masters(changed=1.05, rows=rows), 0).suspects
        assert (suspect.where["parameter"], suspect.where["ranks"], suspect.allowed) == (UP, [1], 0.0)
        assert cause_of(suspect) is Cause.MASTERS_STALE


def test_a_weight_that_noise_does_not_hide_is_a_suspect_once_with_the_same_cause() -> None:
    (suspect,) = updates_match_reference(with_masters(changed=50.0), 0).suspects
    assert suspect.allowed > 0
    assert cause_of(suspect) is Cause.MASTERS_STALE
