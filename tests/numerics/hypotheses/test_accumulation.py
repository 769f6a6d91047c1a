"""Which micro-batches were lost, reduced again or not reduced, and what losses were divided by."""

from __future__ import annotations

import pytest
import torch

from tests.numerics.evidence import suspect
from tpcheck.core.causes import Cause
from tpcheck.numerics.evidence import GradientFacts, LabelCounts, LabelFacts
from tpcheck.numerics.hypotheses import explain

CHANCE = torch.Generator().manual_seed(0)
FIRST, SECOND, THIRD, LOCAL = torch.randn(4, 6, 8, generator=CHANCE, dtype=torch.float64)
EXPECTED = FIRST + SECOND + THIRD
MEAN = tuple((term, term) for term in (FIRST, SECOND, THIRD))
OWN = tuple((term + LOCAL * number, term + LOCAL * number) for number, (term, _) in enumerate(MEAN, 1))
FACTS = GradientFacts(micro_mean=MEAN, micro_local=OWN)


@pytest.mark.parametrize(
    ("actual", "cause", "evidence"),
    [
        (4 * FIRST + 2 * SECOND + THIRD, Cause.REDUCED_AFTER_ACCUMULATION, {"reduced_over": "tp"}),
        (9 * FIRST + 3 * SECOND + THIRD, Cause.REDUCED_AFTER_ACCUMULATION, {"reduced_over": "dp"}),
        (3 * THIRD, Cause.LAST_MICRO_BATCH_ONLY, {"micro_batches": 3}),
        (FIRST + OWN[1][0] + THIRD, Cause.MICRO_BATCH_UNREDUCED, {"micro_batches": [1]}),
        (OWN[0][0] / 3 + OWN[1][0] / 3 + THIRD, Cause.MICRO_BATCH_UNREDUCED, {"micro_batches": [0, 1]}),
        (FIRST + SECOND, None, {}),
        (EXPECTED * 3, Cause.SUM_INSTEAD_OF_MEAN, {}),
    ],
)
def test_sums_of_micro_batches_show_the_mistake(
    actual: torch.Tensor, cause: Cause | None, evidence: dict[str, object]
) -> None:
    explanation = explain(suspect("gradient", [actual] * 2, EXPECTED, gradient=FACTS, num_replicas=3))
    assert (explanation and explanation.cause) == cause
    assert explanation is None or evidence.items() <= explanation.evidence.items()


def test_a_term_of_a_rank_in_some_micro_batches_is_named_over_tp() -> None:
    parts = [FIRST + SECOND + THIRD * 0.3, FIRST + SECOND + THIRD * 0.7]
    explanation = explain(suspect("gradient", parts, EXPECTED, gradient=FACTS))
    assert explanation is not None
    assert explanation.cause is Cause.MICRO_BATCH_UNREDUCED
    assert explanation.evidence == {"micro_batches": [2], "reduced_over": "tp"}


def test_equal_micro_batches_show_a_factor_and_nothing_more() -> None:
    facts = GradientFacts(micro_mean=((FIRST,) * 2,) * 2)
    explanation = explain(suspect("gradient", [FIRST] * 2, FIRST * 2, gradient=facts, num_replicas=3))
    assert explanation is not None
    assert explanation.cause is Cause.GRADIENT_SCALED


@pytest.mark.parametrize("loss", ["mean", "token_mean"])
def test_equal_numbers_of_labels_show_no_normalisation(loss: str) -> None:
    labels = LabelFacts(LabelCounts(((8,), (8,)), loss), 0, 0)
    expected = torch.tensor(2.0, dtype=torch.float64)
    explanation = explain(suspect("activation", [expected * 4] * 3, expected, labels=labels))
    assert explanation is None


