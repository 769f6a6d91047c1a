"""Every module is fed what it is to be fed, and its own part in what comes out is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tpcheck.numerics.evidence import TensorKey
from tpcheck.numerics.recorder import ModuleRecorder
from tpcheck.numerics.teacher_forcing import Gradients, inner_backward, isolated_modules


class Block(nn.Module):
    """Two layers, the second of which is given its input by name, beside what is no activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), Named()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.second(hidden=self.first(hidden), places=torch.arange(3))
        return hidden + inner


class Named(nn.Module):
    def forward(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return hidden[:, places] * 2


def test_an_error_stays_in_the_module_that_makes_it() -> None:
    torch.manual_seed(0)
    model, hidden = nn.Sequential(Block(), Block()), torch.rand(2, 3)
    expected = passed(model, hidden, {})
    with torch.no_grad():
        model[0].first.weight *= 1.5
    whole, alone = passed(model, hidden, {}), passed(model, hidden, expected)
    assert wrong(whole, expected) > wrong(alone, expected)
    assert wrong(alone, expected) == {
        "0.first: output 0",
        "0.second: input 0.hidden",  # as its caller gave it
    }


def test_a_right_model_makes_the_same_of_the_same() -> None:
    torch.manual_seed(0)
    model, hidden = nn.Sequential(Block(), Block()), torch.rand(2, 3)
    expected = passed(model, hidden, {})
    assert wrong(passed(model, hidden, expected), expected) == set()


def test_in_the_backward_pass_an_error_stays_where_it_is_made() -> None:
    torch.manual_seed(0)
    model, hidden = nn.Sequential(Block(), Block()), torch.rand(2, 3, requires_grad=True)
    expected, gradients = passed_back(model, hidden, {})
    model[1].first.weight.register_hook(lambda gradient: gradient * 1.5)
    model[1].second.register_forward_hook(sends_back_too_much)
    whole, _ = passed_back(model, hidden, {})
    alone, others = passed_back(model, hidden, expected)
    assert wrong(whole, expected) > wrong(alone, expected)
    assert wrong(alone, expected) == {"1.second: gradient of input 0.hidden", "1.first: gradient of output 0"}
    assert [name for name in gradients if not torch.equal(gradients[name], others[name])] == ["1.first.weight"]


def test_a_module_may_change_what_it_is_fed_in_place() -> None:
    class InPlace(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.mul_(2)

    model = nn.Sequential(nn.Linear(3, 3), InPlace())
    hidden = torch.rand(2, 3)
    expected, _ = passed_back(model, hidden, {})
    alone, _ = passed_back(model, hidden, {key: tensor.clone() for key, tensor in expected.items()})
    assert wrong({key: alone[key] for key in expected}, expected) == set()


def test_a_backward_pass_inside_is_seen_by_nobody_outside() -> None:
    model, seen = Block(), []
    hidden = torch.ones(2, 3, requires_grad=True)
    taken: list[Gradients] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(seen.append)
    with inner_backward(model, lambda output: output.sum(), taken.append):
        assert not model(hidden).grad_fn
    assert [set(one) for one in taken] == [{"first.weight", "first.bias"}]
    assert not seen
    assert all(one.grad is None for one in (hidden, *model.parameters()))
    assert torch.is_grad_enabled()


class Reversible(torch.autograd.Function):
    """Runs a backward pass of its own in the backward pass, as Reformer's layers do."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        ctx.layer, ctx.hidden = layer, hidden.detach()
        made: torch.Tensor = layer(hidden)
        return made

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        with torch.enable_grad():
            torch.autograd.backward(ctx.layer(ctx.hidden), grads[0])
        return None, grads[0]


@pytest.mark.parametrize("loss", ["none", "recomputed", "reversible"])
def test_without_a_loss_and_where_gradients_would_be_accumulated_nothing_is_taken(loss: str) -> None:
    model = Block()

    def loss_of(output: torch.Tensor) -> torch.Tensor | None:
        if loss == "none":
            return None
        if loss == "reversible":
            reversed_one: torch.Tensor = Reversible.apply(model.first, output)  # type: ignore[no-untyped-call]
            return reversed_one.sum()
        recomputed: torch.Tensor = checkpoint(model.first, output, use_reentrant=True)
        return recomputed.sum()

    taken: list[Gradients] = []
    with inner_backward(model, loss_of, taken.append):
        model(torch.ones(2, 3))
    assert not taken
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_go_with_the_context() -> None:
    model = Block()
    with isolated_modules(model, lambda key, tensor: torch.zeros_like(tensor)):
        assert not model(torch.ones(2, 3)).any()
    assert not any(module._forward_pre_hooks for module in model.modules())


def passed(model: nn.Module, hidden: torch.Tensor, fed: dict[TensorKey, torch.Tensor]) -> dict[TensorKey, torch.Tensor]:
    """Return what enters and leaves every module, each fed what is in `fed`."""
    seen: dict[TensorKey, torch.Tensor] = {}

    def keep(key: TensorKey, tensor: torch.Tensor) -> None:
        seen[key] = tensor.clone()

    with (
        torch.no_grad(),
        ModuleRecorder(model, keep),
        isolated_modules(model, lambda key, tensor: fed.get(key, tensor)),
    ):
        model(hidden)
    return seen


def sends_back_too_much(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.register_hook(lambda gradient: gradient * 1.5)  # type: ignore[no-untyped-call]


def passed_back(
    model: nn.Module, hidden: torch.Tensor, fed: dict[TensorKey, torch.Tensor]
) -> tuple[dict[TensorKey, torch.Tensor], Gradients]:
    """Return the gradients of what enters and leaves every module, each fed what is in `fed`, and of parameters."""
    seen: dict[TensorKey, torch.Tensor] = {}
    taken: list[Gradients] = []

    def keep(key: TensorKey, tensor: torch.Tensor) -> None:
        seen[key] = tensor.clone()

    with (
        ModuleRecorder(model, keep),
        isolated_modules(model, lambda key, tensor: fed.get(key, tensor)),
        inner_backward(model, lambda output: output.square().sum(), taken.append),
    ):
        model(hidden)
    return seen, taken[0]


def wrong(actual: dict[TensorKey, torch.Tensor], expected: dict[TensorKey, torch.Tensor]) -> set[str]:
    assert actual.keys() == expected.keys()
    return {str(key) for key in expected if not torch.equal(actual[key], expected[key])}
