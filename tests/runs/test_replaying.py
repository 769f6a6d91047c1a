"""Calls of a training loop are recorded with their gradients and weights, and replayed under perturbed rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tpcheck import UsageError
from tpcheck.numerics.evidence import TensorKey
from tpcheck.runs.replaying import CallRecorder, few_threads, measure_deviations

WEIGHT = (0, "weight", "weight")


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 1, bias=False).double()


def inputs(seed: int) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recorded(model: nn.Module, *, calls: int = 1, backwards: int = 1, steps: bool = True) -> CallRecorder:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with CallRecorder(model) as recorder:
        for call in range(calls):
            output = model(inputs(call))
            for _ in range(backwards):
                output.square().sum().backward(retain_graph=True)
            if steps:
                optimizer.step()
                optimizer.zero_grad()
    return recorder


def test_a_call_holds_the_state_before_it_and_the_weights_after_its_step() -> None:
    model = linear()
    before = model.weight.detach().clone()
    first, second = recorded(model, calls=2).calls
    assert torch.equal(first.parameters["weight"], before)
    assert torch.equal(first.weights["weight"], second.parameters["weight"])
    assert torch.equal(second.weights["weight"], model.weight)


def test_without_an_optimizer_step_a_call_has_no_weights() -> None:
    (call,) = recorded(linear(), steps=False).calls
    assert call.weights == {}
    assert call.step().weights == {}


def test_gradients_of_two_backward_passes_add_up() -> None:
    (once,), (twice,) = recorded(linear()).calls, recorded(linear(), backwards=2).calls
    torch.testing.assert_close(twice.gradients["weight"], once.gradients["weight"] * 2)


def test_replays_leave_the_model_as_it_was() -> None:
    model = linear()
    calls = recorded(model, calls=2).calls
    model.weight.grad = torch.ones_like(model.weight)
    weight, gradient = model.weight.detach().clone(), model.weight.grad
    deviations = measure_deviations(model, calls)
    assert torch.equal(model.weight, weight)
    assert model.weight.grad is gradient
    assert 0 < deviations[1, 0, TensorKey("forward", "", 0, "output", "0")] < 1e-14


def test_an_updated_weight_moves_as_much_relatively_as_its_gradient() -> None:
    model = linear()
    (call,) = recorded(model).calls
    deviations = measure_deviations(model, [call])
    relative = deviations[0, "gradient", "weight"] / float(call.gradients["weight"].norm())
    update = float((call.weights["weight"] - call.parameters["weight"]).norm())
    assert deviations[WEIGHT] == pytest.approx(update * relative)


def test_an_input_that_requires_a_gradient_is_replayed_with_one() -> None:
    model = linear()
    with CallRecorder(model) as recorder:
        model(inputs(0).requires_grad_()).square().sum().backward()
    key = (0, 0, TensorKey("backward", "", 0, "input", "0"))
    assert 0 < measure_deviations(model, recorder.calls)[key] < 1e-14


class Random(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + next(NUMBERS)


NUMBERS = iter(range(100))


def test_a_model_that_differs_each_time_is_bad_usage() -> None:
    model = Random(3, 1).double()
    with pytest.raises(UsageError, match=r"computes the same each time: switch dropout off"):
        measure_deviations(model, recorded(model).calls)


@pytest.mark.parametrize(("num_parameters", "threads"), [(10, 1), (10**9, 2)])
def test_small_models_compute_on_one_thread(num_parameters: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with few_threads(num_parameters):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
