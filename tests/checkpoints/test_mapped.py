"""Checkpoints of other names are compared under a map; fused and separate parameters, stacked layers are the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tpcheck import UsageError, verify_checkpoint

HEADS, GROUPS, SIZE, WIDTH, LAYERS = 4, 2, 4, 16, 2
TORCH = torch.Generator().manual_seed(5)
ROWS = {
    "self_attn.q_proj": HEADS * SIZE,
    "self_attn.k_proj": GROUPS * SIZE,
    "self_attn.v_proj": GROUPS * SIZE,
    "self_attn.o_proj": WIDTH,
    "mlp.gate_proj": 24,
    "mlp.up_proj": 24,
}
HUGGING_FACE = {
    "model.embed_tokens.weight": torch.randn(20, WIDTH, generator=TORCH),
    "model.norm.weight": torch.randn(WIDTH, generator=TORCH),
    **{
        f"model.layers.{layer}.{name}.weight": torch.randn(rows, WIDTH, generator=TORCH)
        for layer in range(LAYERS)
        for name, rows in ROWS.items()
    },
}


def of_layer(layer: int, name: str) -> Tensor:
    return HUGGING_FACE[f"model.layers.{layer}.{name}.weight"]


def qkv(layer: int, *, by_group: bool) -> Tensor:
    parts = [of_layer(layer, f"self_attn.{kind}_proj") for kind in "qkv"]
    if not by_group:
        return torch.cat(parts)
    return torch.cat([part.chunk(GROUPS)[group] for group in range(GROUPS) for part in parts])


def gate_up(layer: int) -> Tensor:
    return torch.cat([of_layer(layer, "mlp.gate_proj"), of_layer(layer, "mlp.up_proj")])


def fused() -> dict[str, Tensor]:
    """Return the tensors as phi3 has them."""
    return {
        "model.embed_tokens.weight": HUGGING_FACE["model.embed_tokens.weight"],
        "model.norm.weight": HUGGING_FACE["model.norm.weight"],
        **{f"model.layers.{layer}.self_attn.o_proj.weight": of_layer(layer, "self_attn.o_proj") for layer in range(2)},
        **{f"model.layers.{layer}.self_attn.qkv_proj.weight": qkv(layer, by_group=False) for layer in range(2)},
        **{f"model.layers.{layer}.mlp.gate_up_proj.weight": gate_up(layer) for layer in range(2)},
    }


def megatron(*, stacked: bool, by_group: bool = True) -> dict[str, Tensor]:
    layers = {
        "self_attention.linear_qkv.weight": [qkv(layer, by_group=by_group) for layer in range(LAYERS)],
        "self_attention.linear_proj.weight": [of_layer(layer, "self_attn.o_proj") for layer in range(LAYERS)],
        "mlp.linear_fc1.weight": [gate_up(layer) for layer in range(LAYERS)],
    }
    tensors = {
        "embedding.word_embeddings.weight": HUGGING_FACE["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": HUGGING_FACE["model.norm.weight"],
    }
    if stacked:
        return tensors | {f"decoder.layers.{name}": torch.stack(values) for name, values in layers.items()}
    return tensors | {
        f"decoder.layers.{layer}.{name}": values[layer] for name, values in layers.items() for layer in range(LAYERS)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The reference, with its configuration."""
    save_file(HUGGING_FACE, tmp_path / "model.safetensors")
    config = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_fused_and_separate_parameters_are_looked_for_inside_one_another() -> None:
    for sides in ((fused(), HUGGING_FACE), (HUGGING_FACE, fused())):
        report = verify_checkpoint(*sides)
        assert report.passed, report.to_text()
        assert report.verdict.coverage.compared == report.verdict.coverage.total == len(fused())
    wrong = fused()
    name = "model.layers.1.mlp.gate_up_proj.weight"
    wrong[name] = wrong[name].roll(24, 0)
    (finding,) = verify_checkpoint(wrong, HUGGING_FACE).findings
    assert (finding.where["parameter"], finding.cause) == (name, "gate_up_exchanged")


@pytest.mark.parametrize("stacked", [True, False])
def test_megatron_and_transformers_are_compared_by_the_ready_map(stacked: bool, folder: Path) -> None:
    for sides in ((megatron(stacked=stacked), folder), (folder, megatron(stacked=stacked))):
        report = verify_checkpoint(*sides, names=["hf-megatron"])
        assert report.passed, report.to_text()
        assert report.verdict.coverage.compared == report.verdict.coverage.total == len(fused())
    wrong = verify_checkpoint(megatron(stacked=stacked, by_group=False), folder, names=["hf-megatron"])
    assert {finding.cause for finding in wrong.findings} == {"fused_blocks_interleaved"}
    assert len(wrong.findings) == LAYERS


