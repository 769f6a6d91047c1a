"""Folders and functions of the user's are verified as families are, under the name that the user gave."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from tests.schema import document
from tests.snippets import snippets
from tpcheck.core.errors import UsageError
from tpcheck.core.topology import Topology
from tpcheck.model.options import RunOptions
from tpcheck.model.targets import is_family, resolve
from tpcheck.model.user_code import UserFunction
from tpcheck.model.verify import verify_family

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]

QWEN3 = {"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8}
QWEN3 |= {"head_dim": 128, "num_hidden_layers": 28, "vocab_size": 151936, "intermediate_size": 3072}

CODE = next(
    each.text for each in snippets(ROOT / "docs/guides/own-model.md") if each.test == "verified with --backend custom"
)


def written(path: Path, code: str) -> str:
    path.write_text(dedent(code))
    return f"{path}:build"


@pytest.mark.parametrize("name", ["llama", "t5", "bart/seq2seq"])
def test_a_bare_name_is_a_family(name: str) -> None:
    assert is_family(name)


@pytest.mark.parametrize("name", ["./llama", "/a/b", "config.json", "Qwen/Qwen3-8B", "model.py:build", "a.b:c", "m.py"])
def test_paths_hub_ids_and_functions_are_no_families(name: str) -> None:
    assert not is_family(name)


def test_a_folder_is_named_as_given_and_belongs_to_its_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small").mkdir()
    Path("small/config.json").write_text(json.dumps(QWEN3))
    options = RunOptions(topology=Topology(tp=8), settings={"num_hidden_layers": 3})
    for name in ("./small", "small", "small/config.json"):
        target = resolve(name, options)
        subject = target.subject
        assert (subject["target"], subject["family"], target.name) == (name, "qwen3", name)
        assert subject["shrunk"]["hidden_size"] == [1024, 64]  # half as wide as its heads, as the real one
        assert "num_hidden_layers" not in subject["shrunk"]  # the user's own
        assert subject["configuration"]["num_key_value_heads"] == 8
        assert options.command(name) == f"tpcheck verify {name} --tp 8 --set num_hidden_layers=3"


@pytest.mark.parametrize("option", [{"full": True}, {"lora": 4}, {"settings": {"a": 1}}])
def test_options_of_a_configuration_do_not_apply_to_a_function(tmp_path: Path, option: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="the function that builds the model sets"):
        resolve(written(tmp_path / "model.py", CODE), RunOptions.of(**option))


def test_a_family_has_no_other_sizes() -> None:
    with pytest.raises(UsageError, match="full=True: expected False: llama is a family"):
        resolve("llama", RunOptions(full=True))


def test_a_model_that_does_not_fit_is_refused_at_full_size(tmp_path: Path) -> None:
    wide = {**QWEN3, "hidden_size": 2**17, "num_hidden_layers": 90}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    with pytest.raises(UsageError, match=r"billion parameters in float64 on 8 ranks .* GiB are free"):
        resolve(str(tmp_path), RunOptions(full=True, topology=Topology(tp=8)))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import missing_package", r"it raised ModuleNotFoundError: No module named 'missing_package'\nTraceback"),
        ("def build(:", "it raised SyntaxError"),
        ("raise SystemExit(3)", "it raised SystemExit: 3"),
        ("def biuld(): ...", r"a function of model_\d+\.py, which has no build; did you mean biuld\?"),
        ("def build(config): ...", "a function without arguments .missing a required argument: 'config'."),
        ("def build(): return 3", r"returns a torch\.nn\.Module; it returned int"),
        ("build = 3", "a function that makes a new model at each call; it is a int"),
        ("from torch import nn\nbuild = nn.Linear(2, 2)", "at each call; it is a Linear"),
        ("def build():\n    return {}['width']", r"it raised KeyError: 'width'\nTraceback .*return {}\['width'\]"),
    ],
)
def test_what_is_wrong_with_a_function_is_a_sentence(tmp_path: Path, code: str, message: str) -> None:
    path = tmp_path / f"model_{abs(hash(code))}.py"
    function = UserFunction.parse(written(path, code))
    with pytest.raises(UsageError, match=f"(?s){message}") as caught:
        function()
    assert "user_code.py" not in str(caught.value)
    sys.path.remove(str(tmp_path))


@pytest.mark.parametrize("name", ["nothing.py:build", "model.py", "model.py:", ":build", "a-b:c"])
def test_a_function_is_looked_for_before_ranks_start(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.py").touch()
    with pytest.raises(UsageError, match="target="):
        resolve(name, RunOptions())


@pytest.mark.parametrize("forgets", [False, True])
def test_a_function_with_its_own_sharding_passes_and_a_forgotten_reduction_is_named(
    tmp_path: Path, forgets: bool
) -> None:
    reduces = "            y = Reduce.apply(y, self.group)"
    assert reduces in CODE
    name = written(tmp_path / f"model_{forgets}.py", CODE.replace(reduces, "            pass") if forgets else CODE)
    report = verify_family(name, topology=Topology(tp=2), backend="custom", steps=1, replays=2)
    assert report.verdict.subject["target"] == name
    assert report.passed is not forgets
    if forgets:
        assert (report.findings[0].cause, report.findings[0].where["module"]) == ("missing_reduce", "down")
        assert report.findings[0].again == f"tpcheck verify {name} --backend custom --tp 2 --steps 1"


def test_a_package_is_imported_from_here_on_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("somewhere").mkdir()
    Path("somewhere/models.py").write_text("def build():\n    raise ValueError('here')")
    with pytest.raises(UsageError, match=r"(?s)it raised ValueError: here\nTraceback.*somewhere/models\.py"):
        verify_family("somewhere.models:build", topology=Topology(tp=2), steps=1)


def test_a_folder_under_a_configuration_of_its_own_says_what_took_no_part(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    config = {
        "bf16": {"enabled": "auto"},
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}},
        "wall_clock_breakdown": True,
    }
    report = verify_family(
        str(tmp_path), topology=Topology(tp=2), zero_stage=1, accumulate=2, config=config, steps=1, replays=2
    )
    assert report.passed
    text = report.to_text()
    assert "hidden_size 1024 -> " in text
    assert "hardware alone: wall_clock_breakdown, zero_optimization.offload_optimizer" in " ".join(text.split())
    assert len(document(report.to_json(), "report")["notes"]) == 3
    assert "<dt>shrunk</dt><dd>hidden_size 1024" in report.to_html()
