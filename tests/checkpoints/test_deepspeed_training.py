"""Training checkpoints of real DeepSpeed worlds hold the model that was trained, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from tests.checkpoints.samples import (
    FEW_HEADS,
    TIED,
    UNEVEN,
    State,
    contents,
    masters,
    opened,
    same,
    save_training,
)

LM_HEAD_TIED = frozenset({"lm_head.weight", "model.embed_tokens.weight"})


def with_masters(reference: State) -> State:
    return {**masters(reference), "counter": reference["counter"]}


@pytest.mark.parametrize(
    "options",
    [
        {"zero": 0},
        {"zero": 0, "tp": 4, "settings": FEW_HEADS},
        {"zero": 1, "dp": 2, "steps": 2},
        {"zero": 1, "settings": UNEVEN},
        {"zero": 1, "tp": 4, "settings": FEW_HEADS},
        {"zero": 2, "dp": 2, "steps": 2},
        {"zero": 2, "tp": 4, "model_type": "gpt_neox", "settings": {"num_attention_heads": 6, "hidden_size": 48}},
        {"zero": 3, "dp": 2, "steps": 2},
        {"zero": 3, "tp": 4, "settings": FEW_HEADS},
        {"zero": 0, "model_type": "gpt_bigcode"},  # a fused weight of which each rank holds all keys and values
        {"zero": 0, "model_type": "codegen"},  # a fused weight cut by heads
        {"zero": 1, "settings": {"attention_bias": True, "mlp_bias": True}},
    ],
    ids=str,
)
def test_the_model_is_put_together(tmp_path: Path, options: dict[str, Any]) -> None:
    reference = save_training(tmp_path, **options)
    assert same(contents(tmp_path), reference)
    assert not opened(tmp_path).unread


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_tied_and_uneven_weights_are_one_tensor(tmp_path: Path, zero: int) -> None:
    reference = save_training(tmp_path, "qwen3", zero=zero, settings=TIED)
    assert same(contents(tmp_path), reference)
    assert opened(tmp_path).ties == (LM_HEAD_TIED,)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_frozen_parameters_are_there(tmp_path: Path, zero: int) -> None:
    reference = save_training(tmp_path, zero=zero, dp=2, frozen=("layers.0",))
    assert same(contents(tmp_path), reference)


def test_without_zero_the_module_is_the_model(tmp_path: Path) -> None:
    reference = save_training(tmp_path, dtype="bfloat16")
    assert same(contents(tmp_path), reference)
    assert opened(tmp_path).description.endswith("training checkpoint, tp 2: the module's weights")


@pytest.mark.parametrize("zero", [1, 3])
def test_with_zero_the_masters_are_the_model(tmp_path: Path, zero: int) -> None:
    reference = save_training(tmp_path, dtype="bfloat16", zero=zero, steps=2)
    actual = contents(tmp_path)
    rounded = {name: value.to(reference[name].dtype) for name, value in actual.items()}
    assert same(rounded, reference)
    assert not same(actual, with_masters(reference))
    assert f"ZeRO {zero}: the optimizer's float32 weights" in opened(tmp_path).description


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_without_tp_it_is_what_zero_to_fp32_makes(tmp_path: Path, zero: int) -> None:
    save_training(tmp_path, "qwen3", tp=1, dp=2, zero=zero, steps=1, dtype="bfloat16", settings=TIED)
    expected = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path))
    assert same(contents(tmp_path), {name: value.contiguous() for name, value in expected.items()})


def test_the_folder_of_the_step_is_enough(tmp_path: Path) -> None:
    reference = save_training(tmp_path, zero=1)
    assert same(contents(tmp_path / "global_step0"), reference)


def test_an_unsharded_module_says_where_its_tensors_lie(tmp_path: Path) -> None:
    reference = save_training(tmp_path, tp=1)
    checkpoint = opened(tmp_path)
    place = checkpoint.extent("lm_head.weight")
    assert place is not None
    data = place.path.read_bytes()[place.offset : place.offset + place.nbytes]
    assert data == reference["lm_head.weight"].numpy().tobytes()


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_training(tmp_path)
    return tmp_path


def edited(folder: Path, tp_rank: int, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "global_step0" / f"mp_rank_{tp_rank:02}_model_states.pt"
    state = torch.load(path, weights_only=False)
    edit(state)
    torch.save(state, path)


def test_replicas_that_differ_are_named(sharded: Path) -> None:
    edited(sharded, 1, lambda state: state["module"]["model.norm.weight"].add_(1e-3))
    checkpoint = opened(sharded)
    assert checkpoint.unread == {"model.norm.weight": "mp ranks 0 and 1 hold different copies of it"}
    assert "model.norm.weight" not in checkpoint.names()


def test_without_a_layout_nothing_is_guessed(sharded: Path) -> None:
    for tp_rank in (0, 1):
        edited(sharded, tp_rank, lambda state: state.pop("universal_checkpoint_info"))
    checkpoint = opened(sharded)
    assert "model.norm.weight" in checkpoint.names()
    assert "model.embed_tokens.weight" in checkpoint.names()
    assert checkpoint.unread["lm_head.weight"] == (
        "mp ranks 0 and 1 hold different copies of it, and the files do not say how it was cut"
    )
    assert "model.layers.0.self_attn.q_proj.weight" in checkpoint.unread


def test_the_categories_of_older_releases_are_enough(tmp_path: Path) -> None:
    reference = save_training(tmp_path, settings=UNEVEN)
    for tp_rank in (0, 1):
        edited(tmp_path, tp_rank, lambda state: state["universal_checkpoint_info"].pop("affine_map"))
    assert same(contents(tmp_path), reference)


def test_layouts_that_deepspeed_cannot_say_are_passed_on(sharded: Path) -> None:
    def mark(state: dict[str, Any]) -> None:
        info = state["universal_checkpoint_info"]
        info["autotp_unsupported_parameter_patterns"] = {r"^lm_head\.weight$": "an odd layer"}

    for tp_rank in (0, 1):
        edited(sharded, tp_rank, mark)
    assert opened(sharded).unread == {"lm_head.weight": "DeepSpeed cannot say how it is cut: an odd layer"}
