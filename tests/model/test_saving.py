"""The model is saved in each public way of DeepSpeed, read back, and compared bitwise with the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tpcheck import Topology
from tpcheck.core.phases import listening

CHECK = "checkpoint_matches_reference"


def saved(family: str = "llama", tp: int = 2, dp: int = 1, **options: Any) -> tpcheck.Report:
    topology = Topology(tp=tp, dp=dp)
    return tpcheck.verify_family(family, topology=topology, checks=[CHECK], steps=2, timeout=120, **options)


def kinds(report: tpcheck.Report) -> set[tuple[str, str, str | None]]:
    """Return the ways to save, moments and causes of the findings."""
    return {(finding.where["field"], finding.where["phase"], finding.cause) for finding in report.findings}


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True, "vocab_size": 131}], ids=["plain", "tied"])
def test_save_16bit_model_is_caught_and_explained_and_the_other_ways_pass(settings: dict[str, Any]) -> None:
    phases: list[str] = []
    with listening(phases.append):
        report = saved(zero_stage=1, settings=settings)
    moments = ("before the first step", "after step 1")
    assert [phase for phase in phases if "save_checkpoint" in phase] == [
        f"{CHECK}: save_checkpoint, {moment}" for moment in moments
    ]
    assert "training the sharded model" in phases
    assert [check.check for check in report.verdict.checks] == [CHECK]
    assert kinds(report) == {("save_16bit_model", moment, "shard_missing") for moment in ("start", "saved")}
    assert all(finding.evidence["story"]["tp_rank"] == 0 for finding in report.findings)
    assert "deepspeed.module_inject.layers.GatherReplacedLayerParams" in report.to_text()
    names = report.findings[0].evidence["count_tensors"]
    # four other ways and this one, at two moments
    assert report.verdict.coverage.compared == report.verdict.coverage.total == 10 * names


def test_zero_3_gathers_when_configured_to_and_its_other_ways_pass_over_replicas() -> None:
    gather = {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}}
    one_layer = {"num_hidden_layers": 1}
    report = saved("gemma3_text", dp=2, zero_stage=3, dtype="bfloat16", config=gather, settings=one_layer)
    assert report.passed, report
    assert report.verdict.coverage.compared == report.verdict.coverage.total, report


CALLS = {
    "engine.save_16bit_model": "save_16bit_model",
    "accelerator.get_state_dict(engine)": "consolidated state dict",
    "GatherReplacedLayerParams": "GatherReplacedLayerParams",
    "engine.save_checkpoint": "save_checkpoint",
    "ds_to_universal on that": "universal checkpoint",
}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_doctor_predicts_what_is_saved(stage: int) -> None:
    from tpcheck.doctor.deepspeed import what_is_saved

    report = tpcheck.verify(llama_with_buffers, topology=Topology(tp=2), checks=[CHECK], steps=1, zero_stage=stage)
    wrong = {finding.where["field"] for finding in report.findings}
    nothing = {name.split(": ")[-1] for name in report.verdict.coverage.not_compared}
    predicted = what_is_saved({"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": stage}})
    assert {CALLS[saved.way] for saved in predicted if not saved.is_model} == wrong | nothing


def test_a_way_that_writes_nothing_has_not_passed() -> None:
    report = saved(zero_stage=3)
    assert report.passed, report
    assert set(report.verdict.coverage.not_compared.values()) == {"it wrote nothing"}
    assert report.verdict.coverage.compared < report.verdict.coverage.total


def llama_with_buffers() -> nn.Module:
    """A model with a buffer that is saved, as statistics of an input normalisation are, and one that is not."""
    from tpcheck.families.build import small_model

    model = small_model("llama", {})
    model.register_buffer("mean", torch.arange(5.0))
    model.register_buffer("scratch", torch.zeros(3), persistent=False)
    return model


def test_persistent_buffers_that_consolidation_drops_are_caught() -> None:
    report = tpcheck.verify(llama_with_buffers, topology=Topology(tp=2), checks=[CHECK], timeout=120)
    dropped = {
        (finding.where["parameter"], finding.where["field"], finding.cause)
        for finding in report.findings
        if finding.where["field"] != "save_16bit_model"
    }
    assert dropped == {("mean", "consolidated state dict", "tensor_missing")}


def test_for_a_run_that_never_sharded_the_doctor_names_the_line_to_add() -> None:
    """A saved model as large as without TP means that no parameter was sharded."""
    from tpcheck.doctor.deepspeed import config_advice

    (advice,) = config_advice({"gradient_clipping": 1.0, "zero_optimization": {"stage": 3}})
    assert advice.rule == "tensor_parallelism_is_off"
    assert advice.fix == 'add "tensor_parallel": {"autotp_size": 2}'
    report = tpcheck.verify_family(
        "llama", topology=Topology(tp=2), config={"tensor_parallel": {"partition_config": _PLAN_OF_NOTHING}}
    )
    assert [(finding.check, finding.cause) for finding in report.findings] == [
        ("parameters_are_sharded", "not_sharded")
    ]


_PLAN_OF_NOTHING = {"layer_specs": [{"patterns": [".*\\.weight$"], "partition_type": "skip"}]}
