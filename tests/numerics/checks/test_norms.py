"""The gradient norm of every rank is compared, and the usual wrong norms are worked out beside it."""

from __future__ import annotations

from dataclasses import replace
from math import hypot, inf, nan

import pytest

from tests.numerics.evidence import BIAS, DOWN, NORM, UP, right_evidence, with_step
from tpcheck.core.causes import Cause
from tpcheck.numerics.checks.norms import gradient_norm_matches_reference, norm_facts
from tpcheck.numerics.hypotheses.explain import explain

RIGHT = right_evidence()
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
    facts = norm_facts(RIGHT, 0)
    sizes = [{name: float(tensor.norm()) for name, tensor in rank.gradients.items()} for rank in RIGHT.candidate[0]]
    assert facts.of_ranks_shards == pytest.approx([hypot(size[UP], size[DOWN]) for size in sizes])
    assert facts.of_ranks == pytest.approx([hypot(*size.values()) for size in sizes])
    assert facts.counting_replicas == pytest.approx(hypot(EXPECTED, sizes[0][NORM], sizes[0][BIAS]))


def test_missing_and_unknown_gradients_have_no_norm() -> None:
    gradients = {**RIGHT.candidate[0][0].gradients, NORM: None, "head.weight": RIGHT.initial[UP]}
    facts = norm_facts(with_step(RIGHT, ranks=[0], gradients=gradients), 0)
    sizes = {name: float(tensor.norm()) for name, tensor in RIGHT.candidate[0][0].gradients.items()}
    assert facts.of_ranks[0] == pytest.approx(hypot(sizes[UP], sizes[DOWN], sizes[BIAS]))


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
