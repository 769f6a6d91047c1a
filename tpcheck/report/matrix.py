"""Many verdicts as text: a line for each cell, counts, and what the register of known bugs did not expect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from textwrap import shorten
from typing import Any

from tpcheck.families.upstream import Judged
from tpcheck.records import Verdict
from tpcheck.report import words
from tpcheck.report.finding import place
from tpcheck.report.lines import Line, labelled, plain
from tpcheck.report.text import STYLES

NOT_SHARDED = "not sharded"
LABELS = ("passed", "failed", NOT_SHARDED, "error", "skipped")
SIGNS = {"passed": "✓", "failed": "✗", NOT_SHARDED: "∅", "error": "!", "skipped": "·"}
_LABEL_STYLES = {**STYLES, NOT_SHARDED: STYLES["failed"]}
_STANDING_STYLES = {"known": "dim", "new": "bold red", "gone": "bold red"}
_MESSAGE_WIDTH = 100
_REGISTER = "tpcheck/families/known.toml"


def matrix_lines(rows: Sequence[Judged]) -> Iterator[Line]:
    """Yield one line for each cell, the number of each verdict, and what the register did not expect."""
    widths = widths_of([row.verdict.subject for row in rows], [label(row.verdict) for row in rows])
    for row in rows:
        yield row_line(row, widths)
    yield Line()
    yield plain(counts(rows), "bold")
    unexpected = [row for row in rows if row.standing in ("new", "gone")]
    if unexpected:
        yield Line()
    for row in unexpected:
        yield from labelled(row.standing, surprise(row), "red")


def standing_lines(row: Judged) -> Iterator[Line]:
    """Yield what the register of known bugs says of a verdict."""
    if row.standing == "known" and row.bug is not None:
        see = "; ".join(part for part in (row.bug.link, row.bug.script) if part)
        yield from labelled("upstream", f"{row.bug.name}: {row.bug.what}" + (f"\n{see}" if see else ""))
    elif row.standing:
        yield from labelled(row.standing, surprise(row), "red")


def row_line(row: Judged, widths: tuple[int, int, int] = (0, 0, 7)) -> Line:
    """Return a cell with the first thing to know about it; `widths` are of name, configuration and verdict."""
    name_width, layout_width, label_width = widths
    verdict, text = row.verdict, label(row.verdict)
    layout = f"{configuration(verdict.subject):<{layout_width}}  " if layout_width else ""
    return Line(
        (
            (f"{words.name(verdict.subject):<{name_width}}  {layout}", ""),
            (f"{text:<{label_width}}", _LABEL_STYLES[text]),
            (f"  {verdict.seconds:6.1f} s  {gist(verdict)}", ""),
            *([(f"  {_standing(row)}", _STANDING_STYLES[row.standing])] if row.standing else []),
        )
    )


def widths_of(subjects: Sequence[Mapping[str, Any]], labels: Sequence[str] = ()) -> tuple[int, int, int]:
    """Return the widths that fit these; a configuration that all have in common needs no column."""
    layouts = {configuration(subject) for subject in subjects}
    return (
        max((len(words.name(subject)) for subject in subjects), default=0),
        max(map(len, layouts)) if len(layouts) > 1 else 0,
        max([7, *map(len, labels)]),
    )


def counts(rows: Sequence[Judged]) -> str:
    """Return `3 passed, 1 failed (1 known)`."""
    number = Counter(label(row.verdict) for row in rows)
    known = Counter(label(row.verdict) for row in rows if row.standing == "known")
    parts = [f"{number[name]} {name}" + (f" ({known[name]} known)" if known[name] else "") for name in LABELS]
    return ", ".join(part for part, name in zip(parts, LABELS, strict=True) if number[name])


def label(verdict: Verdict) -> str:
    """Return the verdict in a word or two: a model that TP silently left whole is `not sharded`."""
    first = next(iter(verdict.findings), None)
    left_whole = first is not None and first.check == "parameters_are_sharded" and first.cause == "not_sharded"
    return NOT_SHARDED if left_whole else verdict.verdict


def configuration(subject: Mapping[str, Any]) -> str:
    """Return what tells the cells of one family apart: `deepspeed, tp=2, zero=1`."""
    dtype = subject.get("dtype", "float64")
    return ", ".join([*words.layout(subject), *([str(dtype)] if dtype != "float64" else [])])


def gist(verdict: Verdict) -> str:
    """Return the first thing to know about a verdict."""
    if verdict.findings:
        first = verdict.findings[0]
        return f"{first.check}  {place(first)}" + (f"  {first.cause}" if first.cause else "")
    if verdict.message:
        lines = [line.strip() for line in verdict.message.splitlines() if line.strip()]
        return shorten(lines[0], _MESSAGE_WIDTH, placeholder=" ...") if lines else ""
    worst = max((check for check in verdict.checks if check.compared), key=lambda c: c.worst_margin, default=None)
    return "" if worst is None else f"worst margin {words.margin(worst.worst_margin)}  {worst.check}"


def surprise(row: Judged) -> str:
    """Return the sentence of a cell that the register did not expect."""
    name = f"{words.name(row.verdict.subject)} ({configuration(row.verdict.subject)})"
    if row.standing == "gone":
        assert row.bug is not None
        return (
            f"{name} passed, and {row.bug.name} is registered for these versions: {row.bug.what} "
            f"If it is mended, say so in the versions of {_REGISTER}."
        )
    if row.bug is not None:
        return f"{name}: {label(row.verdict)}, otherwise than {row.bug.name} in {_REGISTER} says: {row.bug.what}"
    return f"{name}: {label(row.verdict)}, and no entry of {_REGISTER} says so"


def _standing(row: Judged) -> str:
    return f"known: {row.bug.name}" if row.standing == "known" and row.bug else row.standing
