"""A folder's configuration is read, made small and built; what it cannot give is said in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tpcheck.core.errors import UsageError
from tpcheck.families.build import small_config, small_model
from tpcheck.families.folders import read_folder

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

MIXTRAL = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
    "bos_token_id": 31999,
    "sliding_window": 4096,
    "attention_dropout": 0.1,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "mixtral", **MIXTRAL)


def write(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_is_made_small_and_trains(folder: Path) -> None:
    read = read_folder(str(folder), {"rms_norm_eps": 0.5}, tp=8)
    of_file = read_folder(str(folder / "config.json"), {"rms_norm_eps": 0.5}, tp=8)
    assert (of_file.family, of_file.config, of_file.shrunk) == (read.family, read.config, read.shrunk)
    config = small_config(read)
    assert (config.num_attention_heads, config.num_key_value_heads, config.hidden_size) == (32, 8, 256)
    assert (config.num_local_experts, config.num_experts_per_tok, config.sliding_window) == (8, 2, 8)
    assert (config.rms_norm_eps, config.attention_dropout, config.bos_token_id) == (0.5, 0.0, 1)
    assert read.shrunk["num_hidden_layers"] == (32, 2)
    assert "num_key_value_heads" not in read.shrunk
    tokens_BL = torch.randint(config.vocab_size, (2, 8))
    assert small_model(read)(input_ids=tokens_BL, labels=tokens_BL).loss.isfinite()


def test_full_keeps_every_size(folder: Path) -> None:
    read = read_folder(str(folder), {}, tp=2, full=True)
    assert read.shrunk == {}
    assert {name: read.config[name] for name in ("hidden_size", "num_hidden_layers")} == {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
    }


def test_an_architecture_selects_the_head(tmp_path: Path) -> None:
    bert = {"model_type": "bert", "hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12}
    masked = read_folder(str(write(tmp_path / "bert", **bert, architectures=["BertForMaskedLM"])), {}, tp=2)
    assert masked.family == "bert/masked"
    assert type(small_model(masked)).__name__ == "BertForMaskedLM"
    classifier = read_folder(str(write(tmp_path / "c", **bert, architectures=["BertForTokenClassification"])), {}, tp=2)
    assert any("BertForTokenClassification is not built" in note for note in classifier.notes)


def test_code_of_the_folder_is_not_run_and_quantization_is_left_out(folder: Path) -> None:
    (folder / "modeling_x.py").write_text("raise SystemExit('run')")
    remote = {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "quantization_config": {"quant_method": "fp8"}}
    read = read_folder(str(write(folder, **MIXTRAL, **remote)), {}, tp=2)
    assert any("auto_map) is not run" in note for note in read.notes)
    assert any("quantization is left out" in note for note in read.notes)
    small_model(read)
    unknown = write(folder, **{**MIXTRAL, **remote, "model_type": "mixtrall"})
    with pytest.raises(UsageError, match=r"not 'mixtrall'; did you mean mixtral .* never run: write a function"):
        read_folder(str(unknown), {}, tp=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"valid JSON in config\.json"),
        ("[]", r"a JSON object in config\.json"),
        ("{}", "which has a model_type"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "a configuration that transformers reads"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_folder(str(tmp_path), {}, tp=2)


def test_a_folder_without_a_configuration_names_the_one_inside(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-10", **MIXTRAL)
    with pytest.raises(UsageError, match="checkpoint-10 inside it has one"):
        read_folder(str(tmp_path), {}, tp=2)


def test_a_hub_id_is_read_from_the_local_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match=r"tpcheck downloads nothing: `hf download some/model config\.json`"):
        read_folder("some/model", {}, tp=2)
    cached = tmp_path / "models--some--model"
    (cached / "snapshots").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    write(cached / "snapshots" / "abc", **MIXTRAL)
    assert read_folder("some/model", {}, tp=2).family == "mixtral"
