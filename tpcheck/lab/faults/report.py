"""The table of faults as text, JSON and JUnit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import groupby
from math import inf
from typing import Any
from xml.etree import ElementTree as ET

from tpcheck.lab.faults.results import LEAST_CAUSES, LEAST_PLACES, Caught, Score, by_kind
from tpcheck.report import words
from tpcheck.report.data import SCHEMA, plain_json
from tpcheck.report.junit import xml_text
from tpcheck.report.words import Line, labelled, plain

_PLACES_SHOWN = 3
_STYLES = {"caught": "green", "missed": "bold red", "error": "bold magenta", "hidden": "dim"}


def fault_lines(score: Score, seconds: float) -> Iterator[Line]:
    """Yield the whole table."""
    rows = (*score.faults, *score.hidden)
    width = max((len(row.fault) for row in rows), default=0)
    for kind, of_kind in by_kind(rows).items():
        yield plain(kind, "bold")
        for row in of_kind:
            yield row_line(row, width)
            yield from _amends(row)
        yield Line()
    for row in score.alarms:
        yield Line((("alarm   ", "bold red"), (f"{row.fault}  seed {row.seed}  {row.message or 'a check cried'}", "")))
    yield from _summary(score, seconds)


def outcome(row: Caught) -> str:
    """Return what became of a row, in a word."""
    if row.is_control:
        return {"passed": "clean", "failed": "alarm"}.get(row.verdict, row.verdict)
    if row.verdict == "error":
        return "error"
    return "caught" if row.caught else "missed" if row.must_show else "hidden"


def row_line(row: Caught, width: int = 0) -> Line:
    """Return a row with what was found first."""
    found = "; ".join(part for part in [row.place or "", row.cause or "", "by " + ", ".join(row.checks)] if part)
    name = outcome(row)
    return Line(
        (
            (f"  {name:<7}", _STYLES.get(name, "")),
            (f" {row.fault:<{width}}  {margin(row):>8}  {row.seconds:5.1f} s", ""),
            (f"  {found}" if row.caught else "", "dim"),
        )
    )


def listed_lines(faults: Iterable[tuple[str, str, str]]) -> Iterator[Line]:
    """Yield the name and sentence of each fault, below its kind."""
    listed = list(faults)
    width = max(len(name) for name, _, _ in listed)
    for kind, group in groupby(listed, key=lambda fault: fault[1]):
        yield plain(kind, "bold")
        for name, _, what in group:
            yield Line(((f"  {name:<{width}}  ", ""), (what, "dim")))


def _amends(row: Caught) -> Iterator[Line]:
    """Yield what is true where something else was named."""
    if row.message and not row.caught:
        first = next(iter(row.message.strip().splitlines()), "")
        yield plain(f"          {first}", "magenta")
    if not row.caught:
        yield plain(f"          {row.what}", "")
        return
    if not row.place_is_right:
        yield plain(f"          place   {row.place}, {true_places(row)}", "yellow")
    if not row.cause_is_right:
        yield plain(f"          cause   {row.cause or 'none'}, right is {true_causes(row)}", "yellow")


def true_places(row: Caught) -> str:
    return f"but it is in {words.few(row.true_places, _PLACES_SHOWN)}" if row.true_places else "but it is elsewhere"


def true_causes(row: Caught) -> str:
    return " or ".join(cause or "none" for cause in row.true_causes)


def _summary(score: Score, seconds: float) -> Iterator[Line]:
    for label, text, style in summary(score):
        yield from labelled(label, text, style)
    yield from labelled("seconds", f"{seconds:.1f}")


def summary(score: Score) -> Sequence[tuple[str, str, str]]:
    """Return what the table comes to: a label, a text, and a style for the text."""
    number = len(score.faults)
    lines = []
    if number:
        lines = [
            ("caught", f"{len(score.caught)} of {words.count(number, 'fault')}", _good(len(score.caught) == number)),
            ("place", _share(score.right_places, number), _good(score.right_places >= LEAST_PLACES * number)),
            ("cause", _share(score.right_causes, number), _good(score.right_causes >= LEAST_CAUSES * number)),
        ]
    if score.hidden:
        seen = sum(row.caught for row in score.hidden)
        lines.append(("beyond", f"{seen} of {len(score.hidden)} that need not show at this dtype were caught, too", ""))
    if score.controls:
        alarms = f"{len(score.alarms)} of {words.count(len(score.controls), 'clean control')}"
        lines.append(("alarms", alarms, _good(not score.alarms)))
    if score.least is not None:
        lines.append(("margin", f"{margin(score.least)} or more for a fault ({score.least.fault})", ""))
    if score.worst is not None:
        lines.append(("noise", f"{margin(score.worst)} at most for a clean run ({score.worst.fault})", ""))
    return lines


def _share(right: int, number: int) -> str:
    return f"{right} of {number} right ({right / number:.0%})"


def _good(holds: bool) -> str:
    return "green" if holds else "bold red"


def margin(row: Caught) -> str:
    """Return the margin; what an exact check finds is infinitely more than it allows."""
    return "exact" if row.margin == inf else words.margin(row.margin)


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
