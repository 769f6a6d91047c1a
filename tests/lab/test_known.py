"""The register of known upstream bugs, and what it says of verdicts."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.report.examples import ERROR, FAILED, PASSED, SKIPPED
from tpcheck.core.check_names import CHECKPOINT_CHECK
from tpcheck.core.findings import Verdict
from tpcheck.lab import known
from tpcheck.lab.fuzz.results import Trial
from tpcheck.lab.known import KnownBug, KnownLayerBug, explained, judge, layer_register, register

ROOT = Path(__file__).parents[2]
SUBJECT = {"family": "phi", "backend": "deepspeed", "tp": 2, "dp": 1, "zero": 0, "dtype": "float64", "config": {}}
ENVIRONMENT = {"deepspeed": "0.19.8", "transformers": "5.23.0"}
BUG = KnownBug(
    name="bug",
    families=("phi",),
    backend="deepspeed",
    versions={"deepspeed": ">=0.19"},
    verdict="failed",
    what="It is wrong.",
    again="",
    check="gradients_match_reference",
    settings={"qk_layernorm": True},
    only={"zero": (0, 1)},
)


@pytest.fixture(autouse=True)
def one_entry(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "entry" not in request.fixturenames:
        monkeypatch.setattr(known, "register", lambda: (BUG,))


def of(verdict: Verdict, environment: dict[str, str] = ENVIRONMENT, **subject: Any) -> Verdict:
    settings = {"settings": {"qk_layernorm": True}}
    return replace(verdict, subject={**SUBJECT, **settings, **subject}, environment=environment)


@pytest.mark.parametrize(("verdict", "standing"), [(FAILED, "known"), (PASSED, "gone"), (ERROR, "new"), (SKIPPED, "")])
def test_a_bug_that_shows_is_known_and_one_that_does_not_is_gone(verdict: Verdict, standing: str) -> None:
    assert judge(of(verdict)).standing == standing


@pytest.mark.parametrize(
    "change",
    [
        {"family": "opt"},
        {"backend": "transformers"},
        {"settings": {}},
        {"settings": {"qk_layernorm": False}},
        {"config": {"x": 1}},
        {"ignore_plan": True},
        {"zero": 2},
        {"checks": ["outputs_match_reference"]},
        {"environment": {**ENVIRONMENT, "deepspeed": "0.18.4"}},
        {"environment": {}},
    ],
)
def test_an_entry_does_not_concern_other_runs(change: dict[str, Any]) -> None:
    assert judge(of(FAILED, **change)).standing == "new"
    assert judge(of(PASSED, **change)).standing == ""


def test_a_failure_that_differs_from_the_registered_one_is_new() -> None:
    other = replace(of(FAILED), findings=tuple(replace(one, check="other") for one in FAILED.findings))
    assert (judge(other).standing, judge(other).bug) == ("new", BUG)


def test_a_crash_is_known_by_its_message_and_is_no_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = replace(BUG, verdict="error", check=None, message="heads")
    monkeypatch.setattr(known, "register", lambda: (crash,))
    assert judge(of(replace(ERROR, message="3 heads on 2 ranks"), checks=["outputs_match_reference"])).bug == crash
    assert judge(of(replace(ERROR, message="out of memory"))).standing == "new"
    assert judge(of(replace(FAILED, message="3 heads on 2 ranks"))).standing == "new"


def test_settings_are_those_of_the_run_or_else_of_the_models_own_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "register", lambda: (replace(BUG, settings={"qk_layernorm": True, "heads": 3}),))
    configuration = {"qk_layernorm": True, "heads": 3}
    assert judge(of(FAILED, settings={}, configuration=configuration)).standing == "known"
    assert judge(of(FAILED, settings={"heads": 4}, configuration=configuration)).standing == "new"


def test_a_model_of_ones_own_may_have_more_backend_configuration_than_the_bug_needs() -> None:
    assert judge(of(FAILED, config={"x": 1}, target="folder")).standing == "known"
    assert judge(of(PASSED, config={"x": 1}, target="folder")).standing == ""


def test_saved_models_are_compared_with_the_register_only_if_they_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saving = replace(BUG, check=CHECKPOINT_CHECK)
    monkeypatch.setattr(known, "register", lambda: (saving,))
    assert judge(of(PASSED)).standing == ""
    assert judge(of(PASSED, checks=[CHECKPOINT_CHECK])).standing == judge(of(PASSED, checks=["all"])).standing == "gone"


def test_a_bug_of_saving_explains_no_other_failure_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "register", lambda: (replace(BUG, check=CHECKPOINT_CHECK),))
    first = replace(FAILED.findings[0], check=CHECKPOINT_CHECK)
    alone, beside = ((first,), (*FAILED.findings, first))
    standings = [judge(of(replace(FAILED, findings=each), checks=["all"])).standing for each in (alone, beside)]
    assert standings == ["known", "new"]


@pytest.mark.parametrize("entry", known.register(), ids=lambda bug: bug.name)
def test_every_entry_of_the_register_has_a_command_that_reproduces_it(entry: KnownBug) -> None:
    assert entry.verdict in ("failed", "error")
    assert entry.what.endswith(".")
    program, *words = shlex.split(entry.again)
    if program == "tpcheck":
        command, family, *_ = words
        assert command == "verify"
        assert family in entry.families
    else:
        assert words[-1] == entry.script
    assert list(entry.families) == sorted(set(entry.families)) or entry.verdict == "failed"
    assert entry.link is None or entry.link.startswith("https://github.com/")


@pytest.mark.parametrize("entry", known.register(), ids=lambda bug: bug.name)
def test_every_silent_bug_has_a_short_program_without_tpcheck(entry: KnownBug) -> None:
    if entry.verdict == "failed":
        assert entry.script is not None
        lines = (ROOT / entry.script).read_text().splitlines()
        assert len(lines) <= 40
        assert not any("tpcheck" in line for line in lines if line.lstrip().startswith(("import", "from")))


@pytest.mark.parametrize("entry", layer_register(), ids=lambda bug: bug.name)
def test_every_entry_of_single_layers_explains_its_own_trial_and_no_other(entry: KnownLayerBug) -> None:
    *_, trial = shlex.split(entry.again)
    tried = Trial.of(json.loads(trial))
    outcome = {"verdict": entry.verdict, "tensor": entry.tensor, "message": entry.message}
    versions = {"deepspeed": "0.19.8", "transformers": "5.23.0", "torch": "2.13.0", "megatron-core": "0.16.1"}
    assert entry.explains(tried, entry.backend, versions, **outcome)
    assert not entry.explains(replace(tried, layer="other"), entry.backend, versions, **outcome)
    assert not entry.explains(tried, "other", versions, **outcome)
    assert not entry.explains(tried, entry.backend, {}, **outcome)
    assert entry.verdict == "error" or entry.script


LAYER_BUG = KnownLayerBug(
    name="layer-bug",
    layers=("Row",),
    backend="deepspeed",
    versions={"deepspeed": ">=0.19"},
    verdict="failed",
    what="It is wrong.",
    again="",
    tensor="output",
    message="shape",
    when={"strides": ("sliced",)},
    options={"comm": {"overlap": True}},
)


@pytest.mark.parametrize(
    ("trial", "outcome"),
    [
        ({"layer": "Column"}, {}),
        ({"strides": "transposed"}, {}),
        ({"options": {"comm": {"overlap": False}, "more": 1}}, {}),
        ({}, {"verdict": "error"}),
        ({}, {"tensor": "bias"}),
        ({}, {"message": "dtype"}),
    ],
)
def test_a_bug_of_layers_explains_only_trials_that_it_describes(trial: dict[str, Any], outcome: dict[str, Any]) -> None:
    described = Trial("Row", strides="sliced", options={"comm": {"overlap": True}, "more": 1})
    expected = {"verdict": "failed", "tensor": "output", "message": "a shape"}
    assert LAYER_BUG.explains(described, "deepspeed", ENVIRONMENT, **expected)
    assert not LAYER_BUG.explains(replace(described, **trial), "deepspeed", ENVIRONMENT, **{**expected, **outcome})


def test_a_program_is_named_where_the_package_has_it_and_else_where_the_source_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert BUG.installed_script is None
    bug = replace(BUG, script="docs/upstream/shows.py")
    monkeypatch.setattr(known, "__file__", str(tmp_path / "tpcheck/lab/known.py"))
    assert bug.installed_script == bug.script
    installed = tmp_path / "tpcheck/upstream/shows.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    assert bug.installed_script == str(installed)


@pytest.mark.parametrize("entry", [*register(), *layer_register()], ids=lambda bug: bug.name)
def test_every_program_exists_and_is_short(entry: KnownBug | KnownLayerBug) -> None:
    assert entry.script is None or len((ROOT / entry.script).read_text().splitlines()) <= 40


def test_in_a_search_a_bug_is_known_also_with_more_configuration() -> None:
    assert explained(of(FAILED, config={"x": 1})) == BUG
    assert explained(of(FAILED, family="opt")) is None
    assert explained(of(ERROR)) is None


def test_a_bug_of_the_backend_alone_is_known_of_any_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known, "register", lambda: (replace(BUG, anywhere=True),))
    assert explained(of(FAILED, family="opt", settings={})) is not None
    assert judge(of(PASSED, family="opt")).standing == ""


def test_names_of_entries_are_distinct() -> None:
    names = [entry.name for entry in (*register(), *layer_register())]
    assert len(names) == len(set(names))
