"""Tensors are found and replaced inside nested values; what is copied of a model can be put back."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import torch
from torch import nn

from tpcheck.numerics.tensors import (
    _reduced,
    copy_buffers,
    copy_parameters,
    map_tensors,
    named_tensors,
    pickled,
    restore_buffers,
    restore_parameters,
    state_restored,
)


@dataclass
class Output:
    logits: torch.Tensor


VALUE = {"a": [torch.ones(1), (torch.ones(2), "text")], "b": None}


def test_tensors_are_named_by_their_path() -> None:
    assert [path for path, _ in named_tensors(VALUE)] == ["a.0", "a.1.0"]
    assert [path for path, _ in named_tensors(Output(torch.ones(1)))] == ["logits"]
    assert [path for path, _ in named_tensors(torch.ones(1))] == ["0"]


def test_tensors_are_mapped_in_a_copy() -> None:
    doubled = map_tensors(lambda tensor: tensor * 2, VALUE)
    assert float(doubled["a"][1][0].sum()) == 4
    assert float(VALUE["a"][1][0].sum()) == 2  # type: ignore[index]
    assert doubled["a"][1][1] == "text"


def test_a_dict_in_which_nothing_changes_is_returned_itself() -> None:
    value = {"a": torch.ones(1), "b": None}
    assert map_tensors(lambda tensor: tensor, value) is value


def test_every_kind_of_tensor_is_pickled_with_its_values() -> None:
    drawn = torch.randn(3, 4)
    tensors = {
        **{str(dtype): drawn.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool)},
        "complex": drawn.to(torch.complex64),
        "transposed": drawn.t(),
        "negative": torch.complex(drawn, drawn).conj().imag,
        "part": drawn[:, 1:3],
        "one": torch.tensor(2.0),
        "none": torch.empty(0, 3),
        "parameter": nn.Parameter(drawn),
        "trains": drawn.clone().requires_grad_(),
    }
    for name, tensor in pickle.loads(pickled(tensors)).items():
        assert torch.equal(tensor, tensors[name]), name
        assert (type(tensor), tensor.dtype, tensor.requires_grad) == (
            type(tensors[name]), tensors[name].dtype, tensors[name].requires_grad
        )  # fmt: skip


def test_unpickled_tensors_can_be_written() -> None:
    (tensor,) = pickle.loads(pickled([torch.ones(2)]))
    assert tensor.add_(1).tolist() == [2, 2]


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(2))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.calls += 1  # in place
        self.latest = values + torch.rand(2)  # another tensor
        return self.latest


def test_buffers_and_generators_are_restored_after_a_pass() -> None:
    model = nn.Sequential(Counting())
    calls, latest, generator = model[0].calls, model[0].latest, torch.get_rng_state()
    with state_restored(model):
        assert model(torch.ones(2)).any()
    assert model[0].calls is calls
    assert model[0].latest is latest
    assert not calls.any()
    assert not latest.any()
    assert torch.equal(torch.get_rng_state(), generator)


def test_parameters_and_replaced_buffers_are_restored_from_copies() -> None:
    model = nn.Sequential(Counting(), nn.Linear(2, 2))
    parameters, buffers = copy_parameters(model), copy_buffers(model)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.ones(2))
    with torch.no_grad():
        model[1].weight += 1
    restore_parameters(model, parameters)
    restore_buffers(model, buffers)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    model(torch.ones(2))
    assert not any(tensor.any() for tensor in buffers.values())  # the copies stay as they are


def test_a_pickled_tensor_comes_to_a_device_of_the_process_that_loads_it() -> None:
    unpickle, (content, dtype, shape, device) = _reduced(torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16))
    assert device == "cpu"
    assert torch.equal(unpickle(content, dtype, shape, device), torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16))
    assert unpickle(content, dtype, shape, "meta").device.type == "meta"
