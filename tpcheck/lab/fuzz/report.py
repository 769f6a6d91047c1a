"""A search as text and JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tpcheck.core.findings import Verdict, VerdictName
from tpcheck.lab.fuzz.results import Outcome, SearchResult, ShrunkFailure
from tpcheck.report import words
from tpcheck.report.findings import finding_lines
from tpcheck.report.json_values import SCHEMA, plain_json, verdict_json
from tpcheck.report.report import STYLES
from tpcheck.report.table import Cell, Column, Row, Table, table_lines
from tpcheck.report.words import Line, labelled, plain

_REASONS_SHOWN = 5
_STATUS_STYLES = {**STYLES, "refused": "dim", "known": "dim"}
_SHOWN_OF_MESSAGE = 6


def outcome_line(outcome: Outcome, *, shrinking: bool = False) -> Line:
    """Return one example as a line: its status, and the command that reproduces it."""
    name = f"{outcome.kind}  " if outcome.status == "known" else ""
    reason = outcome.reason if outcome.is_bad or outcome.status == "refused" else ""
    step = "shrink  " if shrinking else ""
    return Line(
        (
            (step, "dim"),
            (f"{outcome.status:<7}", _STATUS_STYLES[outcome.status]),
            (f"  {name}{outcome.command}", ""),
            (f"  {reason}" if reason else "", "dim"),
        )
    )


def searched_lines(searched: SearchResult) -> Iterator[Line]:
    """Yield the smallest example of each failure, and what the search covered."""
    name = f"  {searched.subject.get('family')}  {searched.subject.get('backend')}"
    yield Line(((searched.verdict, STYLES[searched.verdict]), (name, "bold")))
    for found in searched.found:
        yield Line()
        yield from _found_lines(found, cut_short=searched.cut_short)
    yield Line()
    yield from labelled("examples", counted(searched))
    yield from _known_lines([searched])
    reasons = searched.reasons("refused")
    for reason, number in reasons[:_REASONS_SHOWN]:
        yield from labelled("refused", f"{number} x {reason}")
    if len(reasons) > _REASONS_SHOWN:
        yield from labelled("", f"and {words.pluralize(len(reasons) - _REASONS_SHOWN, 'other reason')}")
    if searched.interrupted:
        yield from labelled("ended", "interrupted: these are the results so far", "yellow")
    yield from labelled("seconds", f"{searched.seconds:.1f}")


def counted(searched: SearchResult) -> str:
    """Return `50 ran: 48 passed, 2 failed; 7 refused; 31 more to shrink`."""
    parts = [f"{number} {name}" for name in ("passed", "known", "failed", "error") if (number := searched.count(name))]
    ran = f"{searched.num_ran} ran" + (f": {', '.join(parts)}" if parts else "")
    refused = f"; {searched.count('refused')} refused" if searched.count("refused") else ""
    return ran + refused + (f"; {searched.num_shrinking} more to shrink" if searched.num_shrinking else "")


def searched_data(searched: SearchResult) -> dict[str, Any]:
    """Return the search as plain JSON values, schema 1."""
    return {
        "schema": SCHEMA,
        "verdict": searched.verdict,
        "subject": plain_json(searched.subject),
        "environment": plain_json(searched.environment),
        "findings": [_found_data(found) for found in searched.found],
        "coverage": {
            "ran": searched.num_ran,
            **{name: searched.count(name) for name in ("passed", "known", "failed", "error", "refused")},
            "shrinking": searched.num_shrinking,
            "refusals": dict(searched.reasons("refused")),
            "known_bugs": dict(searched.reasons("known")),
        },
        "cut_short": searched.cut_short,
        "interrupted": searched.interrupted,
        "seconds": searched.seconds,
    }


def layers_lines(searches: Sequence[SearchResult]) -> Iterator[Line]:
    """Yield a line for each layer, and the smallest example of each failure."""
    yield from table_lines(Table(_LAYER_COLUMNS, tuple(map(_layer_row, searches))))
    for searched in searches:
        for found in searched.found:
            yield Line()
            yield from _found_lines(found, cut_short=searched.cut_short)
    if any(searched.count("known") for searched in searches):
        yield Line()
    yield from _known_lines(searches)
    if any(searched.interrupted for searched in searches):
        yield from labelled("ended", "interrupted: these are the results so far", "yellow")


def _known_lines(searches: Sequence[SearchResult]) -> Iterator[Line]:
    known: Counter[str] = Counter()
    for searched in searches:
        known.update(dict(searched.reasons("known")))
    for bug, number in known.most_common():
        yield from labelled("known", f"{bug} ({words.pluralize(number, 'example')}); tpcheck/lab/known.toml")


def layers_data(searches: Sequence[SearchResult]) -> dict[str, Any]:
    """Return the searches of several layers as plain JSON values, schema 1."""
    return {
        "schema": SCHEMA,
        "verdict": verdict_of(searches),
        "environment": plain_json(searches[0].environment) if searches else {},
        "layers": [searched_data(searched) for searched in searches],
    }


def verdict_of(searches: Sequence[SearchResult]) -> VerdictName:
    """Return the worst verdict of the searches: `failed`, `error`, `passed`, or else `skipped`."""
    verdicts = {searched.verdict for searched in searches}
    order: tuple[VerdictName, ...] = ("failed", "error", "passed")
    return next((name for name in order if name in verdicts), "skipped")


def searched_json(data: Mapping[str, Any]) -> str:
    """Return a search as a JSON text."""
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


_LAYER_COLUMNS = (Column("verdict", width=7), Column("layer"), Column("examples"))


def _layer_row(searched: SearchResult) -> Row:
    was_refused = searched.verdict == "skipped" and searched.outcomes
    text = searched.reasons("refused")[0][0] if was_refused else counted(searched)
    layer = str(searched.subject.get("layer"))
    return Row((Cell(searched.verdict, STYLES[searched.verdict]), Cell(layer, "bold"), Cell(text)))


def _found_lines(found: ShrunkFailure, *, cut_short: bool) -> Iterator[Line]:
    outcome = found.outcome
    if isinstance(outcome.data, Verdict) and outcome.data.findings:
        yield from finding_lines(outcome.data.findings[0], outcome.data.subject)
    elif isinstance(outcome.data, Verdict):
        if not outcome.data.is_internal_error:
            yield plain("The system under test crashed. Its own message:", STYLES["error"])
        yield from (
            plain(f"  {line}") for line in (outcome.data.message or "").strip().splitlines()[:_SHOWN_OF_MESSAGE]
        )
        yield from labelled("again", outcome.command)
    else:
        yield Line(((outcome.status, STYLES[outcome.status]), (f"  {outcome.reason}", "")))
        yield from labelled("again", outcome.command)
    if found.shrunk_from != outcome.command:
        yield from labelled("shrunk", f"from {found.shrunk_from}", "dim")
    if cut_short:
        yield from labelled("", "shrinking reached its time limit: a smaller example may exist", "yellow")
    if not found.is_reproducible:
        again = f"it {found.again.status} when it was run again: the outcome is not deterministic"
        yield from labelled("", again, "yellow")


def _found_data(found: ShrunkFailure) -> dict[str, Any]:
    outcome = found.outcome
    return {
        "kind": outcome.kind,
        "status": outcome.status,
        "reason": outcome.reason,
        "again": outcome.command,
        "shrunk_from": found.shrunk_from,
        "comes_again": found.is_reproducible,
        "report": verdict_json(outcome.data) if isinstance(outcome.data, Verdict) else plain_json(outcome.data),
    }
