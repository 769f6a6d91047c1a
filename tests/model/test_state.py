"""What a model keeps between calls can be put back."""

from __future__ import annotations

import torch
from torch import nn

from tpcheck.numerics.snapshots import untouched


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(2))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.calls += 1  # in place
        self.latest = values + torch.rand(2)  # another tensor
        return self.latest


def test_a_pass_that_leaves_a_model_untouched_leaves_buffers_and_generators_as_they_were() -> None:
    model = nn.Sequential(Counting())
    calls, latest, generator = model[0].calls, model[0].latest, torch.get_rng_state()
    with untouched(model):
        assert model(torch.ones(2)).any()
    assert model[0].calls is calls
    assert model[0].latest is latest
    assert not calls.any()
    assert not latest.any()
    assert torch.equal(torch.get_rng_state(), generator)
