"""The families as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tpcheck.families.listing import Listed
from tpcheck.families.upstream import register
from tpcheck.report.lines import Line, plain


def family_lines(families: Sequence[Listed]) -> Iterator[Line]:
    """Yield one line for each family, with its plan and its known bugs."""
    width = max(len(one.family) for one in families)
    for one in families:
        bugs = [bug.name for bug in register() if one.family in bug.families]
        plan = "tp_plan" if one.has_plan else ""
        yield Line(
            ((f"{one.family:<{width}}  ", ""), (f"{plan:<7}", "green"), (f"  {', '.join(bugs)}" if bugs else "", "dim"))
        )
    yield Line()
    planned = sum(one.has_plan for one in families)
    yield plain(f"{len(families)} families, {planned} with a tp_plan of their own", "dim")