def test_evidence_says_what_each_side_divides_by() -> None:
    labels = LabelFacts(LabelCounts(((2,), (14,)), "token_mean"), 1, 0)
    expected = torch.tensor(2.0, dtype=torch.float64)
    explanation = explain(suspect("activation", [expected / 1.75] * 2, expected, labels=labels))
    assert explanation is not None
    assert explanation.evidence == {
        "labels": [[2], [14]],
        "divided_by": "the number of labels of each micro-batch",
        "reference_divides_by": "the number of labels of the whole step",
    }


def test_a_loss_that_adds_up_is_larger_by_all_micro_batches_where_it_is_divided_by_its_own_labels() -> None:
    counts = LabelCounts(((2, 6), (4, 4)), "token_mean", adds_up=True)
    expected = torch.tensor(3.0, dtype=torch.float64)  # a sum over 16 labels, of which the micro-batch has 6
    facts = LabelFacts(counts, 0, 1)
    found = explain(suspect("activation", [expected * 16 / 6] * 2, expected, labels=facts))
    assert found is not None
    assert found.cause is Cause.MEAN_OF_LOCAL_MEANS
    found = explain(suspect("activation", [expected * 16 / 8] * 2, expected, labels=facts))  # of the replica's 8
    assert found is not None
    assert found.evidence["divided_by"] == "the number of labels of each replica"


OVER_REPLICAS = "the number of labels of each micro-batch over all replicas"


@pytest.mark.parametrize(("adds_up", "factor"), [(False, 24 / 3 / 3), (True, 24 / 3)])
def test_micro_batches_that_are_divided_by_their_labels_on_all_replicas_are_named(adds_up: bool, factor: float) -> None:
    """Three micro-batches of two replicas have 3, 12 and 9 of 24 labels: each has the weight of a third."""
    counts = LabelCounts(((1, 8, 0), (2, 4, 9)), "token_mean", adds_up=adds_up)
    loss = torch.tensor(3.0, dtype=torch.float64)
    of_loss = suspect("activation", [loss * factor] * 2, loss, labels=LabelFacts(counts, 1, 0))
    share = 1 if adds_up else 3
    gradient = FIRST * 24 / 3 / share + SECOND * 24 / 12 / share + THIRD * 24 / 9 / share
    of_gradient = suspect(
        "gradient", [gradient] * 2, EXPECTED, gradient=FACTS, labels=LabelFacts(counts, 0, 0), num_replicas=2
    )
    for each in (of_loss, of_gradient):
        found = explain(each)
        assert found is not None
        assert (found.cause, found.evidence["divided_by"]) == (Cause.MEAN_OF_LOCAL_MEANS, OVER_REPLICAS)


def test_a_module_that_is_given_another_number_to_divide_by_is_named() -> None:
    """Of two replicas with two micro-batches, which have 8 of 24 labels and 16: each divides by a fourth of its own."""
    facts = LabelFacts(LabelCounts(((2, 10), (6, 6)), "token_mean"), 0, 0)
    expected = torch.tensor(24.0 / 4, dtype=torch.float64)
    found = explain(suspect("activation", [torch.tensor(8.0 / 2)] * 2, expected, labels=facts, role="input"))
    assert found is not None
    assert (found.cause, found.evidence["divided_by"]) == (Cause.MEAN_OF_LOCAL_MEANS, OVER_REPLICAS)
    assert explain(suspect("activation", [torch.tensor(7.0)] * 2, expected, labels=facts, role="input")) is None


def test_micro_batches_with_equal_labels_on_all_replicas_show_no_such_division() -> None:
    counts = LabelCounts(((2, 6), (6, 2)), "token_mean")
    loss = torch.tensor(3.0, dtype=torch.float64)
    assert explain(suspect("activation", [loss * 1.5] * 2, loss, labels=LabelFacts(counts, 0, 0))) is None
    facts = GradientFacts(micro_mean=MEAN[:2])
    gradients = suspect(
        "gradient", [FIRST - SECOND] * 2, FIRST + SECOND, gradient=facts, labels=LabelFacts(counts, 0, 0)
    )
    assert explain(gradients) is None
