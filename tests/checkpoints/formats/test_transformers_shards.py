"""Shards that each rank of transformers saved are merged into the model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import tpcheck
from tests.checkpoints.reading import open_source, read_all, same_tensors
from tpcheck import Topology
from tpcheck.core.errors import CheckpointError

FIRST = "shard-00001-model-00001-of-00001.safetensors"
SECOND = "shard-00002-model-00001-of-00001.safetensors"


def _save(rank, reference, folder):
    model = LlamaForCausalLM.from_pretrained(reference, tp_plan="auto")
    model.save_pretrained(folder, distributed_checkpoint=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model saved by two ranks, with its state dict."""
    folder, reference = tmp_path_factory.mktemp("shards"), tmp_path_factory.mktemp("reference")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, attention_bias=True, **sizes)).save_pretrained(reference)
    with tpcheck.spawn(Topology(tp=2), timeout=60) as world:
        world.run(_save, str(reference), str(folder))
    return folder, load_file(reference / "model.safetensors")


@pytest.fixture
def shards(saved, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(saved[0], tmp_path / "copy")
    return tmp_path / "copy"


def write(path, tensors, offsets):
    """Save chunks with their offsets in the metadata: text, or offsets by name."""
    info = (
        offsets if isinstance(offsets, str) else json.dumps({key: {"saved_offsets": o} for key, o in offsets.items()})
    )
    save_file(tensors, path, metadata={"DCP_SHARDING_INFO": info})


def test_the_shards_are_the_model(saved):
    folder, expected = saved
    assert same_tensors(read_all(folder), expected)
    checkpoint = open_source(folder)
    assert checkpoint.description == "transformers shards, 2 files"
    assert checkpoint.config["hidden_size"] == 16


def test_each_file_alone_holds_pieces_under_the_same_names(saved):
    with safe_open(saved[0] / FIRST, framework="pt") as one, safe_open(saved[0] / SECOND, framework="pt") as other:
        assert {*one.keys()} & {*other.keys()}


def test_a_full_model_beside_its_shards_is_read_in_place_of_them(shards):
    save_file({"a": torch.ones(1)}, shards / "model.safetensors")
    assert read_all(shards).keys() == {"a"}


def test_a_missing_first_shard_leaves_a_gap(shards):
    (shards / FIRST).unlink()
    with pytest.raises(CheckpointError, match=r"without shard 1\) has chunks that leave out \d+ of its \d+ elem"):
        open_source(shards)


def test_a_missing_last_shard_makes_smaller_tensors(shards, saved):
    (shards / SECOND).unlink()
    assert read_all(shards)["model.embed_tokens.weight"].shape != saved[1]["model.embed_tokens.weight"].shape


def test_shards_without_places_are_refused(shards):
    save_file(load_file(shards / SECOND), shards / SECOND)
    with pytest.raises(CheckpointError, match="does not state the offsets of its chunks"):
        open_source(shards)


def test_shards_of_two_checkpoints_are_refused(shards):
    shutil.copy(shards / SECOND, shards / "shard-00002-model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="several checkpoints"):
        open_source(shards)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "does not hold a JSON object"),
        ('{"a":' * 50_000, "nested too deeply|not valid JSON"),
        ("{}", "does not state the offsets of its chunk of tensor 'a'"),
        ('{"a": 3}', "offsets that are not 2 indices"),
        ('{"a": {"saved_offsets": null}}', "offsets that are not 2 indices"),
        ({"a": [0]}, "offsets that are not 2 indices"),
        ({"a": [2, -1]}, "offsets that are not 2 indices"),
        ({"a": [2, True]}, "offsets that are not 2 indices"),
        ({"a": [2, 1.0]}, "offsets that are not 2 indices"),
        ({"a": [1 << 62, 0]}, "offsets that are not 2 indices"),
        ({"a": [1, 0]}, "chunks that overlap"),
        ({"a": [1 << 40, 0]}, "leave out"),
    ],
)
def test_wrong_offsets_are_refused(tmp_path, offsets, message):
    write(tmp_path / FIRST, {"a": torch.ones(2, 3)}, {"a": [0, 0]})
    write(tmp_path / SECOND, {"a": torch.ones(2, 3)}, offsets)
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)
