"""Objects of any class become containers, numbers and strings; tensors stay as they are."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from tpcheck.checkpoints.rewrite_pickle import MAX_DEPTH, rewrite, without_classes


class Color(Enum):
    RED = 3


def test_objects_are_the_dict_of_their_attributes_and_modules_their_state_dict() -> None:
    layer = nn.Linear(2, 1)
    value = without_classes({"args": SimpleNamespace(lr=0.1, color=Color.RED), 3: layer, Path("a"): {1, 2}})
    assert value["args"] == {"lr": 0.1, "color": 3}
    assert value[3].keys() == layer.state_dict().keys()
    assert sorted(value[repr(Path("a"))]) == [1, 2]


def test_parameters_and_views_are_tensors() -> None:
    parameter = without_classes(nn.Parameter(torch.ones(2)))
    assert type(parameter) is torch.Tensor
    conjugate = torch.ones(1, dtype=torch.complex64).conj()
    assert not without_classes(conjugate).is_conj()
    assert without_classes(torch.eye(2).to_sparse()).layout is torch.sparse_coo


def test_what_is_nested_without_end_is_cut() -> None:
    endless: list[object] = []
    endless.append(endless)
    value, depth = without_classes(endless), 0
    while value is not None:
        value, depth = value[0], depth + 1
    assert depth == MAX_DEPTH + 1


def test_a_file_is_rewritten_without_classes(tmp_path: Path) -> None:
    shared = torch.arange(3.0)
    torch.save({"a": shared, "b": SimpleNamespace(c=shared)}, tmp_path / "from.pt")
    rewrite(str(tmp_path / "from.pt"), str(tmp_path / "to.pt"))
    value = torch.load(tmp_path / "to.pt", weights_only=True)
    assert torch.equal(value["b"]["c"], shared)
    assert value["a"].data_ptr() == value["b"]["c"].data_ptr()
