"""The table of planted faults for programs: JSON of schema 1, and JUnit XML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any
from xml.etree import ElementTree as ET

from tpcheck.records.caught import Caught
from tpcheck.records.score import Score, by_kind
from tpcheck.report.data import SCHEMA, plain_json
from tpcheck.report.faults import outcome, true_causes, true_places
from tpcheck.report.junit import xml_text


def faults_data(score: Score, environment: Mapping[str, str], seconds: float) -> dict[str, Any]:
    """Return the table as plain JSON values. A margin that is infinite (the check is exact) becomes null."""
    return {
        "schema": SCHEMA,
        "verdict": "passed" if score.is_good else "failed",
        "environment": dict(environment),
        "summary": {
            "faults": len(score.faults),
            "caught": len(score.caught),
            "right_places": score.right_places,
            "right_causes": score.right_causes,
            "controls": len(score.controls),
            "alarms": len(score.alarms),
            "least_margin": plain_json(score.least.margin) if score.least else None,
            "worst_clean_margin": plain_json(score.worst.margin) if score.worst else None,
        },
        "faults": [_row(row) for row in (*score.faults, *score.hidden)],
        "controls": [_row(row) for row in score.controls],
        "seconds": seconds,
    }


def _row(row: Caught) -> dict[str, Any]:
    return {"outcome": outcome(row)} | {
        field.name: plain_json(getattr(row, field.name)) for field in fields(row) if field.name != "evidence"
    }


def faults_junit(score: Score) -> str:
    """Return an XML document with a suite for each kind and a case for each run."""
    root = ET.Element("testsuites", name="tpcheck faults")
    for kind, rows in by_kind([*score.faults, *score.hidden, *score.controls]).items():
        cases = [_case(kind, row) for row in rows]
        counts = {tag: sum(case.find(tag) is not None for case in cases) for tag in ("failure", "error")}
        numbers = {"tests": len(cases), "failures": counts["failure"], "errors": counts["error"]}
        suite = ET.SubElement(root, "testsuite", {"name": kind} | {key: str(value) for key, value in numbers.items()})
        suite.extend(cases)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False) + "\n"


def _case(kind: str, row: Caught) -> ET.Element:
    case = ET.Element("testcase", classname=kind, name=f"{row.fault} seed {row.seed}", time=f"{row.seconds:.3f}")
    if row.verdict == "error":
        ET.SubElement(case, "error", message=xml_text(row.message or "error"))
    elif outcome(row) in ("missed", "alarm"):
        ET.SubElement(case, "failure", message=f"{outcome(row)}: {row.what}")
    elif row.caught and not (row.place_is_right and row.cause_is_right):
        ET.SubElement(case, "failure", message=xml_text("; ".join(_wrong(row))))
    return case


def _wrong(row: Caught) -> list[str]:
    place = [] if row.place_is_right else [f"place {row.place}, {true_places(row)}"]
    cause = [] if row.cause_is_right else [f"cause {row.cause or 'none'}, right is {true_causes(row)}"]
    return place + cause
