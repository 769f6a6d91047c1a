"""SGD as both sides train: clipped, stepped, with float32 masters of low-precision weights."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tpcheck.backends.interface import TrainingOptions
from tpcheck.backends.sgd import Sgd, clip_gradients

OPTIONS = TrainingOptions(dtype=torch.float64, learning_rate=0.1, momentum=0.9, weight_decay=0.01, max_grad_norm=1.0)


def parameter(values: list[float], gradient: list[float] | None, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    made = nn.Parameter(torch.tensor(values, dtype=dtype))
    made.grad = None if gradient is None else torch.tensor(gradient, dtype=dtype)
    return made


NUMBERS = st.lists(st.floats(-100, 100), min_size=2, max_size=2)


@given(NUMBERS, NUMBERS, st.sampled_from([0.0, 0.5, 1e6]))
def test_a_step_is_that_of_torch_behind_torchs_clipping(
    values: list[float], gradient: list[float], norm: float
) -> None:
    actual, expected = parameter(values, gradient), parameter(values, gradient)
    stepper = Sgd([actual], TrainingOptions(dtype=torch.float64, max_grad_norm=norm), clip_gradients)
    found = stepper.step()
    expected_norm = nn.utils.clip_grad_norm_([expected], norm or float("inf"))
    torch.optim.SGD([expected], lr=0.05, momentum=0.9, weight_decay=0.01).step()
    assert torch.equal(actual, expected)
    assert found == float(expected_norm)


def test_without_a_clip_there_is_no_norm_and_nothing_is_clipped() -> None:
    weight = parameter([0.0], [10.0])
    assert Sgd([weight], OPTIONS, None).step() is None
    assert weight.item() == pytest.approx(-1.0)


def test_gradients_are_cleared_after_a_step() -> None:
    weight = parameter([1.0], [1.0])
    Sgd([weight], OPTIONS, clip_gradients).step()
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_add_up_steps_that_are_too_small_for_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    weight = parameter([1.0], None, dtype)
    stepper = Sgd([weight], TrainingOptions(dtype=dtype, momentum=0.0, weight_decay=0.0, learning_rate=1e-4), None)
    for _ in range(100):  # each step is a tenth of the distance to the next number, at most
        weight.grad = torch.ones_like(weight)
        stepper.step()
    assert weight.item() == pytest.approx(0.99, abs=4e-3)


def test_masters_have_the_attributes_by_which_code_that_clips_and_steps_knows_shards() -> None:
    """Such as `tensor_model_parallel` of Megatron's, without which a norm counts a shard once for all ranks."""
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    weight.tensor_model_parallel = True  # type: ignore[attr-defined]
    seen: list[tuple[torch.dtype, bool]] = []

    def clip(parameters: Sequence[torch.Tensor], max_norm: float) -> float:
        seen.extend((parameter.dtype, getattr(parameter, "tensor_model_parallel", False)) for parameter in parameters)
        return 0.0

    def optimizer(parameters: Sequence[torch.Tensor]) -> torch.optim.Optimizer:
        clip(parameters, 0.0)
        return torch.optim.SGD(parameters, lr=0.1)

    weight.grad = torch.ones_like(weight)
    Sgd([weight], TrainingOptions(dtype=torch.bfloat16, optimizer=optimizer), clip).step()
    assert seen == [(torch.float32, True)] * 2


def test_a_frozen_parameter_and_one_without_a_gradient_are_left_alone() -> None:
    frozen, unused, used = parameter([1.0], None), parameter([1.0], None), parameter([1.0], [1.0])
    frozen.requires_grad_(False)
    Sgd([frozen, unused, used], OPTIONS, clip_gradients).step()
    assert (frozen.item(), unused.item()) == (1.0, 1.0)
    assert used.item() < 1.0


def test_the_norm_of_no_gradients_is_zero() -> None:
    assert clip_gradients([parameter([1.0], None)], 1.0) == 0.0
