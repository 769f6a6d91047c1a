"""JSON of schema 1 is valid JSON and complete."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from math import inf, nan
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy
import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ColwiseParallel

from tests.report.examples import ERROR, FAILED, GRADIENT, OUTPUT, PASSED, SKIPPED
from tests.schema import document
from tpcheck.core.findings import Verdict
from tpcheck.lab.known import JudgedVerdict
from tpcheck.lab.matrix import judged_json, matrix_html, matrix_junit, matrix_lines, matrix_markdown
from tpcheck.report.report import Report
from tpcheck.report.words import as_text


def test_a_finding_as_json() -> None:
    data = document(Report(replace(FAILED, findings=(GRADIENT,))).to_json(), "report")
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
            "observed": 0.82,
            "allowed": 4.2e-14,
            "margin": 0.82 / 4.2e-14,
            "cause": "partial_gradient_on_replica",
            "evidence": {
                "largest": 0.066,
                "largest_at": [6],
                "replays": 8,
                "dtype": "float64",
                "first_of": 4,
                "inputs_agree": True,
                "cause_error": 1.8e-15,
            },
            "again": "tpcheck verify qwen3 --tp 2 --ignore-plan",
        }
    ]


@pytest.mark.parametrize("verdict", [PASSED, FAILED, ERROR, SKIPPED])
def test_every_verdict_has_the_keys_of_schema_1(verdict: Verdict) -> None:
    data = document(Report(verdict).to_json(), "report")
    assert data["schema"] == 1
    assert data["verdict"] == verdict.verdict
    assert {"subject", "environment", "findings", "coverage", "seconds"} <= set(data)
    assert set(data["coverage"]) == {"compared", "total", "missed"}
    assert len(data["findings"]) == len(verdict.findings)


def test_infinities_are_null_in_json() -> None:
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


class Broken:
    """Cannot say what it is."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class Plan:
    """Has the text that every object has, with its address."""


class BrokenMapping(dict[str, int]):
    def items(self) -> Any:
        raise RuntimeError("no items")


@dataclass
class Nested:
    path: Path
    inner: object


CYCLE: list[object] = []
CYCLE.append(CYCLE)

UNKNOWN_TO_JSON = [
    (ColwiseParallel(), None),  # its text is of torch's version
    (Plan(), "<tests.report.test_json_values.Plan object>"),
    (torch.bfloat16, "torch.bfloat16"),
    (torch.device("cpu"), "device(cpu)"),
    (torch.tensor([1.0, nan]), [1.0, None]),
    (torch.tensor(2), 2),
    (torch.zeros(100, 2), "Tensor of shape [100, 2], torch.float32"),
    (torch.zeros(2, device="meta"), "tensor(..., device='meta', size=(2,))"),
    (nn.ModuleList([nn.ReLU()]), "ModuleList(\n  (0): ReLU()\n)"),
    (numpy.int64(3), 3),
    ({"b", 1, None}, ["b", 1, None]),
    ({3, 1}, [1, 3]),
    (
        {(1, 2): "tuple", 1: "int", "1": "text", None: "none"},
        {"(1, 2)": "tuple", "1": "int", "1 (str)": "text", "None": "none"},
    ),
    ((1, (2.5, inf, -inf)), [1, [2.5, None, None]]),
    (b"\x00\xff", "b'\\x00\\xff'"),
    (PurePosixPath("runs/a"), "runs/a"),
    (Nested(PurePosixPath("a"), Nested(PurePosixPath("b"), object())), None),
    (Broken(), "<tests.report.test_json_values.Broken object>"),
    (
        {Broken(): [Broken()]},
        {"<tests.report.test_json_values.Broken object>": ["<tests.report.test_json_values.Broken object>"]},
    ),
    (Nested(Path("a"), Broken()), "<tests.report.test_json_values.Nested object>"),
    (BrokenMapping(a=1), "{'a': 1}"),
    (partial(print, 1), "functools.partial(<built-in function print>, 1)"),
    (lambda: None, "<function <lambda>>"),
    (iter([1]), "<list_iterator object>"),
    (CYCLE, ["..."]),
]


@pytest.mark.parametrize(("value", "expected"), UNKNOWN_TO_JSON, ids=lambda value: type(value).__name__)
def test_a_report_is_printed_whatever_its_configuration_and_evidence_hold(value: object, expected: object) -> None:
    finding = replace(GRADIENT, where={"step": value}, evidence={**GRADIENT.evidence, "held": value}, again=None)
    subject = {**FAILED.subject, "config": {"plan": {"mlp.*": value}}, "settings": {"value": value}}
    verdict = replace(FAILED, subject=subject, findings=(finding,))
    report, judged = Report(verdict), JudgedVerdict(verdict, "new", None)
    data = json.loads(report.to_json())
    if expected is not None:
        assert data["subject"]["config"]["plan"]["mlp.*"] == data["findings"][0]["evidence"]["held"] == expected
    assert json.loads(judged_json(judged))["subject"] == data["subject"]
    for text in (
        report.to_text(),
        report.to_junit(),
        matrix_junit([judged]),
        matrix_html([judged]),
        matrix_markdown([judged]),
        as_text(matrix_lines([judged])),
        report.to_json(),
    ):
        assert "0x" not in text
    ElementTree.fromstring(report.to_junit())


def test_infinities_in_a_configuration_stay_in_text() -> None:
    verdict = replace(FAILED, subject={**FAILED.subject, "config": {"clip": inf, "other": nan}})
    assert 'config={"clip": Infinity, "other": NaN}' in Report(verdict).to_text()
