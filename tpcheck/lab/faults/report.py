"""The table of faults as text, JSON, JUnit and one HTML page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from math import inf
from typing import Any

from tpcheck.lab.faults.results import LEAST_CAUSES, LEAST_PLACES, FaultResult, Score
from tpcheck.report import words
from tpcheck.report.json_values import SCHEMA, plain_json
from tpcheck.report.table import (
    Cell,
    Column,
    Outcome,
    Row,
    Table,
    junit_xml,
    row_line,
    rows_json,
    table_lines,
    table_suites,
    tables_html,
)
from tpcheck.report.words import Line, plain

_PLACES_SHOWN = 3
_STYLES = {"caught": "green", "missed": "bold red", "error": "bold magenta", "hidden": "dim"}
_COLUMNS = (
    Column("result", width=6),
    Column("fault"),
    Column("margin", right=True, width=8),
    Column("seconds", right=True, width=7),
    Column("first place; cause; failed checks"),
)


def fault_lines(score: Score, seconds: float) -> Iterator[Line]:
    """Yield the whole table."""
    totals = (*summary(score), ("seconds", Cell(f"{seconds:.1f}")))
    rows = tuple(_row(result) for result in _grouped([*score.faults, *score.hidden]))
    yield from table_lines(Table(_COLUMNS, rows, indent=2))
    if rows:
        yield Line()
    for result in score.false_positives:
        message = result.message or "false positive"
        yield Line((("alarm   ", "bold red"), (f"{result.fault}  seed {result.seed}  {message}", "")))
    yield from table_lines(Table(_COLUMNS, totals=totals))


def outcome(result: FaultResult) -> str:
    """Return the result in a word."""
    if result.is_control:
        return {"passed": "clean", "failed": "alarm"}.get(result.verdict, result.verdict)
    if result.verdict == "error":
        return "error"
    return "caught" if result.caught else "missed" if result.must_show else "hidden"


def progress_line(result: FaultResult, width: int) -> Line:
    """Return one result as a line; `width` is that of the longest name."""
    row = _row(result)
    widths = [max(column.width, len(cell.text)) for column, cell in zip(_COLUMNS, row.cells, strict=True)]
    widths[1] = width
    return row_line(row, _COLUMNS, widths, indent=2)


def fault_list(faults: Iterable[tuple[str, str, str]]) -> Iterator[Line]:
    """Yield the name and the sentence of each fault, by kind."""
    rows = (Row((Cell(name), Cell(what, "dim")), group=kind) for name, kind, what in faults)
    return table_lines(Table((Column("fault"), Column("what")), tuple(rows), indent=2))


def _grouped(results: Sequence[FaultResult]) -> list[FaultResult]:
    """Return the results by kind, in the order of their first results."""
    kinds = list(dict.fromkeys(result.kind for result in results))
    return sorted(results, key=lambda result: kinds.index(result.kind))


def _row(result: FaultResult, *, explain: bool = False) -> Row:
    """Return a result as a row; `explain` adds the fault's sentence also where it was caught."""
    first = "; ".join(part for part in [result.place, result.cause, f"by {', '.join(result.checks)}"] if part)
    word = outcome(result)
    return Row(
        cells=(
            Cell(word, _STYLES.get(word, "")),
            Cell(result.fault, link=result.link),
            Cell(margin(result)),
            Cell(f"{result.seconds:.1f} s"),
            Cell(first if result.caught and not result.is_control else "", "dim"),
        ),
        name=f"{result.fault} seed {result.seed}",
        group=result.kind,
        notes=tuple(_notes(result, explain)),
        outcome=_junit_outcome(result),
        message=_junit_message(result),
        seconds=result.seconds,
        is_expected=result.is_right or not result.must_show,
    )


def _notes(result: FaultResult, explain: bool) -> Iterator[Line]:
    """Yield the message of a crash, the sentence of a fault that was missed, and the truth where it was named wrong."""
    indent = " " * 10
    if result.message and not result.caught:
        yield plain(indent + next(iter(result.message.strip().splitlines()), ""), "magenta")
    if explain or not result.caught:
        yield plain(indent + result.what)
    if result.caught and not result.is_control:
        yield from (plain(indent + text, "yellow") for text in _corrections(result))


