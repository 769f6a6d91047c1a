"""Moments and masters of every rank are compared; what a backend does not give is not a pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.numerics.evidence import DOWN, NORM, UP, right_evidence, with_tensor
from tpcheck.core.causes import Cause
from tpcheck.numerics.checks.optimizer_state import optimizer_state_matches_reference
from tpcheck.numerics.evidence import Evidence, Step
from tpcheck.numerics.hypotheses import explain


def with_moments() -> Evidence:
    """Return right evidence in which each parameter's gradient is its moment, and `rows` has another shape."""
    evidence = right_evidence()
    reference, ranks = evidence.reference[0], evidence.candidate[0]
    states = {("exp_avg", name): gradient for name, gradient in reference.gradients.items()}
    parts = [{("exp_avg", name): gradient for name, gradient in rank.gradients.items()} for rank in ranks]
    factored = {("rows", DOWN): torch.ones(3)}
    return replace(
        evidence,
        reference=(replace(reference, optimizer_state=states | factored),),
        candidate=(tuple(replace(rank, optimizer_state=of | factored) for rank, of in zip(ranks, parts, strict=True)),),
    )


def test_equal_states_agree_and_others_of_another_shape_are_not_compared() -> None:
    outcome = optimizer_state_matches_reference(with_moments(), 0)
    assert set(outcome.margins) == {f"exp_avg of {name}" for name in with_moments().reference[0].gradients}
    assert max(outcome.margins.values()) < 1
    assert outcome.not_compared == {f"rows of {DOWN}": "its shape is not that of the parameter's shard"}
    assert not outcome.suspects


def test_a_moment_of_another_rank_is_found_and_named() -> None:
    evidence = with_moments()
    first = evidence.candidate[0][0].optimizer_state["exp_avg", UP]
    outcome = optimizer_state_matches_reference(
        with_tensor(evidence, "optimizer_state", ("exp_avg", UP), lambda moment: first), 0
    )
    (suspect,) = outcome.suspects
    assert suspect.where["parameter"] == UP
    assert suspect.where["ranks"] == [1]
    assert suspect.evidence["state"] == "exp_avg"
    explanation = explain(suspect)
    assert explanation is not None
    assert explanation.cause is Cause.OPTIMIZER_STATE_OF_ANOTHER_RANK
    assert explanation.evidence == {"state_of_tp_rank": [0]}


@pytest.mark.parametrize(("state", "cause"), [("exp_avg", Cause.GRADIENT_SCALED), ("master", None)])
def test_a_multiple_of_a_moment_is_named_one_of_a_master_is_chance(state: str, cause: Cause | None) -> None:
    evidence = with_moments()
    moment = evidence.reference[0].optimizer_state["exp_avg", UP]
    evidence = replace(
        evidence, reference=(replace(evidence.reference[0], optimizer_state={(state, UP): 0.5 * moment}),)
    )
    parts = [{(state, UP): rank.optimizer_state["exp_avg", UP]} for rank in evidence.candidate[0]]
    ranks = tuple(replace(rank, optimizer_state=of) for rank, of in zip(evidence.candidate[0], parts, strict=True))
    (suspect,) = optimizer_state_matches_reference(replace(evidence, candidate=(ranks,)), 0).suspects
    explanation = explain(suspect)
    assert (explanation and explanation.cause) is cause


def test_a_state_that_a_rank_does_not_give_is_not_compared() -> None:
    evidence = with_moments()
    first, second = evidence.candidate[0]
    without = {key: value for key, value in second.optimizer_state.items() if key != ("exp_avg", NORM)}
    evidence = replace(evidence, candidate=((first, replace(second, optimizer_state=without)),))
    outcome = optimizer_state_matches_reference(evidence, 0)
    assert outcome.not_compared[f"exp_avg of {NORM}"] == "the backend does not give this state of every rank"


def with_decayed_master(gradient: torch.Tensor | None) -> Evidence:
    """Return evidence in which the candidate alone has decayed the master of `NORM`, whose gradient is this."""
    evidence = with_moments()
    master = evidence.reference[0].weights[NORM]
    ranks = tuple(
        replace(
            rank,
            gradients={**rank.gradients, NORM: gradient},
            optimizer_state={("master", NORM): rank.weights[NORM] * (1 - 5e-4)},
        )
        for rank in evidence.candidate[0]
    )
    reference = evidence.reference[0]
    gradients = {**reference.gradients, NORM: gradient}
    reference = replace(reference, gradients=gradients, optimizer_state={("master", NORM): master})
    return replace(evidence, reference=(reference,), candidate=(ranks,))


def test_a_master_that_has_no_gradient_may_be_decayed_or_not() -> None:
    outcome = optimizer_state_matches_reference(with_decayed_master(None), 0)
    assert not outcome.suspects
    assert outcome.not_compared == {
        f"master of {NORM}": "it has no gradient, and optimizers differ in whether they decay it"
    }
    gradient = with_moments().reference[0].gradients[NORM]
    (suspect,) = optimizer_state_matches_reference(with_decayed_master(gradient), 0).suspects
    assert suspect.where["parameter"] == NORM


def test_a_master_that_no_step_has_reached_is_that_of_before_not_rounded() -> None:
    """The first masters are weights of a lower dtype: they look rounded, and are stale."""
    evidence = right_evidence()
    initial = {**evidence.initial, UP: evidence.initial[UP].bfloat16().double()}
    parts = evidence.layouts[UP].parts(initial[UP])
    reference = replace(
        evidence.reference[0],
        optimizer_state={("master", UP): initial[UP] * (1 + 1e-3 * torch.rand(initial[UP].shape))},
    )
    for stale, cause in ((parts, Cause.STALE_WEIGHT), (rounded_parts(evidence, reference), Cause.DTYPE_ROUNDED)):
        ranks = tuple(
            replace(rank, optimizer_state={("master", UP): part})
            for rank, part in zip(evidence.candidate[0], stale, strict=True)
        )
        wrong = replace(evidence, initial=initial, reference=(reference,), candidate=(ranks,))
        (suspect,) = optimizer_state_matches_reference(wrong, 0).suspects
        explanation = explain(suspect)
        assert explanation is not None
        assert explanation.cause is cause


def rounded_parts(evidence: Evidence, reference: Step) -> tuple[torch.Tensor, ...]:
    master = reference.optimizer_state["master", UP]
    return tuple(part.bfloat16().double() for part in evidence.layouts[UP].parts(master * 1.01))
