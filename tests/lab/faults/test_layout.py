"""Faults of the layout of weights and heads are caught in place, by name."""

import pytest

import tpcheck
from tests.lab.faults.finding import require_found
from tpcheck import Topology
from tpcheck.lab.faults import heads, layout
from tpcheck.lab.faults.fault import Live, ModelFault, PlantedBackend

FAULTS = {fault.name: fault for fault in (*layout.FAULTS, *heads.FAULTS)}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_caught_in_place_and_named(fault: ModelFault) -> None:
    require_found(fault)


def test_weights_with_two_stories_are_two_findings() -> None:
    def plant(live: Live) -> None:
        for layer in (0, 1):
            layout.fill(live, f"model.layers.{layer}.mlp.up_proj.weight", lambda shards: shards[1 - live.tp_rank])
        layout.fill(live, "model.layers.1.mlp.down_proj.weight", lambda shards: shards[0])

    report = tpcheck.verify_family("llama", topology=Topology(tp=2), backend=PlantedBackend(plant))
    swapped, repeated = (finding for finding in report.findings if finding.check == "weights_match_reference")
    assert (swapped.where["parameter"], swapped.cause) == ("model.layers.0.mlp.up_proj.weight", "shard_order_swapped")
    assert swapped.evidence["also"] == ["model.layers.1.mlp.up_proj.weight"]
    assert (repeated.where["parameter"], repeated.cause) == ("model.layers.1.mlp.down_proj.weight", "shard_repeated")
    assert repeated.where["ranks"] == [1]


def test_what_other_checks_say_of_a_module_with_wrong_weights_follows_from_them() -> None:
    linear, norm = "model.layers.0.mlp.up_proj", "model.norm"

    def plant(live: Live) -> None:
        layout.fill(live, f"{linear}.weight", lambda shards: shards[live.tp_rank] * 1.5)
        live.parameter(f"{norm}.weight").data.mul_(1 + 0.5 * live.tp_rank)

    report = tpcheck.verify_family("llama", topology=Topology(tp=2), backend=PlantedBackend(plant), replays=2)
    found = {one.check: one for one in reversed(report.findings)}  # the first of each check
    assert found["outputs_match_reference"].where["module"] == linear
    assert found["replicas_agree"].where["parameter"] == f"{norm}.weight"
    for check in ("outputs_match_reference", "replicas_agree"):
        assert found[check].evidence["follows_from"] == "weights_match_reference"
