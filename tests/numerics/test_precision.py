"""Float64 means float64 everywhere: forward, backward, hooks."""

import torch

from tpcheck.numerics.precision import everything_in_float64


class Casts(torch.autograd.Function):
    """Asks for float32 on its way back."""

    @staticmethod
    def forward(ctx, values):
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.to(torch.float32).to(gradient.dtype)


def test_every_way_to_ask_for_float32_gives_float64() -> None:
    with everything_in_float64():
        values = torch.ones(2)
        asked = [
            values,
            values.float(),
            values.to(torch.float32),
            values.type(torch.float32),
            torch.zeros(1, dtype=torch.float32),
            torch.softmax(values, dim=0, dtype=torch.float32),
            torch.nn.functional.softmax(values, dim=0, dtype=torch.float32),
        ]
    assert {tensor.dtype for tensor in asked} == {torch.float64}


def test_integers_and_bfloat16_are_left_alone() -> None:
    with everything_in_float64():
        assert torch.zeros(1, dtype=torch.int32).dtype is torch.int32
        assert torch.ones(1).bfloat16().dtype is torch.bfloat16


def test_backward_passes_and_their_hooks_are_in_float64_too() -> None:
    third = 1 / 3  # has no exact float32
    in_hook = []
    with everything_in_float64():
        parameter = torch.nn.Parameter(torch.ones(1))
        parameter.register_post_accumulate_grad_hook(lambda p: in_hook.append(p.grad.to(torch.float32).dtype))
        (Casts.apply(parameter) * third).sum().backward()
    assert float(parameter.grad) == third
    assert in_hook == [torch.float64]


def test_outside_nothing_has_changed() -> None:
    with everything_in_float64():
        pass
    with everything_in_float64(enabled=False):
        assert torch.zeros(1).dtype is torch.float32
    assert torch.zeros(1).double().float().dtype is torch.float32
    parameter = torch.nn.Parameter(torch.ones(1))
    (Casts.apply(parameter) / 3).sum().backward()
    assert parameter.grad.dtype is torch.float32
