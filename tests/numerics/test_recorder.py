"""The recorder sees every tensor that enters or leaves a module; with forced values, errors stay in their module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tpcheck import Rank
from tpcheck.core.errors import BackendError
from tpcheck.numerics.evidence import TensorKey
from tpcheck.numerics.recorder import CollectiveLog, ModuleRecorder, logged_collectives


class Branches(nn.Module):
    """Two projections of one input, and an in-place sum."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 3)
        self.right = nn.Linear(3, 3)

    def forward(self, hidden_BD: torch.Tensor, *, scale: float = 1.0) -> tuple[torch.Tensor, None]:
        out_BD = self.left(hidden_BD)
        out_BD += self.right(hidden_BD) * scale
        return out_BD, None


def recorded(model: nn.Module, hidden_BD: torch.Tensor) -> dict[TensorKey, torch.Tensor]:
    seen: dict[TensorKey, torch.Tensor] = {}
    with ModuleRecorder(model, lambda key, tensor: seen.__setitem__(key, tensor.clone())):
        model(hidden_BD, scale=2.0)[0].sum().backward()
    return seen


def test_every_input_output_and_gradient_is_seen_in_order() -> None:
    seen = [str(key) for key in recorded(Branches(), torch.randn(2, 3, requires_grad=True))]
    assert seen == [
        "model: input 0",
        "left: input 0",
        "left: output 0",
        "right: input 0",
        "right: output 0",
        "model: output 0",
        "model: gradient of output 0",
        "right: gradient of output 0",
        "right: gradient of input 0",
        "left: gradient of output 0",
        "left: gradient of input 0",
        "model: gradient of input 0",
    ]


def test_the_gradient_of_an_input_is_what_this_module_alone_sends_back() -> None:
    model = Branches()
    seen = recorded(model, torch.randn(2, 3, requires_grad=True))
    left = seen[TensorKey("backward", "left", 0, "input", "0")]
    torch.testing.assert_close(left, model.left.weight.sum(dim=0).expand(2, 3))


def test_recording_changes_neither_outputs_nor_gradients() -> None:
    torch.manual_seed(0)
    plain, watched = Branches(), Branches()
    watched.load_state_dict(plain.state_dict())
    hidden_BD = torch.randn(2, 3)
    plain(hidden_BD, scale=2.0)[0].sum().backward()
    recorded(watched, hidden_BD)
    for expected, actual in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(expected.grad, actual.grad)


def test_nothing_is_left_on_the_model() -> None:
    model = Branches()
    recorded(model, torch.randn(2, 3))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_calls_of_a_module_are_numbered() -> None:
    shared = nn.Linear(2, 2)
    seen: list[TensorKey] = []
    model = nn.Sequential(shared, shared)
    with ModuleRecorder(model, lambda key, tensor: seen.append(key)):
        model(torch.ones(1, 2))
    assert [key.call for key in seen if key.module == "0" and key.role == "output"] == [0, 1]


class Block(nn.Module):
    """Two layers, the second of which is given its input by name, beside an integer tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), Named()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.second(hidden=self.first(hidden), places=torch.arange(3))
        return hidden + inner


class Named(nn.Module):
    def forward(self, hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        return hidden[:, places] * 2


class InPlace(nn.Module):
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.mul_(2)


def blocks() -> tuple[nn.Sequential, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block()), torch.rand(2, 3, requires_grad=True)


def test_with_forced_inputs_an_error_stays_in_the_module_that_makes_it() -> None:
    model, hidden = blocks()
    expected = forward(model, hidden, {})
    assert wrong(forward(model, hidden, expected), expected) == set()
    with torch.no_grad():
        model[0].first.weight *= 1.5
    assert wrong(forward(model, hidden, {}), expected) > {"0.first: output 0", "1: output 0"}
    assert wrong(forward(model, hidden, expected), expected) == {
        "0.first: output 0",
        "0.second: input 0.hidden",  # as its caller gave it
    }


def test_with_forced_output_gradients_an_error_stays_in_the_module_that_makes_it() -> None:
    model, hidden = blocks()
    expected = forward_and_backward(model, hidden, {})
    gradients = pop_gradients(model)
    model[1].first.weight.register_hook(lambda gradient: gradient * 1.5)
    model[1].second.register_forward_hook(scale_gradient)
    without = forward_and_backward(model, hidden, {})
    pop_gradients(model)
    assert wrong(without, expected) > {"1.first: gradient of input 0"}
    forced = forward_and_backward(model, hidden, expected)
    assert wrong(forced, expected) == {"1.second: gradient of input 0.hidden", "1.first: gradient of output 0"}
    actual = pop_gradients(model)
    assert [name for name in gradients if not torch.equal(gradients[name], actual[name])] == ["1.first.weight"]


def test_a_module_may_change_a_forced_input_in_place() -> None:
    model = nn.Sequential(nn.Linear(3, 3), InPlace())
    hidden = torch.rand(2, 3)
    expected = forward_and_backward(model, hidden, {})
    forced = forward_and_backward(model, hidden, {key: tensor.clone() for key, tensor in expected.items()})
    assert wrong({key: forced[key] for key in expected}, expected) == set()


def test_nothing_is_forced_outside_the_context() -> None:
    model = Block()
    with ModuleRecorder(model, lambda key, tensor: None, lambda key, tensor: torch.zeros_like(tensor)):
        assert not model(torch.ones(2, 3)).any()
    assert model(torch.ones(2, 3)).any()
    assert not any(module._forward_pre_hooks for module in model.modules())


def forward(
    model: nn.Module, hidden: torch.Tensor, forced: dict[TensorKey, torch.Tensor]
) -> dict[TensorKey, torch.Tensor]:
    """Return what enters and leaves every module; modules are given what is in `forced`."""
    with torch.no_grad():
        return _recorded(lambda: model(hidden), model, forced)


def forward_and_backward(
    model: nn.Module, hidden: torch.Tensor, forced: dict[TensorKey, torch.Tensor]
) -> dict[TensorKey, torch.Tensor]:
    return _recorded(lambda: model(hidden).square().sum().backward(), model, forced)


def _recorded(run: Any, model: nn.Module, forced: dict[TensorKey, torch.Tensor]) -> dict[TensorKey, torch.Tensor]:
    seen: dict[TensorKey, torch.Tensor] = {}
    with ModuleRecorder(
        model,
        lambda key, tensor: seen.__setitem__(key, tensor.clone()),
        lambda key, tensor: forced.get(key, tensor),
    ):
        run()
    return seen


def pop_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


def scale_gradient(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.register_hook(lambda gradient: gradient * 1.5)  # type: ignore[no-untyped-call]


def wrong(actual: dict[TensorKey, torch.Tensor], expected: dict[TensorKey, torch.Tensor]) -> set[str]:
    assert actual.keys() == expected.keys()
    return {str(key) for key in expected if not torch.equal(actual[key], expected[key])}


@pytest.mark.tpcheck(tp=2, timeout=60)
def test_a_rank_that_leaves_out_its_last_collective_fails_with_those_that_wait(tp_rank: Rank) -> None:
    """Its others have the same shape, so that no collective of the model shows it."""
    tensor = torch.ones(2)
    log = CollectiveLog()

    def run() -> None:
        with logged_collectives(nn.Identity(), log):
            for _ in range(2 + tp_rank.rank):
                dist.all_reduce(tensor, group=tp_rank.group("tp"))

    with pytest.raises((BackendError, RuntimeError), match="Detected mismatch between collectives"):
        run()
    assert len(log.issued) == 2 + tp_rank.rank
