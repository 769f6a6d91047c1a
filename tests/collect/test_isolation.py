"""Every module is fed what it is to be fed, and its own part in what comes out is left."""

from __future__ import annotations

import torch
from torch import nn

from tpcheck.collect import ModuleRecorder
from tpcheck.collect.isolation import isolated_modules
from tpcheck.records import TensorKey


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


def wrong(actual: dict[TensorKey, torch.Tensor], expected: dict[TensorKey, torch.Tensor]) -> set[str]:
    assert actual.keys() == expected.keys()
    return {str(key) for key in expected if not torch.equal(actual[key], expected[key])}
