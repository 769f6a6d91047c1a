"""Universal checkpoints of DeepSpeed hold the trained model; known mistakes of the conversion are listed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.checkpoints.reading import open_source, read_all, same_tensors
from tests.checkpoints.samples import FEW_HEADS, TIED, UNEVEN, Samples


@pytest.mark.parametrize(
    "options",
    [
        {"zero": 1, "dp": 2, "steps": 2},
        {"zero": 3, "dp": 2, "steps": 2},
        {"zero": 3, "tp": 1, "dp": 2, "steps": 1},  # parameters are written flat, without their shapes
        {"zero": 1, "settings": {**UNEVEN, "attention_bias": True, "mlp_bias": True}, "steps": 1},
        {
            "zero": 2,
            "tp": 4,
            "steps": 1,
            "model_type": "gpt_neox",
            "settings": {"num_attention_heads": 6, "hidden_size": 48},
        },
    ],
    ids=str,
)
def test_every_parameter_is_full(samples: Samples, options: dict[str, Any]) -> None:
    sample = samples.universal(**options)
    assert same_tensors(read_all(sample.folder), sample.reference)
    assert not open_source(sample.folder).unread


@pytest.mark.parametrize("zero", [1, 3])
def test_a_tied_weight_is_what_it_is_tied_to(samples: Samples, zero: int) -> None:
    """For the alias ZeRO 1 writes mp rank 0's shard, ZeRO 3 nothing (deepspeed 0.19.8); DeepSpeed loads neither."""
    sample = samples.universal(model_type="qwen3", zero=zero, steps=1, settings=TIED)
    assert same_tensors(read_all(sample.folder), sample.reference)
    assert open_source(sample.folder).ties == (frozenset({"lm_head.weight", "model.embed_tokens.weight"}),)
    assert ("lm_head.weight read as tied" in open_source(sample.folder).description) == (zero == 1)


def test_the_folder_above_with_latest_universal_is_enough(samples: Samples) -> None:
    sample = samples.universal(zero=1, dp=2, steps=2)
    assert same_tensors(read_all(sample.folder.parent), sample.reference)


def test_frozen_weights_are_the_shards_of_one_rank(samples: Samples) -> None:
    """deepspeed 0.19.8: `--no_strict`, which such a model needs, writes them from mp rank 0's module."""
    sample = samples.universal(strict=False, zero=1, dp=2, steps=1, frozen=("layers.0",))
    actual = read_all(sample.folder)
    wrong = {name for name, value in sample.reference.items() if actual[name].shape != value.shape}
    assert wrong == {name for name in sample.reference if "layers.0" in name and "norm" not in name}


def test_frozen_weights_of_zero_3_are_listed_as_left_out(samples: Samples) -> None:
    sample = samples.universal(strict=False, zero=3, dp=2, steps=1, frozen=("layers.0",))
    checkpoint = open_source(sample.folder)
    assert {*checkpoint.unread} == {name for name in sample.reference if "layers.0" in name}
    assert {*checkpoint.names()} == {*sample.reference} - {*checkpoint.unread}


def test_a_rank_without_a_share_cannot_be_converted(samples: Samples) -> None:
    """deepspeed 0.19.8 asks for the shape of a step that is not there; when this fails, the conversion is fixed."""
    with pytest.raises(TypeError, match="'NoneType' object is not iterable"):
        samples.universal(zero=1, tp=4, steps=1, settings=FEW_HEADS)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_it_can_be_trained_on_with_any_tp(samples: Samples, tp: int) -> None:
    sample = samples.universal(zero=1, dp=2, steps=2)
    loaded = samples.training(tp=tp, zero=1, load_universal=str(sample.folder.parent))
    assert same_tensors(loaded.reference, sample.reference)
    assert same_tensors(read_all(loaded.folder), sample.reference)
