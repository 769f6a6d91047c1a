"""An optimizer that is given shards computes another step where it depends on the whole matrix, else the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.numerics.evidence import BIAS, DOWN, UP, right_evidence
from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.sgd import Sgd, clip_gradients
from tpcheck.model.on_shards import steps_on_shards
from tpcheck.numerics.evidence import Evidence


def trained(optimizer: str) -> tuple[TrainingOptions, Evidence]:
    """Return evidence whose reference's weights are those after this optimizer's steps on whole matrices."""
    options = TrainingOptions(dtype=torch.float64, optimizer=optimizer)
    evidence = right_evidence(steps=2)
    parameters = {name: torch.nn.Parameter(weight.clone()) for name, weight in evidence.initial.items()}
    stepping = Sgd(list(parameters.values()), options, clip_gradients)
    steps = []
    for step in evidence.reference:
        for name, parameter in parameters.items():
            parameter.grad = step.gradients[name].clone()
        norm = stepping.step()
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        steps.append(replace(step, weights=weights, gradient_norm=norm))
    return options, replace(evidence, reference=tuple(steps))


@pytest.mark.parametrize(("optimizer", "depends"), [("adamw", False), ("adafactor", True)])
def test_shards_show_whether_the_whole_matrix_counts(optimizer: str, depends: bool) -> None:
    options, evidence = trained(optimizer)
    for step, by_rank in enumerate(steps_on_shards(options, evidence)):
        for name, layout in evidence.layouts.items():
            expected = layout.parts(evidence.reference[step].weights[name])
            are_equal = all(
                torch.allclose(weights[name], part, rtol=1e-12, atol=0.0)
                for weights, part in zip(by_rank, expected, strict=True)
            )
            assert are_equal != (depends and name in (UP, DOWN)), (name, step)
    assert BIAS in evidence.layouts


def test_nothing_is_computed_for_sgd() -> None:
    options, evidence = trained("sgd")
    assert steps_on_shards(options, evidence) == ()


def test_what_does_not_decay_in_the_reference_does_not_on_shards() -> None:
    options, evidence = trained("adamw")
    whole, without = (steps_on_shards(options, evidence, decayed)[0][0][UP] for decayed in (None, [DOWN]))
    initial = evidence.initial_parts[0][UP]
    torch.testing.assert_close(without - whole, 0.01 * 0.01 * initial)  # rate times decay
