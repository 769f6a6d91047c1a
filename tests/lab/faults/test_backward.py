"""Every fault of the backward pass is caught at float64, at its place, with its cause."""

import pytest
from torch.nn import functional

import tpcheck
from tests.lab.faults.finding import require_found
from tpcheck import Topology
from tpcheck.lab.faults import gradients, input_gradients, partial_gradients
from tpcheck.lab.faults.fault import Live, ModelFault, PlantedBackend

FAULTS = (*input_gradients.FAULTS, *partial_gradients.FAULTS, *gradients.FAULTS)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught_placed_and_explained(fault: ModelFault) -> None:
    require_found(fault)


def test_two_independent_faults_are_both_reported() -> None:
    attention = "model.layers.0.self_attn.q_proj"
    norm = "model.norm.weight"

    def both(live: Live) -> None:
        layer = live.module(attention)
        layer.forward = lambda hidden: functional.linear(hidden, layer.weight)
        live.parameter(norm).register_hook(lambda gradient: gradient * 2)

    report = tpcheck.verify_family("llama", topology=Topology(tp=2), backend=PlantedBackend(both))
    found = {
        (finding.where.get("module"), finding.cause)
        for finding in report.findings
        if finding.check == "gradients_match_reference"
    }
    assert found == {(attention, "missing_reduce"), ("model.norm", "gradient_scaled")}


def test_all_frozen_parameters_are_one_finding() -> None:
    frozen = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"]

    def freeze(live: Live) -> None:
        for name in frozen:
            live.parameter(name).requires_grad_(False)

    report = tpcheck.verify_family("llama", topology=Topology(tp=2), backend=PlantedBackend(freeze), steps=1)
    (found,) = (one for one in report.findings if one.check == "gradients_match_reference")
    assert [found.where["parameter"], *found.evidence["also"]] == frozen
    assert found.cause == "gradient_missing"


def test_gradients_that_tell_one_story_are_one_finding() -> None:
    report = tpcheck.verify_family("qwen3", topology=Topology(tp=2), ignore_plan=True)
    first, *others = (one for one in report.findings if one.check == "gradients_match_reference")
    assert first.cause == "partial_gradient_on_replica"
    assert not others
    assert {first.where["parameter"], *first.evidence["also"]} == {
        f"model.layers.{layer}.self_attn.{norm}.weight" for layer in (0, 1) for norm in ("q_norm", "k_norm")
    }
