"""Every finding answers: what differs, where, by how much, why, and how to see it again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.report.examples import FAILED, GRADIENT, GROUPS, NORM, OUTPUT, REPLICAS, SHAPE, SUBJECT, WEIGHT
from tpcheck.core.findings import Finding, with_nodes
from tpcheck.report.findings import finding_lines, place
from tpcheck.report.report import Report
from tpcheck.report.words import as_text


def text(finding: Finding) -> str:
    return as_text(finding_lines(finding, SUBJECT))


def test_a_calibrated_finding() -> None:
    assert (
        text(GRADIENT)
        == """\
gradients_match_reference  model.layers.0.self_attn.q_norm.weight
  where     deepspeed, tp=2, backward of step 0; first wrong tensor of 4; inputs of the module agree
  observed  relative error 8.2e-01 (largest 6.6e-02 at [6]) on ranks 0, 1
  allowed   4.2e-14 (float64, 8 perturbed replays); margin 2.0e+13
  cause     partial_gradient_on_replica: the sum of the ranks' gradients equals the expected one to 1.8e-15
  again     tpcheck verify qwen3 --tp 2 --ignore-plan
"""
    )


def test_a_finding_that_is_not_finite() -> None:
    assert (
        text(OUTPUT)
        == """\
outputs_match_reference  (the whole model) loss
  where     deepspeed, tp=2, forward of step 1; inputs of the module differ already
  observed  relative error inf (largest nan) on rank 1
  allowed   1.0e-13 (bfloat16, 1 perturbed replay); margin inf
  cause     not_finite: some elements are infinite or not a number
"""
    )


def test_a_gradient_norm() -> None:
    assert (
        text(NORM)
        == """\
gradient_norm_matches_reference
  where     deepspeed, tp=2, optimizer step 1
  observed  norm 1 and 1.5, expected 1: relative error 5.0e-01 on rank 1
  allowed   1.0e-13 (float64, 8 perturbed replays); margin 5.0e+12
  cause     unknown: none of the known causes explains it
"""
    )


def test_replicas_that_drifted_apart() -> None:
    assert (
        text(REPLICAS)
        == """\
replicas_agree  gradient q.weight over tp
  where     deepspeed, tp=2, optimizer step 0
  observed  2 tensors differ on ranks 0, 1
  allowed   0 (this check is exact)
  cause     replica_drift: the replicas were equal and have drifted apart
  also      parameter q.weight
  evidence  gradients 1, parameters 1
"""
    )


def test_a_weight_that_differs_on_many_ranks() -> None:
    assert (
        text(WEIGHT)
        == """\
weights_match_reference  lm_head.weight
  where     deepspeed, tp=2, dp rank 1, before the first step
  observed  1 of 128 elements differs (largest 5.0e-01 at [0, 3]) on ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more
  allowed   0 (this check is exact)
  cause     unknown: none of the known causes explains it
"""
    )


def test_a_weight_of_another_shape() -> None:
    assert (
        text(SHAPE)
        == """\
weights_match_reference  lm_head.weight
  where     deepspeed, tp=2, before the first step
  observed  shape [32, 64], expected [64, 64] at [3]
  allowed   0 (this check is exact)
  cause     unknown: none of the known causes explains it
  note      rank 0 alone holds it
"""
    )


def test_a_group_that_stands_elsewhere() -> None:
    assert (
        text(GROUPS)
        == """\
groups_match_topology  tp group
  where     deepspeed, tp=2, before the first step
  observed  1 group differs on rank 2
  allowed   0 (this check is exact)
  cause     wrong_group: the group that is used is not the declared one
  evidence  live [[0, 2]], declared [[2, 3]]
"""
    )


def test_a_finding_that_follows_from_another_names_it() -> None:
    assert "  cause     follows from outputs_match_reference, which failed first\n" in text(
        replace(NORM, evidence={**NORM.evidence, "follows_from": "outputs_match_reference"})
    )


def test_many_wrong_tensors_are_named_up_to_a_few() -> None:
    many = replace(REPLICAS, evidence={"also": [f"t{number}" for number in range(12)]})
    assert "  also      t0, t1, t2, t3, t4, t5, t6, t7 and 4 more\n" in text(many)


def test_long_lists_are_shortened_in_text_and_whole_in_json() -> None:
    names = [f"t{number}" for number in range(20)]
    evidence = {
        "also": [{"kind": "buffer", "name": name} for name in names],
        "beside_it": {"wrong": names, "right": names[:2]},
    }
    many = replace(REPLICAS, evidence=evidence)
    verdict = replace(FAILED, findings=(many,))
    for rendered in (text(many), Report(verdict).to_text(), Report(verdict).to_junit()):
        assert f"also      {', '.join(f'buffer {name}' for name in names[:8])} and 12 more" in rendered
        assert "beside it {wrong: [t0, t1, t2, t3, t4, t5, t6, t7 and 12 more], right: [t0, t1]}" in rendered
    assert Report(verdict).to_data()["findings"][0]["evidence"] == evidence


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("q.weight", "q.weight"),
        ({"kind": "gradient", "name": "q.weight"}, "gradient q.weight"),
        ({"field": "labels", "differs": "bits"}, "labels (bits)"),
        ({"replicas": [0, 1]}, "replicas 0, 1"),
    ],
)
def test_every_entry_of_also_has_its_phrase(entry: object, expected: str) -> None:
    assert f"  also      {expected}\n" in text(replace(REPLICAS, evidence={"also": [entry]}))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"module": "model.norm"}, "model.norm"),
        ({"module": ""}, "(the whole model)"),
        ({"module": "model.norm", "parameter": "weight"}, "model.norm.weight"),
        ({"module": "model.norm", "parameter": "model.norm.weight"}, "model.norm.weight"),
        ({"module": "model.mlp", "parameter": "model.norm.weight"}, "model.norm.weight"),
        ({"field": "input_ids"}, "input_ids"),
        ({}, ""),
    ],
)
def test_the_place_is_the_full_name_of_the_tensor(where: dict[str, str], expected: str) -> None:
    assert place(replace(GRADIENT, where=where)) == expected


def test_ranks_of_several_nodes_are_named_with_them() -> None:
    nodes = {rank: f"node-{'ab'[rank // 2]}" for rank in range(4)}
    finding = with_nodes(replace(REPLICAS, where={**REPLICAS.where, "ranks": [1, 2, 3]}), nodes)
    assert finding.where["nodes"] == {"node-a": [1], "node-b": [2, 3]}
    assert "on rank 1 (node-a), ranks 2, 3 (node-b)" in as_text(finding_lines(finding, SUBJECT))
    assert with_nodes(finding, dict.fromkeys(range(4), "node-a")) is finding
