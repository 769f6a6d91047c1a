"""Names that a wrapper or a library changed are matched; other names are not guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tpcheck import verify_checkpoint
from tpcheck.checkpoints.names import match_names
from tpcheck.families.build import small_model

FAMILIES = ("llama", "gemma3_text", "gpt2", "gpt_neox", "mixtral", "mamba")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(3)
    return small_model(request.param)


@pytest.mark.parametrize("shard_size", ["50GB", "50KB"])
def test_save_pretrained_writes_the_model(model: Any, shard_size: str, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    for pair in ((tmp_path, model), (model, tmp_path)):
        report = verify_checkpoint(*pair)
        assert report.passed, report
        assert report.verdict.coverage.compared == report.verdict.coverage.total


@pytest.mark.parametrize("wrap", [lambda name: f"module.{name}", lambda name: f"_orig_mod.{name}", lambda name: name])
def test_names_are_read_without_wrappers(model: Any, wrap: Any, tmp_path: Path) -> None:
    torch.save({wrap(name): tensor for name, tensor in model.state_dict().items()}, tmp_path / "pytorch_model.bin")
    report = verify_checkpoint(tmp_path, model)
    assert report.passed, report
    assert bool(report.verdict.subject["names"]) == (wrap("") != "")


def test_of_a_headless_model_only_the_head_is_missing(model: Any, tmp_path: Path) -> None:
    model.base_model.save_pretrained(tmp_path)
    report = verify_checkpoint(tmp_path, model)
    tied = model.config.tie_word_embeddings
    missing = [finding.where["parameter"] for finding in report.findings]
    assert missing == ([] if tied else [missing[0]])
    assert all(finding.cause == "tensor_missing" for finding in report.findings)


def test_a_cast_model_under_other_names_passes(model: Any, tmp_path: Path) -> None:
    from copy import deepcopy

    deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path)
    assert verify_checkpoint(tmp_path, model, dtype="bfloat16").passed


def test_a_missing_tensor_is_found_under_another_name() -> None:
    tensors = {"a.weight": torch.arange(6.0), "b.weight": torch.arange(9.0)}
    (finding,) = verify_checkpoint({"a.weight": tensors["a.weight"], "c.weight": tensors["b.weight"]}, tensors).findings
    assert (finding.where["parameter"], finding.cause) == ("b.weight", "tensor_missing")
    assert finding.evidence["story"] == {"stands_as": "c.weight"}


def test_names_that_become_equal_are_not_renamed() -> None:
    matching = match_names(["module.a", "a", "b"], ["a", "b"])
    assert matching.actual_of == {"a": "a", "b": "b"}
    assert matching.unexpected == ("module.a",)
    assert not matching.renamed


def test_equal_names_are_never_changed() -> None:
    names = ["module.a", "module.b", "model.c"]
    assert match_names(names, names).actual_of == {name: name for name in names}


@pytest.mark.parametrize("prefix", ["module.", "student.", "a.b.c."])
def test_a_prefix_that_all_names_share_is_found_on_either_side(prefix: str) -> None:
    plain, wrapped = ["x.weight", "y.weight"], [f"{prefix}x.weight", f"{prefix}y.weight"]
    assert match_names(wrapped, plain).actual_of == dict(zip(plain, wrapped, strict=True))
    assert match_names(plain, wrapped).actual_of == dict(zip(wrapped, plain, strict=True))


def test_layer_norm_names_of_tensorflow_are_known() -> None:
    matching = match_names(["ln.gamma", "ln.beta"], ["ln.weight", "ln.bias"])
    assert matching.actual_of == {"ln.weight": "ln.gamma", "ln.bias": "ln.beta"}


@pytest.mark.parametrize("ties_embeddings", [True, False])
def test_a_missing_norm_of_ones_is_missing_though_other_norms_equal_it(ties_embeddings: bool) -> None:
    model = small_model("llama", {"tie_word_embeddings": ties_embeddings})
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
    state = dict(model.state_dict())
    missing = next(name for name in state if "norm" in name)
    state.pop(missing)
    (finding,) = verify_checkpoint(state, model).findings
    assert (finding.where["parameter"], finding.cause) == (missing, "tensor_missing")


def test_an_unexpected_norm_of_ones_is_unexpected_though_other_norms_equal_it() -> None:
    tensors = {"a.norm": torch.ones(4), "b.weight": torch.arange(4.0)}
    (finding,) = verify_checkpoint({**tensors, "c.norm": torch.ones(4)}, tensors).findings
    assert (finding.where["parameter"], finding.cause) == ("c.norm", "tensor_unexpected")


def test_a_tie_that_is_stored_twice_is_not_unexpected() -> None:
    weight = torch.zeros(4)
    assert verify_checkpoint({"a": weight, "b": weight}, {"a": weight}).passed
    assert verify_checkpoint({"a": torch.arange(4.0), "b": torch.arange(4.0)}, {"a": torch.arange(4.0)}).passed
