"""Faults of forward collectives and of vocabulary parallelism are caught in place, by name."""

import random

import pytest

import tpcheck
from tests.lab.faults.finding import require_found
from tpcheck import Topology
from tpcheck.lab.faults import column_parallel, row_parallel, vocabulary
from tpcheck.lab.faults.fault import Draw, Live, ModelFault, PlantedBackend, Planting

FAULTS = {fault.name: fault for fault in (*row_parallel.FAULTS, *column_parallel.FAULTS, *vocabulary.FAULTS)}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_caught_in_place_and_named(fault: ModelFault) -> None:
    require_found(fault)


def test_faults_in_two_layers_are_both_reported_though_the_first_feeds_the_second() -> None:
    def plant(live: Live) -> None:
        for name, layer in (("row_parallel_reduce_skipped", 0), ("row_parallel_reduced_twice", 1)):
            planted(name, f"model.layers.{layer}.mlp.down_proj").plant(live)

    report = tpcheck.verify_family("llama", topology=Topology(tp=2), backend=PlantedBackend(plant))
    first, second = (finding for finding in report.findings if finding.check == "outputs_match_reference")
    assert (first.where["module"], first.cause) == ("model.layers.0.mlp.down_proj", "missing_reduce")
    assert (second.where["module"], second.cause) == ("model.layers.1.mlp.down_proj", "duplicate_reduce")
    assert not second.evidence["inputs_agree"]


def test_a_finding_tells_which_collective_was_expected() -> None:
    report = tpcheck.verify_family(
        "llama",
        topology=Topology(tp=2),
        backend=PlantedBackend(planted("row_parallel_reduce_skipped", "model.layers.1.self_attn.o_proj").plant),
    )
    evidence = report.findings[0].evidence
    assert evidence["collectives"] == []
    assert evidence["collectives_expected"] == [{"name": "all_reduce", "ranks": [0, 1]}]
    assert "expected 1 all_reduce over ranks 0, 1, as in model.layers.0.self_attn.o_proj" in report.to_text()


def planted(name: str, module: str) -> Planting:
    fault = FAULTS[name]
    return fault.draw(Draw(random.Random(0), (module,), {}, fault.topology))
