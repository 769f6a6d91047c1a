"""A fault that shows under one setting alone is found and shrunk to it; what is printed repeats it.

Configurations are drawn from what a family has, and from nothing that the user has fixed.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tpcheck import UsageError
from tpcheck.backends.interface import TrainingOptions
from tpcheck.families.build import dimensions
from tpcheck.lab.faults.fault import FaultyBackend, Live
from tpcheck.lab.fuzz.family import family_examples, fuzz_family, outcome_of
from tpcheck.lab.fuzz.results import Outcome, SearchResult
from tpcheck.lab.fuzz.search import Bounds, Limits
from tpcheck.model.options import RunOptions, Tokens

NARROW = Bounds(tp=(2,), dp=(1,), zero=(0,), dtype=("float64",))
SIZES = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16}
SMALL = {**SIZES, "num_hidden_layers": 1, "vocab_size": 16, "attention_bias": False, "tie_word_embeddings": False}


def scales_the_bias(live: Live) -> None:
    mlp: Any = live.candidate.module.get_submodule("model.layers.0.mlp")
    if mlp.up_proj.bias is not None:
        mlp.up_proj.bias.data.mul_(2)


def does_nothing(live: Live) -> None: ...


def searched(inject: Any, examples: int) -> SearchResult:
    common = RunOptions(backend=FaultyBackend(inject), steps=1, settings=SMALL)
    return fuzz_family("llama", NARROW, common, Limits(examples), lambda outcome, *, shrinking: None)


def test_a_fault_that_needs_a_setting_is_shrunk_to_that_setting() -> None:
    result = searched(scales_the_bias, examples=8)
    assert result.verdict == "failed"
    command = shlex.split(result.found[0].outcome.command)
    assert "--batch" not in command
    assert "mlp_bias=true" in command
    assert result.found[0].is_reproducible
    first = result.found[0].outcome.data.findings[0]
    assert (first.check, first.where["parameter"]) == ("weights_match_reference", "model.layers.0.mlp.up_proj.bias")


def test_without_the_fault_nothing_is_found() -> None:
    result = searched(does_nothing, examples=3)
    assert (result.verdict, result.count("passed")) == ("passed", 3)


@pytest.mark.parametrize(("known", "status"), [(False, "failed"), (True, "known")])
def test_an_upstream_bug_is_known_and_its_command_repeats_it(known: bool, status: str) -> None:
    of_model, config = {"qk_layernorm": True, "vocab_size": 20}, {"gradient_clipping": 0.5}
    options = RunOptions.of(steps=1, settings=of_model, config=config, batch="1x5")
    outcome = outcome_of("phi", options, known=known)
    assert outcome.status == status
    if known:
        assert outcome.kind == "deepspeed-phi-qk-layernorm"
        return
    from tpcheck.cli import app

    again = CliRunner().invoke(app, shlex.split(outcome.command)[1:])
    assert again.exit_code == 1
    assert outcome.data.findings[0].check in again.stdout


def test_what_the_model_refuses_is_no_finding_and_needs_no_world() -> None:
    outcome = outcome_of("llama", RunOptions(settings={"num_attention_heads": 3}))
    assert (outcome.status, outcome.data) == ("refused", None)
    assert "multiple of the number of attention heads" in outcome.reason


@pytest.mark.parametrize(
    ("message", "status", "kind"),
    [
        ("deepspeed, sharding the model: ValueError: 3 heads over 2 ranks", "refused", ""),
        ("deepspeed, sharding the model: KeyError: 'x'", "error", "error sharding the model KeyError 'x'"),
        (
            "deepspeed, forward of step 0: ValueError: 3 is not 4",
            "error",
            "error forward of step 0 ValueError N is not N",
        ),
        ("rank 1 of 2 died by SIGSEGV", "error", "error of a rank"),
    ],
)
def test_a_refusal_is_no_crash(monkeypatch: pytest.MonkeyPatch, message: str, status: str, kind: str) -> None:
    from tpcheck.core.findings import Verdict
    from tpcheck.lab.fuzz import family
    from tpcheck.report.report import Report

    verdict = Verdict("error", {"family": "llama", "backend": "deepspeed"}, {}, message=message)
    monkeypatch.setattr(family, "verify_family", lambda *args, **kwargs: Report(verdict))
    outcome: Outcome = outcome_of("llama", RunOptions())
    assert (outcome.status, outcome.kind) == (status, kind)


def test_an_unknown_family_is_bad_usage() -> None:
    with pytest.raises(UsageError, match="did you mean llama"):
        fuzz_family("lama", NARROW, RunOptions(), Limits(1), lambda outcome, *, shrinking: None)


class Backend:
    """Has two ZeRO stages and an option; shards nothing."""

    name = "two stages"

    def resolved(self, options: TrainingOptions) -> TrainingOptions:
        if options.zero_stage > 1:
            raise UsageError("zero_stage", options.zero_stage, "0 or 1")
        return options

    def config_variants(self) -> Sequence[Mapping[str, Any]]:
        return ({"a": {"b": 1}}, {"a": {"c": 2}})

    def shard(self) -> None: ...


BACKEND: Any = Backend()


def examples(bounds: Bounds = Bounds(), **fixed: Any) -> st.SearchStrategy[RunOptions]:  # noqa: B008 - immutable
    return family_examples("llama", bounds, RunOptions(backend=BACKEND, **fixed))


quickly = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
LLAMA = examples()
FIXED = examples(settings={"vocab_size": 33}, config={"a": {"b": 7}})


@quickly
@given(LLAMA)
def test_what_is_drawn_is_what_the_family_and_the_backend_have(drawn: RunOptions) -> None:
    there = dimensions("llama")
    names = {name for of_role in there.names.values() for name in of_role}
    assert set(drawn.settings) <= names | set(there.switches)
    assert drawn.zero_stage in (0, 1)
    assert drawn.config in ({}, {"a": {"b": 1}}, {"a": {"c": 2}}, {"a": {"b": 1, "c": 2}})
    assert drawn.batch is None or isinstance(drawn.batch, Tokens)


@quickly
@given(FIXED)
def test_what_is_fixed_stays(drawn: RunOptions) -> None:
    assert drawn.settings["vocab_size"] == 33
    assert drawn.config["a"]["b"] == 7


def test_options_of_the_backend_are_drawn() -> None:
    every_option = {"a": {"b": 1, "c": 2}}
    assert find(LLAMA, lambda drawn: drawn.config == every_option, settings=settings(quickly, max_examples=500))


def test_the_smallest_is_a_plain_verification() -> None:
    smallest = find(LLAMA, lambda drawn: True, settings=quickly)
    assert smallest == RunOptions(backend=BACKEND)


def test_a_backend_with_none_of_the_stages_lists_its_own() -> None:
    with pytest.raises(UsageError, match="0 or 1"):
        examples(Bounds(zero=(2, 3)))


@pytest.mark.parametrize("bad", [{"tp": [0]}, {"dp": [-1]}, {"zero": [4]}, {"dtype": ["int8"]}])
def test_invalid_bounds_are_bad_usage(bad: dict[str, Any]) -> None:
    good = {"tp": [2], "dp": [1], "zero": [0], "dtype": ["float64"]}
    with pytest.raises(UsageError):
        Bounds.of(**{**good, **bad})
