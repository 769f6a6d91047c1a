"""Adapters that the real PEFT saved."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from tests.checkpoints.reading import open_source, read_all, same_tensors


@pytest.fixture(scope="module")
def adapter():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))


@pytest.mark.parametrize("safe", [True, False])
def test_an_adapter_is_read_from_its_folder_or_file(tmp_path, adapter, safe):
    adapter.save_pretrained(tmp_path, safe_serialization=safe)
    expected = get_peft_model_state_dict(adapter)
    saved = [path for path in tmp_path.iterdir() if path.name.startswith("adapter_model")]
    if not safe and saved[0].suffix == ".safetensors":  # later versions of PEFT write nothing else
        torch.save(load_file(saved[0]), tmp_path / "adapter_model.bin")
        saved[0].unlink()
        saved = [tmp_path / "adapter_model.bin"]
    for source in (tmp_path, saved[0]):
        assert same_tensors(read_all(source), expected)
    checkpoint = open_source(tmp_path)
    assert checkpoint.description == f"PEFT adapter, LORA, {'safetensors' if safe else 'PyTorch'}"
    assert checkpoint.config["r"] == 2


def test_a_model_beside_an_adapter_is_what_is_read(tmp_path, adapter):
    adapter.save_pretrained(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert read_all(tmp_path).keys() == {"a"}


def test_an_adapter_without_its_config_is_read(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert open_source(tmp_path).description == "PEFT adapter, safetensors"
