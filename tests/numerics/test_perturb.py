"""Replays under random rounding: repeatable, as large as the rounding of the dtype, and measured by tensor."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tpcheck.numerics.differences import frobenius_distance
from tpcheck.numerics.evidence import TensorKey
from tpcheck.numerics.perturb import (
    Deviations,
    Perturbation,
    first_nonzero,
    named_deviations,
    perturbed_leaves,
    perturbed_replay,
)
from tpcheck.numerics.recorder import ModuleRecorder


def outputs(seed: int, eps: float, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    with perturbed_leaves(model, Perturbation(eps, torch.Generator().manual_seed(seed))):
        out = model(torch.linspace(-1, 1, 16, dtype=dtype).reshape(2, 8))
        out.square().sum().backward()
    gradient = model[0].weight.grad
    assert isinstance(gradient, torch.Tensor)
    return out.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_move_by_about_one_rounding(dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for plain, perturbed in zip(outputs(0, 0.0, dtype), outputs(0, eps, dtype), strict=True):
        distance = torch.linalg.vector_norm((perturbed - plain).double()) / torch.linalg.vector_norm(plain.double())
        assert 0.05 * eps < float(distance) < 10 * eps


def test_equal_seeds_give_equal_replays_and_different_seeds_do_not() -> None:
    eps = torch.finfo(torch.float64).eps
    assert torch.equal(outputs(1, eps)[0], outputs(1, eps)[0])
    assert not torch.equal(outputs(1, eps)[0], outputs(2, eps)[0])


def test_replay_0_is_not_perturbed_and_the_others_are_seeded_by_their_number() -> None:
    assert Perturbation.of_replay(0, torch.float64, seed=3).eps == 0
    second = Perturbation.of_replay(2, torch.bfloat16, seed=3)
    assert (second.eps, second.generator.initial_seed()) == (torch.finfo(torch.bfloat16).eps, 3002)


def test_a_replay_measures_the_recorded_tensors_and_no_others() -> None:
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double(), torch.ones(1, 3, dtype=torch.float64)
    recorded: dict[TensorKey, torch.Tensor] = {}
    with ModuleRecorder(model, lambda key, tensor: recorded.__setitem__(key, tensor.clone())):
        model(inputs)
    output = TensorKey("forward", "1", 0, "output", "0")
    del recorded[TensorKey("forward", "", 0, "output", "0")]
    unperturbed: Deviations = {}
    with perturbed_replay(model, Perturbation.of_replay(0, torch.float64, 0), recorded, unperturbed, 4):
        model(inputs)
    assert unperturbed == {(4, key): 0.0 for key in recorded}
    perturbed: Deviations = {}
    with perturbed_replay(model, Perturbation.of_replay(1, torch.float64, 0), recorded, perturbed, 4):
        model(inputs)
    assert 0 < perturbed[4, output] < 1e-14
    assert first_nonzero(perturbed) == (4, TensorKey("forward", "0", 0, "output", "0"))


def test_named_tensors_are_compared_where_both_sides_have_them() -> None:
    actual = {"a": torch.tensor([3.0, 4.0]), "b": None, "d": torch.ones(1)}
    expected = {"a": torch.zeros(2), "b": torch.ones(1), "c": torch.ones(1), "d": None}
    assert named_deviations(actual, expected, 1, "gradient") == {(1, "gradient", "a"): 5.0}


def test_the_first_tensor_that_moved_is_named() -> None:
    assert first_nonzero({(0, "weight", "a"): 0.0, (1, "weight", "b"): 0.5, (1, "loss"): 2.0}) == (1, "weight", "b")
    assert first_nonzero({(0, "loss"): 0.0}) is None


def test_in_float32_replays_cross_kinks_that_rounding_may_cross() -> None:
    """An activation lies three roundings above the zero of a ReLU: beyond it, its weights have no gradient."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1 + 3 * torch.finfo(torch.float32).eps], [1.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, -1.0]]))

    def crosses(number: int, seed: int) -> bool:
        perturbation = Perturbation.of_replay(number, torch.float32, seed)
        with perturbed_leaves(model, perturbation):
            [gradient] = torch.autograd.grad(model(torch.ones(1, 1)).sum(), [model[1].weight])
        moved = perturbation.of_rounding({"weight": frobenius_distance(gradient, torch.ones(1, 2))})["weight"]
        assert moved < 1e-6 or moved == pytest.approx(2**0.5 / abs(perturbation.magnification))
        return moved > 1e-6

    seeds = range(40)
    magnified = sum(any(crosses(number, seed) for number in range(5, 9)) for seed in seeds)
    others = sum(any(crosses(number, seed) for number in range(1, 5)) for seed in seeds)
    assert magnified >= 28
    assert not others
