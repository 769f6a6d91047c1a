"""Perturbation stays at the rounding level of the dtype, and is repeatable."""

import pytest
import torch
from torch import nn

from tpcheck.numerics.perturb import perturbed_leaves


def outputs(seed: int, eps: float, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    with perturbed_leaves(model, eps=eps, generator=torch.Generator().manual_seed(seed)):
        out = model(torch.linspace(-1, 1, 16, dtype=dtype).reshape(2, 8))
        out.square().sum().backward()
    return out.detach(), model[0].weight.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_move_by_about_one_rounding(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for plain, perturbed in zip(outputs(0, 0.0, dtype), outputs(0, eps, dtype), strict=True):
        distance = torch.linalg.vector_norm((perturbed - plain).double()) / torch.linalg.vector_norm(plain.double())
        assert 0.05 * eps < float(distance) < 10 * eps


def test_equal_seeds_give_equal_replays_and_others_do_not() -> None:
    eps = torch.finfo(torch.float64).eps
    assert torch.equal(outputs(1, eps)[0], outputs(1, eps)[0])
    assert not torch.equal(outputs(1, eps)[0], outputs(2, eps)[0])
