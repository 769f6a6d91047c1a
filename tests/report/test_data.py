"""JSON of schema 1 is valid JSON and complete."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.report.examples import ERROR, FAILED, GRADIENT, OUTPUT, PASSED, SKIPPED
from tpcheck.records import Verdict
from tpcheck.report import Report


def test_a_finding_as_json() -> None:
    data = json.loads(Report(replace(FAILED, findings=(GRADIENT,))).to_json())
    assert data["findings"] == [
        {
            "check": "gradients_match_reference",
            "where": {
                "phase": "backward",
                "step": 0,
                "module": "model.layers.0.self_attn.q_norm",
                "parameter": "model.layers.0.self_attn.q_norm.weight",
                "ranks": [0, 1],
            },
            "observed": 0.83,
            "allowed": 4.1e-13,
            "margin": 0.83 / 4.1e-13,
            "cause": "partial_gradient_on_replica",
            "evidence": {
                "largest": 0.031,
                "largest_at": [5],
                "replays": 8,
                "dtype": "float64",
                "first_of": 46,
                "inputs_agree": True,
                "cause_error": 3.9e-16,
            },
            "again": "tpcheck verify qwen3 --tp 2 --seed 0",
        }
    ]


@pytest.mark.parametrize("verdict", [PASSED, FAILED, ERROR, SKIPPED])
def test_every_verdict_has_the_keys_of_schema_1(verdict: Verdict) -> None:
    data = json.loads(Report(verdict).to_json())
    assert data["schema"] == 1
    assert data["verdict"] == verdict.verdict
    assert {"subject", "environment", "findings", "coverage", "seconds"} <= set(data)
    assert set(data["coverage"]) == {"compared", "total", "missed"}
    assert len(data["findings"]) == len(verdict.findings)


def test_what_json_cannot_say_is_null() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(Report(replace(FAILED, findings=(OUTPUT,))).to_json(), parse_constant=refuse)
    finding = data["findings"][0]
    assert (finding["observed"], finding["margin"], finding["evidence"]["largest"]) == (None, None, None)
    assert data["checks"][2]["worst_margin"] is None


def test_values_of_other_types_become_plain_ones() -> None:
    verdict = replace(PASSED, subject={"ranks": {2, 1}, "axes": ("tp", "dp"), "dtype": float, 3: None})
    assert Report(verdict).to_data()["subject"] == {
        "ranks": [1, 2],
        "axes": ["tp", "dp"],
        "dtype": "<class 'float'>",
        "3": None,
    }
