"""The options of a run, and the form of batches among them, are written once."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcheck import Topology, UsageError, verify, verify_family
from tpcheck.model.options import DEFAULTS, FamilyKeywords, Request, RunOptions, Tokens, require_valid

EXPLICIT = {"topology", "backend", "dtype", "zero_stage"}


def test_keywords_for_type_checkers_name_every_option() -> None:
    assert {*FamilyKeywords.__annotations__, *EXPLICIT} == {option.name for option in fields(RunOptions)}


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (
            verify,
            "build batch topology backend dtype device steps zero_stage optimizer accumulate loss attention experts "
            "checkpointing reentrant compile compile_layers loop config checks seed ignore_plan replays timeout shard "
            "layout",
        ),
        (
            verify_family,
            "family topology backend dtype device steps zero_stage optimizer accumulate loss attention experts "
            "checkpointing reentrant compile compile_layers lora loop config checks seed settings batch full "
            "ignore_plan replays timeout",
        ),
    ],
)
def test_signatures_spell_out_every_option_with_its_default(function: Any, names: str) -> None:
    parameters = inspect.signature(function).parameters
    assert list(parameters) == names.split()
    defaults = {**DEFAULTS.keywords(), "config": None, "settings": None}
    for option in parameters.values():
        if option.name in defaults and option.name != "topology":
            assert option.default == defaults[option.name]


@pytest.mark.parametrize("function", [verify, verify_family])
def test_the_docstring_explains_every_option(function: Any) -> None:
    for name in inspect.signature(function).parameters:
        assert f"\n        {name}: " in function.__doc__
    assert max(len(line) for line in function.__doc__.splitlines()) <= 120


@pytest.mark.parametrize("keywords", [{"stepz": 1}, {"settings": {}}])
def test_an_unknown_keyword_is_a_type_error(keywords: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"verify\(\) got an unexpected keyword argument"):
        verify(lambda: None, topology=Topology(tp=2), **keywords)


def test_every_option_but_replays_and_timeout_reaches_the_subject_and_the_command() -> None:
    options = RunOptions.of(
        topology=Topology(tp=4, dp=2), backend="dtensor", dtype="float32", device="cpu", steps=3, zero_stage=1,
        config={"a": 1}, checks=["replicas_agree"], seed=7, settings={"b": True}, batch="1x4", ignore_plan=True,
        replays=3, timeout=9, optimizer={"type": "AdamW"}, accumulate=2, loss="token_mean", attention="sdpa",
        experts="batched_mm", checkpointing=True, reentrant=True, compile=True, compile_layers=True, lora=4,
        loop="trainer",
    )  # fmt: skip
    assert options.subject("llama") == {
        "family": "llama", "backend": "dtensor", "tp": 4, "dp": 2, "zero": 1, "dtype": "float32", "steps": 3,
        "seed": 7, "config": {"a": 1}, "ignore_plan": True, "settings": {"b": True}, "checks": ["replicas_agree"],
        "batch": "1x4", "optimizer": {"type": "AdamW"}, "accumulate": 2, "loss": "token_mean", "attention": "sdpa",
        "experts": "batched_mm", "checkpointing": True, "reentrant": True, "compile": True, "compile_layers": True,
        "lora": 4, "loop": "trainer", "device": "cpu",
    }  # fmt: skip
    assert options.command("llama") == (
        "tpcheck verify llama --backend dtensor --tp 4 --dp 2 --zero 1 --dtype float32 --steps 3 --seed 7 "
        '--config \'{"a": 1}\' --ignore-plan --set b=true --device cpu --optimizer \'{"type": "AdamW"}\' '
        "--accumulate 2 --loss token_mean --attention sdpa --experts batched_mm --checkpointing --reentrant --compile "
        "--compile-layers --lora 4 --loop trainer --checks replicas_agree --batch 1x4"
    )


def test_defaults_are_left_out_of_the_command_and_kept_in_the_subject() -> None:
    assert DEFAULTS.command("llama") == "tpcheck verify llama --tp 2"
    assert DEFAULTS.subject("llama") == {
        "family": "llama", "backend": "deepspeed", "tp": 2, "dp": 1, "zero": 0, "dtype": "float64", "steps": 2,
        "seed": 0, "config": {}, "ignore_plan": False, "settings": {},
    }  # fmt: skip


def test_the_subject_of_a_callers_model_has_no_settings_and_no_batch() -> None:
    options = RunOptions(batch={"x": object()}, settings={"a": 1})
    assert set(options.subject()) == {*DEFAULTS.subject("llama")} - {"family", "settings"}


def test_no_command_repeats_an_optimizer_that_a_function_makes() -> None:
    options = RunOptions(optimizer=list)
    assert options.command("llama") is None


def test_a_batch_in_words_is_parsed_and_the_default_one_is_none() -> None:
    assert RunOptions.of(batch="3x7,padded").batch == Tokens(3, 7, padded=True)
    assert RunOptions.of(batch="2x16").batch is None


def test_options_can_be_keys_of_a_dict() -> None:
    assert len({RunOptions(config={"a": 1}), RunOptions(config={"a": 1}), RunOptions(config={"a": 2})}) == 2


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"config": 3}, "config=3: expected a dict, or None"),
        ({"settings": []}, r"settings=\[\]: expected a dict, or None"),
        ({"checks": "replicas_agree"}, "checks='replicas_agree': expected a list of names"),
        ({"batch": "2by3"}, "batch='2by3'"),
    ],
)
def test_a_value_of_the_wrong_type_is_bad_usage(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RunOptions.of(**keywords)


@pytest.mark.parametrize(
    "change",
    [
        {"topology": 2}, {"backend": "deepsped"}, {"dtype": "int8"}, {"zero_stage": 4}, {"steps": 0}, {"steps": True},
        {"seed": -1}, {"replays": 0}, {"batch": 3}, {"checks": ()}, {"checks": ("no_such_check",)},
    ],
)  # fmt: skip
def test_a_value_that_is_not_accepted_is_bad_usage(change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        require_valid(Request(lambda: None, replace(DEFAULTS, **change)))
    require_valid(Request(lambda: None, DEFAULTS))


@given(st.builds(Tokens, st.integers(1, 99), st.integers(1, 99), st.booleans(), st.booleans()))
def test_parsing_the_text_form_returns_the_same_form(tokens: Tokens) -> None:
    assert Tokens.parse(str(tokens)) == tokens


@pytest.mark.parametrize("text", ["", "3", "x7", "0x7", "3x-1", "3x7,wide", "3x7,padded,padded", "3 x y"])
def test_any_other_text_is_bad_usage(text: str) -> None:
    with pytest.raises(UsageError, match="ROWSxLENGTH"):
        Tokens.parse(text)


def test_a_device_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="None, cpu, cuda"):
        verify_family("llama", topology=Topology(tp=2), device="tpu")
