"""The state dict of a torch file is read, from one file or several."""

from __future__ import annotations

import json
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.checkpoints.reading import open_source, read_all, same_tensors
from tpcheck.checkpoints.formats.pytorch_files import PytorchFormat
from tpcheck.core.errors import CheckpointError

STATE = {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4), "steps": torch.tensor(7)}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "last.ckpt", "weights.pth"])
def test_a_state_dict_is_read_from_a_file_or_its_folder(tmp_path, name):
    torch.save(STATE, tmp_path / name)
    (tmp_path / "config.json").write_text('{"hidden_size": 4, "time_step_limit": [0.0, Infinity]}')
    torch.save({"lr": 1}, tmp_path / "optimizer.pt")
    torch.save({}, tmp_path / "training_args.bin")
    torch.save({}, tmp_path / "rng_state_0.pth")
    for source in (tmp_path, tmp_path / name, str(tmp_path)):
        assert same_tensors(read_all(source), STATE)
    assert open_source(tmp_path).config["hidden_size"] == 4
    assert open_source(tmp_path).description == "PyTorch, 1 file"


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module"])
def test_a_state_dict_is_found_beside_that_of_an_optimizer(tmp_path, key):
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    torch.save({key: OrderedDict(STATE), "optimizer": optimizer, "epoch": 3, "rng": torch.ones(2)}, tmp_path / "a.pt")
    assert same_tensors(read_all(tmp_path), STATE)
    assert open_source(tmp_path).description == f"PyTorch, 1 file, under {key!r}"


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"model": STATE, "state_dict": STATE}, "several state dicts, under 'state_dict', 'model'"),
        ({"epoch": 1, "optimizer": {"a": torch.ones(1)}}, "no tensors under its keys 'epoch', 'optimizer'"),
        ({}, "it is empty"),
        (torch.ones(2), "but a tensor"),
        ([torch.ones(2)], "but a list"),
        ({3: torch.ones(2)}, "not text: 3"),
    ],
)
def test_a_file_without_a_state_dict_is_refused_and_described(tmp_path, structure, message):
    torch.save(structure, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


def test_ties_are_the_names_of_one_view(tmp_path):
    weight = torch.randn(4, 4)
    torch.save(
        {"a": weight, "b": weight, "row": weight[0], "copy": weight.clone(), "e": torch.empty(0)}, tmp_path / "a.pt"
    )
    assert open_source(tmp_path).ties == (frozenset({"a", "b"}),)


def test_entries_that_are_not_tensors_are_unread(tmp_path):
    torch.save({**STATE, "x._extra_state": None, "sparse": torch.eye(2).to_sparse()}, tmp_path / "a.pt")
    unread = open_source(tmp_path).unread
    assert unread["x._extra_state"] == "is a NoneType, not a tensor"
    assert "_rebuild_sparse_tensor" in unread["sparse"]


@pytest.fixture
def indexed(tmp_path):
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    torch.save({"a.weight": STATE["a.weight"]}, tmp_path / names[0])
    torch.save({"a.bias": STATE["a.bias"], "steps": STATE["steps"]}, tmp_path / names[1])
    weight_map = {"a.weight": names[0], "a.bias": names[1], "steps": names[1]}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_several_files_are_read_by_their_index(indexed):
    assert same_tensors(read_all(indexed), STATE)
    assert same_tensors(read_all(indexed / "pytorch_model.bin.index.json"), STATE)
    assert open_source(indexed).description == "PyTorch, 2 files with an index"


def test_files_that_contradict_the_index_are_refused(indexed):
    torch.save({"a.weight": STATE["a.weight"]}, indexed / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"'a\.weight' is both in pytorch_model-00001"):
        open_source(indexed)
    torch.save({"steps": STATE["steps"]}, indexed / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(CheckpointError, match=r"'a\.bias' is in pytorch_model-00002-of-00002\.bin, which lacks it"):
        open_source(indexed)


def test_a_pickled_module_is_read_only_if_pickles_are_allowed(tmp_path):
    model = nn.Linear(3, 2)
    torch.save({"model": model, "args": SimpleNamespace(lr=1)}, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"torch.nn.modules.linear.Linear, types.SimpleNamespace; .*--allow-pickle"
    ):
        open_source(tmp_path)
    assert same_tensors(read_all(tmp_path, allow_pickle=True), model.state_dict())


@pytest.mark.parametrize(
    ("names", "recognised"),
    [
        (["pytorch_model.bin"], True),
        (["pytorch_model.bin.index.json"], True),
        (["model.pt"], True),
        (["model.pt", "other.pt"], False),
        (["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"], False),
        (["mp_rank_00_model_states.pt"], False),
        (["adapter_model.bin"], False),
        ([], False),
    ],
)
def test_folders_are_recognised_by_name_alone(tmp_path, names, recognised):
    for name in names:
        (tmp_path / name).write_bytes(b"nonsense")
    assert PytorchFormat().recognises(tmp_path) == recognised
