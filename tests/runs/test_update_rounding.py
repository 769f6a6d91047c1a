"""Rounding of a gradient in an optimizer's step: an element may turn, once, and a whole step is not hidden."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tpcheck.numerics.optimizer_view import Part
from tpcheck.numerics.tolerance import SAFETY_FACTOR
from tpcheck.runs.recording.update_rounding import LEAST_FACTOR, moves_of_update

RATE, ROUNDING = 0.01, 1e-5


@pytest.mark.parametrize("smallest", [0.0, 1e-7, -2e-6, 1e-5, 3e-5])
def test_one_element_may_turn_in_the_first_step_of_adam_and_a_column_may_not_stay(smallest: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.ones(16, 8))
    weight.grad = torch.randn(16, 8, generator=generator).sign() * 1e-3
    weight.grad[2, 3] = smallest
    optimizer = torch.optim.AdamW([weight], lr=RATE)
    part = Part("gradient", "w", "", weight.grad, None)
    deviations = {("gradient", "w", "", 0): [ROUNDING * weight.numel() ** 0.5]}
    stale_column = RATE * 16**0.5
    for seed in range(20):
        moves = moves_of_update(optimizer, optimizer.param_groups[0], weight, [part], deviations, {}, 0.0, {"w"}, seed)
        for kind, factor in (("weight", LEAST_FACTOR), ("master", SAFETY_FACTOR)):
            allowed = factor * moves[(kind, "w", "", 0)]
            assert allowed > 2 * RATE
            assert allowed < 2 * stale_column
        assert SAFETY_FACTOR * moves[("master", "w", "", 0)] < 1.05 * stale_column


def test_without_an_element_that_may_turn_a_step_is_allowed_its_rounding() -> None:
    weight = nn.Parameter(torch.ones(16, 8))
    weight.grad = torch.full((16, 8), 1e-3)
    optimizer = torch.optim.AdamW([weight], lr=RATE)
    part = Part("gradient", "w", "", weight.grad, None)
    deviations = {("gradient", "w", "", 0): [ROUNDING * weight.numel() ** 0.5]}
    moves = moves_of_update(optimizer, optimizer.param_groups[0], weight, [part], deviations, {}, 0.0, (), 1)
    assert SAFETY_FACTOR * moves[("weight", "w", "", 0)] < 1e-2 * RATE
