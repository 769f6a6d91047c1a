"""Of a checkpoint of torch.distributed.checkpoint the full model is read, whatever was saved beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import tpcheck
from tests.checkpoints.reading import State, open_source, read_all, same_tensors
from tpcheck import CheckpointError, Topology


def state() -> State:
    torch.manual_seed(3)
    return {
        "embed.weight": torch.rand(131, 16),
        "proj.weight": torch.rand(16, 24).to(torch.bfloat16),
        "norm.weight": torch.rand(16),
        "experts.weight": torch.rand(3, 10, 6),
        "scale": torch.tensor(2.0),
        "counter": torch.arange(5),
        "nothing": torch.empty(0, 4),
    }


def saved_alone(folder: Path, value: dict[str, Any]) -> Path:
    dcp.save(value, checkpoint_id=str(folder), no_dist=True)
    return folder


def save_sharded(rank: Any, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    placements = {
        "embed.weight": [Shard(0), Shard(0)],  # 131 rows: chunks of three lengths
        "proj.weight": [Shard(0), Shard(1)],
        "norm.weight": [Replicate(), Replicate()],
        "experts.weight": [Shard(1), Shard(2)],
        "counter": [Shard(0), Replicate()],
    }
    sharded = {
        name: distribute_tensor(value, mesh, placements[name]) if name in placements else value
        for name, value in state().items()
    }
    dcp.save({"model": sharded, "step": 3}, checkpoint_id=folder)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp") / "step"
    with tpcheck.spawn(Topology(tp=2, dp=2), timeout=60) as world:
        world.run(save_sharded, str(folder))
    return folder


def test_shards_over_two_axes_are_merged(sharded: Path) -> None:
    assert same_tensors(read_all(sharded), state())
    assert open_source(sharded).description == "torch.distributed.checkpoint, 4 files, under 'model'"


def test_it_equals_what_torch_loads(sharded: Path) -> None:
    loaded = {"model": {name: torch.zeros_like(value) for name, value in state().items()}}
    dcp.load(loaded, checkpoint_id=str(sharded), no_dist=True)
    assert same_tensors(read_all(sharded), loaded["model"])


NESTED = {
    "": lambda model, optimizer: model,
    ", under 'model'": lambda model, optimizer: {"model": model, "optim": optimizer},
    ", under 'app.model'": lambda model, optimizer: {"app": {"model": model, "optim": optimizer, "step": 3}},
    ", under 'weights'": lambda model, optimizer: {"weights": model, "optimizer": optimizer},
    ", without 'optimizer', 'step'": lambda model, optimizer: {
        **model,
        "optimizer": optimizer,
        "step": {"n": torch.tensor(1)},
    },
}


@pytest.mark.parametrize("part", NESTED)
def test_of_a_nested_state_dict_the_model_is_read(tmp_path: Path, part: str) -> None:
    optimizer = {"state": {name: {"exp_avg": value} for name, value in state().items()}}
    folder = saved_alone(tmp_path / "step", NESTED[part](state(), optimizer))
    assert same_tensors(read_all(folder), state())
    assert open_source(folder).description == f"torch.distributed.checkpoint, 1 files{part}"


def test_two_models_are_refused(tmp_path: Path) -> None:
    folder = saved_alone(tmp_path / "step", {"model": state(), "module": state()})
    with pytest.raises(CheckpointError, match="several state dicts, under 'model', 'module'"):
        open_source(folder)


def test_pickled_objects_in_the_model_are_listed(tmp_path: Path) -> None:
    folder = saved_alone(tmp_path / "step", {"model": {**state(), "extra": {1, 2}}})
    assert open_source(folder).unread == {"extra": "is a pickled object, not a tensor"}


def test_a_tensor_of_one_chunk_has_an_extent(tmp_path: Path) -> None:
    place = open_source(saved_alone(tmp_path / "step", state())).extent("embed.weight")
    assert place is not None
    data = place.path.read_bytes()[place.offset : place.offset + place.nbytes]
    assert data == state()["embed.weight"].numpy().tobytes()