def _corrections(result: FaultResult) -> Iterator[str]:
    if not result.place_is_right:
        right = words.join_truncated(result.true_places, _PLACES_SHOWN)
        yield f"place   {result.place}, " + (f"but it is in {right}" if right else "but it is elsewhere")
    if not result.cause_is_right:
        right = " or ".join(cause or "none" for cause in result.true_causes)
        yield f"cause   {result.cause or 'none'}, expected {right}"


def summary(score: Score) -> Sequence[tuple[str, Cell]]:
    """Return the totals of the table."""
    number = len(score.faults)
    totals = []
    if number:
        caught, places, causes = len(score.caught), score.right_places, score.right_causes
        totals = [
            ("caught", Cell(f"{caught} of {words.pluralize(number, 'fault')}", _good(caught == number))),
            ("place", Cell(_share(places, number), _good(places >= LEAST_PLACES * number))),
            ("cause", Cell(_share(causes, number), _good(causes >= LEAST_CAUSES * number))),
        ]
    if score.hidden:
        caught = sum(result.caught for result in score.hidden)
        totals.append(
            ("beyond", Cell(f"also caught {caught} of {len(score.hidden)} faults too small to require at this dtype"))
        )
    if score.controls:
        alarms = f"{len(score.false_positives)} of {words.pluralize(len(score.controls), 'clean control')}"
        totals.append(("alarms", Cell(alarms, _good(not score.false_positives))))
    if score.least is not None:
        totals.append(("margin", Cell(f"{margin(score.least)} or more for a fault ({score.least.fault})")))
    if score.worst is not None:
        totals.append(("noise", Cell(f"{margin(score.worst)} at most for a clean run ({score.worst.fault})")))
    return totals


def _share(right: int, number: int) -> str:
    return f"{right} of {number} right ({right / number:.0%})"


def _good(holds: bool) -> str:
    return "green" if holds else "bold red"


def margin(result: FaultResult) -> str:
    """Return the margin, or `exact` for a finding of an exact check, whose margin is infinite."""
    return "exact" if result.margin == inf else words.margin(result.margin)


def faults_json(score: Score, environment: Mapping[str, str], seconds: float) -> str:
    """Return the table as JSON, one result a line. An infinite margin, that of an exact check, becomes null."""
    head = {
        "schema": SCHEMA,
        "verdict": "passed" if score.is_good else "failed",
        "environment": dict(environment),
        "summary": {
            "faults": len(score.faults),
            "caught": len(score.caught),
            "right_places": score.right_places,
            "right_causes": score.right_causes,
            "controls": len(score.controls),
            "alarms": len(score.false_positives),
            "least_margin": plain_json(score.least.margin) if score.least else None,
            "worst_clean_margin": plain_json(score.worst.margin) if score.worst else None,
        },
        "seconds": seconds,
    }
    return rows_json(
        head,
        faults=[_data(result) for result in (*score.faults, *score.hidden)],
        controls=[_data(result) for result in score.controls],
    )


def _data(result: FaultResult) -> dict[str, Any]:
    return {"outcome": outcome(result)} | {
        field.name: plain_json(getattr(result, field.name)) for field in fields(result)
    }


def faults_junit(score: Score) -> str:
    """Return an XML document with a suite for each kind and a case for each run."""
    rows = tuple(_row(result) for result in _grouped([*score.faults, *score.hidden, *score.controls]))
    return junit_xml(table_suites(Table(_COLUMNS, rows)), "tpcheck faults")


def _junit_outcome(result: FaultResult) -> Outcome:
    if result.verdict == "error":
        return "error"
    return "passed" if result.is_right or outcome(result) == "hidden" else "failure"


def _junit_message(result: FaultResult) -> str:
    if result.verdict == "error":
        return result.message or "error"
    word = outcome(result)
    return f"{word}: {result.what}" if word in ("missed", "alarm") else "; ".join(_corrections(result))


def faults_html(score: Score, environment: Mapping[str, str], seconds: float) -> str:
    """Return one page with the totals, every fault and every clean control."""
    rows = [_row(result, explain=True) for result in _grouped([*score.faults, *score.hidden, *score.controls])]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(environment.items()))
    title = f"tpcheck faults: {len(score.caught)} of {len(score.faults)} caught"
    table = Table(_COLUMNS, tuple(rows), totals=tuple(summary(score)))
    return tables_html(title, f"{versions}; {seconds:.0f} seconds", [table])
