"""What DeepSpeed saves through each public way is read back and compared with what it should be, to the bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import tpcheck
from tpcheck import Topology

CHECK = "checkpoint_matches_reference"


def saved(family: str = "llama", tp: int = 2, dp: int = 1, **options: Any) -> tpcheck.Report:
    topology = Topology(tp=tp, dp=dp)
    return tpcheck.verify_family(family, topology=topology, checks=[CHECK], steps=2, timeout=120, **options)


def told(report: tpcheck.Report) -> Counter[tuple[str, str, str | None]]:
    """Return how many findings there are for each way to save, moment, and cause."""
    return Counter((one.where["field"], one.where["phase"], one.cause) for one in report.findings)


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True, "vocab_size": 131}], ids=["plain", "tied"])
def test_save_16bit_model_is_caught_and_explained_and_the_other_ways_pass(settings: dict[str, Any]) -> None:
    report = saved(zero_stage=1, settings=settings)
    wrong = told(report)
    assert set(wrong) == {("save_16bit_model", moment, "shard_missing") for moment in ("start", "saved")}
    assert all(finding.evidence["story"]["tp_rank"] == 0 for finding in report.findings)
    assert "engine._consolidated_16bit_state_dict()" in report.to_text()
    names = report.findings[0].evidence["count_tensors"]
    # three other ways and this one, at two moments
    assert report.verdict.coverage.compared == report.verdict.coverage.total == 8 * names


def test_zero_3_gathers_where_it_is_told_to_and_its_other_ways_pass_over_replicas() -> None:
    gather = {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True}}
    report = saved("gemma3_text", dp=2, zero_stage=3, dtype="bfloat16", config=gather)
    assert report.passed, report
    assert report.verdict.coverage.compared == report.verdict.coverage.total, report


CALLS = {
    "engine.save_16bit_model": "save_16bit_model",
    "engine._consolidated_16bit_state_dict()": "consolidated state dict",
    "engine.save_checkpoint": "save_checkpoint",
    "ds_to_universal on that": "universal checkpoint",
}


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_doctor_says_before_what_is_saved_after(stage: int) -> None:
    from tpcheck.doctor.deepspeed import what_is_saved

    report = tpcheck.verify(llama_with_buffers, topology=Topology(tp=2), checks=[CHECK], steps=1, zero_stage=stage)
    wrong = {finding.where["field"] for finding in report.findings}
    nothing = {name.split(": ")[-1] for name in report.verdict.coverage.not_compared}
    foretold = what_is_saved({"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": stage}})
    assert {CALLS[saved.way] for saved in foretold if not saved.is_model} == wrong | nothing


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
        (one.where["parameter"], one.where["field"], one.cause)
        for one in report.findings
        if one.where["field"] != "save_16bit_model"
    }
    assert dropped == {("mean", "consolidated state dict", "tensor_missing")}


def test_the_check_is_asked_only_where_it_is_named() -> None:
    report = tpcheck.verify_family("llama", topology=Topology(tp=2), steps=1)
    assert CHECK not in {check.check for check in report.verdict.checks}


def test_a_run_that_never_sharded_is_told_the_line_to_add() -> None:
    """Why is the saved model as large as without TP? Because TP never started."""
    from tpcheck.doctor.deepspeed import config_advice

    (advice,) = config_advice({"gradient_clipping": 1.0, "zero_optimization": {"stage": 1}})
    assert advice.rule == "tensor_parallelism_is_off"
    assert advice.fix == 'add "tensor_parallel": {"autotp_size": 2}'
    report = tpcheck.verify_family(
        "llama", topology=Topology(tp=2), config={"tensor_parallel": {"partition_config": _PLAN_OF_NOTHING}}
    )
    assert [(one.check, one.cause) for one in report.findings] == [("parameters_are_sharded", "not_sharded")]


_PLAN_OF_NOTHING = {"layer_specs": [{"patterns": [".*\\.weight$"], "partition_type": "skip"}]}
