"""Faults of the layout of weights and heads are caught in place, by name."""

import pytest

import tpcheck
from tests.faults.finding import require_found
from tpcheck import Topology
from tpcheck.faults import Live, ModelFault, PlantedBackend, heads, layout

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


def test_what_a_module_makes_of_wrong_weights_follows_from_them() -> None:
    name = "model.layers.0.mlp.up_proj"

    def plant(live: Live) -> None:
        layout.fill(live, f"{name}.weight", lambda shards: shards[live.tp_rank] * 1.5)
        live.module("model.norm").variance_epsilon *= 10

    report = tpcheck.verify_family("llama", topology=Topology(tp=2), backend=PlantedBackend(plant), replays=2)
    made = next(finding for finding in report.findings if finding.where.get("field") == "output 0")
    assert made.where["module"] == name
    assert made.evidence["follows_from"] == "weights_match_reference"
