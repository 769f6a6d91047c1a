"""Tensors are found in nested values, and mapped there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpcheck.numerics.tensors import map_tensors, named_tensors


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
