"""Safetensors: one file, or several with an index, read as the library reads them."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.checkpoints.reading import open_source, read_all, read_tensor, same_tensors
from tpcheck.checkpoints.formats.safetensors_files import SafetensorsFormat
from tpcheck.core.errors import CheckpointError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
]  # fmt: skip


def llama(**settings) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes, **settings))


@pytest.fixture
def sharded(tmp_path):
    """A model in several files, with its state dict."""
    model = llama()
    model.save_pretrained(tmp_path, max_shard_size=4000)
    return tmp_path, model.state_dict()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_to_the_bit(tmp_path, dtype):
    values = torch.randint(0, 2, (3, 2, 16), dtype=torch.uint8)
    expected = {"a": values.bool() if dtype == torch.bool else values.view(dtype), "b": torch.ones(())}
    save_file(expected, tmp_path / "model.safetensors")
    assert same_tensors(read_all(tmp_path), expected)


def test_two_float4_in_a_byte_are_one_element_of_torch(tmp_path):
    expected = {"a": torch.randint(0, 255, (4, 6), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    save_file(expected, tmp_path / "model.safetensors")
    assert same_tensors(read_all(tmp_path), expected)


def test_a_saved_model_is_read_with_its_config(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    checkpoint = open_source(tmp_path)
    assert checkpoint.description == "safetensors, 1 file"
    assert checkpoint.config["hidden_size"] == 16
    assert same_tensors({name: read_tensor(checkpoint, name) for name in checkpoint.names()}, model.state_dict())
    assert (checkpoint.ties, checkpoint.unread) == ((), {})
    checkpoint.require_unchanged()
    checkpoint.close()


def test_a_model_in_several_files_is_read(sharded):
    folder, expected = sharded
    assert same_tensors(read_all(folder), expected)
    assert same_tensors(read_all(folder / "model.safetensors.index.json"), expected)
    assert open_source(folder).description.endswith("files with an index")


def test_names_come_in_the_order_of_the_files(sharded):
    checkpoint = open_source(sharded[0])
    places = [checkpoint.extent(name) for name in checkpoint.names()]
    assert places == sorted(places, key=lambda place: (place.path, place.offset))


def test_extents_hold_the_elements(sharded):
    checkpoint = open_source(sharded[0])
    for name in checkpoint.names():
        extent = checkpoint.extent(name)
        data = extent.path.read_bytes()[extent.offset : extent.offset + extent.nbytes]
        assert data == sharded[1][name].numpy().tobytes()


def test_a_link_to_a_file_elsewhere_is_followed_as_in_the_cache_of_the_hub(tmp_path):
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "blob")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blob")
    assert read_all(tmp_path / "snapshot").keys() == {"a"}


def test_model_safetensors_has_precedence_over_an_index(sharded):
    save_file({"a": torch.ones(2)}, sharded[0] / "model.safetensors")
    assert read_all(sharded[0]).keys() == {"a"}


@given(rows=st.integers(0, 6), start=st.integers(0, 6), count=st.integers(0, 6), columns=st.integers(0, 3))
def test_any_rows_are_those_of_the_library(tmp_path_factory, rows, start, count, columns):
    path = tmp_path_factory.mktemp("rows") / "model.safetensors"
    save_file({"pad": torch.ones(3), "a": torch.randn(rows, columns)}, path)
    start, stop = min(start, rows), min(start + count, rows)
    checkpoint = open_source(path)
    with safe_open(path, framework="pt") as library:
        assert torch.equal(checkpoint.read("a", range(start, stop)), library.get_tensor("a")[start:stop])
    checkpoint.close()


def _index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_tensor_that_the_index_forgets_is_unread(sharded):
    _index(sharded[0], lambda weight_map: weight_map.pop("model.norm.weight"))
    checkpoint = open_source(sharded[0])
    assert "model.norm.weight" not in checkpoint.names()
    assert "does not list it" in checkpoint.unread["model.norm.weight"]


def test_files_that_contradict_the_index_are_refused(tmp_path):
    for name, tensor in (("x", "a"), ("y", "b")):
        save_file({tensor: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'b' is in x\.safetensors, which lacks it"):
        open_source(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "y.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"'a' is both in x\.safetensors and in y\.safetensors"):
        open_source(tmp_path)


def test_a_wrong_total_size_is_ignored(sharded):
    path = sharded[0] / "model.safetensors.index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "metadata": {"total_size": -1}}))
    assert same_tensors(read_all(sharded[0]), sharded[1])


def test_several_files_without_an_index_are_refused(sharded):
    (sharded[0] / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="safetensors files and no index"):
        open_source(sharded[0])


@pytest.mark.parametrize(
    ("name", "recognised"),
    [
        ("model.safetensors", True),
        ("anything.safetensors", True),
        ("model.safetensors.index.json", True),
        ("diffusion.safetensors.index.json", True),
        ("adapter_model.safetensors", False),
        ("shard-00001-model-00001-of-00001.safetensors", False),
        ("model.bin", False),
        ("config.json", False),
    ],
)
def test_it_is_recognised_by_name_alone(tmp_path, name, recognised):
    assert not SafetensorsFormat().recognises(tmp_path)
    (tmp_path / name).write_bytes(b"nonsense")
    assert SafetensorsFormat().recognises(tmp_path) == recognised
    assert SafetensorsFormat().recognises(tmp_path / name) == recognised
