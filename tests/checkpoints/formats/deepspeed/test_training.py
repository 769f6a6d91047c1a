"""Training checkpoints of real DeepSpeed worlds are read as the trained model, to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from tests.checkpoints.reading import open_source, read_all, same_tensors
from tests.checkpoints.samples import FEW_HEADS, TIED, UNEVEN, Samples

FUSED = {
    "tensor_parallel": {
        "partition_config": {
            "use_default_specs": False,
            "layer_specs": [
                {"patterns": [r".*\.o_proj\.weight$", r".*\.down_proj\.weight$"], "partition_type": "row"},
                {"patterns": [r".*\.gate_up_proj\.weight$"], "partition_type": "column", "shape": [2, -1]},
                {"patterns": [r".*\.qkv_proj\.weight$"], "partition_type": "column", "shape": [[64, 32, 32], -1]},
            ],
        }
    }
}
"""phi3's fused weights, cut block by block: 8 query heads of 8, 4 heads of keys and of values."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tp": 4, "settings": FEW_HEADS},
        {"zero": 1, "dp": 2, "steps": 2},
        {"zero": 1, "settings": {**UNEVEN, "attention_bias": True, "mlp_bias": True}},
        {"zero": 1, "tp": 4, "settings": FEW_HEADS},
        {"zero": 2, "dp": 2, "steps": 2},
        {"zero": 2, "tp": 4, "model_type": "gpt_neox", "settings": {"num_attention_heads": 6, "hidden_size": 48}},
        {"zero": 3, "dp": 2, "steps": 2},
        {"zero": 3, "tp": 4, "settings": FEW_HEADS},
        {"model_type": "gpt_bigcode"},  # a fused weight of which each rank holds all keys and values
        {"model_type": "codegen"},  # a fused weight cut by heads
        {"model_type": "phi3", "config": FUSED, "zero": 3},
    ],
    ids=str,
)
def test_shards_and_partitions_are_merged(samples: Samples, options: dict[str, Any]) -> None:
    sample = samples.training(**options)
    assert same_tensors(read_all(sample.folder), sample.reference)
    assert not open_source(sample.folder).unread


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_tied_and_uneven_weights_are_one_tensor(samples: Samples, zero: int) -> None:
    sample = samples.training("qwen3", zero=zero, settings=TIED)
    assert same_tensors(read_all(sample.folder), sample.reference)
    assert open_source(sample.folder).ties == (frozenset({"lm_head.weight", "model.embed_tokens.weight"}),)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_frozen_parameters_are_read(samples: Samples, zero: int) -> None:
    sample = samples.training(zero=zero, dp=2, steps=1, frozen=("layers.0",))
    assert same_tensors(read_all(sample.folder), sample.reference)


def test_without_zero_the_module_is_the_model(samples: Samples) -> None:
    sample = samples.training(dtype="bfloat16")
    assert same_tensors(read_all(sample.folder), sample.reference)
    assert open_source(sample.folder).description.endswith("training checkpoint, tp 2: the module's weights")


@pytest.mark.parametrize("zero", [1, 3])
def test_with_zero_the_masters_are_the_model(samples: Samples, zero: int) -> None:
    sample = samples.training(dtype="bfloat16", zero=zero, steps=2)
    actual = read_all(sample.folder)
    rounded = {name: value.to(sample.reference[name].dtype) for name, value in actual.items()}
    assert same_tensors(rounded, sample.reference)
    assert {str(value.dtype) for name, value in actual.items() if name != "counter"} == {"torch.float32"}
    assert f"ZeRO {zero}: the optimizer's float32 weights" in open_source(sample.folder).description


def test_the_description_names_parameters_that_are_not_rounded_masters(samples: Samples, tmp_path: Path) -> None:
    sample = samples.training(dtype="bfloat16", zero=1, steps=2)
    folder = Path(shutil.copytree(sample.folder, tmp_path / "copy"))
    assert open_source(folder).description.endswith("float32 weights")
    edited(folder, 1, lambda state: state["module"]["lm_head.weight"].add_(1.0))
    remark = "; the module's lm_head.weight is not rounded from them"
    assert open_source(folder).description.endswith(remark)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_without_tp_it_equals_zero_to_fp32(samples: Samples, zero: int) -> None:
    folder = samples.training("qwen3", tp=1, dp=2, zero=zero, steps=1, dtype="bfloat16", settings=TIED).folder
    expected = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    assert same_tensors(read_all(folder), {name: value.contiguous() for name, value in expected.items()})


def test_the_folder_of_the_step_is_enough(samples: Samples) -> None:
    sample = samples.training()
    assert same_tensors(read_all(sample.folder / "global_step0"), sample.reference)


def test_tensors_of_an_unsharded_module_have_an_extent(samples: Samples) -> None:
    sample = samples.training(tp=1)
    place = open_source(sample.folder).extent("lm_head.weight")
    assert place is not None
    data = place.path.read_bytes()[place.offset : place.offset + place.nbytes]
    assert data == sample.reference["lm_head.weight"].numpy().tobytes()


@pytest.fixture
def sharded(samples: Samples, tmp_path: Path) -> Path:
    return Path(shutil.copytree(samples.training().folder, tmp_path / "copy"))


def edited(folder: Path, tp_rank: int, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / (folder / "latest").read_text() / f"mp_rank_{tp_rank:02}_model_states.pt"
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)


def test_replicas_that_differ_are_named(sharded: Path) -> None:
    edited(sharded, 1, lambda state: state["module"]["model.norm.weight"].add_(1e-3))
    checkpoint = open_source(sharded)
    assert checkpoint.inconsistent_replicas == {"model.norm.weight": "mp ranks 0 and 1 hold different copies of it"}
    assert "model.norm.weight" not in checkpoint.names()


def test_without_a_layout_nothing_is_guessed(sharded: Path) -> None:
    for tp_rank in (0, 1):
        edited(sharded, tp_rank, lambda state: state.pop("universal_checkpoint_info"))
    checkpoint = open_source(sharded)
    assert "model.norm.weight" in checkpoint.names()
    assert "model.embed_tokens.weight" in checkpoint.names()
    assert checkpoint.unread["lm_head.weight"] == (
        "mp ranks 0 and 1 hold different copies of it, and the files do not state how it was cut"
    )
    assert "model.layers.0.self_attn.q_proj.weight" in checkpoint.unread


@pytest.mark.parametrize("options", [{"settings": UNEVEN}, {"model_type": "phi3", "config": FUSED}], ids=str)
def test_the_categories_of_older_releases_are_enough(samples: Samples, tmp_path: Path, options: dict[str, Any]) -> None:
    sample = samples.training(**options)
    folder = Path(shutil.copytree(sample.folder, tmp_path / "copy"))
    for tp_rank in (0, 1):
        edited(folder, tp_rank, lambda state: state["universal_checkpoint_info"].pop("affine_map"))
    assert same_tensors(read_all(folder), sample.reference)


def test_layouts_that_deepspeed_does_not_support_are_unread(sharded: Path) -> None:
    def mark(state: dict[str, Any]) -> None:
        info = state["universal_checkpoint_info"]
        info["autotp_unsupported_parameter_patterns"] = {r"^lm_head\.weight$": "an odd layer"}

    for tp_rank in (0, 1):
        edited(sharded, tp_rank, mark)
    assert open_source(sharded).unread == {"lm_head.weight": "DeepSpeed does not support its layout: an odd layer"}
