"""Of Megatron's distributed checkpoints the model alone is read; stacked layers stay stacked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import tpcheck
from tests.checkpoints.reading import State, open_source, read_all, same_tensors
from tpcheck import CheckpointError, Topology

EMBEDDING = "embedding.word_embeddings.weight"
LAYERS = "decoder.layers.self_attention.linear_proj.weight"
NORM = "decoder.final_layernorm.weight"
MOMENT = f"optimizer.state.exp_avg.{EMBEDDING}"


def model() -> State:
    torch.manual_seed(5)
    return {EMBEDDING: torch.randn(8, 4), LAYERS: torch.randn(2, 4, 6), NORM: torch.randn(4)}


def save_like_megatron(root: Path) -> Path:
    """Write the files that Megatron writes, with torch alone."""
    folder = root / "iter_0000010"
    state = {**model(), MOMENT: torch.zeros(8, 4), "decoder.layers.mlp._extra_state/shard_0_2": b"", "rng_state": b""}
    dcp.save(state, checkpoint_id=str(folder), no_dist=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    torch.save({"iteration": 10}, folder / "common.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


def save_with_megatron(rank: Any, folder: str) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *_: None
    full, tp, own = model(), rank.topology.tp, rank.tp_rank
    sharded = ShardedTensor.from_rank_offsets
    state = {
        "embedding": sharded(EMBEDDING, full[EMBEDDING].chunk(tp)[own].clone(), (0, own, tp)),
        "norm": sharded(NORM, full[NORM].clone(), replica_id=own),
        "moment": sharded(MOMENT, torch.zeros(4, 4), (0, own, tp)),
        "extra": ShardedObject("decoder.layers.mlp._extra_state", {"a": 1}, (tp,), (own,), replica_id=0),
        "iteration": 10,
    }
    for layer in range(2):
        part = full[LAYERS][layer].chunk(tp, 1)[own].contiguous()
        place = (0, layer, 2), (2, own, tp)
        state[f"layer {layer}"] = sharded(LAYERS, part, *place, prepend_axis_num=1)
    dist_checkpointing.save(state, folder)


def test_the_model_is_read_without_the_optimizer(tmp_path: Path) -> None:
    folder = save_like_megatron(tmp_path)
    for source in (folder, tmp_path):
        assert same_tensors(read_all(source), model())
        assert open_source(source).unread == {"decoder.layers.mlp._extra_state": "is a pickled object, not a tensor"}
    description = "Megatron torch_dist, iter_0000010, without the optimizer and other states"
    assert open_source(tmp_path).description == description


def test_a_checkpoint_of_megatron_is_read(tmp_path: Path) -> None:
    pytest.importorskip("megatron.core")
    folder = tmp_path / "iter_0000010"
    folder.mkdir()
    with tpcheck.spawn(Topology(tp=2), timeout=120) as world:
        world.run(save_with_megatron, str(folder))
    assert same_tensors(read_all(folder), model())


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("11", "names iteration 11, but there is no folder iter_0000011"),
        ("../10", "holds '../10', which is not an iteration"),
        ("", "is empty"),
        ("٣", "which is not an iteration"),
    ],
)
def test_a_tracker_file_without_a_folder_is_refused(tmp_path: Path, tracker: str, message: str) -> None:
    save_like_megatron(tmp_path)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(tracker, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


def test_unreadable_backends_are_refused(tmp_path: Path) -> None:
    folder = save_like_megatron(tmp_path)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(CheckpointError, match="was saved by backend 'zarr'; readable are torch_dist"):
        open_source(tmp_path)


def test_the_old_format_is_refused(tmp_path: Path) -> None:
    folder = save_like_megatron(tmp_path)
    (folder / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not a distributed checkpoint of Megatron: it has no metadata\.json"):
        open_source(tmp_path)
