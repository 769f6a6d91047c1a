"""A model that holds adapters of PEFT is compared with what PEFT saves of it, and with the merged model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tests.numerics.exact.tensors import Tensors
from tpcheck import Report, verify_checkpoint
from tpcheck.checkpoints.adapters import AdapterNames
from tpcheck.checkpoints.comparison import compare_checkpoints

TARGETS = {"r": 2, "target_modules": ["q", "k"], "init_lora_weights": False}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["head"]},
}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.q, self.k, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 12)


class WithEmbeddings(Base):
    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> None: ...


def peft_model(kind: str = "lora") -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(Base(), LoraConfig(**TARGETS, **KINDS[kind]))  # type: ignore[arg-type]


def adapter_file(folder: Path) -> Path:
    return folder / "adapter_model.safetensors"


def assert_passes(report: Report) -> None:
    assert report.passed, report.to_text()
    assert report.verdict.coverage.compared == report.verdict.coverage.total > 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_equals_the_adapter_that_it_saves(kind: str, tmp_path: Path) -> None:
    model = peft_model(kind)
    model.save_pretrained(tmp_path)
    merged_in_place = copy.deepcopy(model)
    merged_in_place.merge_adapter()
    (tmp_path / "whole").mkdir()
    torch.save(model.state_dict(), tmp_path / "whole" / "model.pt")
    for whole in (model, merged_in_place, tmp_path / "whole"):
        for sides in ((whole, tmp_path), (tmp_path, whole)):
            report = verify_checkpoint(*sides)
            assert_passes(report)
            (reason,) = report.verdict.coverage.not_compared.values()
            assert reason.endswith("holds the adapter alone")


def test_an_adapter_of_embeddings_that_peft_saves_with_their_base_weight_equals_it(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = get_peft_model(WithEmbeddings(), LoraConfig(**{**TARGETS, "target_modules": ["q", "embed"]}))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("embed.base_layer" in name for name in load_file(adapter_file(tmp_path)))
    assert_passes(verify_checkpoint(tmp_path, model))
    with torch.no_grad():
        model.base_model.model.embed.base_layer.weight[0, 0] += 1
    assert len(verify_checkpoint(tmp_path, model).findings) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_was_saved_under_the_names_of_the_model_equals_it(kind: str, tmp_path: Path) -> None:
    model = peft_model(kind)
    model.save_pretrained(tmp_path / "saved")
    named = {name: value.clone() for name, value in model.state_dict().items() if ".default" in name}
    (tmp_path / "named").mkdir()
    save_file(named, adapter_file(tmp_path / "named"))
    assert_passes(verify_checkpoint(tmp_path / "named", tmp_path / "saved"))
    assert_passes(verify_checkpoint(tmp_path / "named", model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_model_equals_the_model_with_its_adapters(kind: str) -> None:
    model = peft_model(kind)
    merged = copy.deepcopy(model).merge_and_unload()
    merged_in_place = copy.deepcopy(model)
    merged_in_place.merge_adapter()
    for other in (model, merged_in_place):
        assert_passes(verify_checkpoint(merged, other))
        assert_passes(verify_checkpoint(other, merged))
    with torch.no_grad():
        merged.q.weight[0, 0] += 1
    (finding,) = verify_checkpoint(merged, model).findings
    assert str(finding.where["parameter"]).endswith("q.weight")


def test_equal_tensors_with_another_scale_are_another_adapter(tmp_path: Path) -> None:
    for name, changes in (
        ("reference", {}),
        ("renamed", {"inference_mode": False, "task_type": "X", "rank_pattern": None}),
        ("scaled", {"lora_alpha": 32}),
    ):
        folder = tmp_path / name
        peft_model().save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    assert_passes(verify_checkpoint(tmp_path / "renamed", tmp_path / "reference"))
    report = verify_checkpoint(tmp_path / "scaled", tmp_path / "reference")
    (finding,) = report.findings
    assert finding.where["field"] == "lora_alpha in adapter_config.json"
    assert finding.evidence["actual"] == 32
    assert "lora_alpha in adapter_config.json" in report.to_text()
    assert "lora_alpha in adapter_config.json" in report.to_html()


def test_adapters_that_were_dropped_are_missing() -> None:
    model = peft_model()
    base = copy.deepcopy(model).unload()
    report = verify_checkpoint(base, model)
    assert {finding.cause for finding in report.findings} == {"tensor_missing"}
    assert len(report.findings) == 4


def test_each_of_several_adapters_is_found_by_its_tensors(tmp_path: Path) -> None:
    model = peft_model()
    model.add_adapter("second", LoraConfig(**TARGETS))  # type: ignore[arg-type]
    model.save_pretrained(tmp_path)
    for folder, other in ((tmp_path, "second"), (tmp_path / "second", "default")):
        report = verify_checkpoint(folder, model)
        assert_passes(report)
        assert report.verdict.coverage.not_compared[f"adapter {other!r} of the reference"] == "actual holds one adapter"


def test_a_wrong_adapter_is_found(tmp_path: Path) -> None:
    model = peft_model()
    model.save_pretrained(tmp_path)
    saved = load_file(adapter_file(tmp_path))
    first, second = (name for name in saved if "lora_B" in name)
    wrong = {
        "shard_missing": {**saved, first: saved[first][:3].clone()},
        "tensor_of_another_layer": {**saved, first: saved[second].clone()},
        "tensor_missing": {name: value for name, value in saved.items() if name != first},
    }
    for cause, tensors in wrong.items():
        save_file(tensors, adapter_file(tmp_path))
        (finding,) = verify_checkpoint(tmp_path, model).findings
        assert finding.cause == cause


def test_names_are_taken_apart() -> None:
    tuned = ("m.q.lora_A.a.weight", "m.q.lora_magnitude_vector.a.weight", "m.q.ia3_l.b")
    names = AdapterNames.of(["m.q.base_layer.weight", *tuned, "m.norm.weight"])
    assert names.holds_base
    assert names.of_base == {"m.q.weight": "m.q.base_layer.weight", "m.norm.weight": "m.norm.weight"}
    assert names.of_adapter == {
        "a": {
            "m.q.lora_A.weight": "m.q.lora_A.a.weight",
            "m.q.lora_magnitude_vector": "m.q.lora_magnitude_vector.a.weight",
        },
        "b": {"m.q.ia3_l": "m.q.ia3_l.b"},
    }
    assert AdapterNames.of(["m.q.lora_A.weight"]).of_adapter == {"": {"m.q.lora_A.weight": "m.q.lora_A.weight"}}


def test_an_adapter_is_not_a_base_model() -> None:
    adapter = Tensors({"m.q.lora_A.weight": torch.ones(2, 3)})
    base = Tensors({"m.q.weight": torch.zeros(3, 3)})
    causes = [finding.cause for finding in compare_checkpoints(adapter, base).findings]
    assert causes == ["tensor_missing", "tensor_unexpected"]