def test_without_a_configuration_heads_are_not_compared() -> None:
    report = verify_checkpoint(megatron(stacked=False), HUGGING_FACE, names=["hf-megatron"])
    assert report.passed
    reasons = set(report.verdict.coverage.not_compared.values())
    assert reasons == {"the order of its heads is unknown: no config.json states num_key_value_heads"}


def test_a_pattern_renames_and_is_in_the_command_that_repeats_it(folder: Path, tmp_path: Path) -> None:
    actual = {name.replace("model.", "net.").replace("mlp", "ffn"): value for name, value in HUGGING_FACE.items()}
    (tmp_path / "renamed").mkdir()
    save_file(actual, tmp_path / "renamed" / "model.safetensors")
    names = {r"^net\.": "model.", "ffn": "mlp"}
    assert verify_checkpoint(tmp_path / "renamed", folder, names=names).passed
    assert not verify_checkpoint(tmp_path / "renamed", folder, names={"ffn": "other"}).passed
    actual["net.norm.weight"] += 1
    save_file(actual, tmp_path / "renamed" / "model.safetensors")
    (finding,) = verify_checkpoint(tmp_path / "renamed", folder, names=names).findings
    assert (finding.where["parameter"], finding.cause) == ("model.norm.weight", "offset_by_constant")
    assert finding.again is not None
    assert finding.again.endswith(r"--map '^net\.=model.' --map ffn=mlp")


def test_maps_that_are_none_or_give_two_tensors_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="names of ready maps"):
        verify_checkpoint(HUGGING_FACE, HUGGING_FACE, names=3)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="hf-megatron"):
        verify_checkpoint(HUGGING_FACE, HUGGING_FACE, names=["megatron"])
    with pytest.raises(UsageError, match="a name of its own"):
        verify_checkpoint(HUGGING_FACE, HUGGING_FACE, names={r"layers\.\d+": "layers.0"})


def test_a_ready_map_that_fits_is_named() -> None:
    missing = [finding for finding in verify_checkpoint(megatron(stacked=False), HUGGING_FACE).findings
               if finding.cause == "tensor_missing"]  # fmt: skip
    assert {finding.evidence["advice"] for finding in missing} == {
        "More names have a counterpart under a ready map: pass --map hf-megatron."
    }
    other = {name.replace("model.layers", "blocks"): tensor for name, tensor in HUGGING_FACE.items()}
    advice = [finding.evidence["advice"] for finding in verify_checkpoint(other, HUGGING_FACE).findings]
    assert advice
    assert not any("hf-megatron" in each for each in advice)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    other = {name.replace("model.layers", "blocks"): tensor for name, tensor in HUGGING_FACE.items()}
    assert verify_checkpoint(other, HUGGING_FACE, names={"^blocks": "model.layers"}).passed
    with pytest.raises(UsageError, match=r"block.*=x': expected a pattern that a name of the actual"):
        verify_checkpoint(other, HUGGING_FACE, names={"^blocks": "model.layers", r"^block\.": "x"})


def test_renamed_tensors_are_one_group_that_names_each_pair() -> None:
    actual = {f"net.{number}.w": torch.randn(3, 2, generator=TORCH) for number in range(21)}
    reference = {f"layers.{number}.proj.weight": value for number, value in enumerate(actual.values())}
    report = verify_checkpoint(actual, reference)
    assert len(report.findings) == 21
    for number, finding in enumerate(report.findings):
        assert finding.evidence["story"] == {"stands_as": f"net.{number}.w"}
        assert "--map" in finding.evidence["advice"]
    text = report.to_text()
    assert "21 of 21 tensors: tensor_missing: its bits are there under another name" in text
    assert "layers.{0-20}.proj.weight stands as net.{0-20}.w" in text


def test_experts_with_one_explanation_are_one_group() -> None:
    names = [
        f"layers.{layer}.experts.{expert}.{kind}" for layer in range(4) for expert in range(8) for kind in ("w1", "w3")
    ]
    values = dict(zip(names, torch.randn(len(names), 4, 3, generator=TORCH), strict=True))
    exchanged = {name: values[name[:-1] + ("3" if name.endswith("1") else "1")] for name in names}
    report = verify_checkpoint(exchanged, values)
    assert len(report.findings) == 64
    assert len(report.to_text().splitlines()) < 30
    assert "64 of 64 tensors: gate_up_exchanged" in report.to_text()
