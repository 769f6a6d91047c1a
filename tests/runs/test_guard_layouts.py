"""A vector of ones goes with the columns of what its module returns, so that tells whether it is a replica."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.runs.guarded import RootMeanSquareNorm, Scale
from tpcheck.runs.guarding.layouts import FirstOutputs, divides_by_a_statistic

ROWS = (
    torch.randn(6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1.0, 7)[:, None]
)


@pytest.mark.parametrize("norm", [RootMeanSquareNorm(32), nn.LayerNorm(32, dtype=torch.float64)])
def test_a_norm_gives_its_rows_equal_mean_squares(norm: nn.Module) -> None:
    assert divides_by_a_statistic(ROWS, norm(ROWS))
    assert divides_by_a_statistic(ROWS, norm(ROWS).bfloat16())
    assert divides_by_a_statistic(ROWS + 3, 0.5 * norm(ROWS + 3))


def test_what_scales_rows_by_the_same_or_by_the_statistic_of_several_shards_is_no_norm_of_these_rows() -> None:
    assert not divides_by_a_statistic(ROWS, 2 * ROWS)
    assert not divides_by_a_statistic(ROWS[:, :16], RootMeanSquareNorm(32)(ROWS)[:, :16])
    assert not divides_by_a_statistic(ROWS.sign(), ROWS.sign())  # equal before
    assert not divides_by_a_statistic(ROWS[:2], RootMeanSquareNorm(32)(ROWS[:2]))  # two rows tell little


def test_only_vectors_along_the_columns_of_an_output_are_looked_at() -> None:
    class TwoMatrices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.ones(32, 32)), nn.Parameter(torch.ones(32, 32))
            self.bias = nn.Parameter(torch.zeros(32))  # of which of the two?

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return (rows @ self.up.double() + self.bias) @ self.down.double()

    model = nn.Sequential(RootMeanSquareNorm(32), Scale(32), nn.Linear(32, 8).double(), TwoMatrices())
    names = ["0.weight", "1.weight", "2.bias", "3.bias"]
    first = FirstOutputs(model, names)
    hidden = model[1](model[0](ROWS))
    model[2](hidden)
    model[3](hidden)
    first.remove()
    assert {name: seen.is_norm for name, seen in first.seen.items()} == {
        "0.weight": True,
        "1.weight": False,
        "2.bias": False,
    }
    assert first.seen["0.weight"].digest != first.seen["2.bias"].digest != ""
    assert not any(module._forward_hooks for module in model.modules())


def test_an_output_whose_columns_are_equal_may_be_that_of_equal_shards() -> None:
    first = FirstOutputs(scale := Scale(32), ["weight"])
    scale(torch.ones(3, 32))
    assert first.seen["weight"].digest == ""
