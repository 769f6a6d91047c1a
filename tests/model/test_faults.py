"""Every check catches a fault planted in real DeepSpeed, at its place, with its cause, and nothing else is named."""

from dataclasses import dataclass
from typing import Any

import pytest

import tpcheck
from tests.model import planting
from tpcheck import Topology
from tpcheck.lab.faults.fault import FaultyBackend
from tpcheck.numerics.checks import CHECK_NAMES

LEAST_MARGIN = 1e3  # of a real bug, in float64


@dataclass(frozen=True)
class Case:
    plant: planting.Plant
    check: str
    place: str | None
    cause: str | None
    ranks: tuple[int, ...] = (0, 1)
    dp: int = 1
    also: tuple[str, ...] = ()


CASES = [
    Case(planting.tp_group_is_the_dp_group, "groups_match_topology", None, "wrong_group", (0, 1, 2, 3), dp=2),
    Case(planting.shard_of_another_place, "weights_match_reference", "model.layers.0.mlp.up_proj", None),
    Case(planting.skips_its_reduce, "outputs_match_reference", "model.layers.1.mlp.down_proj", "missing_reduce"),
    Case(planting.reduces_twice, "outputs_match_reference", "model.layers.0.self_attn.o_proj", "duplicate_reduce"),
    Case(planting.other_epsilon_on_rank_1, "outputs_match_reference", "model.norm", None, ranks=(1,)),
    Case(planting.gradient_times_tp, "gradients_match_reference", "model.layers.1.input_layernorm", "gradient_scaled"),
    Case(planting.partial_gradient, "gradients_match_reference", "model.norm", "partial_gradient_on_replica"),
    Case(
        planting.gradient_never_made,
        "gradients_match_reference",
        "model.layers.0.post_attention_layernorm",
        "gradient_missing",
    ),
    Case(planting.norm_counts_replicas, "gradient_norm_matches_reference", None, "norm_counts_replicas"),
    Case(planting.higher_learning_rate, "updates_match_reference", None, None),
    Case(planting.drifts_on_rank_1, "replicas_agree", "model.norm", "replica_drift"),
    Case(planting.buffer_differs_on_rank_1, "replicas_agree", None, None),
    Case(planting.buffer_moves_on_every_rank, "updates_match_reference", "model.rotary_emb", None),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.plant.__name__)
def test_a_planted_fault_is_caught_in_place(case: Case) -> None:
    report = verified(planting.faulty(case.plant), dp=case.dp)
    assert report.verdict.verdict == "failed"
    first = report.findings[0]
    assert first.check == case.check
    assert first.cause == case.cause
    assert tuple(first.where["ranks"]) == case.ranks
    assert first.margin > LEAST_MARGIN
    if case.check == "groups_match_topology":  # layers that gather over another group tell wrongly how shards lie
        assert all(finding.cause is None for finding in report.findings[1:])
    if case.place is not None:
        assert case.place in (first.where.get("module"), first.where.get("parameter", "").rpartition(".")[0])


def test_a_model_that_tp_never_touched_is_caught() -> None:
    untouched = {
        "tensor_parallel": {"partition_config": {"use_default_specs": False, "layer_specs": [{"patterns": ["^$"]}]}}
    }
    report = tpcheck.verify_family("llama", topology=Topology(tp=2), config=untouched)
    assert [(finding.check, finding.cause) for finding in report.findings] == [
        ("parameters_are_sharded", "not_sharded")
    ]


def test_each_check_has_a_fault() -> None:
    assert {case.check for case in CASES} | {"parameters_are_sharded"} == set(CHECK_NAMES)


def test_the_same_run_without_a_fault_passes_every_check() -> None:
    report = verified(planting.faulty(nothing), dp=2)
    assert report.passed
    assert {check.check for check in report.verdict.checks} == set(CHECK_NAMES)
    assert all(check.compared > 0 for check in report.verdict.checks)
    assert max(check.worst_margin for check in report.verdict.checks) < 0.2
    assert report.verdict.coverage.compared == report.verdict.coverage.total


def test_only_the_checks_that_were_asked_for_are_run() -> None:
    report = verified(planting.faulty(planting.skips_its_reduce), checks=["weights_match_reference"])
    assert report.passed
    assert [check.check for check in report.verdict.checks] == ["weights_match_reference"]


def nothing(candidate: Any, rank: Any) -> None:
    """Plant no fault."""


def verified(backend: FaultyBackend, dp: int = 1, **options: Any) -> tpcheck.Report:
    return tpcheck.verify_family("llama", topology=Topology(tp=2, dp=dp), backend=backend, timeout=120, **options)
