"""Recording sees every tensor that enters or leaves a module, and changes nothing."""

from dataclasses import dataclass

import torch
from torch import nn

from tpcheck.numerics.evidence import TensorKey
from tpcheck.numerics.recorder import ModuleRecorder
from tpcheck.numerics.tensors import map_tensors, named_tensors


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


def test_a_second_call_of_a_module_is_told_from_the_first() -> None:
    shared = nn.Linear(2, 2)
    seen: list[TensorKey] = []
    with ModuleRecorder(nn.Sequential(shared, shared), lambda key, tensor: seen.append(key)) as recorder:
        recorder._model(torch.ones(1, 2))
    assert [key.call for key in seen if key.module == "0" and key.role == "output"] == [0, 1]


def test_tensors_are_found_in_nested_values_and_mapped_there() -> None:
    @dataclass
    class Output:
        logits: torch.Tensor

    value = {"a": [torch.ones(1), (torch.ones(2), "text")], "b": None}
    assert [path for path, _ in named_tensors(value)] == ["a.0", "a.1.0"]
    assert [path for path, _ in named_tensors(Output(torch.ones(1)))] == ["logits"]
    doubled = map_tensors(lambda tensor: tensor * 2, value)
    assert float(doubled["a"][1][0].sum()) == 4
    assert float(value["a"][1][0].sum()) == 2
    assert map_tensors(lambda tensor: tensor, value) is value or value["b"] is None
