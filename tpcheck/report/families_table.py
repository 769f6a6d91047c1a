"""The table of families in the documentation, from what a run of the matrix has written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tpcheck.errors import UsageError
from tpcheck.families.upstream import Judged, KnownBug, judged, register
from tpcheck.report.lines import Line, plain
from tpcheck.report.matrix import configuration, counts
from tpcheck.report.matrix_data import stored_verdicts
from tpcheck.report.matrix_markdown import families_markdown, versions


def table_lines(path: Path) -> Iterator[Line]:
    """Yield a page of Markdown: what was run, how it went by configuration, every family, and the known bugs.

    Raises:
        UsageError: The file holds no verdicts.
    """
    rows = [judged(verdict) for verdict in stored_verdicts(path)]
    if not rows:
        raise UsageError("table", str(path), "a file that `tpcheck verify --json` has written")
    return (plain(line) for line in _page(rows, path))


def _page(rows: Sequence[Judged], path: Path) -> Iterator[str]:
    yield from ["# What works, by family", ""]
    yield f"Made with `tpcheck families --table {path}` from what `tpcheck verify --all --json {path}` wrote"
    yield from [f"({versions(rows)}).", ""]
    for name in dict.fromkeys(configuration(row.verdict.subject) for row in rows if row.verdict.subject.get("tp")):
        own = [row for row in rows if configuration(row.verdict.subject) == name]
        yield f"- {name}: {len(own)} families, {counts(own)}"
    yield from ["", "A name in brackets is that of a known bug, below.", ""]
    yield from families_markdown(rows)
    yield from ["", "## Known upstream bugs", ""]
    for bug in register():
        yield from _entry(bug)


def _entry(bug: KnownBug) -> Iterator[str]:
    silent = "silent" if bug.verdict == "failed" else "loud"
    see = [*([f"[reported]({bug.link})"] if bug.link else []), *([f"`{bug.script}` shows it"] if bug.script else [])]
    yield f"- **{bug.name}** ({silent}; {bug.backend}): {bug.what} `{bug.again}`" + (
        f"; {', '.join(see)}" if see else ""
    )
