"""Many verdicts in a table: one line each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from textwrap import shorten

from tpcheck.records import Verdict
from tpcheck.report import words
from tpcheck.report.finding import place
from tpcheck.report.lines import Line, plain
from tpcheck.report.text import STYLES

_MESSAGE_WIDTH = 100


def summary_lines(verdicts: Sequence[Verdict]) -> Iterator[Line]:
    """Yield one line for each verdict and a count of all."""
    width = max((len(words.name(verdict.subject)) for verdict in verdicts), default=0)
    for verdict in verdicts:
        yield summary_line(verdict, width)
    counts: Counter[str] = Counter(verdict.verdict for verdict in verdicts)
    yield Line()
    yield plain(", ".join(f"{counts[name]} {name}" for name in STYLES if counts[name]), "bold")


def summary_line(verdict: Verdict, width: int = 0) -> Line:
    """Return the verdict with the first thing to know about it."""
    return Line(
        (
            (f"{words.name(verdict.subject):<{width}}  ", ""),
            (f"{verdict.verdict:<7}", STYLES[verdict.verdict]),
            (f"  {verdict.seconds:6.1f} s  {_gist(verdict)}", ""),
        )
    )


def _gist(verdict: Verdict) -> str:
    if verdict.findings:
        first = verdict.findings[0]
        return f"{first.check}  {place(first)}" + (f"  {first.cause}" if first.cause else "")
    if verdict.message:
        lines = [line.strip() for line in verdict.message.splitlines() if line.strip()]
        return shorten(lines[0], _MESSAGE_WIDTH, placeholder=" ...") if lines else ""
    worst = max((check for check in verdict.checks if check.compared), key=lambda c: c.worst_margin, default=None)
    return "" if worst is None else f"worst margin {words.margin(worst.worst_margin)}  {worst.check}"
