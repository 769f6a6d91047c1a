"""Several faults in one model: which findings they make, and what a finding says of the others."""

from __future__ import annotations

from torch.nn import functional

import tpcheck
from tpcheck import Finding, Report, Topology
from tpcheck.lab.faults import layout
from tpcheck.lab.faults.fault import FaultyBackend, Live

UP, DOWN = "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"


def findings(report: Report, check: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.check == check]


def skip_reduce(live: Live, name: str) -> None:
    layer = live.module(name)
    layer.forward = lambda hidden: hidden @ layer.weight.t()


def test_two_faults_of_the_forward_pass_are_both_reported_though_the_first_feeds_the_second() -> None:
    def inject(live: Live) -> None:
        skip_reduce(live, DOWN.format(0))
        layer = live.module(DOWN.format(1))
        right = layer.forward
        layer.forward = lambda hidden: right(hidden) * live.tp  # as a second all-reduce of replicas

    report = tpcheck.verify_family("llama", topology=Topology(tp=2), backend=FaultyBackend(inject), replays=2, steps=1)
    first, second = findings(report, "outputs_match_reference")
    assert (first.where["module"], first.cause) == (DOWN.format(0), "missing_reduce")
    assert (second.where["module"], second.cause) == (DOWN.format(1), "duplicate_reduce")
    assert not second.evidence["inputs_agree"]
    assert first.evidence["collectives"] == []
    assert first.evidence["collectives_expected"] == [{"name": "all_reduce", "ranks": [0, 1]}]
    assert "expected 1 all_reduce over ranks 0, 1, as in model.layers.1.mlp.down_proj" in report.to_text()


def test_two_faults_of_the_backward_pass_and_frozen_parameters_are_all_reported() -> None:
    attention, frozen = "model.layers.0.self_attn.q_proj", [f"{UP.format(0)}.weight", f"{UP.format(1)}.weight"]

    def inject(live: Live) -> None:
        layer = live.module(attention)
        layer.forward = lambda hidden: functional.linear(hidden, layer.weight)
        live.parameter("model.norm.weight").register_hook(lambda gradient: gradient * 2)
        for name in frozen:
            live.parameter(name).requires_grad_(False)

    report = tpcheck.verify_family("llama", topology=Topology(tp=2), backend=FaultyBackend(inject), replays=2, steps=1)
    by_cause = {finding.cause: finding for finding in findings(report, "gradients_match_reference")}
    assert set(by_cause) == {"missing_reduce", "gradient_scaled", "gradient_missing"}
    assert by_cause["missing_reduce"].where["module"] == attention
    assert by_cause["gradient_scaled"].where["module"] == "model.norm"
    missing = by_cause["gradient_missing"]
    assert [missing.where["parameter"], *missing.evidence["also"]] == frozen


def test_gradients_with_one_cause_are_one_finding() -> None:
    report = tpcheck.verify_family("qwen3", topology=Topology(tp=2), ignore_plan=True, replays=2, steps=1)
    (finding,) = findings(report, "gradients_match_reference")
    assert finding.cause == "partial_gradient_on_replica"
    assert {finding.where["parameter"], *finding.evidence["also"]} == {
        f"model.layers.{layer}.self_attn.{norm}.weight" for layer in (0, 1) for norm in ("q_norm", "k_norm")
    }


def test_wrong_weights_with_two_causes_are_two_findings() -> None:
    def inject(live: Live) -> None:
        for layer in (0, 1):
            layout.fill(live, f"{UP.format(layer)}.weight", lambda shards: shards[1 - live.tp_rank])
        layout.fill(live, f"{DOWN.format(1)}.weight", lambda shards: shards[0])

    report = tpcheck.verify_family("llama", topology=Topology(tp=2), backend=FaultyBackend(inject), replays=2, steps=1)
    swapped, repeated = findings(report, "weights_match_reference")
    assert (swapped.where["parameter"], swapped.cause) == (f"{UP.format(0)}.weight", "shard_order_swapped")
    assert swapped.evidence["also"] == [f"{UP.format(1)}.weight"]
    assert (repeated.where["parameter"], repeated.cause) == (f"{DOWN.format(1)}.weight", "shard_repeated")
    assert repeated.where["ranks"] == [1]


def test_findings_on_a_module_with_wrong_weights_follow_from_those_on_the_weights() -> None:
    def inject(live: Live) -> None:
        layout.fill(live, f"{UP.format(0)}.weight", lambda shards: shards[live.tp_rank] * 1.5)
        live.parameter("model.norm.weight").data.mul_(1 + 0.5 * live.tp_rank)

    report = tpcheck.verify_family("llama", topology=Topology(tp=2), backend=FaultyBackend(inject), replays=2, steps=1)
    output, replica = (findings(report, check)[0] for check in ("outputs_match_reference", "replicas_agree"))
    assert output.where["module"] == UP.format(0)
    assert replica.where["parameter"] == "model.norm.weight"
    for finding in (output, replica):
        assert finding.evidence["follows_from"] == "weights_match_reference"
